"""``duo-mlx oracle plot``: figures of what ``duo-mlx oracle`` found."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from duo_mlx.study.results import Found


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--skips", type=click.Path(path_type=Path), metavar="DIR", help="An oracle over --choices -sB.")
@click.option("--routers", type=click.Path(path_type=Path), metavar="DIR", help="What duo-mlx oracle routers wrote.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the figures.")
@click.option("--sequence", type=click.IntRange(0), default=0, show_default=True, help="Whose tokens are shown.")
@click.option("--model", "path", metavar="DIR|HUB_ID", help="The oracle's.  [default: the embedded one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--force", is_flag=True, help="Replace figures that are there.")
def command(
    folder: Path,
    skips: Path | None,
    routers: Path | None,
    out: Path,
    sequence: int,
    path: str | None,
    revision: str | None,
    force: bool,
) -> None:
    """Draw what an oracle found, as SVG and PNG with captions.

    DIR is a finished folder of duo-mlx oracle. Figures: where big is by layer and budget (layers) and by position;
    losses by budget beside baselines and, of --controls, what as many candidates or noise would gain; a text token by
    token, whose labels take the oracle's own model; difficulty against loss; skips; and trained routers' losses and
    where they have big. What the folder does not hold is left out, and said so. Needs `pip install 'duo-mlx[plot]'`.

    \b
    Examples:
      duo-mlx oracle plot oracle --out figures
      duo-mlx oracle plot oracle --skips skips --routers routers --sequence 3 --out figures --force
    """
    from duo_mlx import checkpoint
    from duo_mlx.errors import DuoError
    from duo_mlx.study import plots, results
    from duo_mlx.study.routers import read_folder

    plots.refuse_existing(out, force)
    found = results.read(folder)
    with_skips = results.read(skips) if skips else None
    routed = read_folder(routers, found) if routers else ()
    count = len(found.any["targets"])
    if sequence >= count:
        raise DuoError(f"--sequence {sequence}: {folder} has {count}, numbered from 0")
    directory = checkpoint.resolve(path, revision)
    asked = found.summary["model"]
    same = checkpoint.fingerprint(directory) == asked["sha256"]
    if path is not None and not same:
        raise DuoError(f"--model {path}: is not the oracle's, {asked['name']}, or was changed since")
    if with_skips and with_skips.summary["model"]["sha256"] != asked["sha256"]:
        raise DuoError(f"--skips {skips}: is of another model than {folder}")
    words = _words(directory, found, sequence) if same else None
    drawn = plots.draw(found, with_skips, sequence, words, routed)
    for name, why in drawn.left_out.items():
        click.echo(f"left out {name}: {why}", err=True)
    for file in plots.write(drawn, out, force):
        click.echo(file)


def _words(directory: Path, found: "Found", sequence: int) -> list[str]:
    """The text of each target token of a sequence."""
    from duo_mlx import checkpoint
    from duo_mlx.study.difficulty import pieces

    inputs, targets = (found.any[name][sequence].tolist() for name in ("inputs", "targets"))
    tokenizer = checkpoint.read_tokenizer(directory, checkpoint.read_config(directory))
    return pieces(tokenizer, [inputs[0], *targets])[1:]
