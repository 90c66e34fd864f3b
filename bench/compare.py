"""Two results of ``duo-mlx bench run``, B against A: what got faster, slower, smaller, better or worse.

For what is timed or metered: one value a round, the mean of its runs there and back; the logarithm of B over A,
paired by round number; its median and the 95 % bootstrap interval of the median. A loss is compared by its difference
in nats, which is the log-ratio of the perplexities, so that one threshold serves all: 2 % is 0.02 nats. Losses over
the same windows and peaks of memory have no noise from round to round and are compared exactly.

The interval tells how sure the difference of these two results is, not how far two runs of one program differ: compare
two results of the same program first.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from duo_mlx.bench import alike, summary
from duo_mlx.bench.alike import Record
from duo_mlx.errors import DuoError
from duo_mlx.intervals import Interval, interval

THRESHOLD = 0.02
ROUNDS = 3  # common to both, at least
SURE = 5  # rounds; the bootstrap of a median over fewer is from the least to the greatest and covers less than 93 %

ROUNDED = {
    "tpot_s": summary.tpot,
    "ttft_s": summary.ttft,
    "decode_j_per_token": summary.joules("decode"),
    "prefill_j_per_token": summary.joules("prefill"),
}
ENERGY = ("decode_j_per_token", "prefill_j_per_token")
EXACT: dict[str, Callable[[Record], Any]] = {
    "loss": lambda cell: cell["quality"] and cell["quality"]["loss"]["median"],
    "peak_bytes": lambda cell: cell["summary"] and cell["summary"]["peak_bytes"],
}
METRICS = (*ROUNDED, *EXACT)


class Row(NamedTuple):
    """One metric of one cell, or of all of them."""

    cell: str
    metric: str
    a: float  # median over the common rounds, in the metric's unit
    b: float
    change: Interval | None  # of log(B / A); None where it cannot be told
    rounds: int | None  # in common; None: exact
    verdict: str  # better, worse, same, undecided
    why: str = ""  # undecided, other than by the interval

    def record(self) -> dict[str, Any]:
        """For JSON; the change as a fraction of A, so that 0.02 is 2 % more."""
        change = self.change and {name: fraction(value) for name, value in self.change._asdict().items()}
        return self._asdict() | {"change": change}


@dataclass(frozen=True)
class Comparison:
    """All that there is to say; ``threshold`` is that of times and energy, ``asked`` that of what is exact."""

    asked: float
    threshold: float
    rows: list[Row]
    overall: Row | None  # TPOT over all cells; its ratio is a geometric mean
    only: dict[str, list[str]]  # by A and B: cells that the other one does not have
    invalid: dict[str, str]  # cells that both have and that are not valid in both: why
    notes: list[str]

    @property
    def regressed(self) -> bool:
        """Whether anything is worse."""
        return any(row.verdict == "worse" for row in (*self.rows, self.overall) if row)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "threshold": self.threshold,
            "threshold_asked": self.asked,
            "regressed": self.regressed,
            "rows": [row.record() for row in self.rows],
            "overall": self.overall and self.overall.record(),
            "only": self.only,
            "invalid": self.invalid,
            "notes": self.notes,
        }


def fraction(log_ratio: float) -> float:
    """A log-ratio as the change against A, 0.02 for 2 % more."""
    return math.expm1(min(log_ratio, 700.0))  # beyond this a float ends


def compare(
    a: Record, b: Record, threshold: float = THRESHOLD, metrics: Sequence[str] = (), allowed: Collection[str] = ()
) -> Comparison:
    """B against A.

    Args:
        a: a result as `duo_mlx.bench.results.read` gives it.
        b: another.
        threshold: the change, as a fraction, from which a difference matters; raised to the noise floor of A and B.
        metrics: of `METRICS`; those that both have unless given.
        allowed: of `duo_mlx.bench.alike.DIFFERENCES`; in what A and B may differ.

    Raises:
        DuoError: A and B were not measured alike, or have nothing in common.
    """
    notes = alike.differences(a, b, allowed)
    cells = [{cell["id"]: cell for cell in result["cells"]} for result in (a, b)]
    ids = [name for name in cells[0] if name in cells[1]]
    if not ids:
        first = ["; the first is " + next(iter(found), "none at all") for found in cells]
        raise DuoError(f"A and B have no cell in common: A has {len(cells[0])}{first[0]}, B {len(cells[1])}{first[1]}")
    invalid = {name: why for name in ids if (why := _invalid(cells[0][name], cells[1][name]))}
    if len(invalid) == len(ids):
        raise DuoError(f"no cell is valid in both A and B: {ids[0]}: {invalid[ids[0]]}")
    pairs = {name: (cells[0][name], cells[1][name]) for name in ids if name not in invalid}
    raised = _raised(a, b, threshold, notes)
    elsewhere = _elsewhere(a, b)
    rows = []
    tpots: list[dict[int, float]] = []
    for metric in dict.fromkeys(metrics or METRICS):
        for name, pair in pairs.items():
            if metric in EXACT:
                row = _exact(name, metric, pair, threshold)
            else:
                sides = [_rounds(cell, ROUNDED[metric]) for cell in pair]
                row = _paired(name, metric, sides, raised)
                if metric == "tpot_s" and row and row.change:
                    tpots.append(_ratios(sides))
            if row:
                other = elsewhere.get(metric)
                rows.append(row._replace(change=None, verdict="undecided", why=other) if other else row)
    _missing(pairs, rows, metrics, notes)
    overall = _overall(tpots, raised)
    if tpots and not overall:
        notes.append(f"TPOT over all cells is not given: they have fewer than {ROUNDS} rounds in common")
    few = min((row.rounds for row in rows if row.change and row.rounds), default=SURE)
    if few < SURE:
        notes.append(
            f"with {few} rounds an interval is from the least to the greatest and holds the true change in "
            f"{1 - 2 ** (1 - few):.0%} of cases, not in 95 %: measure {SURE} rounds or more"
        )
    only = {"A": [name for name in cells[0] if name not in ids], "B": [name for name in cells[1] if name not in ids]}
    return Comparison(threshold, raised, rows, overall, only, invalid, notes)


def _rounds(cell: Record, value: Callable[[summary.Run], float | None]) -> dict[int, float]:
    """A cell's values by number of round, of its valid rounds."""
    found = summary.by_round(summary.valid_rounds(cell["runs"]), value) or {}
    return {number: each for number, each in sorted(found.items()) if _usable(each)}


