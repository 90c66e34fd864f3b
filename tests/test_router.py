"""Routers: what they decide, that every strategy carries it out without asking the host, and how it is kept."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step

import duo_mlx
from duo_mlx import checkpoint, conditional, cost
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routed import RoutedModel
from duo_mlx.router import LinearRouter, Recorder, Router
from duo_mlx.routes import LETTERS, Route

LAYERS, TOKENS, HIDDEN = 4, 9, 16
TOLERANCE = 1e-4
WITHIN = [name for name in conditional.STRATEGIES if name != "planned"]
PASSES = {"no cache": (TOKENS,), "prefill and decode": (5, 1, 1, 1, 1), "a few at a time": (3, 3, 3)}


def tokens_of(batch):
    return np.random.default_rng(batch).integers(0, 32, (batch, TOKENS))


@pytest.fixture
def routed(tiny_model):
    """``routed(choices, **changes)``: a model whose routers choose between routes about equally often."""
    return lambda choices="-sB", **changes: tiny_model(seed=2, router_choices=choices, **changes)


def passes(model, router, tokens, cuts, strategy):
    """Logits of a pass over each of ``cuts`` tokens, and what the router decided ``[batch, tokens, layers]``."""
    recorder, cache, start, logits, routes = Recorder(router), model.make_cache(), 0, [], []
    for cut in cuts:
        part = mx.array(tokens[:, start : start + cut])
        logits.append(np.array(model(part, cache=cache, routes=recorder, strategy=strategy)))
        routes.append(np.stack([np.array(taken).reshape(len(taken), -1) for taken in recorder.taken], axis=-1))
        start += cut
    return np.concatenate(logits, axis=1), np.concatenate(routes, axis=1)


# --- what a router decides ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", ["sB", "-B", "-sB", "Bs-"])
def test_the_largest_logit_names_the_route(choices):
    random = np.random.default_rng(0)
    weights = random.standard_normal((LAYERS, len(choices), HIDDEN)).astype(np.float32)
    x = random.standard_normal((2, 5, HIDDEN)).astype(np.float32)
    named = np.array([LETTERS.index(letter) for letter in choices])
    router = LinearRouter([mx.array(weight) for weight in weights], named)
    for layer in range(LAYERS):
        expected = named[(x @ weights[layer].T).argmax(axis=-1)]
        np.testing.assert_array_equal(np.array(router.routes(layer, mx.array(x))), expected)


@pytest.mark.parametrize("choices", ["sB", "-sB"])
def test_a_layers_bias_and_the_offsets_of_all_layers_add_up(choices):
    random = np.random.default_rng(1)
    weights, x = random.standard_normal((LAYERS, len(choices), HIDDEN)), random.standard_normal((40, HIDDEN))
    biases, offsets = random.standard_normal((LAYERS, len(choices))), random.standard_normal(len(choices))
    named = np.array([LETTERS.index(letter) for letter in choices])
    router = LinearRouter([mx.array(each, mx.float32) for each in weights], named, mx.array(offsets, mx.float32),
                          [mx.array(each, mx.float32) for each in biases])  # fmt: skip
    for layer in range(LAYERS):
        expected = named[(x @ weights[layer].T + biases[layer] + offsets).argmax(axis=-1)]
        np.testing.assert_array_equal(np.array(router.routes(layer, mx.array(x, mx.float32))), expected)


@pytest.mark.parametrize("strategy", WITHIN)
def test_a_model_with_biases_routes_alike_by_every_strategy(tiny_model, strategy):
    model = tiny_model(seed=2, router_choices="-sB", router_bias=True)
    offsets = mx.array([0.3, -0.2, 0.1])
    expected, same = passes(model, model.router(offsets), tokens_of(2), (TOKENS,), "dense")
    logits, routes = passes(model, model.router(offsets), tokens_of(2), PASSES["prefill and decode"], strategy)
    np.testing.assert_array_equal(routes, same)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    plain = passes(model, model.router(), tokens_of(2), (TOKENS,), "dense")[1]
    assert (plain != same).any()


def test_offsets_move_the_threshold():
    random = np.random.default_rng(0)
    weight, x = mx.array(random.standard_normal((2, HIDDEN))), mx.array(random.standard_normal((1, 200, HIDDEN)))
    shares = []
    for offset in (-100.0, -2.0, 0.0, 2.0, 100.0):
        routes = LinearRouter([weight], (1, 2), mx.array([0.0, offset])).routes(0, x)
        shares.append(float((routes == Route.BIG).mean()))
    assert shares == sorted(set(shares)) and (shares[0], shares[-1]) == (0, 1)


# --- carried out by strategies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cuts", PASSES)
@pytest.mark.parametrize("strategy", WITHIN)
def test_every_strategy_does_what_the_router_says(routed, strategy, cuts, batch, skip_scope):
    model, tokens = routed(skip_scope=skip_scope), tokens_of(batch)
    logits, routes = passes(model, model.router(), tokens, PASSES[cuts], strategy)
    assert set(np.unique(routes)) == set(Route)
    np.testing.assert_allclose(
        logits, np.array(model(mx.array(tokens), routes=routes, strategy="dense")), rtol=0, atol=TOLERANCE
    )
    expected, same = passes(model, model.router(), tokens, (TOKENS,), "dense")
    np.testing.assert_array_equal(routes, same)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("strategy", WITHIN)
def test_a_layer_without_small_does_big_where_the_router_says_small(routed, strategy):
    model, tokens = routed("-sB", small_layers=[1, 2]), tokens_of(2)
    logits, routes = passes(model, model.router(), tokens, PASSES["prefill and decode"], strategy)
    realised = model.config.realised(routes.astype(np.uint8))
    assert (realised != routes).any()
    expected = np.array(model(mx.array(tokens), routes=realised, strategy="dense"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_a_router_of_your_own(tiny_model):
    class BySign(Router):
        def routes(self, layer, x):
            return mx.where(x[..., layer] > 0, int(Route.BIG), int(Route.SKIP))

    model, tokens = tiny_model(), tokens_of(1)
    logits, routes = passes(model, BySign(), tokens, PASSES["prefill and decode"], "auto")
    assert set(np.unique(routes)) == {Route.SKIP, Route.BIG}
    expected = np.array(model(mx.array(tokens), routes=routes, strategy="dense"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("strategy", "reads"), [("dense", 0), ("masked", 0), ("fused", 0), ("sync", LAYERS)])
@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_decoding_waits_once_a_token_unless_the_strategy_is_sync(routed, monkeypatch, strategy, reads, skip_scope):
    model = routed(skip_scope=skip_scope)
    call = RoutedModel(model, model.router(), strategy)
    waits = {"item": 0, "eval": 0}

    def counted(name, function):
        def wait(*args, **kwargs):
            waits[name] += 1
            return function(*args, **kwargs)

        return wait

    tokens = generate_step(mx.arange(6), call, max_tokens=12)
    next(tokens)  # past the prompt, whose chunk is sorted
    before = conditional.host_reads()
    monkeypatch.setattr(mx.array, "item", counted("item", mx.array.item))
    monkeypatch.setattr(mx, "eval", counted("eval", mx.eval))
    assert len(list(tokens)) == 11
    assert waits == {"item": 11, "eval": 0}
    assert conditional.host_reads() - before == 11 * reads


def test_a_prompt_reads_the_counts_of_each_layer_once_a_chunk(routed):
    model, before = routed(), conditional.host_reads()
    for strategy in ("auto", "sorted", "masked"):
        mx.eval(model(mx.array(tokens_of(1)), routes=model.router(), strategy=strategy))
    assert conditional.host_reads() - before == 3 * LAYERS


# --- generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", WITHIN)
@pytest.mark.parametrize("chunk", [2, 512])
def test_generated_tokens_come_with_the_routes_that_made_them(saved, strategy, chunk):
    model, tokenizer = duo_mlx.load(saved(router_choices="-sB")[0])
    prompt, found = [3, 5, 7, 11, 13], []
    responses = duo_mlx.stream_generate(
        model, tokenizer, prompt, route="router", strategy=strategy, max_tokens=6, prefill_step_size=chunk
    )
    for response in responses:
        text = mx.array([[*prompt, *(token for token, _ in found)]])
        recorder = Recorder(model.router())
        logits = model(text, routes=recorder, strategy="dense")
        np.testing.assert_array_equal(response.routes, [int(np.ravel(taken[0])[-1]) for taken in recorder.taken])
        assert response.token == int(logits[0, -1].argmax())
        found.append((response.token, response.routes))
    assert len(found) == 6


def test_the_first_sequence_of_a_batch_is_the_one_that_is_shown(routed):
    model = routed()
    call = RoutedModel(model, model.router())
    cache = model.make_cache()
    call(mx.array(tokens_of(3)[:, :4]), cache)
    logits = call(mx.array(tokens_of(3)[:, 4:5]), cache)
    mx.eval(logits)
    _, routes = passes(model, model.router(), tokens_of(3)[:, :5], (4, 1), "dense")
    np.testing.assert_array_equal(call.later(4)(), routes[0, -1])
    assert not call.decided  # nothing piles up


# --- kept in a model directory -----------------------------------------------------------------------------------


def test_routers_are_stored_with_the_model(routed, tiny_config, write_tokenizer, tmp_path):
    model = routed("sB")
    checkpoint.save(tmp_path, tiny_config(router_choices="sB"), checkpoint.parameters(model))
    write_tokenizer(tmp_path)
    loaded, _ = duo_mlx.load(tmp_path)
    assert mx.load(str(tmp_path / "model.safetensors"))["model.layers.3.mlp.router.weight"].shape == (2, HIDDEN)
    for layer, kept in zip(loaded.layers, model.layers, strict=True):
        assert mx.array_equal(layer.mlp.router.weight, kept.mlp.router.weight).item()


def test_quantising_leaves_the_router_alone(tiny_config):
    model = Model(ModelArgs.from_dict(tiny_config(hidden_size=64, intermediate_size=64, router_choices="sB")))
    nn.quantize(model, 32, 4, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % 32 == 0)
    kept = {name: value.dtype for name, value in tree_flatten(model.parameters()) if "router" in name}
    assert len(kept) == LAYERS and set(kept.values()) == {mx.float32}


def test_a_router_is_read_only_where_it_decides(routed):
    model = routed("sB")
    by_route = cost.weight_bytes(model, by_router=True).by_route - cost.weight_bytes(model).by_route
    assert (by_route == 2 * HIDDEN * 4).all()


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", ["s", "ss", "sX", ["s", "B"], 7])
def test_choices_that_are_none(tiny_config, choices):
    with pytest.raises(DuoError, match="config.json: router_choices is"):
        ModelArgs.from_dict(tiny_config(router_choices=choices))


def test_a_model_without_a_router_says_so(saved):
    model, tokenizer = duo_mlx.load(saved()[0])
    with pytest.raises(DuoError, match="has no router"):
        duo_mlx.generate(model, tokenizer, [3], route="router")


def test_planned_cannot_wait_for_a_router(routed):
    model = routed()
    with pytest.raises(DuoError, match="a router decides within it; use auto, fused, masked, sync, sorted or dense"):
        model(mx.array([[1]]), routes=model.router(), strategy="planned")
