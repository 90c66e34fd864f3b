"""The oracle of a text: brute force finds the same, ties go to the cheaper pattern, and candidates are counted."""

from functools import partial
from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import cost
from duo_mlx.routes import Route
from duo_mlx.study import oracle, tree
from duo_mlx.study.committed import Token
from duo_mlx.study.limits import parse_limit
from duo_mlx.study.losses import token_losses

TOKENS = 7
IDS = np.random.default_rng(0).integers(0, 32, TOKENS + 1)
BASES = {  # by the form of their blocks
    "llama": {},  # a norm before each branch
    "gemma2": {"base_model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 64},  # 4 norms
    "phi": {  # attention beside the FFN
        "base_model_type": "phi",
        "num_key_value_heads": 4,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
}
LIMITS = ("none", "2", "at-most:1", "bytes:0.8", "3..1")


@pytest.fixture
def asked(tiny_model):
    """``asked(**changes)``: a model, the space of its patterns and the limits."""

    def make(**changes):
        model = tiny_model(**changes)
        space = oracle.Space(model, tree.layer_options(model, tuple(Route)))
        return model, space, [parse_limit(spec, model, TOKENS) for spec in LIMITS]

    return make


def losses_of(model, pattern):
    return token_losses(model(mx.array(IDS[None, :-1]), routes=pattern), IDS[1:])[0]


@pytest.mark.parametrize("rows", [3, 64])
@pytest.mark.parametrize("base", BASES)
def test_each_token_gets_the_best_of_what_it_may_have(asked, base, rows):
    model, space, limits = asked(**BASES[base])
    half = np.arange(len(space.patterns)) % 2 == 0
    allowed = oracle.allowed_by(limits, space, TOKENS) | {"every second": half[:, None]}
    best, means, work = oracle.shared(model, IDS[:-1], IDS[1:], space, allowed, rows)
    table = np.array([losses_of(model, pattern) for pattern in space.patterns])
    assert best.keys() == allowed.keys() and (work.attention, work.head) == (1 + 3 + 9 + 27, 81)
    for name, may in allowed.items():
        may, found = np.broadcast_to(may, table.shape), best[name]
        np.testing.assert_allclose(found.loss, np.where(may, table, np.inf).min(axis=0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(table[found.number, np.arange(TOKENS)], found.loss, rtol=0, atol=1e-5)
        assert may[found.number, np.arange(TOKENS)].all()
        np.testing.assert_array_equal(found.seen, may.sum(axis=0))
    np.testing.assert_allclose(means, table.mean(axis=1), rtol=0, atol=1e-5)
    for route in Route:
        expected = losses_of(model, np.full(4, route))
        found, unsure = oracle.uniform(model, IDS[:-1], IDS[1:], route)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        logits = np.array(model(mx.array(IDS[None, :-1]), routes=np.full(4, route)), np.float64)[0]
        shares = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(unsure, -(shares * np.log(shares)).sum(axis=-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", LIMITS)
@pytest.mark.parametrize("base", BASES)
def test_committed_is_greedy_and_what_it_finds_can_be_replayed(asked, base, spec):
    model, space, limits = asked(**BASES[base])
    limit = limits[LIMITS.index(spec)]

    def choose(cache, place):
        wanted = partial(limit.reaches, layers=4, token=place, tokens=TOKENS)
        walk = Token(model, cache, int(IDS[place]), int(IDS[place + 1]), space.options, 20, wanted)
        return oracle.lowest(walk, space)

    found = oracle.committed(model, IDS[:-1], choose)
    routes = found.patterns
    replayed = token_losses(model(mx.array(IDS[None, :-1]), routes=routes[None]), IDS[1:])[0]
    np.testing.assert_allclose(replayed, found.loss, rtol=0, atol=1e-5)
    for place in range(TOKENS):
        may = space.patterns[limit.at(space.patterns, place, TOKENS)]
        assert found.seen[place] == len(may)
        tried = np.repeat(routes[None, : place + 1], len(may), axis=0)
        tried[:, place] = may
        ids = np.repeat(IDS[None, : place + 1], len(may), axis=0)
        logits = model(mx.array(ids), routes=tried)[:, -1:]
        losses = token_losses(logits, IDS[place + 1 : place + 2])[:, 0]
        assert losses.min() == pytest.approx(found.loss[place], abs=1e-5)


def test_numbers_are_places_in_the_order_of_routes(tiny_model):
    options = [(Route.BIG,), (Route.SKIP, Route.BIG), tuple(Route), (Route.SMALL,)]
    space = oracle.Space(tiny_model(), options)
    assert space.patterns.tolist() == [list(pattern) for pattern in product(*options)]
    np.testing.assert_array_equal(space.numbers(space.patterns[::-1]), np.arange(6)[::-1])


def test_ties_go_to_fewer_bytes_and_then_to_the_lower_route_first(asked):
    model, space, _ = asked()
    ranked = space.patterns[np.argsort(space.ranks)]
    read = cost.weight_bytes(model).of(ranked).tolist()
    keys = [(each, tuple(pattern)) for each, pattern in zip(read, ranked.tolist(), strict=True)]
    assert keys == sorted(keys) and sorted(space.ranks.tolist()) == list(range(81))


@given(st.data())
def test_offers_in_any_batches_give_the_one_answer(data):
    count, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    row = st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=tokens, max_size=tokens)  # with ties
    losses = np.array(data.draw(st.lists(row, min_size=count, max_size=count)), np.float32)
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))[:, None]
    space = SimpleNamespace(ranks=np.array(data.draw(st.permutations(range(count)))))
    best, numbers = oracle.Best.of(tokens), np.array(data.draw(st.permutations(range(count))))
    cut = data.draw(st.integers(0, count))
    for part in (numbers[:cut], numbers[cut:]):
        if len(part):
            best.offer(losses[part], part, space, allowed[part])
    for token in range(tokens):
        candidates = [(losses[each, token], space.ranks[each], each) for each in range(count) if allowed[each, 0]]
        if candidates:
            assert (best.loss[token], best.rank[token], best.number[token]) == min(candidates)
        else:
            assert np.isinf(best.loss[token])
        assert best.seen[token] == len(candidates)
