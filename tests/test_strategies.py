"""The contract of every strategy: the numbers of ``dense``, whoever knows the routes and however a pass is cut.

Whatever is in `duo_mlx.conditional.STRATEGIES` is tested; a new strategy joins by being registered there.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx import conditional
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import Route

TOLERANCE = 1e-4  # maximum absolute difference of fp32 logits
LAYERS, TOKENS, VOCAB = 4, 9, 32
PASSES = {"no cache": None, "prefill and decode": (5, 1, 1, 1, 1), "chunked prefill": (4, 3, 2)}
ROUTES = {
    "big": np.full(LAYERS, Route.BIG),
    "small": np.full(LAYERS, Route.SMALL),
    "skip": np.full(LAYERS, Route.SKIP),
    "mixed": np.array([Route.BIG, Route.SKIP, Route.SMALL, Route.BIG]),
    "random per token": None,
}
ATTENTION = {"GQA": 2, "MHA": 4}
ON_HOST = ("auto", "planned", "sorted", "sync")


def tokens_of(batch):
    return np.random.default_rng(batch).integers(0, VOCAB, (batch, TOKENS))


def routes_of(kind, batch):
    per_token = np.random.default_rng(batch + 10).integers(0, 3, (batch, TOKENS, LAYERS))
    return per_token if ROUTES[kind] is None else ROUTES[kind]


@pytest.fixture(scope="module")
def expected(tiny_model):
    """Logits of one ``dense`` pass without a cache."""
    known = {}

    def find(batch, kind, **changes):
        key = (batch, kind, *changes.items())
        if key not in known:
            routes = routes_of(kind, batch)
            known[key] = np.array(tiny_model(**changes)(mx.array(tokens_of(batch)), routes=routes, strategy="dense"))
        return known[key]

    return find


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cuts", PASSES)
@pytest.mark.parametrize("known_by", ["host", "device"])
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_contract(tiny_model, in_passes, expected, strategy, kind, known_by, cuts, batch, attention, skip_scope):
    changes = {"num_key_value_heads": ATTENTION[attention], "skip_scope": skip_scope}
    found = in_passes(
        tiny_model(**changes), tokens_of(batch), routes_of(kind, batch), PASSES[cuts], known_by, strategy=strategy
    )
    np.testing.assert_allclose(found, expected(batch, kind, **changes), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_the_contract_tells_routes_apart(expected, skip_scope):
    changes = {"num_key_value_heads": 2, "skip_scope": skip_scope}
    logits = [expected(3, kind, **changes) for kind in ROUTES]
    for index, a in enumerate(logits):
        for b in logits[index + 1 :]:
            assert np.abs(a - b).max() > 100 * TOLERANCE


BIG_ONLY = (0, 3)


@pytest.fixture(scope="module")
def big_only(tiny_model, tiny_config):
    """``big_only(**changes)``: a model, and the same one without small FFNs in the layers `BIG_ONLY`."""
    made = {}

    def make(**changes):
        if repr(changes) not in made:
            full = tiny_model(**changes)
            kept = [layer for layer in range(LAYERS) if layer not in BIG_ONLY]
            model = Model(ModelArgs.from_dict(tiny_config(small_layers=kept, **changes)))
            names = dict(tree_flatten(model.parameters()))
            model.load_weights([item for item in tree_flatten(full.parameters()) if item[0] in names])
            made[repr(changes)] = full, model
        return made[repr(changes)]

    return make


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("cuts", PASSES)
@pytest.mark.parametrize("known_by", ["host", "device"])
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_small_is_big_where_there_is_no_small(big_only, in_passes, strategy, kind, known_by, cuts, skip_scope):
    full, model = big_only(skip_scope=skip_scope)
    routes = routes_of(kind, 3)
    instead = routes.copy()
    for layer in BIG_ONLY:
        instead[..., layer][routes[..., layer] == Route.SMALL] = Route.BIG
    found = in_passes(model, tokens_of(3), routes, PASSES[cuts], known_by, strategy=strategy)
    expected = in_passes(full, tokens_of(3), instead, strategy="dense")
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_layers_without_small_tell_small_from_big_elsewhere(big_only):
    _, model = big_only()
    logits = [np.array(model(mx.array(tokens_of(3)), routes=routes_of(kind, 3))) for kind in ROUTES]
    for index, a in enumerate(logits):
        for b in logits[index + 1 :]:
            assert np.abs(a - b).max() > 100 * TOLERANCE


@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_half_precision_stays_half(tiny_config, strategy):
    model = Model(ModelArgs.from_dict(tiny_config()))
    model.set_dtype(mx.float16)
    for kind in ROUTES if strategy != "masked" else ("big", "small", "skip", "mixed"):  # on the CPU it takes float32
        logits = model(mx.array(tokens_of(1)), routes=routes_of(kind, 1), strategy=strategy)
        assert logits.dtype == mx.float16 and mx.isfinite(logits).all().item()


def fits(name, module):
    return ".mlp." in name and isinstance(module, nn.Linear) and module.weight.shape[1] % 32 == 0


@pytest.fixture(scope="module")
def quantised(tiny_config):
    """``quantised(bits)``: a model whose FFNs are quantised, small's down projection too narrow for it."""
    made = {}

    def make(bits):
        if bits not in made:
            sizes = {"hidden_size": 64, "intermediate_size": 96, "small_intermediate_size": 24}
            model = Model(ModelArgs.from_dict(tiny_config(**sizes)))
            weights = {name: value * 3 if "mlp" in name else value for name, value in tree_flatten(model.parameters())}
            model.load_weights(list(weights.items()))
            nn.quantize(model, 32, bits, class_predicate=fits)
            assert isinstance(model.layers[0].mlp.small.up_proj, nn.QuantizedLinear)
            assert isinstance(model.layers[0].mlp.small.down_proj, nn.Linear)
            made[bits] = model
        return made[bits]

    return make


