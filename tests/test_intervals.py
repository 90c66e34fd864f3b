"""Bootstrap intervals: they hold the true figure about as often as they say."""

import numpy as np
import pytest

from duo_mlx.intervals import interval


@pytest.mark.parametrize(("of", "draw", "true"), [
    (np.median, lambda random, size: random.normal(3.0, 0.2, size), 3.0),
    (np.median, lambda random, size: random.lognormal(0.0, 0.5, size), 1.0),
    (np.mean, lambda random, size: random.uniform(1.0, 2.0, size), 1.5),
])  # fmt: skip
@pytest.mark.parametrize("size", [5, 20])
def test_most_intervals_hold_the_true_figure(of, draw, true, size):
    random = np.random.default_rng(7)
    found = [interval(draw(random, size), of, draws=400) for _ in range(400)]
    held = np.mean([each.low <= true <= each.high for each in found])
    # 95 % of many values; few values make percentile intervals too narrow
    assert (0.90 if size == 20 else 0.80) < held < 0.985
    assert np.median([each.median for each in found]) == pytest.approx(true, rel=0.05)


def test_more_values_are_surer():
    values = np.random.default_rng(1).normal(1.0, 0.1, 200)
    few, many = (interval(values[:size]) for size in (8, 200))
    assert many.high - many.low < (few.high - few.low) / 2


def test_one_value_is_its_own_interval():
    assert interval([0.25]) == (0.25, 0.25, 0.25)


def test_the_figure_is_the_median_or_the_mean_of_the_values():
    values = [1.0, 2.0, 9.0]
    assert interval(values).median == 2.0 and interval(values, np.mean).median == 4.0
    assert interval(values).low >= 1.0 and interval(values).high <= 9.0


def test_it_repeats_and_follows_the_seed():
    values = np.random.default_rng(2).normal(size=12).tolist()
    assert interval(values, np.mean) == interval(values, np.mean) != interval(values, np.mean, seed=1)


def test_a_record_is_plain_json():
    found = interval([1, 2, 3]).record()
    assert list(found) == ["median", "low", "high"] and all(type(value) is float for value in found.values())
