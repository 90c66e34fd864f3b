"""``duo-mlx bench draft``: the pattern that drafts best in speculative decoding, on this machine."""

import os
from pathlib import Path
from typing import Any

import click

from duo_mlx.cli.columns import aligned
from duo_mlx.cli.typed import typed

LENGTH = 128  # tokens of a window of text
SHOWN = 5  # patterns in the table, where fewer were measured


@click.command()
@click.argument("text", required=False, type=click.Path(path_type=Path))
@click.option("--model", "path", metavar="DIR|HUB_ID",
              help="Model directory or Hugging Face id.  [default: the embedded model]")  # fmt: skip
@click.option("--verify", default="big", show_default=True, metavar="SPEC", help="The fixed pattern that verifies.")
@click.option("--choices", type=click.Choice(["sB", "-sB"]), default="-sB", show_default=True,
              help="Routes that a draft may have: small and big, or skip, too.")  # fmt: skip
@click.option("--draft-vocabulary", "vocabulary", type=click.IntRange(1), metavar="N",
              help="Draft the first N tokens of the vocabulary alone, in most the frequent ones.")  # fmt: skip
@click.option("--temp", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Acceptance at this temperature decides.")  # fmt: skip
@click.option("--costs", type=click.Choice(["measured", "bytes"]), default="measured", show_default=True,
              help="Of a verifying pass over several tokens: timed here, or as if it cost its bytes.")  # fmt: skip
@click.option(
    "--text-tokens", type=click.IntRange(LENGTH), default=1024, show_default=True, help="Of TEXT, for each pattern."
)
@click.option("--passes", type=click.IntRange(1), default=100, show_default=True, help="Patterns to try, at most.")
@click.option(
    "--best", type=click.IntRange(1), default=3, show_default=True, help="Patterns to measure, beside all small."
)
@click.option(
    "--rounds", type=click.IntRange(1), default=10, show_default=True, help="Of measuring, each there and back."
)
@click.option(
    "--tokens", type=click.IntRange(8), default=64, show_default=True, help="Generated in a run that is measured."
)
@click.option("--out", type=click.Path(path_type=Path), help="Write all figures to a .json file.")
@click.option("--store", is_flag=True,
              help="Make the best pattern, and N, the default_draft of the model in DIR.")  # fmt: skip
@click.option("--force", is_flag=True, help="Replace an existing --out, or another default_draft.")
def command(text: Path | None, path: str | None, verify: str, vocabulary: int | None, out: Path | None, store: bool,
            force: bool, text_tokens: int, **options: Any) -> None:  # fmt: skip
    """Find the pattern that drafts best for --verify, by what TEXT has it accept and by what it costs.

    A search over fixed patterns: each is tried by one pass over the text, which says how many of its first drafted
    tokens would be accepted (later ones are taken to fare alike), and costs the weight bytes that it reads. The best
    are then measured: speculation by them against plain decoding by --verify, in interleaved rounds, with as many
    drafted tokens as promised most. Without TEXT: a bundled one, on which the embedded model was not trained.

    \b
    Examples:
      duo-mlx bench draft
      duo-mlx bench draft novel.txt --model models/duo --store
      duo-mlx generate "It is a truth" --model models/duo --speculate default
    """
    from duo_mlx import checkpoint
    from duo_mlx.bench import drafts, reading
    from duo_mlx.bench.record import check_output, write_output
    from duo_mlx.bench.system import system_record
    from duo_mlx.cli.progress import shown
    from duo_mlx.generation import pattern_of

    if out:
        check_output(out, force)
    if store:
        _check_store(path, force)
    directory = checkpoint.resolve(path)
    model, tokenizer = checkpoint.load(directory, fuse=True)
    if vocabulary:
        model.draft_from(vocabulary)
    pattern = pattern_of(model, "--verify", verify)
    read = reading.read(text, "held_out")
    length = min(LENGTH, model.config.max_position_embeddings or LENGTH)
    windows = reading.windows(read, tokenizer, text_tokens, length)[:, :-1]
    before = system_record()
    with shown() as progress:
        found = drafts.study(model, pattern, windows, drafts.Settings(**options), progress)
    click.echo("\n".join(_table(found)))
    if out:
        named = {"name": "embedded" if path is None else Path(path).name, "sha256": checkpoint.fingerprint(directory)}
        text_record = read.record(windows.size, len(windows))
        write_output(out, {"command": typed(), "model": named, "text": text_record, "system": before} | found)
    if store:
        checkpoint.save_default_draft(directory, found["best"], vocabulary)
        click.echo(f"{directory / 'config.json'}: default_draft is {found['best']}", err=True)


def _check_store(path: str | None, force: bool) -> None:
    """Refuse, before anything is measured, to store where it cannot be done."""
    from duo_mlx.checkpoint import read_config

    if path is None or not Path(path).is_dir():
        raise click.UsageError("--store writes into a model directory; give one with --model DIR")
    config = read_config(Path(path))
    if not os.access(path, os.W_OK):
        raise click.UsageError(f"--store: {path} cannot be written; leave --store out, or copy the model")
    if config.get("default_draft") and not force:
        raise click.UsageError(
            f"--store: {path} has the default_draft {config['default_draft']}; give --force to replace it"
        )


def _table(found: dict[str, Any]) -> list[str]:
    """The best patterns and those that were measured, with what was chosen."""
    rows = [("pattern", "accepted", "sampled", "bytes", "drafts", "expected", "measured", "")]
    for place, each in enumerate(found["candidates"]):
        measured = found["measured"].get(each["pattern"])
        if place >= SHOWN and measured is None:
            continue
        rows.append(
            (
                each["pattern"],
                f"{each['greedy']:.1%}",
                f"{each['sampled']:.1%}",
                f"{each['bytes']:.2f}",
                str(each["draft_tokens"]),
                f"{each['speed_up']:.2f} x",
                "" if measured is None else f"{measured['speed_up']['median']:.2f} x",
                "" if measured is None else "[{low:.2f}, {high:.2f}]".format(**measured["speed_up"]),
            )
        )
    passes = ", ".join(f"{cost:.2f} over {tokens}" for tokens, cost in found["verifying_passes"].items())
    faster = "" if found["faster"] else "; none is faster than plain decoding here"
    return [
        f"{len(found['candidates'])} patterns tried; verifying passes cost {passes} tokens",
        *aligned(rows, 1),
        f"best: {found['best']}{faster}",
    ]
