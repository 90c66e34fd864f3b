"""What figures decide about a claim: it holds, it fails, or it is undecided at this size.

A claim says within which bounds figures lie, such as a difference of losses above 0. A figure has a 95 % interval, by
resampling sequences: it holds where the whole interval lies within its bounds, fails where the whole interval lies
without, and is undecided otherwise, also where there is nothing to compute it from. A claim holds if all of its figures
hold, and fails if any fails: by chance alone, one figure in 40 does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import inf, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import Interval, of_means
from duo_mlx.study.results import Found

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
COUNTED = {HOLDS: "hold", FAILS: "fail", UNDECIDED: "undecided"}
ABOVE_0 = (0.0, inf)
FEWEST = 6  # sequences: all of n lie on one side by chance in 2 of 2 ** n cases, which is below 5 % from here on
TOLD = 2  # reasons of one kind that a sentence names


@dataclass(frozen=True)
class Values:
    """Something of each token ``[sequences, length]``, or of each sequence ``[sequences, 1]``; or why there is nothing.

    NaN where a token has none.
    """

    array: NDArray[Any] | None
    why: str = ""

    @classmethod
    def of(cls, found: Found, budget: int | str, name: str) -> "Values":
        """An array of a budget's table."""
        table = found.tables.get(str(budget))
        if table is None:
            return cls(None, f"budget {budget} is missing")
        if name not in table:
            return cls(None, f"there is no {words(name)}, which takes --controls")
        return cls(None, f"budget {budget} has no {words(name)}") if np.isnan(table[name]).all() else cls(table[name])

    @classmethod
    def baseline(cls, found: Found, budget: int, name: str) -> "Values":
        """A baseline of each sequence, from the summary."""
        of = found.summary["budgets"].get(str(budget))
        if of is None:
            return cls(None, f"budget {budget} is missing")
        losses = of.get(f"{name}_by_sequence")
        if losses is None:
            return cls(None, f"budget {budget} has no {words(name)} by sequence")
        return cls(np.array(losses, np.float64)[:, None])

    def __sub__(self, other: "Values") -> "Values":
        if self.array is None or other.array is None:
            return Values(None, self.why or other.why)
        return Values(self.array.astype(np.float64) - other.array)

    def by_sequence(self) -> NDArray[np.float64]:
        """The mean of each sequence's tokens, ``[sequences, 1]``."""
        assert self.array is not None
        there = ~np.isnan(self.array)
        sums = np.where(there, self.array, 0).sum(axis=1, keepdims=True, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            return sums / there.sum(axis=1, keepdims=True)


def words(name: str) -> str:
    """The name of an array for people."""
    return name.removesuffix("_loss").replace("_", " ")


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval, where there is one."""

    interval: Interval | None
    why: str = ""  # it decides nothing
    over: str = ""  # what the interval is


NOT_FINITE = Estimate(None, "it is not finite")


def resampled(found: Interval, sequences: int, nothing: Estimate = NOT_FINITE) -> Estimate:
    """What resampling so many sequences found, or what is to be said where it is no number."""
    if not all(map(isfinite, found)):
        return nothing
    few = f"{sequences} sequences, fewer than {FEWEST}, are too few to decide" if sequences < FEWEST else ""
    return Estimate(found, few, f"95 % over {sequences} sequences")


def mean(values: Values) -> Estimate:
    """The mean of sequences' means."""
    if values.array is None:
        return Estimate(None, values.why)
    return resampled(of_means(values.by_sequence(), lambda means: means[..., 0]), len(values.array))


def alone(value: float) -> Estimate:
    """A figure without an interval."""
    return Estimate(Interval(value, value, value), over="no interval") if isfinite(value) else NOT_FINITE


def of_runs(values: Sequence[float], what: str) -> Estimate:
    """The mean of a few training runs, whose lowest and highest stand in for an interval."""
    if not values:
        return Estimate(None, f"there are no {what}")
    if not all(map(isfinite, values)):
        return NOT_FINITE
    few = f"one of {what} is too few to decide" if len(values) == 1 else ""
    return Estimate(Interval(float(np.mean(values)), min(values), max(values)), few, f"all {len(values)} {what}")


@dataclass(frozen=True)
class Figure:
    """One figure of a claim, or one that is told beside it."""

    name: str  # figures of one name are told as one
    estimate: Estimate
    bounds: tuple[float, float] | None = ABOVE_0  # where it is claimed to lie; None: nothing is claimed
    at: str = ""  # where it was taken, such as a budget
    unit: str = "nats"

    @property
    def verdict(self) -> str | None:
        """None where nothing is claimed."""
        if self.bounds is None:
            return None
        found, (low, high) = self.estimate.interval, self.bounds
        if found is None or self.estimate.why:
            return UNDECIDED
        if low < found.low and found.high < high:
            return HOLDS
        return FAILS if found.high < low or high < found.low else UNDECIDED

    def shown(self) -> str:
        """For a sentence."""
        assert self.estimate.interval is not None
        value, low, high = self.estimate.interval
        return " ".join(filter(None, (f"{value:.3g}", f"[{low:.3g}, {high:.3g}]" if low < high else "", self.unit)))

    def record(self) -> dict[str, Any]:
        """For a result's JSON; a bound of null is none."""
        found = self.estimate.interval
        return {
            "name": self.name,
            "at": self.at,
            "unit": self.unit,
            "value": found and found.median,
            "interval": found and [found.low, found.high],
            "over": self.estimate.over,
            "claimed": self.bounds and [bound if isfinite(bound) else None for bound in self.bounds],
            "verdict": self.verdict,
            "why": self.estimate.why,
        }


@dataclass(frozen=True)
class Outcome:
    """What became of a claim, by one reading of it.

    Args:
        figures: on which it rests, and those beside them.
        holds, fails: what it means if it does.
        remark: what a reader must know.
        open: what belongs to the claim but was not looked at, and why; the verdict is about the rest.
    """

    figures: tuple[Figure, ...]
    holds: str = ""
    fails: str = ""
    remark: str = ""
    open: str = ""

    @classmethod
    def missing(cls, why: str) -> "Outcome":
        """Undecided, as there is nothing to look at."""
        return cls((Figure("", Estimate(None, why)),))

    @property
    def verdict(self) -> str:
        """Of all figures together."""
        found = {figure.verdict for figure in self.figures} - {None}
        return FAILS if FAILS in found else HOLDS if found == {HOLDS} else UNDECIDED

    @property
    def sentence(self) -> str:
        """The verdict in words, with the figures."""
        lacking = any(figure.verdict and figure.estimate.why for figure in self.figures)
        undecided = UNDECIDED if lacking else f"{UNDECIDED} at this size"
        said = {HOLDS: self.holds, FAILS: self.fails, UNDECIDED: undecided}[self.verdict]
        told = [_told(list(alike)) for _, alike in groupby(self.figures, lambda figure: figure.name)]
        weak = dict.fromkeys(figure.estimate.why for figure in self.figures if figure.estimate.interval)
        return f"{said}: {'; '.join(filter(None, (*told, self.remark, *weak, self.open)))}"

    def record(self) -> dict[str, Any]:
        """For a result's JSON."""
        return {
            "verdict": self.verdict,
            "open": self.open,
            "sentence": self.sentence,
            "figures": [figure.record() for figure in self.figures],
        }


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and what became of it as the paper reads it and with a control."""

    number: int
    text: str
    without: Outcome
    control: Outcome

    def record(self) -> dict[str, Any]:
        """For a result's JSON."""
        outcomes = {"without_control": self.without.record(), "with_control": self.control.record()}
        return {"number": self.number, "claim": self.text} | outcomes


def _told(alike: list[Figure]) -> str:
    """Figures of one name: that which speaks for the claim the least, how many hold and fail, and what is missing."""
    known = [(_margin(figure), place) for place, figure in enumerate(alike) if figure.estimate.interval]
    text, least = alike[0].name, alike[min(known)[1]] if known else None
    if least:
        text += f" {least.shown()}" + (f" at {least.at}" if least.at else "")
    if least and len(alike) > 1:
        verdicts = [figure.verdict for figure in alike]
        counts = ", ".join(f"{verdicts.count(each)} {word}" for each, word in COUNTED.items() if each in verdicts)
        text += f", the least of {len(known)}" + (f" ({counts})" if counts else "")
    whys = list(dict.fromkeys(figure.estimate.why for figure in alike if not figure.estimate.interval))
    more = f" and {len(whys) - TOLD} more such reasons" if len(whys) > TOLD else ""
    return ": ".join(filter(None, (text, ", ".join(whys[:TOLD]) + more)))


def _margin(figure: Figure) -> float:
    """How far within its bounds the interval lies; where nothing is claimed, how far above 0."""
    assert figure.estimate.interval is not None
    low, high = figure.bounds or ABOVE_0
    return min(figure.estimate.interval.low - low, high - figure.estimate.interval.high)
