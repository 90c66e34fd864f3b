"""Bootstrap intervals: they hold the true figure about as often as they say."""

import numpy as np
import pytest

from duo_mlx.intervals import interval, of_means


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


def test_a_function_of_means_has_the_interval_that_resampled_rows_have():
    random = np.random.default_rng(3)
    counts = random.integers(1, 9, 30)
    values = np.stack([counts * random.normal(2.0, 0.5, 30), counts], axis=1)
    found = of_means(values, lambda means: means[..., 0] / means[..., 1], draws=4000)
    drawn = [values[random.integers(0, 30, 30)].sum(axis=0) for _ in range(4000)]
    low, high = np.quantile([total / count for total, count in drawn], (0.025, 0.975))
    assert found.median == pytest.approx(values[:, 0].sum() / counts.sum())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_paired_columns_cancel_what_they_share():
    random = np.random.default_rng(4)
    shared = random.normal(0.0, 5.0, 40)
    values = np.stack([shared + random.normal(0.0, 0.1, 40), shared + 0.2], axis=1)
    found = of_means(values, lambda means: means[..., 0] - means[..., 1])
    assert found.high < 0 and found.high - found.low < 0.1


def test_draws_without_the_figure_are_left_out_and_no_figure_is_nan():
    values = np.array([[1.0, 1.0], [0.0, 0.0], [2.0, 1.0]])
    found = of_means(values, lambda means: means[..., 0] / means[..., 1])
    assert (found.low, found.high) == (1.0, 2.0) and found.median == 1.5
    assert np.isnan(of_means(np.zeros((3, 2)), lambda means: means[..., 0] / means[..., 1])).all()