@pytest.mark.parametrize(("bits", "batch"), [(4, 3), (8, 1)])
@pytest.mark.parametrize("known_by", ["host", "device"])
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("strategy", [name for name in conditional.STRATEGIES if name != "masked"])
def test_quantised_models(quantised, in_passes, strategy, kind, known_by, batch, bits):
    model, tokens, routes = quantised(bits), tokens_of(batch), routes_of(kind, batch)
    found = in_passes(model, tokens, routes, PASSES["prefill and decode"], known_by, strategy=strategy)
    expected = np.array(model(mx.array(tokens), routes=routes, strategy="dense"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_masked_refuses_a_quantised_model_with_a_reason(quantised):
    with pytest.raises(DuoError, match="'masked' cannot run here: .* these weights are quantised; use auto"):
        quantised(4)(mx.array([[1]]), routes=mx.array(routes_of("mixed", 1)), strategy="masked")


@pytest.mark.parametrize("strategy", ["dense", "masked", "planned", "sorted"])
def test_a_pass_that_reads_no_route_can_be_compiled(tiny_model, strategy):
    model, tokens = tiny_model(), mx.array(tokens_of(3)[:, :1])
    routes = routes_of("random per token", 3)[:, :1]
    if strategy in ("dense", "masked"):
        routes = mx.array(routes)
    compiled = mx.compile(lambda tokens: model(tokens, routes=routes, strategy=strategy))
    expected = model(tokens, routes=routes, strategy="dense")
    np.testing.assert_allclose(np.array(compiled(tokens)), np.array(expected), rtol=0, atol=TOLERANCE)


# --- what a skipped layer leaves behind --------------------------------------------------------------------------


@pytest.mark.parametrize("known_by", ["host", "device"])
@pytest.mark.parametrize("kind", ROUTES)
@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_skipping_a_layer_still_writes_keys_and_values(tiny_model, in_passes, strategy, kind, known_by):
    model, tokens, routes = tiny_model(skip_scope="layer"), tokens_of(3), routes_of(kind, 3)
    dense, cache = model.make_cache(), model.make_cache()
    in_passes(model, tokens, routes, (TOKENS,), cache=dense, strategy="dense")
    in_passes(model, tokens, routes, PASSES["prefill and decode"], known_by, strategy=strategy, cache=cache)
    for layer, reference in zip(cache, dense, strict=True):
        assert layer.offset == TOKENS
        for found, wanted in ((layer.keys, reference.keys), (layer.values, reference.values)):
            found, wanted = np.array(found)[:, :, :TOKENS], np.array(wanted)[:, :, :TOKENS]
            assert (np.abs(wanted).max(axis=(1, 3)) > 0).all()  # every position holds something
            np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_skipping_every_layer_leaves_the_embedding(tiny_model, strategy):
    model, tokens = tiny_model(skip_scope="layer"), mx.array(tokens_of(1))
    embed = model.model.embed_tokens
    expected = embed.as_linear(model.model.norm(embed(tokens)))
    assert mx.array_equal(model(tokens, routes=ROUTES["skip"], strategy=strategy), expected).item()


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_later_tokens_attend_to_a_skipped_one(tiny_model, in_passes, strategy, skip_scope):
    model, tokens = tiny_model(skip_scope=skip_scope), tokens_of(1)
    routes = np.full((1, TOKENS, LAYERS), Route.BIG)
    routes[:, 0] = Route.SKIP
    other = tokens.copy()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    a, b = (in_passes(model, each, routes, PASSES["chunked prefill"], strategy=strategy) for each in (tokens, other))
    assert (np.abs(a - b).max(axis=-1) > TOLERANCE).all()


# --- who reads what ----------------------------------------------------------------------------------------------


def reads_of(model, routes, strategy):
    before = conditional.host_reads()
    mx.eval(model(mx.array(tokens_of(3)), routes=routes, strategy=strategy))
    return conditional.host_reads() - before


@pytest.mark.parametrize("strategy", ON_HOST)
@pytest.mark.parametrize("kind", ROUTES)
def test_routes_that_the_host_knows_are_never_read(tiny_model, strategy, kind):
    assert reads_of(tiny_model(), routes_of(kind, 3), strategy) == 0


@pytest.mark.parametrize("kind", ROUTES)
def test_routes_on_the_device_are_read_as_often_as_documented(tiny_model, kind):
    model, routes = tiny_model(), mx.array(routes_of(kind, 3))
    assert {strategy: reads_of(model, routes, strategy) for strategy in ("dense", *ON_HOST)} == {
        "dense": 0,
        "auto": 1,
        "planned": 1,
        "sorted": LAYERS,
        "sync": LAYERS,
    }


# --- training ----------------------------------------------------------------------------------------------------


def gradients(model, routes, strategy="dense"):
    def loss(tokens):
        return nn.losses.cross_entropy(model(tokens[:, :-1], routes=routes, strategy=strategy), tokens[:, 1:]).mean()

    _, grads = nn.value_and_grad(model, loss)(mx.array(tokens_of(3)))
    return {name: np.array(grad) for name, grad in tree_flatten(grads)}


@pytest.mark.parametrize("hand_over", [np.asarray, mx.array], ids=["host", "device"])
def test_dense_trains_what_the_routes_use(tiny_model, hand_over):
    model = tiny_model()
    routes = routes_of("random per token", 3)[:, : TOKENS - 1].copy()
    routes[..., 0], routes[..., 1], routes[..., 2] = Route.BIG, Route.SMALL, Route.SKIP
    used = {(0, "big"), (1, "small"), (3, "big"), (3, "small")}
    for name, grad in gradients(model, hand_over(routes)).items():
        assert np.isfinite(grad).all()
        parts = name.split(".")
        if "mlp" in parts:
            assert (np.abs(grad).max() > 0) == ((int(parts[2]), parts[4]) in used), name
        elif parts[2:] != ["2", "post_attention_layernorm", "weight"]:
            assert np.abs(grad).max() > 0, name


def test_dense_gradients_agree_with_finite_differences(tiny_model):
    model, routes = tiny_model(), routes_of("random per token", 3)
    tokens = mx.array(tokens_of(3))
    weight = model.layers[1].mlp.small.down_proj

    def loss(bias):
        original = weight.weight
        weight.weight = original + bias
        value = (model(tokens, routes=routes, strategy="dense") ** 2).mean()
        weight.weight = original
        return value

    direction = mx.random.normal(weight.weight.shape, key=mx.random.key(0))
    slope = (mx.grad(loss)(mx.zeros_like(direction)) * direction).sum().item()
    step = 1e-2
    numeric = (loss(step * direction) - loss(-step * direction)).item() / (2 * step)
    assert abs(slope) > 1e-2
    assert numeric == pytest.approx(slope, rel=2e-2)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
@pytest.mark.parametrize("hand_over", [np.array, mx.array], ids=["host", "device"])
@pytest.mark.parametrize("shape", [(3,), (TOKENS, LAYERS), (2, TOKENS, LAYERS), (3, TOKENS, LAYERS + 1)])
def test_routes_of_another_shape(tiny_model, strategy, hand_over, shape):
    routes = hand_over(np.ones(shape, np.int32))
    with pytest.raises(DuoError, match=r"must be \[4\] .* or \[3, 9, 4\]"):
        tiny_model()(mx.array(tokens_of(3)), routes=routes, strategy=strategy)


@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
@pytest.mark.parametrize("value", [3, -1, 0.5])
def test_routes_with_other_values(tiny_model, strategy, value):
    with pytest.raises(DuoError, match=r"0 \(skip\), 1 \(small\) or 2 \(big\)"):
        tiny_model()(mx.array(tokens_of(3)), routes=np.array([1, 1, 1, value]), strategy=strategy)


def test_an_unknown_strategy_names_the_known_ones(tiny_model):
    with pytest.raises(DuoError, match="'fast' does not exist; there are " + ", ".join(conditional.STRATEGIES)):
        tiny_model()(mx.array(tokens_of(1)), strategy="fast")


def test_planned_says_what_to_use_for_routes_it_cannot_plan(tiny_model):
    ffns, x = tiny_model().layers[0].mlp, mx.zeros((1, 3, 16))
    with pytest.raises(DuoError, match="use dense, sorted or sync"):
        conditional.run(ffns, x, mx.array([[0, 1, 2]]), "planned", residual=x)
