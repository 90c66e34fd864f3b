"""What is the same for all sequences of a question: random patterns, batches, and what is refused."""

import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route
from duo_mlx.study import sequence

LENGTH = 6
IDS = np.random.default_rng(3).integers(0, 32, LENGTH + 1)


@pytest.fixture
def searcher(tiny_model):
    """``searcher(budgets, **changes)``: of a tiny model."""

    def make(*budgets, memory=1 << 24, **changes):
        asked = {"choices": "-sB", "prefix": "shared", "budgets": budgets, "seed": 1, "text": {}, "model": {}}
        return sequence.Searcher(tiny_model(), sequence.Question(**asked | changes), LENGTH, memory)

    return make


@pytest.mark.parametrize("search", ["exhaustive", "beam:2"])
def test_random_patterns_are_within_the_budget_and_the_same_for_all_texts(searcher, search):
    drawn = searcher("at-most:3", "1", "2", "bytes:0.7", "3..1", search=search)._drawn
    assert set(drawn) == {"at-most:3", "1", "2", "bytes:0.7"}
    assert all(len(np.unique(patterns, axis=0)) == len(patterns) for patterns in drawn.values())
    bigs = {name: (patterns == Route.BIG).sum(axis=1) for name, patterns in drawn.items()}
    assert len(bigs["at-most:3"]) == 80 and bigs["at-most:3"].max() == 3
    assert len(bigs["1"]) == 32 and (bigs["1"] == 1).all() and len(bigs["2"]) == 24 and (bigs["2"] == 2).all()
    again = searcher("at-most:3", search=search)._drawn["at-most:3"]
    np.testing.assert_array_equal(drawn["at-most:3"], again)


@pytest.mark.parametrize("prefix", ["shared", "committed"])
def test_local_search_finds_what_all_patterns_hold_where_they_are_few(searcher, prefix):
    """On four layers a beam of 8 and its neighbours leave out little: no token is far from the best."""
    window = IDS
    budgets = ("none", "2", "at-most:1", "3..1")
    every = searcher(*budgets, prefix=prefix).sequence(window, 0)
    for search in ("beam:8", "descent:4"):
        found = searcher(*budgets, prefix=prefix, search=search).sequence(window, 0)
        for place in range(len(budgets)):
            best, own = every[f"oracle_loss_{place}"], found[f"oracle_loss_{place}"]
            assert (found[f"seen_{place}"] <= every[f"seen_{place}"]).all()
            if prefix == "shared":
                np.testing.assert_allclose(own, best, rtol=0, atol=1e-5)
            else:  # a token that differs has other keys and values after it
                assert own[0] == pytest.approx(best[0], abs=1e-5) and own.mean() < best.mean() + 0.01
            bigs = (found[f"oracle_routes_{place}"] == Route.BIG).sum(axis=1)
            assert {"none": True, "2": (bigs == 2).all(), "at-most:1": (bigs <= 1).all()}.get(budgets[place], True)
        assert bigs.tolist() == [3, 3, 2, 2, 1, 1]  # of the schedule
        assert found["work"][2] < 4 * 81 * LENGTH


def test_too_many_patterns_are_refused_with_the_cost_and_what_would_do():
    options = [(Route.SMALL, Route.BIG)] * 30
    with pytest.raises(DuoError, match=r"1.1e\+09 patterns of 30 layers are too many .* give --search beam"):
        sequence.refuse_many(options, 128)
    sequence.refuse_many(options[:20], 128)


def test_batches_grow_with_the_memory_and_never_vanish(tiny_model):
    model = tiny_model()
    rows = [sequence.rows_within(model, LENGTH, LENGTH, size) for size in (1, 1 << 16, 1 << 18, 1 << 40)]
    assert rows[0] == 1 and rows == sorted(rows) and rows[-1] == sequence.CACHED // LENGTH and rows[1] < rows[2]
    assert sequence.rows_within(model, 1, LENGTH, 1 << 40) == sequence.MOST_ROWS


def test_controls_need_every_pattern_and_their_memory(searcher):
    with pytest.raises(DuoError, match="--controls: only --prefix shared with --search exhaustive"):
        searcher("2", controls=True, search="beam:2")
    with pytest.raises(DuoError, match="--controls: only --prefix shared"):
        searcher("2", controls=True, prefix="committed")
    with pytest.raises(DuoError, match="keeps all losses and needs --max-memory 2 or more"):
        searcher("2", controls=True, memory=1000)
