"""What an oracle's routes would give, beside one pattern for all tokens and what was measured."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from duo_mlx.bench.report.charts import Axis, Chart, Point, Series, Value, enumerate_once
from duo_mlx.bench.report.rows import PEER, Result, joined, usable
from duo_mlx.study import results as study

BYTES = "weight bytes a token, over all big's"
BASELINES = {
    "random": "best of 100 random patterns",
    "fixed_split": "best fixed pattern, chosen on other sequences",
}


def quality(results: Sequence[Result], oracle: Path) -> Chart:
    """Loss against bytes: an oracle's budgets, its baselines, and the cells of the results.

    Args:
        results: of benchmarks.
        oracle: the folder of a finished oracle.

    Raises:
        DuoError: it is none.
    """
    summary = study.read(oracle).summary
    whose = f"{summary['model'].get('name', '')}, {summary['prefix']}"
    series = [_oracle(summary, whose)]
    series += [
        Series(title, "line", _baseline(summary, whose, name, title), number, number)
        for number, (name, title) in enumerate(BASELINES.items(), 1)
    ]
    shown = [
        cell for cell in usable(results) if cell.record["quality"] and cell.summary("byte_ratio") and not cell.peer
    ]
    worst = max((point.y for each in series for point in each.points if not isinstance(point.y, str)), default=0.0)
    groups = enumerate_once(cell.group for cell in shown)
    for group, number in groups.items():
        points = []
        for cell in shown:
            loss, share = cell.record["quality"]["loss"], 1 / cell.summary("byte_ratio")
            if cell.group == group and loss["median"] <= 1.2 * worst:
                row: tuple[Value, ...] = (*cell.who, share, loss["median"], loss["low"], loss["high"], None)
                points.append(Point(share, loss["median"], row, cell.brief, None, (loss["low"], loss["high"])))
        series.append(Series(joined("measured", group), "points", points, number + 3, number + 3))
    text = f"{summary['sequences']} sequences of {summary['length']} tokens"
    return Chart(
        "oracle",
        "Quality against bytes: the oracle",
        "Loss and the weights that are read for a token. The oracle, dashed, knows the true next token and takes the "
        f"best of all patterns, so no router can be expected to reach it; {text}, and the measured cells are of their "
        "own text. Whiskers are 95 % bootstrap intervals.",
        Axis(BYTES),
        Axis("loss (nats a token)"),
        ("whose", "routes", BYTES, "loss", "low", "high", "patterns to choose from"),
        [each for each in series if each.points],
        "The oracle has no budget that can be drawn.",
        [f"{PEER} has no routes and is left out."] if any(cell.peer for cell in usable(results)) else [],
        better=True,
    )


def _oracle(summary: Mapping[str, Any], whose: str) -> Series:
    points = []
    for budget, of in _by_bytes(summary):
        low, high = of["oracle_interval"] or (of["oracle"],) * 2
        row = (whose, f"oracle {budget}", of["bytes"], of["oracle"], low, high, of["patterns_seen"])
        points.append(Point(of["bytes"], of["oracle"], row, budget, None, (low, high)))
    return Series("oracle, by budget", "line", points, 0, 0, projected=True)


def _baseline(summary: Mapping[str, Any], whose: str, name: str, title: str) -> list[Point]:
    found = [(budget, of) for budget, of in _by_bytes(summary) if of.get(name) is not None and budget != "none"]
    return [
        Point(of["bytes"], of[name], (whose, f"{title}, {budget}", of["bytes"], of[name], None, None, None))
        for budget, of in found
    ]


def _by_bytes(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Budgets that are the same for all tokens, from the cheapest."""
    known = [(name, of) for name, of in summary["budgets"].items() if ".." not in name]
    return sorted(known, key=lambda each: float(each[1]["bytes"]))
