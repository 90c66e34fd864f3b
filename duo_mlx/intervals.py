"""How sure a figure is: bootstrap intervals over rounds, windows or sequences."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 2000
BOUNDS = (0.025, 0.975)


class Interval(NamedTuple):
    """A figure and its 95 % interval."""

    median: float
    low: float
    high: float

    def record(self) -> dict[str, float]:
        """For a result's JSON."""
        return dict(self._asdict())


def interval(
    values: Sequence[float], of: Callable[..., Any] = np.median, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """``of`` (a function of NumPy with an ``axis``) of the values, and its percentile bootstrap interval.

    One value is its own interval, which says nothing.
    """
    drawn = np.random.default_rng(seed).choice(np.array(values, np.float64), (draws, len(values)))
    low, high = np.quantile(of(drawn, axis=1), BOUNDS)
    return Interval(float(of(values, axis=0)), float(low), float(high))


def of_means(
    values: NDArray[np.floating], of: Callable[[NDArray[np.float64]], Any], seed: int = 0, draws: int = DRAWS
) -> Interval:
    """A function of columns' means, and its percentile bootstrap interval over rows.

    Rows stay whole, so that what one row holds of two columns stays paired, and what depends within a row does not
    count as independent. A ratio of sums is the ratio of their means.

    Args:
        values: ``[rows, columns]``, such as sums over each sequence's tokens.
        of: takes means ``[..., columns]`` and gives figures ``[...]``; draws where they are not finite are left out.
        seed: of the draws.
        draws: how many.

    Returns:
        The figure of all rows and its interval; all NaN where it is not finite.
    """
    rows = len(values)
    weights = _shares(rows, seed, draws)
    with np.errstate(divide="ignore", invalid="ignore"):
        whole, drawn = float(of(values.mean(axis=0, dtype=np.float64))), of(weights @ values.astype(np.float64))
    if not np.isfinite(whole):
        return Interval(*[float("nan")] * 3)
    low, high = np.quantile(drawn[np.isfinite(drawn)], BOUNDS)
    return Interval(whole, float(low), float(high))


@lru_cache(maxsize=4)  # a study asks for hundreds of figures over the same rows
def _shares(rows: int, seed: int, draws: int) -> NDArray[np.float64]:
    """Which share of each draw every row has, ``[draws, rows]``."""
    drawn: NDArray[np.float64] = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), draws) / rows
    return drawn