def _usable(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and value > 0


def _ratios(sides: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """log(B / A) by number of round."""
    return {
        number: math.log(sides[1][number]) - math.log(value) for number, value in sides[0].items() if number in sides[1]
    }


def _paired(name: str, metric: str, sides: Sequence[Mapping[int, float]], threshold: float) -> Row | None:
    if not all(sides):
        return None
    ratios = _ratios(sides)
    middle = [float(np.median([side[number] for number in ratios or side])) for side in sides]
    if len(ratios) < ROUNDS:
        why = f"too few rounds: {len(ratios)} in common, {ROUNDS} needed"
        return Row(name, metric, middle[0], middle[1], None, len(ratios), "undecided", why)
    change = interval(list(ratios.values()))
    return Row(name, metric, middle[0], middle[1], change, len(ratios), _verdict(change, threshold))


def _exact(name: str, metric: str, pair: Sequence[Record], threshold: float) -> Row | None:
    one, other = (EXACT[metric](cell) for cell in pair)
    if not (_usable(one) and _usable(other)):
        return None
    if metric == "loss" and pair[0]["quality"]["tokens"] != pair[1]["quality"]["tokens"]:
        return Row(name, metric, one, other, None, None, "undecided", "over another number of held-out tokens")
    ratio = other - one if metric == "loss" else math.log(other) - math.log(one)
    change = Interval(ratio, ratio, ratio)
    return Row(name, metric, one, other, change, None, _verdict(change, threshold))


def _verdict(change: Interval, threshold: float) -> str:
    """All metrics are better when they are less. The limits are alike for B against A and for A against B."""
    limit = math.log1p(threshold)
    if change.low > limit:
        return "worse"
    if change.high < -limit:
        return "better"
    return "same" if -limit <= change.low and change.high <= limit else "undecided"


def _overall(tpots: Sequence[Mapping[int, float]], threshold: float) -> Row | None:
    """TPOT over all cells: cells of one round share its noise, so their mean in each round is what is drawn from."""
    common = sorted(set.intersection(*map(set, tpots))) if tpots else []
    if len(common) < ROUNDS:
        return None
    change = interval([float(np.mean([ratios[number] for ratios in tpots])) for number in common])
    return Row(
        f"{len(tpots)} cells",
        "tpot_s",
        1.0,
        1 + fraction(change.median),
        change,
        len(common),
        _verdict(change, threshold),
    )


def _invalid(one: Record, other: Record) -> str:
    whys = {
        side: ", ".join(cell["invalid_why"]) or "not said why"
        for side, cell in (("A", one), ("B", other))
        if not cell["valid"]
    }
    return "; ".join(f"in {side}: {why}" for side, why in whys.items())


def _raised(a: Record, b: Record, threshold: float, notes: list[str]) -> float:
    """The threshold, or the noise floor where that is larger: how far from no difference A against A may lie."""
    worst = 0.0
    for side, result in (("A", a), ("B", b)):
        floors = [floor for session in result["sessions"] if (floor := session["noise_floor"])]
        if not floors:
            notes.append(f"{side} has no noise floor: how far it differs from itself is not known")
        worst = max([worst, *(abs(floor[edge] - 1) for floor in floors for edge in ("low", "high"))])
    if worst <= threshold:
        return threshold
    notes.append(f"the threshold of times and energy is raised from {threshold:.2%} to the noise floor, {worst:.2%}")
    return worst


def _elsewhere(a: Record, b: Record) -> dict[str, str]:
    """Why metrics cannot be compared between two results that may be compared otherwise."""
    found = {}
    if a["texts"]["held_out"]["sha256"] != b["texts"]["held_out"]["sha256"]:
        found["loss"] = "over another held-out text"
    labels = [result["meter"]["label"] for result in (a, b)]
    if labels[0] != labels[1]:
        found |= dict.fromkeys(ENERGY, f"by another meter: {labels[0]} in A, {labels[1]} in B")
    return found


def _missing(
    pairs: Mapping[str, Sequence[Record]], rows: Sequence[Row], metrics: Sequence[str], notes: list[str]
) -> None:
    """Refuse metrics that were asked for and are nowhere in both; note what only one of the two has."""
    compared = {(row.cell, row.metric) for row in rows}
    for metric in metrics or METRICS:
        left = [pair for name, pair in pairs.items() if (name, metric) not in compared]
        if metrics and len(left) == len(pairs):
            whys = dict.fromkeys(why for pair in left for cell in pair if (why := _why(cell, metric)))
            raise DuoError("; ".join((f"--metric {metric}: no cell has it in both A and B", *whys)))
        for side, which in (("A", 0), ("B", 1)):
            if alone := sum(_has(pair[which], metric) for pair in left):
                notes.append(f"{metric} is not compared in {alone} of {len(pairs)} cells: only {side} has it there")
    if not rows:
        raise DuoError("A and B have no figure in common: no cell has a valid round in both")


def _has(cell: Record, metric: str) -> bool:
    return _usable(EXACT[metric](cell)) if metric in EXACT else bool(_rounds(cell, ROUNDED[metric]))


def _why(cell: Record, metric: str) -> str:
    return str(cell["summary"]["why_no_energy"]) if metric in ENERGY and cell["summary"] else ""
