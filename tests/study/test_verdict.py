"""What figures decide: a figure by its interval, a claim by its figures, and the sentence in which they are told."""

import numpy as np
import pytest

from duo_mlx.intervals import Interval
from duo_mlx.study.verdict import FAILS, HOLDS, UNDECIDED, Estimate, Figure, Outcome, Values, mean, of_runs


@pytest.mark.parametrize(
    ("interval", "bounds", "verdict"),
    [
        ((1.0, 0.5, 2.0), (0, np.inf), HOLDS),
        ((1.0, -0.5, 2.0), (0, np.inf), UNDECIDED),
        ((0.0, 0.0, 0.0), (0, np.inf), UNDECIDED),
        ((-1.0, -2.0, -0.5), (0, np.inf), FAILS),
        ((0.5, 0.46, 0.54), (0.45, 0.55), HOLDS),
        ((0.5, 0.4, 0.54), (0.45, 0.55), UNDECIDED),
        ((0.5, 0.4, 0.6), (0.45, 0.55), UNDECIDED),
        ((0.6, 0.56, 0.7), (0.45, 0.55), FAILS),
        ((0.3, 0.2, 0.44), (0.45, 0.55), FAILS),
        ((0.3, 0.2, 0.4), None, None),
    ],
)
def test_a_figure_is_decided_by_its_whole_interval(interval, bounds, verdict):
    assert Figure("", Estimate(Interval(*interval)), bounds).verdict == verdict
    assert Figure("", Estimate(Interval(*interval), "too few"), bounds).verdict == (verdict and UNDECIDED)
    assert Figure("", Estimate(None, "missing"), bounds).verdict == (verdict and UNDECIDED)


def test_a_claim_holds_if_all_figures_do_and_fails_if_any_does():
    of = {
        HOLDS: Figure("a", Estimate(Interval(1, 0.5, 2))),
        FAILS: Figure("b", Estimate(Interval(-1, -2, -0.5))),
        UNDECIDED: Figure("c", Estimate(Interval(0, -1, 1))),
        None: Figure("d", Estimate(Interval(-1, -2, -0.5)), None),
    }
    for names, verdict in (
        ((HOLDS, None), HOLDS),
        ((HOLDS, UNDECIDED), UNDECIDED),
        ((HOLDS, UNDECIDED, FAILS), FAILS),
        ((None,), UNDECIDED),
        ((), UNDECIDED),
    ):
        assert Outcome(tuple(of[name] for name in names)).verdict == verdict


def test_few_sequences_decide_nothing():
    values = np.random.default_rng(1).normal(3, 0.1, (6, 4))
    assert Figure("", mean(Values(values))).verdict == HOLDS
    few = mean(Values(values[:5]))
    assert Figure("", few).verdict == UNDECIDED and few.interval.low > 0 and "5 sequences" in few.why


def test_a_mean_is_over_sequences_and_leaves_out_tokens_that_have_none():
    values = np.arange(24.0).reshape(6, 4)
    values[0, :2] = np.nan
    found = mean(Values(values) - Values(np.ones((6, 1))))
    assert found.interval.median == pytest.approx(np.mean([2.5, *values[1:].mean(axis=1)]) - 1)
    assert found.interval.low < found.interval.median < found.interval.high
    values[1] = np.nan
    assert mean(Values(values)) == Estimate(None, "it is not finite")


def test_runs_have_no_interval_but_their_ends():
    assert tuple(of_runs([1.0, 2.0, 6.0], "pairs").interval) == (3, 1, 6)
    assert of_runs([1.0], "pairs").why == "one of pairs is too few to decide"
    assert of_runs([], "pairs") == Estimate(None, "there are no pairs")
    assert of_runs([1.0, float("nan")], "pairs") == Estimate(None, "it is not finite")


def test_of_figures_that_are_told_as_one_the_weakest_is_named():
    alike = [Figure("less", Estimate(Interval(value, value - 1, value + 1)), at=f"k={value}") for value in (2, -3, 4)]
    other = Figure("share", Estimate(None, "budget 3 is missing"))
    told = Outcome((*alike, other), holds="so it is", fails="it is not").sentence
    assert told == (
        "it is not: less -3 [-4, -2] nats at k=-3, the least of 3 (2 hold, 1 fail); share: budget 3 is missing"
    )
