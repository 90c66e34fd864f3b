"""What a pass computes, exactly: primitives and weights in its exported graph, and the host's waits while decoding."""

import io
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

from duo_mlx import conditional
from duo_mlx.policies import parse_route
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import FEW, Route

LAYERS = 4
ATTENTION_MATMULS, FFN_MATMULS, HEAD_MATMULS = 4, 3, 1
CASES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 4},
    "biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "llama3 rope": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}},
    "sliding": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
}


def graph_of(output, model):
    """The graph's primitives by name, and the weights ``{module: [layers]}`` of FFNs that it reads."""
    file = io.StringIO()
    mx.export_to_dot(file, output, **dict(tree_flatten(model.parameters())))
    text = file.getvalue()
    primitives = Counter(re.findall(r'\[label ="([^"]*)", shape=rectangle\]', text))
    read = set(re.findall(r'"model\.layers\.(\d+)\.mlp\.(big|small)\.\w+\.weight" ->', text))
    weights = {module: sorted(int(layer) for layer, name in read if name == module) for module in ("big", "small")}
    return primitives, weights


def step_of(call, cache, prompt=5, tokens=1):
    """The unevaluated logits of a pass over ``tokens`` after a prefill of ``prompt``."""
    if prompt:
        mx.eval(call(mx.arange(prompt)[None], cache))
        mx.eval([layer.state for layer in cache])
    return call(mx.arange(tokens)[None], cache)


def with_routes(model, routes, strategy):
    return lambda tokens, cache: model(tokens, cache=cache, routes=routes, strategy=strategy)


def matmuls(primitives):
    """Products; one with a bias is a primitive of its own."""
    return primitives["Matmul"] + primitives["AddMM"]


def attention_products(primitives):
    """Products within attention where it is not one fused primitive: scores and mixed values."""
    return 2 * primitives["Softmax"]


def rotations(tokens, attends=LAYERS, writes=0):
    """Products that rotate queries and keys of a few tokens, and keys where a layer does no more than write them."""
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    return 2 * attends + writes if tokens <= FEW and on_cpu else 0


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("tokens", [1, 6, 12])
@pytest.mark.parametrize("strategy", ["planned", "auto", "sorted", "sync"])
@pytest.mark.parametrize("pattern", ["BBBB", "ssss", "----", "Bs-s"])
def test_a_step_holds_the_modules_of_its_pattern_and_nothing_else(tiny_model, pattern, strategy, tokens, skip_scope):
    model = tiny_model(skip_scope=skip_scope)
    routes = parse_route(pattern, LAYERS).routes(0, 1)
    logits = step_of(with_routes(model, routes, strategy), model.make_cache(), tokens=tokens)
    primitives, weights = graph_of(logits, model)
    assert weights == {
        "big": [layer for layer, letter in enumerate(pattern) if letter == "B"],
        "small": [layer for layer, letter in enumerate(pattern) if letter == "s"],
    }
    skips = pattern.count("-")
    writes = skips if skip_scope == "layer" else 0  # keys and values remain
    of_attention = ATTENTION_MATMULS * LAYERS - 2 * writes + rotations(tokens, LAYERS - writes, writes)
    expected = HEAD_MATMULS + of_attention + FFN_MATMULS * (LAYERS - skips) + attention_products(primitives)
    assert matmuls(primitives) == expected


def test_the_counts_see_what_dense_computes(tiny_model):
    model = tiny_model()
    logits = step_of(with_routes(model, np.full(LAYERS, Route.SKIP), "dense"), model.make_cache())
    primitives, weights = graph_of(logits, model)
    assert weights == {"big": list(range(LAYERS)), "small": list(range(LAYERS))}
    of_layers = LAYERS * (ATTENTION_MATMULS + 2 * FFN_MATMULS) + rotations(1)
    assert matmuls(primitives) == HEAD_MATMULS + of_layers + attention_products(primitives)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("strategy", ["planned", "auto", "sorted", "sync"])
