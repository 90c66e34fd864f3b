"""Beam search and coordinate descent: on loss tables that are known whole, they find nearly what is lowest."""

from itertools import product

import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route
from duo_mlx.study import local, tree
from duo_mlx.study.oracle import Space

LAYERS, TOKENS = 8, 20
TWO = [(Route.SMALL, Route.BIG)] * LAYERS
THREE = [(Route.SKIP, Route.SMALL, Route.BIG)] * 5 + [(Route.SKIP, Route.BIG)]


def table_of(options, tokens=TOKENS, seed=0):
    """Losses ``[n, tokens]`` of all patterns: layers' own effects, effects of pairs, and a little of everything."""
    random = np.random.default_rng(seed)
    patterns = np.array(list(product(*options)), np.uint8)
    chosen = np.eye(len(Route))[patterns].reshape(len(patterns), -1)
    single = random.normal(0, 0.3, (chosen.shape[1], tokens))
    pair = random.normal(0, 0.05, (chosen.shape[1], chosen.shape[1], tokens))
    both = np.einsum("na,nb,abt->nt", chosen, chosen, pair)
    return patterns, (3 + chosen @ single + both + random.normal(0, 0.02, both.shape)).astype(np.float32)


def pool_of(patterns, losses, allows=lambda of: np.ones((len(of), 1), bool)):
    rows = {pattern.tobytes(): row for row, pattern in enumerate(patterns)}
    tried = []

    def score(asked):
        tried.extend(pattern.tobytes() for pattern in asked)
        return losses[[rows[pattern.tobytes()] for pattern in asked]]

    def price(of):
        return of.sum(axis=-1)

    return local.Pool(score, allows, price, losses.shape[1], patterns.shape[1]), tried


def exactly(count):
    return lambda of: ((of == Route.BIG).sum(axis=1) == count)[:, None]


@pytest.mark.parametrize("spec", ["beam:8", "descent:4"])
@pytest.mark.parametrize(("options", "allows"), [
    (TWO, lambda of: np.ones((len(of), 1), bool)), (TWO, exactly(3)), (TWO, exactly(0)), (TWO, exactly(LAYERS)),
    (THREE, lambda of: np.ones((len(of), 1), bool)), (THREE, exactly(2)),
    (THREE, lambda of: (of.sum(axis=1) <= 4)[:, None]),
])  # fmt: skip
def test_a_token_alone_comes_within_a_hundredth_of_the_range(spec, options, allows):
    patterns, losses = table_of(options)
    may = allows(patterns)[:, 0]
    gaps, seen = [], []
    for token in range(TOKENS):
        pool, tried = pool_of(patterns, losses[:, [token]], allows)
        found = local.find(pool, options, local.parse_method(spec), 0)
        assert len(tried) == len(set(tried)) == len(pool.patterns)  # none is tried twice
        assert found.loss[0] == losses[(patterns == found.patterns[0]).all(axis=1), token] and allows(found.patterns)
        assert found.seen[0] == allows(pool.patterns).sum()
        gaps.append(found.loss[0] - losses[may, token].min())
        seen.append(len(tried))
    scale = np.mean(losses[may].max(axis=0) - losses[may].min(axis=0))
    assert min(gaps) >= 0 and np.mean(gaps) <= 0.01 * scale
    assert np.mean(seen) < (0.75 if options is TWO else 0.5) * len(patterns)


def test_tokens_together_see_each_others_patterns_and_each_keeps_to_its_limit():
    patterns, losses = table_of(TWO)
    most = np.arange(TOKENS) % 4 + 1

    def allows(of):
        return (of == Route.BIG).sum(axis=1)[:, None] == most

    pool, _ = pool_of(patterns, losses, allows)
    found = local.find(pool, TWO, local.parse_method("beam:2"), 0)
    np.testing.assert_array_equal((found.patterns == Route.BIG).sum(axis=1), most)
    best = np.where(allows(patterns), losses, np.inf).min(axis=0)
    assert (found.loss - best).mean() < 0.01 and (found.loss >= best).all()
    np.testing.assert_array_equal(found.seen, allows(pool.patterns).sum(axis=0))


def test_wider_beams_and_more_starts_try_more_and_find_no_worse():
    patterns, losses = table_of(TWO, seed=1)
    for name in ("beam", "descent"):
        tried, loss = [], []
        for size in (1, 4, 16):
            pool, _ = pool_of(patterns, losses[:, :1], exactly(4))
            found = local.find(pool, TWO, local.Method(name, size), 0)
            tried.append(len(pool.patterns))
            loss.append(found.loss[0])
        assert tried == sorted(tried) and tried[0] < tried[-1] and loss == sorted(loss, reverse=True)


def test_ties_go_to_the_cheaper_pattern_and_then_to_the_lower_route_first():
    patterns, losses = table_of(TWO)
    pool, _ = pool_of(patterns, np.zeros_like(losses))
    found = local.find(pool, TWO, local.parse_method("beam"), 0)
    assert (found.patterns == Route.SMALL).all()
    pool, _ = pool_of(patterns, np.zeros_like(losses), exactly(1))
    pool.add(patterns)
    assert (pool.patterns[pool.best(0, 1)] == [*[Route.SMALL] * (LAYERS - 1), Route.BIG]).all()


def test_a_limit_without_a_pattern_is_named():
    patterns, losses = table_of(TWO)
    pool, _ = pool_of(patterns, losses, lambda of: np.zeros((len(of), 1), bool))
    with pytest.raises(DuoError, match="no pattern to start from is within the budget of 20 tokens, such as 0"):
        local.find(pool, TWO, local.parse_method("beam"), 0)


def test_a_scorer_gives_what_plain_passes_give_and_evaluates_nothing_twice(tiny_model):
    model, ids = tiny_model(), np.random.default_rng(0).integers(0, 32, 8)
    options = tree.layer_options(model, tuple(Route))
    every = Space(model, options).patterns
    score = local.Scorer(lambda wanted: tree.Text(model, ids[:-1], ids[1:], options, 5, wanted))
    asked = np.random.default_rng(1).permutation(every)[:9]
    found = score(asked)
    whole = tree.Text(model, ids[:-1], ids[1:], options)
    expected = {pattern.tobytes(): losses for batch in whole.losses() for pattern, losses in zip(*batch, strict=True)}
    np.testing.assert_allclose(found, [expected[pattern.tobytes()] for pattern in asked], rtol=0, atol=1e-5)
    edges = {bytes(pattern[:depth]) for pattern in asked for depth in range(1, 5)}
    ffns = sum(beginning[-1] != Route.SKIP for beginning in edges)
    assert (score.work.head, score.work.ffn) == (9, ffns)
    np.testing.assert_array_equal(score(asked[::-1]), found[::-1])
    assert score.work.head == 9


@pytest.mark.parametrize("spec", ["beam:0", "beam:", "beam:x", "descent:-1", "luck", "", "exhaustive:3"])
def test_methods_are_named_or_refused(spec):
    with pytest.raises(DuoError, match="give exhaustive, beam"):
        local.parse_method(spec)
    assert [str(local.parse_method(of)) for of in ("beam", "descent:2", "exhaustive")] == [
        "beam:8", "descent:2", "exhaustive",
    ]  # fmt: skip
