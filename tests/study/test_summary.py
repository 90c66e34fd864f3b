"""A summary of a small made-up table: means, baselines and intervals are what loops over it find."""

import json

import numpy as np
import pytest

from duo_mlx.intervals import interval
from duo_mlx.routes import Route, format_pattern
from duo_mlx.study import oracle, tree
from duo_mlx.study.limits import parse_limit
from duo_mlx.study.summary import summarise

LENGTH, LAYERS = 6, 4
BUDGETS = ("2", "3..1", "none")


@pytest.fixture
def space(tiny_model):
    return oracle.Space(tiny_model(), tree.layer_options(tiny_model(), (Route.SMALL, Route.BIG)))


@pytest.fixture
def limits(tiny_model):
    return [parse_limit(spec, tiny_model(), LENGTH) for spec in BUDGETS]


def price(patterns):
    """Bytes: 10 for a big layer, 3 for a small one."""
    return np.array([0, 3, 10])[patterns].sum(axis=-1)


def made_up(space, sequences, seed=0):
    """Arrays of sequences: random losses of all patterns, some of them as each budget's oracle, and five drawn ones."""
    random, found = np.random.default_rng(seed), []
    for number in range(sequences):
        losses = random.gamma(4.0, 1.0, (len(space.patterns), LENGTH)).astype(np.float32)
        each = {f"loss_{route.name.lower()}": random.random(LENGTH, np.float32) + route for route in Route}
        each |= {"table": losses, "means": losses.mean(axis=1), "work": np.array([number, 2 * number, 5])}
        each["peak_bytes"] = np.array(100 - number)
        for place in range(len(BUDGETS)):
            chosen = random.integers(0, len(space.patterns), LENGTH)
            each |= {
                f"oracle_loss_{place}": losses[chosen, np.arange(LENGTH)],
                f"oracle_routes_{place}": space.patterns[chosen],
                f"seen_{place}": random.integers(1, 16, LENGTH),
            }
        for place in (0, 2):
            each |= {f"drawn_{place}": losses[3:8].mean(axis=1), f"random_{place}": losses[3:8].min(axis=0)}
        found.append(each)
    return found


def lowest(found, on, candidates):
    """The pattern with the lowest loss over some of the sequences."""
    return min(candidates, key=lambda n: sum(float(found[at]["table"][n].sum()) for at in on))


def mean(rows):
    """Of all numbers of all rows."""
    numbers = [float(number) for row in rows for number in row]
    return pytest.approx(sum(numbers) / len(numbers), rel=1e-5)


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_means_are_over_all_tokens_of_all_sequences(space, limits, sequences):
    found = made_up(space, sequences)
    summary = summarise(found, space, limits, price)
    bigs = [each["oracle_routes_0"] == Route.BIG for each in found]
    share = np.mean([[(10 * token.sum() + 3 * (~token).sum()) / 40 for token in of] for of in bigs])
    assert summary["budgets"]["2"]["bytes"] == pytest.approx(share, rel=1e-6)
    for route in ("big", "small", "skip"):
        assert summary["uniform"][route] == mean([each[f"loss_{route}"] for each in found])
        for value, each in zip(summary["uniform_by_sequence"][route], found, strict=True):
            assert value == mean([each[f"loss_{route}"]])
    assert tuple(summary["budgets"]) == BUDGETS
    for place, budget in enumerate(BUDGETS):
        of = summary["budgets"][budget]
        losses = [each[f"oracle_loss_{place}"] for each in found]
        assert of["oracle"] == mean(losses)
        assert of["oracle_by_sequence"] == [mean([row]) for row in losses]
        assert of["difficulty"] == mean([each["loss_small"] - row for each, row in zip(found, losses, strict=True)])
        assert of["patterns_seen"] == mean([each[f"seen_{place}"] for each in found])
        bigs = [[list(pattern).count(Route.BIG) for pattern in each[f"oracle_routes_{place}"]] for each in found]
        assert of["big_layers"] == mean(bigs)
        resampled = interval([row.mean(dtype=np.float64) for row in losses], np.mean)
        assert of["oracle_interval"] == pytest.approx([resampled.low, resampled.high], rel=1e-5)
        assert of["controls"] is None
    assert summary["patterns"] == 16 and summary["peak_bytes"] == 100
    last = sequences - 1
    assert summary["work_a_sequence"] == {"attention": last / 2, "ffn": last, "head": 5}


