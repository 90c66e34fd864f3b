"""Command-line options that benchmarks share, each meaning the same everywhere."""

from pathlib import Path

import click

from duo_mlx.bench.prefill import CLOCKS, SHAPE

model = click.option(
    "--model", "directory", type=click.Path(path_type=Path), help="A model directory in place of random weights."
)
rounds = click.option("--rounds", type=click.IntRange(1), default=10, help="Interleaved rounds, each there and back.")
layers = click.option(
    "--layers", type=click.IntRange(1), default=SHAPE["num_hidden_layers"], help="Layers, where random."
)
clock = click.option(
    "--clock", type=click.Choice(list(CLOCKS)), default="wall", help="wall; or the process's cpu seconds."
)
out = click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json or .csv file.")
force = click.option("--force", is_flag=True, help="Replace an existing --out.")


def weights_of(directory: Path | None, count: int) -> str:
    """The options that say again which weights were used: a directory's, or random ones in ``count`` layers."""
    return f"--model {directory.name}" if directory else f"--layers {count}"
