"""Timing several callables against each other on a machine that does not stand still.

Runs are interleaved: each round times every callable once there and once back (A B C C B A), so that a machine that
warms up, throttles or is shared slows all of them alike, and a linear drift within a round cancels. Compare paired
ratios within rounds, not times of different rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timings:
    """What `interleave` measured: ``runs``, seconds by name, two a round in the order in which they ran."""

    runs: dict[str, list[float]]

    def rounds(self, name: str) -> list[float]:
        """Seconds a run of ``name``, one value a round: the mean of there and back."""
        there_and_back = self.runs[name]
        return [(there + back) / 2 for there, back in zip(there_and_back[::2], there_and_back[1::2], strict=True)]

    def median(self, name: str) -> float:
        """Median of ``name``'s runs in seconds."""
        return statistics.median(self.runs[name])

    def best(self, name: str) -> float:
        """The fastest run of ``name`` in seconds: what is least disturbed."""
        return min(self.runs[name])

    def ratios(self, name: str, weights: Mapping[str, float]) -> list[float]:
        """``name``'s time divided by the weighted sum of other times, paired within each round.

        ``{"other": 1}`` compares two names; ``{"a": 0.5, "b": 0.5}`` compares with the mean of two.
        """
        parts = [[weight * seconds for seconds in self.rounds(other)] for other, weight in weights.items()]
        totals = [sum(part) for part in zip(*parts, strict=True)]
        return [seconds / total for seconds, total in zip(self.rounds(name), totals, strict=True)]


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm_up: int = 1,
    after_round: Callable[[int], object] = lambda done: None,  # noqa: ARG005
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time ``calls`` in interleaved rounds.

    Args:
        calls: what to time, by name; each call must wait for its own result (`mx.eval`).
        rounds: how many times to go there and back.
        warm_up: calls of each before anything is timed.
        after_round: called with the number of rounds done, for progress.
        clock: seconds.
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(1, rounds + 1):
        for name in (*calls, *reversed(list(calls))):
            start = clock()
            calls[name]()
            runs[name].append(clock() - start)
        after_round(done)
    return Timings(runs)
