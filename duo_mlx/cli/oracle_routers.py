"""``duo-mlx oracle routers``: trained routers on the text of an oracle, beside it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.columns import aligned
from duo_mlx.cli.typed import typed

if TYPE_CHECKING:
    from duo_mlx.study.results import Found
    from duo_mlx.study.routers import Routed

SCHEMA = "duo-mlx-routers/1"


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="OUT", help="Folder of the tables.")
@click.option("--force", is_flag=True, help="Replace a folder of tables that is there.")
def command(folder: Path, models: tuple[str, ...], out: Path, force: bool) -> None:
    """Measure trained routers on an oracle's text, at its budgets.

    DIR is what duo-mlx oracle wrote, with budgets of k big layers; each MODEL is the oracle's model with a router that
    duo-mlx train router trained. OUT gets a table for each, MODEL.npz with losses and routes, and routers.json with
    losses, the realised shares of big, and big by layer and by position. `duo-mlx oracle claims --routers OUT` judges
    by them, and `duo-mlx oracle plot --routers OUT` draws them.

    \b
    Examples:
      duo-mlx oracle routers oracle routed --out routers
      duo-mlx oracle routers oracle runs/mixture runs/gains --out routers --force
    """
    from duo_mlx.checkpoint import load
    from duo_mlx.cli.progress import shown
    from duo_mlx.study import results, routers

    found, names = results.read(folder), routers.names(models)
    routers.refuse_existing(out, force)
    measured = []
    with shown() as progress:
        for name, path in zip(names, models, strict=True):
            model, _ = load(path, lazy=True)
            measured.append(routers.measure(name, model, found, lambda *done, name=name: progress(name, *done)))
    routers.write(out, measured, found, _record(found, measured), force)
    click.echo("\n".join(_lines(found, measured)))
    click.echo(f"wrote {out}", err=True)


def _record(found: "Found", measured: "Sequence[Routed]") -> dict[str, Any]:
    """All routers for programs."""
    from importlib.metadata import version

    from duo_mlx.study import routers

    return {
        "schema": SCHEMA,
        "command": typed(),
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm", "numpy")},
        "oracle": {name: found.summary.get(name) for name in ("model", "text", "sequences", "length", "command")},
        "uniform": found.summary.get("uniform"),
        "routers": [routers.record(each, found) for each in measured],
    }


def _lines(found: "Found", measured: "Sequence[Routed]") -> Iterator[str]:
    """Losses by budget, beside the oracle's baselines."""
    ks = sorted({k for each in measured for k in each.ks})
    rows = [["k", "oracle", "fixed, of the other half", "random", *(f"{each.name} (share)" for each in measured)]]
    for k in ks:
        of = found.summary["budgets"][str(k)]
        row = [str(k), *(_number(of.get(name)) for name in ("oracle", "fixed_split", "random"))]
        for each in measured:
            there = each.at(k)
            share = each.share[each.ks.index(k)] if there else 0
            row.append(f"{there[0].mean():.4f} ({share:.3f})" if there else "")
        rows.append(row)
    yield from aligned([tuple(row) for row in rows])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
