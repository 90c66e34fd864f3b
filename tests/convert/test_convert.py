"""From PyTorch to a model directory: every form of source, parity, and what is refused with nothing written."""

import json
import pickle
import shutil

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.convert import directory as converting
from duo_mlx.convert import parity
from duo_mlx.convert.directory import convert
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.tensors import Tensor, to_mlx, to_torch
from duo_mlx.errors import DuoError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shards(state, directory, pattern, index, write):
    weight_map = {}
    names = sorted(state)
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        write({name: state[name] for name in part}, directory / pattern.format(number))
        weight_map.update(dict.fromkeys(part, pattern.format(number)))
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


FORMS = {
    "bin": lambda state, d: torch.save(state, d / "pytorch_model.bin"),
    "pt": lambda state, d: torch.save(state, d / "duo.pt"),
    "old pickle": lambda state, d: torch.save(state, d / "duo.pth", _use_new_zipfile_serialization=False),
    "safetensors": lambda state, d: save_file(state, d / "model.safetensors"),
    "sharded bin": lambda state, d: shards(state, d, "part-{}.bin", "pytorch_model.bin.index.json", torch.save),
    "sharded safetensors": lambda state, d: shards(
        state, d, "model-{}.safetensors", "model.safetensors.index.json", save_file
    ),
}


@pytest.fixture
def source(tiny_config, write_tokenizer, tmp_path):
    """``source(form, dtype, **changes)``: a directory as a PyTorch user has it, and its state dict."""

    def make(form="bin", dtype=torch.float32, **changes):
        config = tiny_config(**changes)
        torch.manual_seed(0)
        model = DuoModel(DuoConfig.from_dict(config))
        model.initialise(0.3)
        directory = tmp_path / "source"
        directory.mkdir(exist_ok=True)
        state = {name: value.to(dtype) for name, value in model.state_dict().items()}
        (directory / "config.json").write_text(json.dumps(config))
        write_tokenizer(directory)
        FORMS[form](state, directory)
        return directory, state

    return make


def bits(value):
    array = to_mlx(value) if isinstance(value, torch.Tensor) else value
    return np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_weights_arrive_bit_for_bit(source, tmp_path, form, dtype):
    directory, state = source(form, DTYPES[dtype])
    convert(directory, tmp_path / "model")
    model, tokenizer = duo_mlx.load(tmp_path / "model", dtype=getattr(mx, dtype))
    weights = checkpoint.parameters(model)
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert weights[name].dtype == getattr(mx, dtype)
        np.testing.assert_array_equal(bits(weights[name]), bits(value))
        np.testing.assert_array_equal(bits(to_torch(weights[name])), bits(value))
    assert tokenizer.encode("w1 w2") == [3, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skip_scope": "layer"},
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "rope_traditional": True},
    ],
)
def test_verify_finds_both_frameworks_in_agreement(source, tmp_path, changes):
    directory, _ = source(**changes)
    result = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model"), "--verify"])
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["big", "small", "skip", "random"]
    for _, difference, divergence, agreement in rows:
        assert float(difference) <= 1e-4 and abs(float(divergence)) < 1e-6 and agreement == "100.00%"


def test_verify_finds_a_wrong_weight_and_leaves_nothing(source, tmp_path, monkeypatch):
    directory, _ = source()
    write = converting.write_weights

    def spoil(target, tensors, **options):
        name = "model.layers.1.mlp.small.up_proj.weight"
        write(target, {**tensors, name: Tensor.of(tensors[name].load() + 0.01)}, **options)

    monkeypatch.setattr(converting, "write_weights", spoil)
    result = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model"), "--verify"])
    assert result.exit_code == 1 and "beyond the tolerance" in result.stderr
    assert not (tmp_path / "model").exists() and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_difference_that_is_not_a_number_is_a_failure():
    assert parity.failures([parity.Parity("big", float("nan"), 0.0, 1.0)])


def test_a_single_file_with_its_configuration(source, tmp_path):
    directory, _ = source("pt")
    config = shutil.move(directory / "config.json", tmp_path / "duo.json")
    with pytest.raises(DuoError, match="has no config.json beside it; give one with --config"):
        convert(directory / "duo.pt", tmp_path / "model")
    convert(directory / "duo.pt", tmp_path / "model", config=config, dtype="float16", default_route="Bs-B")
    model, _ = duo_mlx.load(tmp_path / "model", dtype=mx.float16)
    assert model.config.default_pattern.tolist() == [2, 1, 0, 2]
    assert {value.dtype for value in checkpoint.parameters(model).values()} == {mx.float16}


