"""Nested small FFNs against mlx-lm's own models of the sliced weights, and against transformers."""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.utils import quantize_model

from duo_mlx import bases, checkpoint, cost, cpu
from duo_mlx.config import Config
from duo_mlx.convert import references
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.nested import linear_maps
from duo_mlx.work import imagined
from tests.architectures import ARCHITECTURES

WIDTH = 64
KINDS = ("llama", "qwen3", "gemma3_text", "starcoder2", "phi", "gpt2", "gpt_neox", "olmo2", "gemma3n")
STRATEGIES = ("planned", "sorted", "sync")


def made(kind: str, widths: Any = WIDTH, seed: int = 0, **keys: Any) -> Model:
    own = {"model_type": "duo", "base_model_type": kind, "small_kind": "nested", "small_intermediate_size": widths}
    model = Model(Config.from_dict(ARCHITECTURES[kind].config | own | {"small_bias": True} | keys))
    if model.config.base.get("tie_word_embeddings"):  # some bases have a head until they see that the weights have none
        model.sanitize({name: value for name, value in checkpoint.parameters(model).items() if "lm_head" not in name})
    random = np.random.default_rng(seed)
    model.update(tree_map(lambda a: mx.array(random.normal(0, 0.1, a.shape).astype(np.float32)), model.parameters()))
    return model


def tokens_of(model: Model, count: int = 7) -> mx.array:
    return mx.array(np.random.default_rng(1).integers(3, model.config.vocab_size, (2, count)))


def close(ours: mx.array, theirs: mx.array, tolerance: float = 1e-5) -> bool:
    return float(mx.abs(ours - theirs).max()) <= tolerance * max(1.0, float(mx.abs(theirs).max()))


def random_routes(model: Model, tokens: mx.array) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 3, (*tokens.shape, model.config.num_hidden_layers))


