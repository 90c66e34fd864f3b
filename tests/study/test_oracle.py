"""The oracle of a text: brute force finds the same, ties go to the cheaper pattern, and candidates are counted."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import cost
from duo_mlx.routes import Route
from duo_mlx.study import oracle, tree
from duo_mlx.study.limits import parse_limit

TOKENS = 9
IDS = np.random.default_rng(0).integers(0, 32, TOKENS + 1)


def losses_of(model, pattern):
    logits = model(mx.array(IDS[None, :-1]), routes=pattern)
    return np.array(tree.token_losses(logits, mx.array(IDS[1:])))[0]


@pytest.mark.parametrize("rows", [3, 64])
def test_each_token_gets_the_best_of_what_it_may_have(tiny_model, rows):
    model = tiny_model()
    options = tree.layer_options(model, tuple(Route))
    limits = [parse_limit(spec, model, TOKENS) for spec in ("none", "2", "at-most:1", "bytes:0.6", "3..1")]
    patterns = oracle.every(options)
    half = np.arange(len(patterns)) % 2 == 0
    found = oracle.exhaustive(model, IDS[:-1], IDS[1:], options, limits, {"every second": half}, rows)
    table = np.array([losses_of(model, pattern) for pattern in patterns])
    allowed = {limit.name: np.broadcast_to(limit.allows(patterns, TOKENS), table.shape) for limit in limits}
    allowed["every second"] = np.broadcast_to(half[:, None], table.shape)
    assert found.best.keys() == allowed.keys()
    for name, may in allowed.items():
        best = found.best[name]
        np.testing.assert_allclose(best.loss, np.where(may, table, np.inf).min(axis=0), rtol=0, atol=1e-5)
        np.testing.assert_allclose(table[best.number, np.arange(TOKENS)], best.loss, rtol=0, atol=1e-5)
        assert may[best.number, np.arange(TOKENS)].all()
        np.testing.assert_array_equal(best.seen, may.sum(axis=0))
    np.testing.assert_allclose(found.means, table.mean(axis=1), rtol=0, atol=1e-5)
    for route, losses in found.uniform.items():
        np.testing.assert_allclose(losses, losses_of(model, np.full(4, route)), rtol=0, atol=1e-5)
    assert found.work.head == 81 and found.peak_bytes > 0


def test_patterns_and_their_numbers():
    options = [(Route.BIG,), (Route.SKIP, Route.BIG), tuple(Route)]
    patterns = oracle.every(options)
    assert patterns.tolist() == [[2, 0, 0], [2, 0, 1], [2, 0, 2], [2, 2, 0], [2, 2, 1], [2, 2, 2]]
    np.testing.assert_array_equal(oracle.numbers(patterns[::-1], options), np.arange(6)[::-1])


def test_ties_go_to_fewer_bytes_and_then_to_the_lower_route_first(tiny_model):
    model = tiny_model()
    patterns = oracle.every([tuple(Route)] * 4)
    order = oracle.Cheapest(model).order(patterns)
    ranked = patterns[np.argsort(order)]
    keys = [
        (int(read), tuple(pattern)) for read, pattern in zip(cost.weight_bytes(model).of(ranked), ranked, strict=True)
    ]
    assert keys == sorted(keys) and sorted(order.tolist()) == list(range(81))


@given(st.data())
def test_offers_in_any_batches_give_the_one_answer(data):
    count, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    values = st.sampled_from([1.0, 2.0, 3.0])  # with ties
    losses = np.array(
        data.draw(st.lists(st.lists(values, min_size=tokens, max_size=tokens), min_size=count, max_size=count))
    )
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))[:, None]
    ranks = np.array(data.draw(st.permutations(range(count))))
    best, numbers = oracle.Best.of(tokens), np.array(data.draw(st.permutations(range(count))))
    cut = data.draw(st.integers(0, count))
    for part in (numbers[:cut], numbers[cut:]):
        part = part[np.argsort(ranks[part])]
        if len(part):
            best.offer(losses[part].astype(np.float32), part, ranks[part], allowed[part])
    for token in range(tokens):
        candidates = [(losses[each, token], ranks[each], each) for each in range(count) if allowed[each, 0]]
        if candidates:
            loss, rank, number = min(candidates)
            assert (best.loss[token], best.rank[token], best.number[token]) == (loss, rank, number)
        else:
            assert np.isinf(best.loss[token])
        assert best.seen[token] == len(candidates)
