"""How sure a figure is: bootstrap intervals over rounds or windows."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 2000


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
    low, high = np.quantile(of(drawn, axis=1), (0.025, 0.975))
    return Interval(float(of(values, axis=0)), float(low), float(high))
