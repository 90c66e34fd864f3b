"""GGUF files of six architectures, written as llama.cpp's converter does: their logits are those of transformers."""

import importlib
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from duo_mlx import checkpoint
from duo_mlx.convert import dense, guard
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.readers.gguf import read
from duo_mlx.convert.readers.gguf_rope import llama3
from duo_mlx.convert.source import open_source
from duo_mlx.convert.writer import write_weights
from duo_mlx.errors import DuoError
from duo_mlx.guard import all_big
from tests.convert.gguf_kinds import CASES, Kind, llama3_factors, made, write


def in_mlx(config: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """Return mlx-lm's own model."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {name: tensor.load() for name, tensor in tensors.items()}
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    return model


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    name, changes, options = CASES[case]
    theirs = made(name, changes)
    more = options.get("more", dict)()
    write(tmp_path / "x.gguf", theirs, more=more, add=options.get("add"))
    found = read(tmp_path / "x.gguf")
    state = theirs.state_dict()
    tied = theirs.config.tie_word_embeddings
    assert found.config["tie_word_embeddings"] is tied
    assert found.tensors.keys() == state.keys() - ({"lm_head.weight"} if tied else set())
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(np.array(tensor.load()), state[key].numpy(), rtol=0, atol=3e-7, err_msg=key)
    ids = np.random.default_rng(1).integers(0, 64, (1, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(ids)).logits.numpy()
    ours = np.array(in_mlx(found.config, found.tensors)(mx.array(ids)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
    # transformers itself reads our configuration as the same model
    again = type(theirs)(
        type(theirs.config).from_dict(found.config | {"_attn_implementation": "eager", "pad_token_id": 0})
    ).eval()
    again.load_state_dict(state)
    with torch.no_grad():
        np.testing.assert_allclose(again(torch.tensor(ids)).logits.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_dense_file_is_hosted_and_written_as_mlx_lms_own(case, tmp_path):
    name, changes, options = CASES[case]
    write(tmp_path / "x.gguf", made(name, changes), more=options.get("more", dict)(), add=options.get("add"))
    found = open_source(tmp_path / "x.gguf", graft=True)
    found.check()
    (tmp_path / "dense").mkdir()
    write_weights(tmp_path / "dense", found.tensors)
    checkpoint.save_config(tmp_path / "dense", found.config)
    guard.check(tmp_path / "dense")
    model = dense.host(dense.written(tmp_path / "dense"), checkpoint.read_config(tmp_path / "dense"))
    ids = mx.array(np.random.default_rng(1).integers(0, 64, (1, 40)))
    own = in_mlx(found.checkpoint.config, found.checkpoint.tensors)
    assert mx.array_equal(all_big(model, ids), own(ids)).item()


def test_notes_of_a_file_are_those_of_its_source(tmp_path):
    write(tmp_path / "x.gguf", made("Qwen3", {"head_dim": 32}), Kind.Q8_0)
    found = open_source(tmp_path / "x.gguf", graft=True)
    assert found.checkpoint.notes == ("Q8_0 become float32; --bits quantises again",)


def test_longrope_of_phi3(tmp_path):
    model = made("Phi3", {})
    factors = {
        "rope_factors_long.weight": np.linspace(1, 8, 8, dtype=np.float32),
        "rope_factors_short.weight": np.linspace(1, 2, 8, dtype=np.float32),
    }

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_count(16)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_attn_factors((1 + np.log(4) / np.log(32)) ** 0.5)

    write(tmp_path / "x.gguf", model, more=factors, add=add)
    config = read(tmp_path / "x.gguf").config
    assert config["rope_scaling"]["long_factor"] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    assert config["rope_scaling"]["rope_type"] == "longrope" and config["original_max_position_embeddings"] == 32
    theirs = transformers.Phi3Config.from_dict(config)
    assert theirs.rope_parameters["short_factor"] == config["rope_scaling"]["short_factor"]
    assert in_mlx(config, read(tmp_path / "x.gguf").tensors)(mx.array([[1, 2, 3]])).shape == (1, 3, 64)
    for missing in factors:
        write(tmp_path / "y.gguf", model, more={key: factors[key] for key in factors if key != missing}, add=add)
        with pytest.raises(DuoError, match=f"longrope, but it has no {missing}"):
            read(tmp_path / "y.gguf")


def can_quantise(kind: Kind) -> bool:
    try:
        gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


STORED = [kind for kind in Kind if kind.name not in ("F64", "I8", "I16", "I32", "I64") and can_quantise(kind)]


@pytest.mark.parametrize("kind", STORED, ids=lambda kind: kind.name)
def test_every_type_that_gguf_writes_is_read(kind, tmp_path):
    model = made("Qwen3", {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1})
    write(tmp_path / "x.gguf", model, kind)
    found = read(tmp_path / "x.gguf")
    state = model.state_dict()
    for name, tensor in found.tensors.items():
        loaded = tensor.load()
        values = state[name].numpy()
        if values.ndim > 1:
            values = gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            assert tensor.stored == ("" if kind.name in ("F32", "F16", "BF16") else kind.name)
        assert loaded.shape == tensor.shape and str(loaded.dtype) == f"mlx.core.{tensor.dtype}"
        np.testing.assert_array_equal(np.array(loaded.astype(mx.float32)), values)
    assert bool(found.notes) is (kind.name not in ("F32", "F16", "BF16"))


UNWRITTEN = [
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "NVFP4",
]


@pytest.mark.parametrize("name", UNWRITTEN)
def test_types_that_gguf_only_reads(name, gguf_file, tmp_path):
    """Random bytes stand for numbers in these; rows are dequantised piece by piece as in one."""
    kind = Kind[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (33, 2 * 256 // block * size), np.uint8)
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_file(tensors=[("token_embd.weight", int(kind), (33, 512), raw.tobytes())]))
    (tensor,) = read(file, given={"model_type": "llama"}).tensors.values()
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind)
    assert tensor.stored == name and tensor.shape == (33, 512)
    np.testing.assert_array_equal(np.array(tensor.load()), expected)


@pytest.mark.parametrize(
    ("factor", "high", "trained", "theta", "head"),
    [(8.0, 4.0, 8192, 5e5, 128), (32.0, 4.0, 8192, 5e5, 64), (16.0, 6.0, 4096, 1e5, 128), (4.0, 2.5, 2048, 1e4, 128)],
)
def test_parameters_of_llama_3_are_found_in_its_factors(factor, high, trained, theta, head):
    found = llama3(llama3_factors(theta, head, factor, high, trained).astype(np.float64), theta, head)
    assert found == {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


def test_other_factors():
    assert llama3(np.full(8, 4.0), 1e4, 16) == {"type": "linear", "rope_type": "linear", "factor": 4.0}
    with pytest.raises(DuoError, match="follows no rule of RoPE scaling that is known; give .* with --config FILE"):
        llama3(np.linspace(1, 9, 8), 1e4, 16)


@pytest.fixture
def parts(tmp_path):
    """The three files of a split model, and its transformers twin."""
    model = made("Qwen2", {})
    write(tmp_path / "whole.gguf", model, split_max_tensors=15)
    files = sorted(tmp_path.glob("whole-0*.gguf"))
    assert [file.name for file in files] == [f"whole-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    return files, model


def test_a_split_model_is_read_by_any_part_and_by_its_folder(parts):
    files, model = parts
    for source in (files[0], files[2], files[0].parent):
        checkpoint = open_checkpoint(source)
        assert checkpoint.files == tuple(files)
        assert checkpoint.tensors.keys() == model.state_dict().keys()
    loaded = checkpoint.tensors["model.norm.weight"].load()
    np.testing.assert_array_equal(np.array(loaded), model.state_dict()["model.norm.weight"].numpy())


def test_parts_that_do_not_fit(parts):
    files, _ = parts
    content = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    with pytest.raises(DuoError, match="whole-00002-of-00003.gguf: is part 2 of 3 by its metadata"):
        read(files[0])
    files[1].unlink()
    with pytest.raises(DuoError, match="is one of 3 parts, and whole-00002-of-00003.gguf is missing beside it"):
        read(files[0])
    (files[1].parent / "other.gguf").write_bytes(content)
    with pytest.raises(DuoError, match="llama-gguf-split --merge"):
        read(files[1].parent / "other.gguf")


def test_a_folder_of_several(gguf_file, tmp_path):
    for name in ("a-Q4_K_M.gguf", "mmproj-a.gguf"):
        (tmp_path / name).write_bytes(gguf_file())
    assert open_checkpoint(tmp_path).files == (tmp_path / "a-Q4_K_M.gguf",)
    (tmp_path / "a-Q8_0.gguf").write_bytes(gguf_file())
    with pytest.raises(
        DuoError, match=r"several weights files \(a-Q4_K_M.gguf, a-Q8_0.gguf\); name one, .*a-Q4_K_M.gguf"
    ):
        open_checkpoint(tmp_path)


@pytest.fixture
def gguf_file(request):
    return request.getfixturevalue("gguf")
