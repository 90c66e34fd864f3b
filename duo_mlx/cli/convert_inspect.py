"""``duo-mlx convert inspect``: what a checkpoint is."""

from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="SRC")
@click.option("--config", type=click.Path(path_type=Path), help="config.json in place of the checkpoint's own.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def command(source: str, config: Path | None, revision: str | None, as_json: bool) -> None:
    """Say what a checkpoint is and what can be made of it, without loading it.

    SRC is what `duo-mlx convert` takes: a directory, a weights file, an index of shards, or a Hugging Face id, whose
    files are downloaded first. A directory that is called inspect is ./inspect to `duo-mlx convert`.

    \b
    Examples:
      duo-mlx convert inspect models/duo
      duo-mlx convert inspect weights.gguf --json
    """
    import json
    from dataclasses import asdict

    from duo_mlx.convert.inspection import describe

    found = describe(source, config=config, revision=revision)
    click.echo(json.dumps(asdict(found)) if as_json else "\n".join(found.lines()))
