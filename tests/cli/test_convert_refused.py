"""``duo-mlx convert``: what is refused, in one line and with nothing written."""

import json
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from duo_mlx import checkpoint, shards
from duo_mlx.convert import tensors

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def test_an_existing_destination_is_refused_before_anything_is_read(tmp_path, fails):
    (tmp_path / "model").mkdir()
    fails("exists already; give --force to replace it", tmp_path / "absent", tmp_path / "model")
    (tmp_path / "model" / "mine.txt").write_text("mine")
    fails("is no model directory, so --force does not", tmp_path / "absent", tmp_path / "model", "--force")
    assert names(tmp_path / "model") == ["mine.txt"]


@pytest.mark.parametrize("inside", ["config", "text"])
def test_what_is_read_is_not_replaced(saved, tmp_path, inside, fails):
    model = tmp_path / "model"
    shutil.copytree(saved()[0], model)
    (model / "text.txt").write_text("w1 w2")
    options = {"config": ("--config", model / "config.json"), "text": ("--calibrate", model / "text.txt")}[inside]
    fails("is or holds the source", saved()[0], model, "--force", *options)
    assert (model / "text.txt").read_text() == "w1 w2"


def kind_of(dense, saved, kind):
    directory = dense()
    config = config_of(directory)
    match kind:
        case "small FFNs without their width":
            weights = checkpoint.parameters(saved()[1])
            shutil.rmtree(directory)
            directory.mkdir()
            shards.write(directory, shards.held(weights))
        case "a Duo's configuration":
            config |= {"model_type": "duo", "small_intermediate_size": 8}
        case "another architecture":
            config |= {"model_type": "bert"}
        case "another activation":
            config |= {"hidden_act": "gelu"}
        case "quantised by others":
            config |= {"quantization_config": {"quant_method": "gptq"}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("kind", "options", "line"),
    [
        ("dense", (), "dense: is a dense model, not a Duo; --graft makes a Duo of it"),
        ("small FFNs without their width", (), "its config.json has no small_intermediate_size"),
        ("small FFNs without their width", ("--graft",), "its config.json has no small_intermediate_size"),
        ("a Duo's configuration", ("--graft",), "is a Duo model already, so there is nothing to graft"),
        ("another architecture", ("--graft",), "the installed mlx-lm has no architecture 'bert'"),
        (
            "another activation",
            ("--graft",),
            "config.json says hidden_act 'gelu'; mlx-lm's llama does not read that key",
        ),
        ("quantised by others", ("--graft",), "its weights are quantised (gptq)"),
        ("dense", ("--graft", "--small-layers", "1-4"), "there is no layer 4; "),
        ("dense", ("--graft", "--small-ratio", "2000"), "--small-ratio: no neuron would be left"),
    ],
)
def test_a_model_of_another_kind(dense, saved, graft, text, tmp_path, kind, options, line, fails):
    directory = kind_of(dense, saved, kind)
    fails(line, directory, tmp_path / "model", *options, *(("--calibrate", text) if options else ()))
    assert graft.calls == [] and names(tmp_path) == ["dense", "text.txt"]


def test_a_duos_configuration_with_a_dense_models_weights_lists_what_is_missing(dense, saved, tmp_path, invoke):
    done = invoke(kind_of(dense, saved, "a Duo's configuration"), tmp_path / "model")
    lines = done.stderr.splitlines()
    assert done.exit_code == 2 and lines[-1].endswith("12 tensors do not fit config.json; nothing was written")
    assert "missing     model.layers.0.mlp.small.up_proj.weight [8, 16]" in lines
    assert names(tmp_path) == ["dense"]


def flip(file, at):
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def lie(file, length):
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])


DAMAGE = {
    "a bit of the header": lambda file: flip(file, 9),
    "a bit of the header's length": lambda file: flip(file, 1),
    "a length beyond the file": lambda file: lie(file, file.stat().st_size),
    "a length beyond all memory": lambda file: lie(file, (1 << 64) - 1),
    "a length of nothing": lambda file: lie(file, 0),
    "half of the header": lambda file: file.write_bytes(file.read_bytes()[:50]),
    "nothing": lambda file: file.write_bytes(b""),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_of_weights(saved, tmp_path, case, fails):
    source = tmp_path / "source"
    shutil.copytree(saved()[0], source)
    DAMAGE[case](source / "model.safetensors")
    (source / "model.safetensors.index.json").unlink()
    done = fails("model.safetensors: is damaged or no safetensors file", source, tmp_path / "model")
    assert str(source) in done.stderr and names(tmp_path) == ["source"]


@pytest.mark.parametrize("dtype", tensors.DTYPES)
def test_nan_and_infinity_are_named_and_taken_only_when_told(saved, tmp_path, dtype, succeed, fails):
    source, name = tmp_path / "source", "model.layers.2.mlp.big.up_proj.weight"
    shutil.copytree(saved()[0], source)
    weights = {key: value.to(getattr(torch, dtype)) for key, value in load_file(source / "model.safetensors").items()}
    weights[name][3, 5], weights[name][4, :2] = torch.nan, -torch.inf
    save_file(weights, source / "model.safetensors")
    line = f"{name}: holds 1 NaN and 2 infinite values; --allow-nonfinite takes them as they are"
    fails(line, source, tmp_path / "model")
    assert names(tmp_path) == ["source"]
    succeed(source, tmp_path / "model", "--allow-nonfinite")
    found = load_file(tmp_path / "model" / "model.safetensors")[name]
    assert torch.equal(found.isnan(), weights[name].isnan()) and torch.equal(found.isinf(), weights[name].isinf())


FULL = """
import resource, sys
from duo_mlx.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("room", "options"), [(30_000, ()), (30_000, ("--bits", "4")), (300, ()), (70_000, ("--force",))]
)
def test_a_full_disk_is_one_line_and_leaves_what_was_there(saved, tmp_path, room, options):
    directory, model = saved(**WIDE), tmp_path / "model"
    if "--force" in options:
        shutil.copytree(saved()[0], model)
    before = {file.name: file.read_bytes() for file in model.iterdir()} if model.exists() else None
    arguments = [sys.executable, "-c", FULL, str(room), "convert", str(directory[0]), str(model), *options]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert f"duo-mlx: error: {model}/" in done.stderr and "File too large" in done.stderr
    assert names(tmp_path) == ([] if before is None else ["model"])
    if before is not None:
        assert {file.name: file.read_bytes() for file in model.iterdir()} == before
