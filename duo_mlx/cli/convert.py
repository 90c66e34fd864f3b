"""``duo-mlx convert``: a PyTorch checkpoint becomes a model directory."""

import sys
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument("source", metavar="SRC", type=click.Path(path_type=Path))
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--config", type=click.Path(path_type=Path), help="config.json of a single weights file.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: as stored]")
@click.option("--default-route", metavar="SPEC", help="What the model does when nobody says.")
@click.option("--verify", is_flag=True, help="Run PyTorch and MLX on the same tokens and compare; write if they agree.")
@click.option("--force", is_flag=True, help="Replace DST if it is a model directory.")
def command(
    source: Path,
    destination: Path,
    config: Path | None,
    dtype: str | None,
    default_route: str | None,
    verify: bool,
    force: bool,
) -> None:
    """Turn a PyTorch checkpoint of a Duo model into a model directory.

    SRC is a directory with config.json, weights and tokenizer files, or a single weights file. Weights are a PyTorch
    state dict (.pt, .pth, .bin) or safetensors, in one file or in shards with an index, under canonical names. DST is
    what `duo-mlx generate --model` and mlx-lm load. Exit code 1: --verify found a difference; nothing is written then.

    \b
    Examples:
      duo-mlx convert runs/duo models/duo --verify
      duo-mlx convert weights.pt models/duo --config config.json --dtype float16
    """
    import mlx.core as mx

    from duo_mlx.convert import parity
    from duo_mlx.convert.directory import MisfitError, convert
    from duo_mlx.convert.readers import Weights

    def check(directory: Path, settings: dict[str, Any], weights: Weights) -> None:
        found = parity.measure(directory, settings, weights)
        click.echo(parity.HEAD)
        for row in found:
            click.echo(str(row))
        if parity.failures(found):
            click.echo(f"duo-mlx: beyond the tolerance of {parity.TOLERANCE:g}; nothing was written", err=True)
            sys.exit(1)

    try:
        convert(
            source,
            destination,
            config=config,
            dtype=getattr(mx, dtype) if dtype else None,
            default_route=default_route,
            force=force,
            verify=check if verify else None,
        )
    except MisfitError as error:
        for misfit in error.misfits:
            click.echo(str(misfit), err=True)
        raise
    click.echo(f"wrote {destination}", err=True)
