"""Quantising: which modules get how many bits, that mlx-lm and this package load it, and what is refused."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.convert.quantise import Quantised, _predicate, quantise
from duo_mlx.errors import DuoError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32, "vocab_size": 32}
ATTENTION = [f"self_attn.{part}_proj" for part in "qkvo"]


def modules(directory):
    model = checkpoint.read_model(directory)
    kinds = nn.Linear | nn.Embedding | nn.QuantizedLinear | nn.QuantizedEmbedding
    return {path: getattr(module, "bits", None) for path, module in model.named_modules() if isinstance(module, kinds)}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_every_module_gets_its_bits_and_the_numbers_stay_close(saved, out, bits, group_size):
    directory, model = saved(**WIDE)
    result = quantise(directory, out, bits=bits, group_size=group_size)
    found = modules(out)
    kept = [f"model.layers.{layer}.mlp.small.down_proj" for layer in range(4)] if group_size == 64 else []
    assert list(result.kept) == kept
    assert {path for path, number in found.items() if number is None} == set(kept)
    assert {number for number in found.values() if number} == {bits}
    loaded, _ = duo_mlx.load(out)
    dequantize_model(loaded)
    for name, value in checkpoint.parameters(model).items():
        ours = checkpoint.parameters(loaded)[name]
        step = (value.max() - value.min()).item() / (2**bits - 1)
        assert mx.abs(ours - value).max().item() <= step
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    weights = sum(value.size for value in checkpoint.parameters(model).values())
    assert result.bits_per_weight < 8 * stored / weights < 1.2 * result.bits_per_weight + 2  # the header is the rest


@pytest.mark.parametrize(
    ("bits", "small_bits", "expected"),
    [(4, 8, (4, 8)), (4, 16, (4, None)), (None, 4, (None, 4)), (16, 3, (None, 3)), (8, None, (8, 8)), (6, 6, (6, 6))],
)
def test_big_and_small_have_bits_of_their_own(saved, out, bits, small_bits, expected):
    directory, _ = saved(**WIDE, tie_word_embeddings=False)
    assert quantise(directory, out, bits=bits, small_bits=small_bits, group_size=32).kept == ()
    for path, number in modules(out).items():
        assert number == expected[".mlp.small." in path], path
    said = config_of(out)["quantization"]
    assert config_of(out)["quantization_config"] == said
    assert said["bits"] == next(number for number in expected if number) and said["group_size"] == 32
    special = {path: value["bits"] for path, value in said.items() if isinstance(value, dict)}
    assert set(special.values()) == ({expected[1]} if None not in expected and expected[0] != expected[1] else set())


def test_a_router_stays_in_float(tiny_model):
    choose = _predicate(tiny_model(router_choices="sB"), 4, 8, 4, 64)
    linear = nn.Linear(64, 3)
    assert choose("model.layers.0.mlp.router", tiny_model(router_choices="sB").ffns[0].router) is False
    assert choose("model.layers.0.mlp.big.up_proj", linear) is True and choose("lm_head", linear) is True
    assert choose("model.layers.0.mlp.small.up_proj", linear) == {"group_size": 64, "bits": 8, "mode": "affine"}


def test_stock_mlx_lm_loads_it_and_says_the_same_tokens(saved, out):
    directory, _ = saved(**WIDE, default_route="Bs-B", mlp_bias=True, attention_bias=True)
    quantise(directory, out, bits=4, small_bits=8, group_size=32)
    theirs, tokenizer = mlx_lm.load(str(out), trust_remote_code=True)
    ours, _ = duo_mlx.load(out)
    tokenizer._eos_token_ids = set()
    prompt = mx.array([[3, 4, 5, 6]])
    np.testing.assert_allclose(np.array(theirs(prompt)), np.array(ours(prompt)), atol=1e-5)
    said = [response.token for response in mlx_lm.stream_generate(theirs, tokenizer, [3, 4, 5, 6], max_tokens=6)]
    again = duo_mlx.stream_generate(ours, tokenizer, [3, 4, 5, 6], max_tokens=6)
    assert [response.token for response in again] == said and len(said) == 6


@pytest.mark.parametrize("strategy", ["dense", "planned", "sorted", "sync"])
def test_a_quantised_model_runs_mixed_routes_under_every_strategy(saved, out, strategy):
    quantise(saved(**WIDE)[0], out, bits=8, small_bits=4, group_size=32)
    model, _ = duo_mlx.load(out)
    tokens, routes = mx.array([[3, 4, 5, 6]]), np.array([[[2, 1, 0, 2], [1, 1, 2, 0], [0, 2, 1, 1], [2, 2, 2, 2]]])
    reference = np.array(model(tokens, routes=routes, strategy="dense"))
    np.testing.assert_allclose(np.array(model(tokens, routes=routes, strategy=strategy)), reference, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_stored_type_is_kept(tiny_model, tiny_config, write_tokenizer, tmp_path, out, dtype):
    source = tmp_path / "source"
    source.mkdir()
    weights = checkpoint.parameters(tiny_model(**WIDE))
    halves = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    checkpoint.save(source, tiny_config(**WIDE), halves)
    write_tokenizer(source)
    quantise(source, out, bits=4, group_size=32, limit=20_000)
    found = checkpoint.parameters(checkpoint.read_model(out))
    assert {str(value.dtype).rpartition(".")[2] for value in found.values()} == {dtype, "uint32"}
    assert len(list(out.glob("model-*.safetensors"))) > 1
    name = "model.layers.2.mlp.big.up_proj"
    expected = mx.quantize(halves[f"{name}.weight"], 32, 4)
    for part, value in zip(("weight", "scales", "biases"), expected, strict=True):
        assert mx.array_equal(found[f"{name}.{part}"], value).item()


def test_the_tokenizer_comes_along_and_nothing_is_printed(saved, out, capfd):
    quantise(saved(**WIDE)[0], out, bits=4, group_size=32)
    assert capfd.readouterr() == ("", "")
    assert {file.name for file in out.iterdir()} == {
        *("config.json", "duo_model.py", "model.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    _, tokenizer = duo_mlx.load(out)
    assert tokenizer.encode("w1 w2") == [3, 4] and tokenizer.eos_token_ids == {1}


def test_what_stays_in_float_is_said_once_with_what_would_help():
    said = str(Quantised(4.5, ("model.layers.0.mlp.small.down_proj", "model.layers.1.mlp.small.down_proj"), 64))
    assert said == (
        "4.50 bits per weight; 2 modules such as model.layers.0.mlp.small.down_proj stay in float, as their width is "
        "no multiple of the group size 64; --group-size 32 may fit them"
    )
    assert (
        "--group-size" not in str(Quantised(4.5, ("a",), 32)) and str(Quantised(4.5, (), 64)) == "4.50 bits per weight"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"bits": 7}, "--bits 7: it must be 2, 3, 4, 5, 6 or 8, or 16 for float"),
        ({"bits": 4, "small_bits": 1}, "--small-bits 1: it must be"),
        ({"bits": 4, "group_size": 16}, "--group-size 16: it must be 32, 64 or 128"),
        ({}, "nothing is to be quantised; give --bits or --small-bits"),
        ({"bits": 16, "small_bits": 16}, "nothing is to be quantised"),
        ({"bits": 4, "group_size": 128}, "no width of it is a multiple of the group size 128"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(saved, out, changes, line):
    directory, _ = saved()
    with pytest.raises(DuoError, match=re.escape(line)):
        quantise(directory, out, **changes)
    assert list(out.iterdir()) == []


def test_a_quantised_model_is_not_quantised_again(saved, tmp_path, out):
    quantise(saved(**WIDE)[0], out, bits=4, group_size=32)
    with pytest.raises(DuoError, match="out: is quantised already"):
        quantise(out, tmp_path, bits=4)