@pytest.mark.parametrize("kind", KINDS)
def test_all_small_is_the_base_with_sliced_ffns(kind):
    """mlx-lm's own model, whose FFNs keep their first neurons and take small's down projection for big's."""
    model = made(kind, small_bias=False)
    layers = model.config.num_hidden_layers
    tokens = tokens_of(model)
    ours = model(tokens, routes=[1] * layers)
    base_class, args = bases.classes(model.config.base)
    sliced = base_class(args.from_dict(model.config.base))
    weights = {
        model.base_name(name): value for name, value in tree_flatten(model.parameters()) if ".small." not in name
    }
    for path, ffn in zip(model.ffn_paths, model.ffns, strict=True):
        *reads, down = linear_maps(ffn.big)
        for name in reads:
            for part, value in ffn.big[name].items():
                weights[f"{path}.{name}.{part}"] = value[:WIDTH]
        weights[f"{path}.{down}.weight"] = ffn["small"].down_proj.weight
        if "bias" in ffn.big[down]:
            weights[f"{path}.{down}.bias"] = mx.zeros(model.config.hidden_size)
    if hasattr(sliced, "sanitize"):
        sliced.sanitize(dict(weights))  # as `made` does
    assert weights.keys() == checkpoint.parameters(sliced).keys()
    sliced.load_weights(list(weights.items()), strict=False)  # strict would refuse the shapes
    assert close(ours, sliced(tokens))
    assert not close(ours, model(tokens, routes=[2] * layers), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_strategy_gives_what_dense_gives(kind):
    layers = ARCHITECTURES[kind].config.get("num_hidden_layers", 3)
    model = made(kind, [WIDTH, 0, *[32] * (layers - 2)])
    tokens = tokens_of(model)
    routes = random_routes(model, tokens)
    dense = model(tokens, routes=routes, strategy="dense")
    strategies = STRATEGIES if kind == "gemma3n" else (*STRATEGIES, "masked")
    assert all(close(model(tokens, routes=routes, strategy=strategy), dense) for strategy in strategies)
    assert close(model(tokens, routes=mx.array(routes), strategy="sorted"), dense)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_one_shares_bigs_packed_rows(kind, bits, tmp_path):
    model = made(kind)
    quantised, config = quantize_model(model, model.config.to_dict(), 32, bits)
    tokens = tokens_of(model)
    routes = random_routes(model, tokens)
    dense = quantised(tokens, routes=routes, strategy="dense")
    assert close(quantised(tokens, routes=routes, strategy="sorted"), dense)
    view = quantised.ffns[0].small
    *reads, down = linear_maps(view)
    assert all(type(view[name]) is nn.QuantizedLinear and view[name].bits == bits for name in (*reads, down))
    for name in reads:
        whole = quantised.ffns[0].big[name]
        restored = mx.dequantize(whole.weight, whole.scales, whole.biases, 32, bits)[:WIDTH]
        part = view[name]
        assert mx.array_equal(mx.dequantize(part.weight, part.scales, part.biases, 32, bits), restored)
    checkpoint.save(tmp_path, config, checkpoint.parameters(quantised))
    assert mx.array_equal(checkpoint.read_model(tmp_path)(tokens, routes=routes, strategy="dense"), dense)


def test_it_takes_memory_for_its_down_projection_alone():
    model = made("llama")
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    own = [value.nbytes for name, value in tree_flatten(model.parameters()) if ".small." in name]
    assert sum(own) == layers * 4 * (hidden * WIDTH + hidden)
    read = cost.weight_bytes(model).by_route
    assert (read[:, 1] - read[:, 0]).tolist() == [4 * (3 * hidden * WIDTH + 2 * hidden)] * layers  # with the norm's


def test_weights_that_change_are_seen():
    model = made("llama")
    tokens = tokens_of(model)
    before = model(tokens, routes=[1, 1, 1])
    model.ffns[0].big.gate_proj.weight = model.ffns[0].big.gate_proj.weight * 2
    assert not close(model(tokens, routes=[1, 1, 1]), before, 1e-3)


def test_gradients_reach_what_is_shared_and_what_is_not():
    model = made("qwen3")
    tokens = tokens_of(model)

    def loss(model: Model) -> mx.array:
        return mx.square(model(tokens, routes=[1, 1, 1], strategy="dense")).mean()

    _, gradient = nn.value_and_grad(model, loss)(model)
    found = dict(tree_flatten(gradient))
    shared = found["model.layers.0.mlp.big.gate_proj.weight"]
    assert float(mx.abs(shared[:WIDTH]).max()) > 0 and float(mx.abs(shared[WIDTH:]).max()) == 0
    assert float(mx.abs(found["model.layers.0.mlp.small.down_proj.weight"]).max()) > 0
    down, step = model.ffns[0]["small"].down_proj, 1e-2
    down.weight = (whole := down.weight) + (nudge := step * mx.random.normal(down.weight.shape, key=mx.random.key(0)))
    above = loss(model)
    down.weight = whole - nudge
    slope = (above - loss(model)) / 2
    assert close(slope, (found["model.layers.0.mlp.small.down_proj.weight"] * nudge).sum(), 1e-3)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_cpus_modules_give_the_same(fuse):
    model = made("llama", small_bias=False)
    tokens = tokens_of(model, 1)
    before = model(tokens, routes=[1, 2, 1])
    cpu.quicken(model, fuse)
    assert close(model(tokens, routes=[1, 2, 1]), before)


def test_lora_on_big_reaches_small():
    from mlx_lm.tuner.lora import LoRALinear

    model = made("llama")
    tokens = tokens_of(model)
    gate = LoRALinear.from_base(model.ffns[0].big.gate_proj)
    gate.lora_b = mx.random.normal(gate.lora_b.shape, key=mx.random.key(0))
    model.ffns[0].big.gate_proj = gate
    ours = model(tokens, routes=[1, 2, 2])
    model.ffns[0].big.gate_proj = gate.fuse()
    assert close(ours, model(tokens, routes=[1, 2, 2]), 1e-4)


def test_a_model_of_sizes_alone_has_one():
    config = made("llama").config
    assert (
        cost.weight_bytes(imagined(config, 32)).by_route[:, 1].tolist()
        == cost.weight_bytes(made("llama")).by_route[:, 1].tolist()
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "starcoder2", "gpt2", "gpt_neox", "phi"])
def test_transformers_model_with_sliced_ffns_gives_the_same(kind):
    torch = pytest.importorskip("torch")
    layers = ARCHITECTURES[kind].config.get("num_hidden_layers", 3)
    model = made(kind, [WIDTH, *[32] * (layers - 1)])
    config = model.config.to_dict()
    weights = {
        name: Tensor(value.shape, "float32", lambda value=value: value)
        for name, value in checkpoint.parameters(model).items()
    }
    reference = references.made(config, weights)
    tokens = tokens_of(model)
    for routes in (np.ones(layers, int), random_routes(model, tokens)):
        theirs, _ = reference.routed(torch.tensor(np.array(tokens)).long(), torch.tensor(routes))
        assert close(model(tokens, routes=routes), mx.array(theirs.detach().numpy()), 1e-4)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        ("llama", {"small_kind": "nesting"}, "small_kind is 'nesting'; it must be 'own' or 'nested'"),
        ("llama", {"widths": 97}, "has 97 neurons, and its big one only 96"),
        ("llama", {"widths": [8, 8]}, "a list of one width for each of the 3 layers"),
        ("llama", {"widths": [8, 8, -1]}, "must be a positive integer, or a list"),
        ("llama", {"widths": [0, 0, 0]}, "must be a positive integer, or a list"),
        ("llama", {"widths": [8, 8, True]}, "must be a positive integer, or a list"),
        ("phi3", {}, "cannot be nested in big"),
        ("mixtral", {}, "cannot be nested in big"),
    ],
)
def test_what_cannot_be_is_refused_by_name(kind, keys, said):
    with pytest.raises(DuoError, match=re.escape(said)):
        made(kind, **keys)
