"""The cost of a pattern, against the arrays that a model holds."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import quantize_model

from duo_mlx import checkpoint, cost
from duo_mlx.flops import flops
from duo_mlx.model import Model, ModelArgs


@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_of_the_arrays(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    sizes = {name: value.nbytes for name, value in checkpoint.parameters(model).items()}
    row = sizes["model.embed_tokens.weight"] // model.config.vocab_size
    read = sum(sizes.values()) - (0 if tied else sizes["model.embed_tokens.weight"]) + row
    small = sum(size for name, size in sizes.items() if ".small." in name)
    big = sum(size for name, size in sizes.items() if ".big." in name)
    norms = sum(size for name, size in sizes.items() if "post_attention" in name)
    table = cost.weight_bytes(model)
    routes = np.stack([np.full(4, route, np.uint8) for route in (2, 1, 0)])
    np.testing.assert_array_equal(table.of(routes), [read - small, read - big, read - big - small - norms])
    per_layer = [table.of(np.array([2] * layer + [0] + [2] * (3 - layer), np.uint8)) for layer in range(4)]
    assert per_layer == [read - small - (big + norms) // 4] * 4


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_a_draft_reads_no_more_of_the_head_than_it_multiplies_with(tiny_config, tied, bits):
    config = tiny_config(hidden_size=64, intermediate_size=128, tie_word_embeddings=tied, draft_vocabulary=24)
    model = Model(ModelArgs.from_dict(config | {"small_intermediate_size": 64}))
    if bits:
        model, _ = quantize_model(model, config, group_size=64, bits=bits)
    table = model.model.embed_tokens if tied else model.lm_head
    unread = sum(value[24:].nbytes for value in table.parameters().values())
    whole, draft = cost.weight_bytes(model), cost.draft_bytes(model)
    assert whole.fixed - draft.fixed == unread > 0 and (whole.by_route == draft.by_route).all()
    out = mx.random.normal((1, 2, 64), key=mx.random.key(1))
    found, expected = model.draft_head()(out), model.head(out)
    assert found.shape == (1, 2, 24) and mx.allclose(found, expected[..., :24], atol=1e-5)
    model.config = replace(model.config, draft_vocabulary=0)
    assert cost.draft_bytes(model).fixed == whole.fixed
    assert mx.allclose(model.draft_head()(out), expected, atol=1e-5)


def test_a_skipped_layer_still_reads_what_writes_keys_and_values(tiny_model):
    whole, ffn = tiny_model(skip_scope="layer"), tiny_model(skip_scope="ffn")
    skip = np.zeros(4, np.uint8)
    sizes = {name: value.nbytes for name, value in checkpoint.parameters(whole).items()}
    left_out = sum(size for name, size in sizes.items() if "q_proj" in name or "o_proj" in name)
    assert cost.weight_bytes(ffn).of(skip) - cost.weight_bytes(whole).of(skip) == left_out


def test_quantised_weights_count_as_stored(tiny_config):
    config = tiny_config(hidden_size=64, intermediate_size=128, small_intermediate_size=64)
    model = Model(ModelArgs.from_dict(config))
    before = cost.weight_bytes(model).of(np.full(4, 2, np.uint8))
    model, _ = quantize_model(model, config, group_size=64, bits=4)
    after = cost.weight_bytes(model).of(np.full(4, 2, np.uint8))
    assert after / before == pytest.approx((4 + 2 * 32 / 64) / 32, rel=0.1)  # 4 bits, and a scale and a bias a group


def test_where_there_is_no_small_it_costs_what_big_costs(tiny_model):
    part, full = tiny_model(small_layers=[1, 2]), tiny_model()
    tables = [
        (cost.weight_bytes(part), cost.weight_bytes(full)),
        (flops(part)(10), flops(full)(10)),
    ]
    for ours, everywhere in tables:
        assert ours.fixed == everywhere.fixed
        expected = everywhere.by_route.copy()
        expected[[0, 3], 1] = expected[[0, 3], 2]
        np.testing.assert_array_equal(ours.by_route, expected)
        assert (everywhere.by_route[:, 1] < everywhere.by_route[:, 2]).all()


def test_biases_of_small_are_bytes_of_small(tiny_model):
    with_biases, without = (cost.weight_bytes(tiny_model(small_bias=biases)).by_route for biases in (True, False))
    np.testing.assert_array_equal(with_biases - without, [[0, (8 + 8 + 16) * 4, 0]] * 4)


def test_cache_bytes_are_those_of_a_real_cache(tiny_model):
    model = tiny_model()
    cache = model.make_cache()
    mx.eval(model(mx.array([[1] * 9]), cache=cache))
    held = sum(array[:, :, :9].nbytes for entry in cache for array in (entry.keys, entry.values))
    assert cost.cache_bytes(model, 9).of(np.full(4, 2, np.uint8)) == held


def test_a_sliding_layer_reads_no_more_than_its_window(tiny_model):
    changes = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4}
    sliding, full = tiny_model(**changes), tiny_model()
    routes = np.full(4, 2, np.uint8)
    assert cost.cache_bytes(sliding, 4).of(routes) == cost.cache_bytes(full, 4).of(routes)
    assert cost.cache_bytes(sliding, 100).of(routes) * 200 == cost.cache_bytes(full, 100).of(routes) * 104


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_a_pass_reads_what_each_layer_s_dearest_token_reads(tiny_model, skip_scope):
    model = tiny_model(layer_types=["full_attention", "sliding_attention"] * 2, sliding_window=4, skip_scope=skip_scope)
    read, random = cost.pass_cache_bytes(model), np.random.default_rng(0)
    for context in (1, 4, 5, 100):
        table = cost.cache_bytes(model, context).by_route
        for tokens in (1, 1, 3, 3):
            routes = random.choice(3, (tokens, 4), p=[0.7, 0.15, 0.15]).astype(np.uint8)
            dearest = [max(table[layer, route] for route in routes[:, layer]) for layer in range(4)]
            assert read(routes, context) == sum(dearest)


def test_tables_add():
    one = cost.RouteTable(1, np.arange(6).reshape(2, 3))
    assert (one + one).of(np.array([2, 0], np.uint8)) == 2 * one.of(np.array([2, 0], np.uint8)) == 2 * (1 + 2 + 3)
