"""``duo-mlx bench compare``: two results, B against A, for people and for CI."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.columns import aligned

if TYPE_CHECKING:
    from duo_mlx.bench.compare import Comparison, Row

# equal to METRICS of duo_mlx.bench.compare, which needs numpy, and DIFFERENCES of duo_mlx.bench.alike
METRICS = ("tpot_s", "ttft_s", "decode_j_per_token", "prefill_j_per_token", "loss", "peak_bytes")
DIFFERENCES = ("chip", "power", "model", "router", "texts")
UNITS = {
    "tpot_s": (1e3, "ms"),
    "ttft_s": (1e3, "ms"),
    "decode_j_per_token": (1.0, "J"),
    "prefill_j_per_token": (1.0, "J"),
    "loss": (1.0, "nats"),
    "peak_bytes": (1e-6, "MB"),
}


def _percent(ctx: click.Context, param: click.Parameter, text: str) -> float:  # noqa: ARG001
    """``2%`` is 0.02; a bare number could be meant either way."""
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = -1.0
    if not text.endswith("%") or not 0 <= value < 10:
        raise click.BadParameter(f"{text}: give a percentage from 0% on, such as 2%")
    return value


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@click.option(
    "--threshold", callback=_percent, default="2%", show_default=True, metavar="PERCENT", help="A change that matters."
)
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    type=click.Choice(METRICS),
    help="Compare this one only; may be repeated.  [default: all that both have]",
)
@click.option(
    "--allow-different",
    "allowed",
    multiple=True,
    type=click.Choice(DIFFERENCES),
    help="Compare although A and B differ in this; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(
    a: Path, b: Path, threshold: float, metrics: tuple[str, ...], allowed: tuple[str, ...], as_json: bool
) -> None:
    """Compare two results of bench run, B against A, and fail where B is worse.

    A and B are results folders or their results.json. Times and energy: the median over rounds of the paired log-ratio
    B / A as a change in percent, with its 95 % bootstrap interval; ~ where that includes no change. Better or worse:
    the whole interval is beyond the threshold; same: all of it is within; else undecided. The threshold is never less
    than the noise floor of A and B. A loss is compared exactly, as the change of the perplexity (0.02 nats are 2 %),
    and so is memory. Less is better throughout.

    Runs differ from day to day by more than their rounds do: compare two results of the same version first.
    Exit code 1: something is worse.

    \b
    Examples:
      duo-mlx bench compare results/before results/after
      duo-mlx bench compare main.json branch.json --threshold 5% --metric tpot_s --metric loss
      duo-mlx bench compare m1 m4 --allow-different chip --json
    """
    import json

    from duo_mlx.bench.compare import compare
    from duo_mlx.bench.results import read

    found = {"A": read(a), "B": read(b)}
    comparison = compare(found["A"], found["B"], threshold, metrics, allowed)
    sides = {name: _side(path, found[name]) for name, path in (("A", a), ("B", b))}
    if as_json:
        click.echo(json.dumps(sides | comparison.record()))
    else:
        lines = "\n".join(" ".join(line.splitlines()) for line in _lines(sides, comparison))
        click.echo("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in lines))
    if comparison.regressed:
        click.get_current_context().exit(1)


def _side(path: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What was compared."""
    return {
        "path": str(path),
        "device": result["system"]["device"],
        "model": result["model"]["name"],
        "started": next((session["started"] for session in result["sessions"]), None),
        "complete": result["complete"],
    }


def _lines(sides: dict[str, dict[str, Any]], comparison: "Comparison") -> Iterator[str]:
    """The comparison for people."""
    for name, side in sides.items():
        yield ", ".join(filter(None, (f"{name}: {side['path']}", side["model"], side["device"], side["started"])))
    yield from (f"note: {note}" for note in comparison.notes)
    for metric in dict.fromkeys(row.metric for row in comparison.rows):
        scale, unit = UNITS[metric]
        rows = [row for row in comparison.rows if row.metric == metric]
        threshold = comparison.threshold if any(row.rounds is not None for row in rows) else comparison.asked
        what = ", change of the perplexity" if metric == "loss" else ""
        table: list[tuple[str, ...]] = [
            (metric, f"A {unit}", f"B {unit}", f"B against A{what}", "rounds", f"threshold {threshold:.2%}")
        ]
        for row in rows:
            values = [f"{scale * value:.4g}" for value in (row.a, row.b)]
            rounds = "exact" if row.rounds is None else str(row.rounds)
            table.append((row.cell, *values, _change(row), rounds, _verdict(row)))
        yield ""
        yield from aligned(table)
    yield ""
    if all_ := comparison.overall:
        what = f"TPOT over {all_.cell} (geometric mean): x{all_.b:.4g}"
        yield f"{what}, {_change(all_)}, {all_.rounds} rounds: {all_.verdict}"
    for name, cells in comparison.only.items():
        yield from (f"only in {name}: {cell}" for cell in cells)
    yield from (f"not valid: {cell}: {why}" for cell, why in comparison.invalid.items())
    verdicts = [row.verdict for row in comparison.rows]
    yield ", ".join(f"{verdicts.count(each)} {each}" for each in ("worse", "undecided", "same", "better"))


def _change(row: "Row") -> str:
    """As benchstat prints it: ~ where no change is within the interval."""
    from duo_mlx.bench.compare import fraction

    if row.change is None:
        return "-"
    median, low, high = (f"{fraction(value):+.2%}" for value in row.change)
    shown = "~" if row.change.low <= 0 <= row.change.high else median
    return shown if row.rounds is None else f"{shown} [{low}, {high}]"


def _verdict(row: "Row") -> str:
    return f"{row.verdict}: {row.why}" if row.why else row.verdict