def test_a_tied_head_and_rotary_tables_are_dropped(source, tmp_path):
    directory, state = source()
    extra = {
        "lm_head.weight": state["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    }
    torch.save(state | extra, directory / "pytorch_model.bin")
    convert(directory, tmp_path / "model")
    assert checkpoint.parameters(duo_mlx.load(tmp_path / "model")[0]).keys() == state.keys()


def test_misfits_are_listed_with_both_shapes_and_nothing_is_written(source, tmp_path):
    directory, state = source()
    del state["model.layers.0.mlp.small.up_proj.weight"]
    state["model.layers.7.mlp.big.up_proj.weight"] = torch.zeros(3, 2)
    state["model.norm.weight"] = torch.zeros(5)
    torch.save(state, directory / "pytorch_model.bin")
    result = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model")])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "missing     model.layers.0.mlp.small.up_proj.weight [8, 16]",
        "left over   model.layers.7.mlp.big.up_proj.weight [3, 2]",
        "wrong shape model.norm.weight [5], config.json implies [16]",
        f"duo-mlx: error: {directory}: 3 tensors do not fit config.json; nothing was written",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import pathlib

        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--verify",)])
def test_the_command_does_not_run_a_pickle_either(source, tmp_path, options):
    directory, state = source()
    torch.save(state | {"payload": Payload(tmp_path / "ran")}, directory / "pytorch_model.bin")
    result = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model"), *options])
    assert result.exit_code == 2 and "could run code" in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_pickle_that_would_run_code_is_refused_and_not_run(source, tmp_path):
    directory, state = source()
    ran = tmp_path / "ran"
    torch.save(state | {"payload": Payload(ran)}, directory / "pytorch_model.bin")
    with pytest.raises(DuoError, match="could run code"):
        convert(directory, tmp_path / "model")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(DuoError, match="pytorch_model.bin"):
        convert(directory, tmp_path / "model")
    assert not ran.exists() and not (tmp_path / "model").exists()


def spoil_index(directory, **weight_map):
    file = directory / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] |= weight_map
    file.write_text(json.dumps(index))


def add_tensor(file, name):
    save_file({**load_file(file), name: torch.ones(2)}, file)


REFUSED = {
    "bin cut short": ("bin", lambda d: (d / "pytorch_model.bin").write_bytes(b"PK\3\4 no archive"), "is damaged"),
    "bin is text": ("bin", lambda d: (d / "pytorch_model.bin").write_text("text"), "pytorch_model.bin"),
    "bin is a list": ("bin", lambda d: torch.save([torch.ones(1)], d / "pytorch_model.bin"), "is no state dict"),
    "safetensors cut short": (
        "safetensors",
        lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-9]),
        "model.safetensors: is damaged",
    ),
    "a shard is not there": ("sharded safetensors", lambda d: (d / "model-2.safetensors").unlink(), "is not there"),
    "an index that leaves": (
        "sharded safetensors",
        lambda d: spoil_index(d, a="../x.safetensors"),
        "not a file beside",
    ),
    "an index with more": ("sharded safetensors", lambda d: spoil_index(d, a="model-1.safetensors"), "does not hold"),
    "a tensor in two shards": (
        "sharded safetensors",
        lambda d: add_tensor(d / "model-2.safetensors", "model.embed_tokens.weight"),
        "holds model.embed_tokens.weight, which another shard holds, too",
    ),
    "a tensor that the index does not name": (
        "sharded safetensors",
        lambda d: add_tensor(d / "model-2.safetensors", "extra"),
        "holds the unknown tensor extra",
    ),
    "an index without a map": (
        "sharded safetensors",
        lambda d: (d / "model.safetensors.index.json").write_text("{}"),
        "no index with a weight_map",
    ),
    "no weights": ("bin", lambda d: (d / "pytorch_model.bin").unlink(), "holds no weights file"),
    "no config": ("bin", lambda d: (d / "config.json").unlink(), "needs its config.json"),
    "config is no JSON": ("bin", lambda d: (d / "config.json").write_text("{"), "config.json: is no JSON"),
    "no tokenizer": ("bin", lambda d: (d / "tokenizer.json").unlink(), "neither a tokenizer.json nor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line_and_leaves_nothing(source, tmp_path, case):
    form, spoil, line = REFUSED[case]
    directory, _ = source(form)
    spoil(directory)
    result = CliRunner().invoke(main, ["convert", str(directory), str(tmp_path / "model")])
    assert result.exit_code == 2 and line in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_destination_is_kept_without_force(source, tmp_path):
    directory, _ = source()
    convert(directory, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(DuoError, match="exists already; give --force"):
        convert(directory, tmp_path / "model", dtype="float16")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    convert(directory, tmp_path / "model", dtype="float16", force=True)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != before
    with pytest.raises(DuoError, match="is or holds the source"):
        convert(directory, directory, force=True)


def test_without_pytorch_a_pickle_names_the_extra(source, tmp_path, monkeypatch):
    directory, _ = source()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(DuoError, match=r"pip install 'duo-mlx\[torch\]'"):
        convert(directory, tmp_path / "model")


@pytest.mark.parametrize(
    "content", [lambda whole: whole[:-100], lambda whole: whole[:60], lambda _: b"GGUF" + b"\xff" * 40]
)
def test_a_damaged_gguf_file_is_one_line(gguf, tmp_path, content):
    (tmp_path / "llama.gguf").write_bytes(content(gguf()))
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "llama.gguf"), str(tmp_path / "model")])
    assert result.exit_code == 2 and "llama.gguf: " in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["llama.gguf"]
