"""Time passes over few tokens with products in pieces (`duo_mlx.cpu.products`) and with whole products.

    OPENBLAS_NUM_THREADS=1 python -m duo_mlx.bench.pieces --out pieces.json

Passes over 1, 2, 4 and 8 tokens by all big and a step by all small, each both ways in the same interleaved rounds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
from duo_mlx import _blas
from duo_mlx.bench import options
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.peer import open_model, pattern, whole_products
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.speculated import passes
from duo_mlx.bench.speculated_summary import REPEATS
from duo_mlx.bench.system import system_record
from duo_mlx.cpu import products
from duo_mlx.errors import DuoError
from duo_mlx.intervals import interval
from duo_mlx.routes import Route

CONTEXT = 128  # positions before the tokens
Call = Callable[[], None]


def whole(call: Call) -> Call:
    """The same with whole products."""

    def without() -> None:
        with whole_products():
            call()

    return without


def summary(timings: Timings, names: list[str]) -> dict[str, Any]:
    """By pass: its milliseconds in pieces, and that time over the time with whole products."""
    return {
        name: {
            "median_ms": 1e3 * timings.median(name) / REPEATS,
            "over_whole": interval(timings.ratios(name, {f"{name}, whole": 1})).record(),
        }
        for name in names
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@options.model
@options.rounds
@options.layers
@options.out
@options.force
def command(directory: Path | None, rounds: int, layers: int, out: Path | None, force: bool) -> None:
    """Time few tokens' passes with products in pieces, and whole."""
    if out:
        check_output(out, force)
    if not products.cuts():
        raise DuoError(f"nothing is cut here: {products.RULE}; this is {_blas.preload() or 'another BLAS'}")
    model = open_model(directory, layers, seed=0)
    calls = passes(model, pattern(model, Route.BIG), {"small": pattern(model, Route.SMALL)}, CONTEXT)
    before = system_record()
    timings = interleave(
        {each: way for name, call in calls.items() for each, way in ((name, call), (f"{name}, whole", whole(call)))},
        rounds,
        after_round=lambda done: click.echo(f"round {done} of {rounds}", err=True),
    )
    result = summary(timings, list(calls))
    for name, found in result.items():
        line = "{median:.3f} ({low:.3f} to {high:.3f})".format(**found["over_whole"])
        click.echo(f"{name:<14} {found['median_ms']:>8.1f} ms, over whole products {line}")
    if out:
        of = options.weights_of(directory, layers)
        write_runs(
            out,
            f"python -m duo_mlx.bench.pieces {of} --rounds {rounds}",
            before,
            timings.runs,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "pieces")


if __name__ == "__main__":
    main()
