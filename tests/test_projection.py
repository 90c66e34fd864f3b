"""The projection: its kernels against the graphs of real passes, its bytes against real arrays, its sum by hand."""

import io
import re

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from duo_mlx import conditional, cost, projection
from duo_mlx.errors import DuoError
from duo_mlx.kernels import launch, selfcheck, verdicts
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import Route, parse_pattern

# primitives that start no kernel: they view an array, or are the stand-ins' own
VIEWS = {"Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unflatten"}
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "small_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "router_choices": "-sB",
}
CASES = {
    "plain": {},
    "untied, biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "biases of small": {"small_bias": True},
    "a layer without small": {"small_layers": [0]},
    "skip_scope layer": {"skip_scope": "layer"},
}


def made(bits=32, **changes):
    return projection.imagined(ModelArgs.from_dict(SHAPE | changes), bits)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Graphs as MLX builds them for a GPU: its fast operations are one primitive each, launches are counted.

    Gives the list of launches.
    """
    launches = []

    def execute(launched):
        launches.append(launched.kernel)
        outputs = [mx.zeros(shape, dtype) for _, shape, dtype in launched.outputs]
        mx.eval(outputs)
        return mx.depends(outputs, [array for _, array in launched.inputs])

    def dequantize(packed, scales, biases, bits, **_):
        out = mx.zeros((*packed.shape[:-1], packed.shape[-1] * 32 // bits), scales.dtype)
        mx.eval(out)
        return mx.abs(mx.depends([out], [packed, scales, biases])[0])

    def attend(queries, keys, values, **_):
        return mx.depends([mx.abs(queries)], [keys, values])[0]

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "dequantize", dequantize)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.abs(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.abs(x))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(launch, "execute", execute)
    monkeypatch.setattr(selfcheck, "verdict", lambda *_: verdicts.Verdict(True))
    return launches


def kernels(model, strategy, route, launches, monkeypatch):
    """Kernels of one decoding step, counted in its graph."""
    mx.eval(model.parameters())
    dtype = model.model.norm.weight.dtype
    cache = model.make_cache()
    for layer in cache:
        layer.keys, layer.values, layer.offset = mx.zeros((1, 1, 256, 32), dtype), mx.zeros((1, 1, 256, 32), dtype), 5
        mx.eval(layer.keys, layer.values)
    read = []

    def answer(array):
        read.append(array)
        return (
            np.full((1, 1), route) if strategy == "sync" else np.array([route == Route.SKIP, route == Route.SMALL], int)
        )

    monkeypatch.setattr(conditional, "_read", answer)
    routes = np.full(model.args.num_hidden_layers, route, np.uint8) if strategy == "planned" else model.router()
    if strategy != "planned":
        mx.eval(routes.offsets)
    logits = model(mx.array([[1]]), cache=cache, routes=routes, strategy=strategy)[:, -1]
    token = mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)
    file = io.StringIO()
    mx.export_to_dot(file, token, *read)
    text = file.getvalue()
    primitives = re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text)
    inputs = re.findall(r'^"\w+" -> (\d+)', text, re.MULTILINE)
    assert len(read) == (len(model.layers) if strategy in ("sync", "sorted") else 0)
    # a concatenation copies its inputs one by one
    return len(launches) + sum(
        inputs.count(node) if name == "Concatenate" else name not in VIEWS for node, name in primitives
    )


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize("strategy", projection.STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_dispatches_are_those_of_the_graph(case, strategy, bits, route, as_on_a_gpu, monkeypatch):
    model = made(bits, **CASES[case])
    if projection.refusal(model, strategy):
        pytest.skip("refused, see test_masked_takes_no_quantised_model")
    routes = np.full(2, route)
    counted = kernels(model, strategy, route, as_on_a_gpu, monkeypatch)
    assert projection.dispatches(model, strategy).of(routes) == counted