@pytest.mark.parametrize("pattern", ["BBBB", "ssss", "----", "-sBs"])
def test_a_layer_without_small_runs_big_once(tiny_model, pattern, strategy, skip_scope):
    model, full = tiny_model(small_layers=[1, 2], skip_scope=skip_scope), tiny_model(skip_scope=skip_scope)
    instead = "".join("B" if layer in (0, 3) and letter == "s" else letter for layer, letter in enumerate(pattern))
    ours, theirs = (
        graph_of(
            step_of(with_routes(which, parse_route(text, LAYERS).routes(0, 1), strategy), which.make_cache()), which
        )
        for which, text in ((model, pattern), (full, instead))
    )
    assert ours == theirs
    assert ours[1]["small"] == [layer for layer in (1, 2) if pattern[layer] == "s"]


def test_generating_by_drawn_routes_runs_big_once_where_there_is_no_small(tiny_model):
    model = tiny_model(small_layers=[])
    routed = RoutedModel(model, parse_route("random", LAYERS))
    assert set(np.unique(routed.policy.routes(0, 6))) == {Route.SMALL, Route.BIG}
    drawn, big = (
        graph_of(call(mx.arange(6)[None]), model)
        for call in (routed, lambda tokens: model(tokens, routes=[Route.BIG] * LAYERS))
    )
    assert drawn == big


@pytest.mark.parametrize("strategy", ["planned", "auto", "sorted"])
def test_per_token_routes_read_a_module_only_where_some_token_needs_it(tiny_model, strategy):
    model = tiny_model()
    routes = np.full((1, 6, LAYERS), Route.SKIP)
    routes[0, 2, 0], routes[0, 4, 0], routes[0, 3, 1], routes[0, :, 2] = Route.BIG, Route.SMALL, Route.SMALL, Route.BIG
    _, weights = graph_of(model(mx.arange(6)[None], routes=routes, strategy=strategy), model)
    assert weights == {"big": [0, 2], "small": [0, 1]}


@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1], ids=["decode", "verify two", "verify", "prefill"])
@pytest.mark.parametrize("prompt", [0, 5], ids=["empty cache", "after a prompt"])
@pytest.mark.parametrize("strategy", ["planned", "auto", "sorted", "sync"])
@pytest.mark.parametrize("case", CASES)
def test_all_big_is_llama(tiny_model, llama_twin, case, strategy, prompt, tokens):
    model = tiny_model(**CASES[case])
    twin = llama_twin(model)
    ours = step_of(with_routes(model, np.full(LAYERS, Route.BIG), strategy), model.make_cache(), prompt, tokens)
    theirs = step_of(twin, twin.make_cache(), prompt, tokens)
    assert_no_more_than(graph_of(ours, model)[0], graph_of(theirs, twin)[0], tokens)
    assert mx.allclose(ours, theirs, rtol=0, atol=1e-5).item()


def assert_no_more_than(ours, theirs, tokens):
    """The same graph as llama's; a smaller one where few tokens decode, the more so on the CPU, whose rotations are
    matrices.
    """
    if tokens > FEW:
        assert ours == theirs
        return
    assert ours.total() < theirs.total()
    if rotations(tokens):
        assert matmuls(ours) == matmuls(theirs) + rotations(tokens)
        assert ours["Softmax"] == theirs["Softmax"]
        assert ours["Cos"] <= 1 < theirs["Cos"]
        assert ours.total() < theirs.total() - 20 * LAYERS


def test_all_small_is_llama_with_the_small_width(tiny_model, llama_twin):
    model = tiny_model()
    twin = llama_twin(model, "small")
    for tokens in (1, 6, 12):
        ours = step_of(with_routes(model, np.full(LAYERS, Route.SMALL), "auto"), model.make_cache(), tokens=tokens)
        theirs = step_of(twin, twin.make_cache(), tokens=tokens)
        assert_no_more_than(graph_of(ours, model)[0], graph_of(theirs, twin)[0], tokens)
        assert mx.allclose(ours, theirs, rtol=0, atol=1e-5).item()


