"""Bytes and FLOPs in bench run: the cost tables' for one sequence, those of every array that is read for a batch."""

import math

import numpy as np
import pytest

from duo_mlx import checkpoint, cost
from duo_mlx.bench import touched
from duo_mlx.flops import flops as flops_of

ROUTED = {"router_choices": "-sB"}
LAYERS, CONTEXT = 4, 9
MODELS = {
    "plain": {},
    "untied, biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "two small": {"small_layers": [1, 2]},
    "skips attention": {"skip_scope": "layer"},
}
KV = 2 * 2 * 4 * 4  # bytes of a position's keys and values in a layer: two heads of four float32


@pytest.fixture(params=MODELS)
def model(tiny_model, request):
    return tiny_model(**ROUTED, **MODELS[request.param])


def routes_of(model, passes, batch):
    """Routes as realised, ``[passes, batch, layers]``; in the first pass all sequences skip."""
    routes = np.random.default_rng(0).integers(0, 3, (passes, batch, LAYERS)).astype(np.uint8)
    routes[0] = 0
    return model.config.realised(routes)


def flops_per_token(model, routes, context, ran):
    return touched.flops_per_token(model.config, flops_of(model)(context), routes, ran)


def everything_read(model, routes, all_computed=False, by_router=False):
    """Bytes that a pass over a batch reads, array by array by its name; ``routes [batch, layers]``."""
    sizes = {name: array.nbytes for name, array in checkpoint.parameters(model).items()}
    table = sizes["model.embed_tokens.weight"]
    names = {"model.norm.weight", "model.embed_tokens.weight" if model.args.tie_word_embeddings else "lm_head.weight"}
    read = table // model.config.vocab_size
    for layer in range(LAYERS):
        used = {*routes[:, layer].tolist()} | ({1, 2} if all_computed else set())
        parts = ["input_layernorm", "self_attn.k_proj", "self_attn.v_proj"]
        attends = model.config.skip_scope == "ffn" or used != {0}
        if attends:
            parts += ["self_attn.q_proj", "self_attn.o_proj"]
        read += len(routes) * KV * (CONTEXT if attends else 1)
        parts += [part for route, part in ((1, "mlp.small"), (2, "mlp.big")) if route in used]
        parts += ["post_attention_layernorm"] * bool(used - {0}) + ["mlp.router"] * by_router
        names |= {name for name in sizes if name.startswith(tuple(f"model.layers.{layer}.{part}." for part in parts))}
    return read + sum(sizes[name] for name in names)


@pytest.mark.parametrize("by_router", [False, True])
def test_of_one_sequence_they_are_the_tables(model, by_router):
    routes = routes_of(model, 20, 1)
    table = cost.weight_bytes(model, by_router) + cost.cache_bytes(model, CONTEXT)
    found = touched.bytes_per_token(model, routes, CONTEXT, "planned", by_router)
    assert found == pytest.approx(table.of(routes[:, 0]).mean(), rel=1e-12)
    flops = flops_per_token(model, routes, CONTEXT, "planned")
    assert flops == pytest.approx(flops_of(model)(CONTEXT).of(routes[:, 0]).mean(), rel=1e-12)


@pytest.mark.parametrize("by_router", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_reads_what_any_of_its_sequences_needs_once(model, batch, by_router):
    routes = routes_of(model, 20, batch)
    expected = np.mean([everything_read(model, each, by_router=by_router) for each in routes]) / batch
    found = touched.bytes_per_token(model, routes, CONTEXT, "sorted", by_router)
    assert found == pytest.approx(expected, rel=1e-12)


def test_equal_sequences_share_the_weights_and_nothing_else(tiny_model):
    model = tiny_model()
    routes = routes_of(model, 20, 1)
    alone, four = (
        touched.bytes_per_token(model, np.repeat(routes, count, axis=1), CONTEXT, "planned") for count in (1, 4)
    )
    cache = KV * CONTEXT * LAYERS
    assert four - cache == pytest.approx((alone - cache) / 4, rel=1e-12)


@pytest.mark.parametrize("ran", ["dense", "masked"])
def test_the_reference_and_masked_products_on_a_cpu_read_and_compute_both(model, ran):
    assert touched.computes_everything(ran)
    for batch in (1, 3):
        routes = routes_of(model, 20, batch)
        read = np.mean([everything_read(model, each, all_computed=True) for each in routes]) / batch
        assert touched.bytes_per_token(model, routes, CONTEXT, ran) == pytest.approx(read, rel=1e-12)
        matrices = {
            name: array.shape
            for name, array in checkpoint.parameters(model).items()
            if array.ndim == 2 and "router" not in name
        }
        if not model.args.tie_word_embeddings:
            del matrices["model.embed_tokens.weight"]  # a row of it is looked up, which is no product
        attention = LAYERS * 2 * CONTEXT * 16 * 2  # scores and mixtures, over four heads of four
        expected = 2 * sum(map(math.prod, matrices.values())) + attention
        assert flops_per_token(model, routes, CONTEXT, ran) == expected


@pytest.mark.parametrize("ran", ["planned", "sorted", "sync", "fused"])
def test_other_strategies_leave_out_what_no_route_needs(tiny_model, ran):
    model = tiny_model()
    assert not touched.computes_everything(ran)
    skip, big = (np.full((1, 1, LAYERS), route, np.uint8) for route in (0, 2))
    for of in (touched.bytes_per_token, flops_per_token):
        assert of(model, skip, CONTEXT, ran) < of(model, big, CONTEXT, ran) < of(model, skip, CONTEXT, "dense")


def test_flops_are_the_mean_over_passes_and_sequences(model):
    routes = routes_of(model, 20, 3)
    expected = np.mean([flops_of(model)(CONTEXT).of(pattern) for each in routes for pattern in each])
    assert flops_per_token(model, routes, CONTEXT, "sorted") == pytest.approx(expected, rel=1e-12)
