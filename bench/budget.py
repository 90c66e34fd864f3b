"""Fixed patterns compared: the best known ones of a model beside evenly spaced and random ones, by loss and bytes.

    python -m duo_mlx.bench.budget MODEL TEXT... --out budget.json --plot budget.svg

MODEL's patterns were measured on another text than the held-out windows here: the last 5 % of each TEXT. Every kind has
as many big layers as the others, small in the rest; of the best known ones it is what ``--route budget:K`` takes.
"""

from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from duo_mlx import budget, checkpoint
from duo_mlx.bench.record import check_output, held_out_windows, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.convert.calibration import encode, read_texts
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes, format_pattern

Point = dict[str, Any]


def evenly_spaced(layers: int, count: int) -> Routes:
    """``count`` big layers at equal distances, the first and the last among them."""
    pattern = np.full(layers, Route.SMALL, np.uint8)
    pattern[np.linspace(0, layers - 1, count).round().astype(int)] = Route.BIG
    return pattern


def at_random(layers: int, count: int, seed: int) -> Routes:
    """``count`` big layers anywhere."""
    pattern = np.full(layers, Route.SMALL, np.uint8)
    pattern[np.random.default_rng([seed, count]).choice(layers, count, replace=False)] = Route.BIG
    return pattern


def loss(model: Model, windows: mx.array, pattern: Routes) -> float:
    """Nats a token on ``windows [windows, tokens + 1]``."""
    rows = [
        nn.losses.cross_entropy(model(row[None, :-1], routes=pattern)[0], row[1:], reduction="mean").item()
        for row in windows
    ]
    return float(np.mean(rows))


def draw(path: Path, points: list[Point], title: str) -> None:
    """Loss against bytes as an .svg or .png file.

    Raises:
        DuoError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise DuoError("--plot needs matplotlib: pip install 'duo-mlx[plot]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for kind, marker in (("random", "."), ("evenly spaced", "s"), ("best known", "o")):
        chosen = sorted((point["bytes"], point["loss"]) for point in points if point["kind"] == kind)
        axes.plot(*zip(*chosen, strict=True), marker, ls="" if kind == "random" else "-", label=kind)
    axes.set(xlabel="weight bytes a token / all big's", ylabel="held-out loss (nats a token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with output_file(path, force=True) as file:
        figure.savefig(file, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model", metavar="MODEL")
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--held-out", type=click.IntRange(512), default=3072, help="Held-out tokens.")
@click.option("--step", type=click.IntRange(1), default=5, help="Between numbers of big layers.")
@click.option("--random", "draws", type=click.IntRange(1), default=4, help="Random patterns of each number.")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw it to an .svg or .png file.")
@click.option("--force", is_flag=True, help="Replace an existing --out or --plot.")
def command(
    model: str,
    texts: tuple[Path, ...],
    held_out: int,
    step: int,
    draws: int,
    seed: int,
    out: Path | None,
    plot: Path | None,
    force: bool,
) -> None:
    """Compare the best known patterns of a MODEL with evenly spaced and random ones."""
    if out:
        check_output(out, force)
    if plot and (plot.suffix not in (".svg", ".png") or (plot.exists() and not force)):
        raise DuoError(f"--plot {plot}: must be a new .svg or .png file, or --force replaces it")
    loaded, _ = checkpoint.load(model)
    directory = checkpoint.resolve(model)
    config = checkpoint.read_config(directory)
    ids = [encode(directory, config, [text]) for text in read_texts(texts)]
    windows = mx.array(held_out_windows(texts, ids, held_out))
    layers = loaded.args.num_hidden_layers
    points: list[Point] = []

    def add(kind: str, count: int, pattern: Routes) -> None:
        share = float(budget.shares_of_bytes(loaded, pattern))
        text = format_pattern(pattern)
        found = loss(loaded, windows, pattern)
        points.append({"kind": kind, "big": count, "pattern": text, "bytes": share, "loss": found})
        click.echo(f"{kind:14} {count:3} big  {share:.3f} of the bytes  {found:.3f}  {text}")

    for count in sorted({*range(0, layers + 1, step), layers}):
        add("best known", count, budget.best_pattern(loaded, f"{budget.PREFIX}{count}"))
        add("evenly spaced", count, evenly_spaced(layers, count))
        for number in range(draws if 0 < count < layers else 1):
            add("random", count, at_random(layers, count, seed + number))
    if plot:
        draw(plot, points, f"Fixed patterns of {directory.name}")
    if out:
        options = f"--held-out {held_out} --step {step} --random {draws} --seed {seed}"
        names = " ".join(text.name for text in texts)
        record = {
            "command": f"python -m duo_mlx.bench.budget {directory.name} {names} {options}",
            "system": system_record(),
        }
        write_output(out, record | {"nats_per_token": points})


if __name__ == "__main__":
    run(command, "budget")