@pytest.mark.parametrize("sequences", [2, 5])
def test_fixed_patterns_are_chosen_on_all_and_on_the_other_half(space, limits, sequences):
    found = made_up(space, sequences)
    summary = summarise(found, space, limits, price)
    for budget in ("2", "none"):
        bigs = (space.patterns == Route.BIG).sum(axis=1)
        within = [n for n in range(16) if budget == "none" or bigs[n] == 2]
        chosen = lowest(found, range(sequences), within)
        of = summary["budgets"][budget]
        assert of["fixed"] == mean([each["table"][chosen] for each in found])
        assert of["fixed_pattern"] == format_pattern(space.patterns[chosen])
        by_other = [lowest(found, range(1 - at % 2, sequences, 2), within) for at in range(sequences)]
        split = [found[at]["table"][by_other[at]] for at in range(sequences)]
        assert of["fixed_split"] == mean(split)
        assert of["fixed_split_by_sequence"] == [mean([row]) for row in split]
        assert of["fixed"] <= of["fixed_split"]


def test_one_sequence_has_no_other_half(space, limits):
    of = summarise(made_up(space, 1), space, limits, price)["budgets"]["2"]
    assert of["fixed_split"] is None and of["fixed_split_by_sequence"] is None and of["fixed"] > 0
    assert of["oracle_interval"] == pytest.approx([of["oracle"]] * 2)


def test_the_best_of_the_random_patterns_by_average_and_by_token(space, limits):
    found = made_up(space, 5)
    summary = summarise(found, space, limits, price)
    best = lowest(found, range(5), range(3, 8))
    for budget in ("2", "none"):
        of = summary["budgets"][budget]
        assert of["random"] == mean([each["table"][best] for each in found])
        assert of["random_by_sequence"] == [mean([each["table"][best]]) for each in found]
        assert of["random_by_token"] == mean([[min(each["table"][3:8, t]) for t in range(LENGTH)] for each in found])


def test_what_there_is_no_baseline_for_is_null_and_says_why(space, limits):
    found = made_up(space, 3)
    fixed = ("fixed", "fixed_pattern", "fixed_split", "fixed_split_by_sequence")
    drawn = ("random", "random_by_sequence", "random_by_token")
    schedule = summarise(found, space, limits, price)["budgets"]["3..1"]
    assert all(schedule[name] is None for name in (*fixed, *drawn)) and "schedule" in schedule["why_no_fixed"]
    for each in found:
        del each["means"]
    for summary in (summarise(found, space, limits, price), summarise(found, None, limits, price)):
        of = summary["budgets"]["2"]
        assert all(of[name] is None for name in fixed) and "exhaustive shared" in of["why_no_fixed"]
        assert of["random"] > 0
    assert summary["patterns"] is None


def test_controls_are_over_the_tokens_that_have_them(space, limits):
    found = made_up(space, 4)
    random = np.random.default_rng(1)
    for each in found:
        each["mean_loss_0"] = random.random(LENGTH, np.float32)
        each["to_short_0"] = np.where(np.arange(LENGTH) < 3, np.nan, random.random(LENGTH)).astype(np.float32)
        each["noise_12_0"] = each["mean_loss_1"] = np.full(LENGTH, np.nan, np.float32)
    summary = summarise(found, space, limits, price)
    of = summary["budgets"]["2"]["controls"]
    assert of.keys() == {"mean_loss", "to_short"}  # what no token has is left out
    assert summary["budgets"]["3..1"]["controls"] is None and summary["budgets"]["none"]["controls"] is None
    for name, first in (("mean_loss", 0), ("to_short", 3)):
        rows = [each[f"{name}_0"][first:] for each in found]
        assert of[name]["mean"] == mean(rows)
        resampled = interval([row.mean(dtype=np.float64) for row in rows], np.mean)
        assert of[name]["interval"] == pytest.approx([resampled.low, resampled.high], rel=1e-5)
    json.dumps(summary, allow_nan=False)


def test_sequences_are_resampled_whole(space, limits):
    found = made_up(space, 6)
    for each in found:  # tokens differ as before, sequences do not
        each["oracle_loss_0"] += 3 - each["oracle_loss_0"].mean(dtype=np.float64)
    low, high = summarise(found, space, limits, price)["budgets"]["2"]["oracle_interval"]
    assert low == pytest.approx(3, abs=1e-5) and high == pytest.approx(3, abs=1e-5)
