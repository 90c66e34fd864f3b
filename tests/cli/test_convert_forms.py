"""``duo-mlx convert`` to fewer bits and back to PyTorch."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import pytest
import torch

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.convert import export, stored, tensors
from duo_mlx.convert.tensors import Tensor

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


# fewer bits


@pytest.mark.parametrize("bits", [("--bits", 4), ("--bits", 8, "--small-bits", 4), ("--small-bits", 4)])
def test_fewer_bits_load_in_mlx_lm_and_are_verified(saved, tmp_path, bits, succeed):
    directory, _ = saved(**WIDE)
    done = succeed(directory, tmp_path / "model", *bits, "--group-size", 32, "--verify")
    assert [line.split()[0] for line in done.stdout.splitlines() if line].count("random") == 2
    loaded, _ = mlx_lm.load(str(tmp_path / "model"), trust_remote_code=True)
    ours, _ = duo_mlx.load(tmp_path / "model")
    assert mx.allclose(loaded(mx.array([[3, 4]])), ours(mx.array([[3, 4]])), atol=1e-5).item()
    assert "float" not in names(tmp_path / "model")
    quantised = config_of(tmp_path / "model")["quantization"]
    assert quantised["bits"] == bits[1] and quantised["group_size"] == 32


def test_wrongly_packed_weights_are_found_and_not_written(saved, tmp_path, monkeypatch, invoke):
    exact = stored.weights

    def other(directory, **options):
        found = exact(directory, **options)
        one, two = (f"model.layers.{layer}.mlp.big.up_proj.weight" for layer in (0, 1))
        return found | {one: found[two], two: found[one]}

    monkeypatch.setattr(stored, "weights", other)
    done = invoke(saved(**WIDE)[0], tmp_path / "model", "--bits", 4, "--verify")
    assert done.exit_code == 1 and "beyond the tolerance" in done.stderr and names(tmp_path) == []


def test_a_quantised_duo_is_only_exported(saved, text, tmp_path, succeed, fails):
    succeed(saved(**WIDE)[0], tmp_path / "model", "--bits", 4)
    for options in ((), ("--bits", 8), ("--calibrate", text), ("--dry-run",)):
        line = "is a Duo that MLX quantised; only --to torch --dequantise takes it"
        fails(line, tmp_path / "model", tmp_path / "again", *options)
    narrow = "no width of it is a multiple of the group size 64"
    done = fails(narrow, saved()[0], tmp_path / "narrow", "--bits", 4)
    assert f"{tmp_path}/narrow" in done.stderr and ".new" not in done.stderr
    assert names(tmp_path) == ["model", "text.txt"]


# back to PyTorch


@pytest.mark.parametrize("dtype", tensors.DTYPES)
@pytest.mark.parametrize("form", ["duo.pt", "duo"])
def test_there_and_back_bit_for_bit(saved, tmp_path, dtype, form, succeed):
    first, source = tmp_path / "first.pt", tmp_path / form
    directory, model = saved()
    state = {
        name: tensors.to_torch(value).to(getattr(torch, dtype)) for name, value in checkpoint.parameters(model).items()
    }
    torch.save(state, first)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, tmp_path / name)
    succeed(first, tmp_path / "model")
    succeed(tmp_path / "model", source, "--to", "torch", "--names", "llama", "--verify")
    options = ("--config", tmp_path / "config.json") if source.is_file() else ()
    succeed(source, tmp_path / "again", *options)
    succeed(tmp_path / "again", tmp_path / "last.pt", "--to", "torch")
    found = torch.load(tmp_path / "last.pt", weights_only=True)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_an_export_that_is_wrong_is_not_written(saved, tmp_path, monkeypatch, invoke):
    save, write = export._save_state, export.write_weights
    name = "model.layers.1.mlp.small.up_proj.weight"

    def spoilt(weights):
        return {**weights, name: Tensor.of(weights[name].load() + 0.01)}

    monkeypatch.setattr(export, "_save_state", lambda file, weights: save(file, spoilt(weights)))
    monkeypatch.setattr(export, "write_weights", lambda d, weights, **options: write(d, spoilt(weights), **options))
    for form in ("duo.pt", "duo"):
        done = invoke(saved()[0], tmp_path / form, "--to", "torch", "--verify")
        assert done.exit_code == 1 and "beyond the tolerance" in done.stderr
        assert len(done.stdout.splitlines()) == 5 and names(tmp_path) == []


@pytest.mark.parametrize(
    ("source", "options", "line"),
    [
        ("dense", (), "model_type is 'llama', so it is a dense model, not a Duo"),
        ("file", (), "is a file; a model is a directory with config.json"),
        ("absent", (), "there is no such directory"),
        ("model", ("--revision", "v1"), "is no hub id (OWNER/NAME)"),
    ],
)
def test_an_export_of_what_is_no_model_directory(dense, saved, tmp_path, source, options, line, fails):
    shutil.copytree(saved()[0], tmp_path / "model")
    dense()
    (tmp_path / "file").touch()
    before = names(tmp_path)
    fails(line, tmp_path / source, tmp_path / "duo.pt", "--to", "torch", *options)
    fails("exists already; give --force", tmp_path / "model", tmp_path / "file", "--to", "torch")
    assert names(tmp_path) == before