def test_steps_that_skip_layers_leave_no_growing_graph(tiny_model):
    """Keys and values of a skipped layer are written with the step although no logit depends on them."""
    model = tiny_model(skip_scope="layer")
    cache = model.make_cache()
    for _ in range(3):
        mx.eval(model(mx.array([[1]]), cache=cache, routes=np.full(LAYERS, Route.SKIP)))
    file = io.StringIO()
    mx.export_to_dot(file, *[array for layer in cache for array in (layer.keys, layer.values)])
    assert "shape=rectangle" not in file.getvalue()


# --- waits of the host -------------------------------------------------------------------------------------------

WAITS = ("item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__", "__iter__")


@pytest.fixture
def waits(monkeypatch):
    """Counts what makes the host wait for the device."""
    counts = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    for name in WAITS:
        if hasattr(mx.array, name):
            monkeypatch.setattr(mx.array, name, counted(name, getattr(mx.array, name)))
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, counted(name, getattr(mx, name)))
    monkeypatch.setattr(conditional, "read", counted("route", conditional.read))
    return counts


class Routed:
    """A model bound to a policy, as far as `generate_step` needs it."""

    def __init__(self, model, policy, hand_over=np.asarray, strategy="auto"):
        self.model, self.policy, self.hand_over, self.strategy = model, policy, hand_over, strategy
        self.layers, self.make_cache = model.layers, model.make_cache
        self.position = 0

    def __call__(self, tokens, cache):
        routes = self.policy.routes(self.position, self.position + tokens.shape[1])
        self.position += tokens.shape[1]
        return self.model(tokens, cache=cache, routes=self.hand_over(routes), strategy=self.strategy)


def decode(model, count, prompt=7, chunk=4):
    return [token for token, _ in generate_step(mx.arange(prompt), model, max_tokens=count, prefill_step_size=chunk)]


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("strategy", ["auto", "planned", "sorted", "sync", "dense"])
@pytest.mark.parametrize("spec", ["big", "Bs-B", "random:.4,.4,.2"])
def test_decoding_by_routes_that_the_host_knows_waits_once_a_token(tiny_model, waits, spec, strategy, skip_scope):
    model = Routed(tiny_model(skip_scope=skip_scope), parse_route(spec, LAYERS), strategy=strategy)
    waits.clear()
    assert len(decode(model, 12)) == 12
    # generate_step's own: two prefill chunks (6 tokens by 4), the first token, then one .item() a token
    assert waits == {"eval": 3, "item": 12}


def test_the_waits_are_those_of_llama(tiny_model, llama_twin, waits):
    twin = llama_twin(tiny_model())
    waits.clear()
    theirs = decode(twin, 12)
    counted = dict(waits)
    waits.clear()
    assert decode(Routed(tiny_model(), parse_route("big", LAYERS)), 12) == theirs
    assert dict(waits) == counted


def test_the_count_sees_routes_read_from_the_device(tiny_model, waits):
    model = Routed(tiny_model(), parse_route("random", LAYERS), hand_over=mx.array, strategy="sync")
    waits.clear()
    decode(model, 12)
    assert waits["route"] == LAYERS * (2 + 1 + 12)  # prefill chunks, the prompt's last token, one step ahead each


@pytest.mark.parametrize("strategy", ["planned", "auto"])
def test_routes_from_a_look_ahead_are_read_once_a_token(tiny_model, waits, strategy):
    """All layers' routes from the token itself: the wait for them is the wait for the token, which is then there."""
    model = tiny_model()

    class LookAhead:
        layers, make_cache = model.layers, model.make_cache

        def __call__(self, tokens, cache):
            routes = (tokens[..., None] + mx.arange(LAYERS)) % len(Route)
            return model(tokens, cache=cache, routes=routes, strategy=strategy)

    steps = generate_step(mx.arange(7), LookAhead(), max_tokens=12)
    next(steps)
    waits.clear()
    assert len(list(steps)) == 11
    assert waits["route"] == waits["item"] == 11 and waits["eval"] == 0
