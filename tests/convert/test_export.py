"""Back to PyTorch: bit for bit, in anyone's names, loadable by the reference, whole or not at all."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from duo_mlx import checkpoint, files
from duo_mlx.convert import stored
from duo_mlx.convert.directory import convert
from duo_mlx.convert.export import export
from duo_mlx.convert.keymaps import NAMES, named
from duo_mlx.convert.quantise import quantise
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.tensors import to_mlx
from duo_mlx.errors import DuoError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


@pytest.fixture
def duo(tiny_config, write_tokenizer, tmp_path):
    """``duo(dtype, **changes)``: a model directory made of a PyTorch state dict, and that."""

    def make(dtype="float32", limit=1 << 30, **changes):
        config = tiny_config(**changes)
        torch.manual_seed(0)
        model = DuoModel(DuoConfig.from_dict(config))
        model.initialise(0.3)
        state = {name: value.to(DTYPES[dtype]) for name, value in model.state_dict().items()}
        directory = tmp_path / "model"
        directory.mkdir()
        checkpoint.save(directory, config, {name: to_mlx(value) for name, value in state.items()}, limit=limit)
        write_tokenizer(directory)
        return directory, state

    return make


def same_bits(a, b):
    width = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(width), b.view(width))


def load_exported(path):
    if path.is_dir():
        return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["duo.pt", "duo.pth", "pytorch_model.bin", "exported"])
def test_torch_to_mlx_to_torch_is_bit_for_bit(duo, tmp_path, name, dtype):
    directory, state = duo(dtype, tie_word_embeddings=name == "duo.pt", mlp_bias=True, attention_bias=True)
    export(directory, tmp_path / name, names="canonical")
    found = load_exported(tmp_path / name)
    assert found.keys() == state.keys()
    assert all(same_bits(found[key], value) for key, value in state.items())
    config = tmp_path / name / "config.json" if name == "exported" else directory / "config.json"
    DuoModel(DuoConfig.from_file(config)).load_state_dict(found)


def test_special_numbers_survive(duo, tmp_path):
    directory, state = duo("bfloat16")
    special = torch.tensor([float("inf"), float("-inf"), -0.0, 1e-40, float("nan")], dtype=torch.bfloat16)
    norm = state["model.norm.weight"]
    norm[:5] = special
    weights = {name: to_mlx(value) for name, value in state.items()}
    checkpoint.save(directory, json.loads((directory / "config.json").read_text()), weights)
    export(directory, tmp_path / "duo.pt", names="canonical")
    export(directory, tmp_path / "exported", names="canonical")
    for path in ("duo.pt", "exported"):
        found = load_exported(tmp_path / path)["model.norm.weight"]
        assert same_bits(found[:4], norm[:4]) and found[4].isnan() and same_bits(found[5:], norm[5:])


def test_a_directory_holds_what_pytorch_users_expect(duo, tmp_path):
    directory, state = duo(limit=4000, default_route="BBsB", default_draft="BssB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    export(directory, tmp_path / "exported", names="canonical")
    exported = tmp_path / "exported"
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "duo" and "model_file" not in config
    assert {file.name for file in exported.iterdir()} == {
        *("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
    }
    found = open_checkpoint(exported)
    assert found.tensors.keys() == state.keys()
    assert all(same_bits(value, load_exported(exported)[name]) for name, value in state.items())
    convert(exported, tmp_path / "back")
    assert checkpoint.read_model(tmp_path / "back").args == checkpoint.read_model(directory).args
    assert config["default_draft"] == "BssB"


@pytest.mark.parametrize("names", [name for name in NAMES if name != "canonical"])
def test_other_names_come_back_through_their_map(duo, tmp_path, names):
    directory, state = duo("float16", mlp_bias=True, attention_bias=True)
    export(directory, tmp_path / "duo.pt", names=names)
    found = load_exported(tmp_path / "duo.pt")
    assert found.keys() != state.keys()
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in state.values())
    config = json.loads((directory / "config.json").read_text())
    opened = open_checkpoint(tmp_path / "duo.pt", config=directory / "config.json")
    back = named(names).to_canonical(opened.tensors, config)
    assert back.keys() == state.keys()
    for name, value in state.items():
        assert mx.array_equal(back[name].load(), to_mlx(value)).item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_model_is_dequantised_when_told_to(duo, tmp_path, dtype):
    directory, state = duo(dtype, **WIDE, attention_bias=True)
    (tmp_path / "q").mkdir()
    quantise(directory, tmp_path / "q", bits=4, small_bits=8, group_size=32)
    with pytest.raises(DuoError, match="q: is quantised; give --dequantise"):
        export(tmp_path / "q", tmp_path / "out", names="canonical")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "q", tmp_path / "out", dequantise=True, names="canonical")
    export(tmp_path / "q", tmp_path / "out.pt", dequantise=True, names="canonical")
    found = load_exported(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization", "quantization_config", "model_file"} & config.keys()
    assert found.keys() == state.keys()
    exact = stored.weights(tmp_path / "q", dequantise="float32")
    for name, value in load_exported(tmp_path / "out.pt").items():
        assert same_bits(value, found[name]) and value.dtype == DTYPES[dtype]
        if value.ndim == 1:  # norms and biases
            assert same_bits(value, state[name])
            continue
        bits = 8 if ".small." in name else 4
        expected = mx.dequantize(*mx.quantize(to_mlx(state[name]), 32, bits), 32, bits)
        assert mx.array_equal(to_mlx(value), expected).item()
        difference = np.array(exact[name].load()) - value.float().numpy()
        # the sum and the product of the scale, each rounded to the type
        assert np.abs(difference).max() <= {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[dtype]


def test_what_exists_is_kept_without_force(duo, tmp_path):
    directory, state = duo()
    for name in ("duo.pt", "exported"):
        export(directory, tmp_path / name, names="canonical")
        with pytest.raises(DuoError, match=f"{name} exists already; give --force"):
            export(directory, tmp_path / name, names="canonical")
        export(directory, tmp_path / name, force=True, names="canonical")
        assert load_exported(tmp_path / name).keys() == state.keys()
    (tmp_path / "photos.pt").mkdir()
    with pytest.raises(DuoError, match="photos.pt is a directory; give the name of a file"):
        export(directory, tmp_path / "photos.pt", force=True, names="canonical")


@pytest.mark.parametrize(
    ("destination", "line"),
    [
        ("model", "is or holds the source"),
        (".", "is or holds the source"),
        ("model/out.pt", "lies inside the source"),
        ("out.safetensors", "give a directory, or a name in .pt, .pth, .bin"),
    ],
)
def test_a_destination_that_makes_no_sense_is_refused(duo, tmp_path, destination, line):
    directory, _ = duo()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DuoError, match=line):
        export(directory, tmp_path / destination, force=True, names="canonical")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_that_is_no_sound_model_leaves_nothing(duo, tmp_path):
    directory, _ = duo()
    with pytest.raises(DuoError, match="there is no key map 'mine'"):
        export(directory, tmp_path / "out", names="mine")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for name in ("out", "out.pt"):
        with pytest.raises(DuoError, match="model.safetensors: is damaged"):
            export(directory, tmp_path / name, names="canonical")
    (directory / "config.json").unlink()
    with pytest.raises(DuoError, match="holds no config.json"):
        export(directory, tmp_path / "out", names="canonical")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_disk_that_fills_up_leaves_nothing(duo, tmp_path, monkeypatch):
    directory, _ = duo()

    def full(_, file):
        file.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672]\nunexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DuoError, match=r"\.pt: cannot be written: .*unexpected pos 64 vs 0$") as error:
        export(directory, tmp_path / "out.pt", names="canonical")
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_without_pytorch_a_state_dict_names_the_extra_and_a_directory_is_written(duo, tmp_path, monkeypatch):
    directory, state = duo()
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(DuoError, match=r"pip install 'duo-mlx\[torch\]'"):
        export(directory, tmp_path / "out.pt", names="canonical")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    export(directory, tmp_path / "out", names="canonical")
    monkeypatch.undo()
    assert load_exported(tmp_path / "out").keys() == state.keys()


def test_a_second_copy_of_a_tied_head_is_left_out(duo, tmp_path):
    directory, state = duo()
    file = directory / "model.safetensors"
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file, {"format": "mlx"})
    export(directory, tmp_path / "out.pt", names="canonical")
    assert load_exported(tmp_path / "out.pt").keys() == state.keys()


def test_an_output_file_appears_whole(tmp_path):
    target = tmp_path / "new" / "duo.pt"
    with files.output_file(target) as file:
        file.write_text("whole")
        assert not target.exists() and file.suffix == ".pt"
    assert target.read_text() == "whole"
    with pytest.raises(RuntimeError), files.output_file(target, force=True) as file:
        file.write_text("half")
        raise RuntimeError
    assert target.read_text() == "whole" and [path.name for path in target.parent.iterdir()] == ["duo.pt"]


def test_an_output_where_none_can_be_is_one_line(tmp_path):
    (tmp_path / "file").write_text("text")
    for output in (files.output_file, files.output_directory):
        with (
            pytest.raises(DuoError, match=r"file/new/x: cannot be written: \w"),
            output(tmp_path / "file" / "new" / "x"),
        ):
            pass
    with pytest.raises(DuoError, match="absent/x: cannot be written: No such file or directory"):
        files.write_text(tmp_path / "absent" / "x", "text")
    with pytest.raises(DuoError, match="out.*pt: cannot be written: No such"), files.output_file(tmp_path / "out.pt"):
        pass  # whoever was to write it did not
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
