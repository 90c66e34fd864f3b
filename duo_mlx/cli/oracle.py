"""``duo-mlx oracle``: for each token of a text, the routes that would have been best."""

import sys
from pathlib import Path
from typing import Any

import click

from duo_mlx.cli.columns import aligned
from duo_mlx.cli.typed import typed

PREFIXES = ("shared", "committed")


def _letters(ctx: click.Context, param: click.Parameter, text: str) -> str:  # noqa: ARG001
    """Letters of routes, in the order of their cost."""
    if not text or set(text) - set("-sB") or len(set(text)) < len(text):
        raise click.BadParameter(f"{text!r}: give some of B (big), s (small) and - (skip), such as sB or -sB")
    return "".join(letter for letter in "-sB" if letter in text)


@click.command()
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Model.  [default: the embedded one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--text", type=click.Path(path_type=Path), help="Text to search on.  [default: bundled held-out text]")
@click.option("--sequences", type=click.IntRange(1), default=8, show_default=True, help="Spread over the text.")
@click.option("--length", type=click.IntRange(2), default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--choices", callback=_letters, default="sB", show_default=True, help="Routes to choose from.")
@click.option("--budget", "budgets", multiple=True, metavar="SPEC", help="See above; may be repeated.  [default: none]")
@click.option("--prefix", type=click.Choice(PREFIXES), default="shared", show_default=True,
              help="What earlier tokens' keys and values are.")  # fmt: skip
@click.option("--search", "method", metavar="METHOD", default="exhaustive", show_default=True, help="See above.")
@click.option("--controls", is_flag=True, help="Measure what noise and chance give, too; takes three times as long.")
@click.option("--max-memory", type=click.IntRange(1), default=1024, show_default=True, metavar="MB",
              help="For the passes, beside the weights.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the random patterns.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the result.")
@click.option("--force", is_flag=True, help="Replace a result that is there.")
def command(
    path: str | None,
    revision: str | None,
    text: Path | None,
    sequences: int,
    length: int,
    choices: str,
    budgets: tuple[str, ...],
    prefix: str,
    method: str,
    controls: bool,
    max_memory: int,
    seed: int,
    out: Path,
    force: bool,
) -> None:
    """Find, for each token of a text, the pattern with the lowest loss on the true next token.

    Attention and FFNs are computed once for all patterns that begin alike. shared: one pass for each pattern, then a
    minimum for each token. committed: from left to right, each token after the patterns that were chosen for those
    before it; its table can be replayed as it was scored. A minimum over many patterns is low by chance, too: baselines
    from the same passes stand beside it, and --controls measures the chance.

    \b
    Methods:
      exhaustive    every pattern is tried: 2 or 3 to the number of layers
      beam:8        for deep models: changes of the 8 best patterns so far
      descent:4     from 4 patterns to the best change while that is better

    \b
    Budgets, each with a table of its own:
      none          any pattern
      4             exactly 4 big layers
      at-most:4     no more than 4
      bytes:0.6     at most this share of the weight bytes of all big
      flops:0.6     the same of its FLOPs
      6..2          from exactly 6 big layers at the first token to 2 at the last
    \b
    Examples:
      duo-mlx oracle --sequences 2 --length 32 --budget 6 --out oracle
      duo-mlx oracle --text novel.txt --budget 0 --budget 4 --budget 12 --out oracle
      duo-mlx oracle --prefix committed --choices -sB --budget 4 --out oracle
      duo-mlx oracle --model smollm2 --prefix committed --search beam --out oracle
      duo-mlx generate --route oracle/tokens.npz:1 "It is a truth"

    Ctrl-C keeps the sequences that are done, and the same command goes on from them.
    """
    from duo_mlx import checkpoint
    from duo_mlx.bench import reading
    from duo_mlx.cli.progress import shown
    from duo_mlx.errors import DuoError
    from duo_mlx.study import search
    from duo_mlx.study.local import parse_method
    from duo_mlx.study.sequence import Question

    directory = checkpoint.resolve(path, revision)
    model, tokenizer = checkpoint.load(directory)
    limit = model.config.max_position_embeddings
    if limit is not None and length > limit:
        raise click.UsageError(f"--length {length}: the model's context is {limit}")
    read = reading.read(text, "held_out")
    windows = reading.windows(read, tokenizer, sequences * length, length)
    if len(windows) < sequences:
        raise DuoError(f"{read.source}: has {len(windows)} sequences of {length} tokens; {sequences} were asked for")
    question = Question(
        choices,
        prefix,
        tuple(dict.fromkeys(budgets)) or ("none",),
        seed,
        {"source": read.source, "sha256": read.sha256},
        {"name": "embedded" if path is None else Path(path).name, "sha256": checkpoint.fingerprint(directory)},
        controls,
        str(parse_method(method)),
    )
    try:
        with shown() as progress:
            found = search.run(model, windows, question, out, typed(), max_memory << 20, progress, force)
    except KeyboardInterrupt:
        click.echo(f"interrupted; {out} keeps the sequences that are done", err=True)
        sys.exit(130)
    if found is not None:  # in one of several processes
        click.echo("\n".join(_lines(found)))
        click.echo(f"results in {out}", err=True)


def _lines(found: dict[str, Any]) -> list[str]:
    """Mean losses in nats a token, for people."""
    names = ("oracle", "fixed", "fixed_split", "random", "random_by_token", "patterns_seen", "big_layers")
    rows = [("budget", *(name.replace("_", " ") for name in names))]
    for budget, of in found["budgets"].items():
        rows.append((budget, *("-" if of[name] is None else f"{of[name]:.4g}" for name in names)))
    uniform = ", ".join(f"all {name} {loss:.4g}" for name, loss in found["uniform"].items())
    return [f"nats a token: {uniform}", *aligned(rows, left=0)]
