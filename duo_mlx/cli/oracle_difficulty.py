"""``duo-mlx oracle difficulty``: which tokens gain from more compute, as an oracle's table shows it."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.columns import aligned
from duo_mlx.cli.typed import typed

if TYPE_CHECKING:
    from duo_mlx.intervals import Interval
    from duo_mlx.study.difficulty import Example, Group, Study
    from duo_mlx.study.results import Found

SCHEMA = "duo-mlx-difficulty/1"
COLUMNS = ("loss_small", "oracle_loss", "difficulty", "gap_to_big", "big_layers")
EXAMPLE = ("sequence:position", "small", "big", "oracle", "difficulty", "pattern", "class", "text [next token]")
KEPT = ("text", "model", "choices", "prefix", "search", "seed")  # of the oracle's summary


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--budget", metavar="SPEC", help="Of the table.  [default: none, or that of the lowest loss]")
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Model of the oracle.  [default: the embedded one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures as JSON.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def command(
    folder: Path, budget: str | None, path: str | None, revision: str | None, out: Path | None, force: bool
) -> None:
    """Study which tokens gain from more compute, in a finished oracle's table.

    DIR is what duo-mlx oracle wrote. A token's difficulty is all small's loss less the oracle's. Shown are how it goes
    with the loss and with the entropy, where in a sequence and in which class of next tokens it is high, and tokens
    with a high loss that are not difficult. The gap to all big, which is no minimum over patterns, stands beside it;
    and gaps to minima over 66 patterns and over 66 noisy passes, if the oracle had --controls. Only the model's
    tokenizer is used.

    \b
    Examples:
      duo-mlx oracle difficulty oracle
      duo-mlx oracle difficulty oracle --budget 4 --out difficulty.json
    """
    import json

    from duo_mlx.files import output_file, write_text
    from duo_mlx.study.difficulty import study
    from duo_mlx.study.results import read

    found = read(folder)
    budget = _budget(found, budget)
    shown = study(found.tables[budget], _texts(found, path, revision))
    if out is not None:
        with output_file(out, force) as new:
            write_text(new, json.dumps(_record(found, budget, shown), indent=1, allow_nan=False) + "\n")
    click.echo("\n".join(_lines(found, budget, shown)))
    if out is not None:
        click.echo(f"wrote {out}", err=True)


def _budget(found: "Found", asked: str | None) -> str:
    """The budget whose table is studied."""
    from duo_mlx.errors import DuoError
    from duo_mlx.study.difficulty import NEEDED

    if asked is not None and asked not in found.tables:
        raise DuoError(f"--budget {asked!r}: {found.folder} has no such table; it has {', '.join(found.tables)}")
    lowest = min(found.tables, key=lambda name: float(found.tables[name]["oracle_loss"].mean()))
    budget = asked or ("none" if "none" in found.tables else lowest)
    if missing := [name for name in NEEDED if name not in found.tables[budget]]:
        raise DuoError(f"{found.folder}: its tables hold no {' and no '.join(missing)}; run duo-mlx oracle again")
    return budget


def _texts(found: "Found", path: str | None, revision: str | None) -> list[list[str]]:
    """Each sequence's pieces of text, by the tokenizer of the model that made the tables."""
    from duo_mlx import checkpoint
    from duo_mlx.errors import DuoError
    from duo_mlx.study.difficulty import pieces

    directory = checkpoint.resolve(path, revision)
    config = checkpoint.read_config(directory)
    if checkpoint.fingerprint(directory) != found.summary["model"].get("sha256"):
        made = found.summary["model"].get("name")
        raise DuoError(
            f"{found.folder}: was made by another model ({made}) than {path or 'the embedded one'}; give it as --model"
        )
    tokenizer = checkpoint.read_tokenizer(directory, config)
    rows = zip(found.any["inputs"].tolist(), found.any["targets"].tolist(), strict=True)
    return [pieces(tokenizer, [*inputs, targets[-1]]) for inputs, targets in rows]


def _record(found: "Found", budget: str, shown: "Study") -> dict[str, Any]:
    """The study for programs."""
    from importlib.metadata import version

    from duo_mlx.study.difficulty import CLASSES

    sequences, length = found.tables[budget]["inputs"].shape
    return {
        "schema": SCHEMA,
        "command": typed(),
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm", "numpy")},
        "oracle": {name: found.summary.get(name) for name in KEPT} | {"sequences": sequences, "length": length},
        "budget": budget,
        "token_classes": CLASSES,
    } | shown.record()


def _lines(found: "Found", budget: str, shown: "Study") -> Iterator[str]:
    """The study for people."""
    model, text = found.summary["model"].get("name"), found.summary["text"].get("source")
    sequences, length = found.tables[budget]["inputs"].shape
    yield _safe(f"{model} on {text}, budget {budget}: {sequences} sequences of {length} tokens")
    yield "nats a token; in brackets 95 % intervals over sequences"
    yield "every gap is all small's loss less another, and so rises with all small's by arithmetic, too"
    yield ""
    gaps = shown.high_but_easy
    yield from aligned(
        [
            ("gap", "mean", "of the highest tenth of losses, below the median gap"),
            *((_words(name), _figure(shown.whole.means[name]), _figure(share)) for name, share in gaps.items()),
        ]
    )
    yield ""
    yield from aligned(
        [
            ("correlation", "with", "Pearson", "Spearman"),
            *((_words(e.a), _words(e.b), _figure(e.pearson), _figure(e.spearman)) for e in shown.correlations),
        ]
    )
    for title, groups in (("positions", shown.positions), ("next token", shown.classes)):
        yield ""
        yield from aligned([(title, "tokens", *map(_words, COLUMNS)), *map(_row, (*groups, shown.whole))])
    for title, examples in (
        ("a high loss (highest tenth) and a difficulty below the median:", shown.high_and_easy_examples),
        ("a middling loss and the highest difficulty:", shown.middling_but_difficult_examples),
    ):
        yield ""
        yield title if examples else f"{title} no token"
        if examples:
            yield from aligned([EXAMPLE, *map(_example, examples)])


def _row(group: "Group") -> tuple[str, ...]:
    return (group.name, str(group.tokens), *(_figure(group.means[name]) for name in COLUMNS))


def _example(one: "Example") -> tuple[str, ...]:
    losses = (one.loss_small, one.loss_big, one.oracle_loss, one.difficulty)
    return (
        f"{one.sequence}:{one.position}",
        *(f"{loss:.2f}" for loss in losses),
        one.pattern,
        one.token_class,
        _safe(f"{one.context}[{one.target}]"),
    )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _figure(figure: "Interval") -> str:
    if figure.median != figure.median:  # NaN: there is none
        return "-"
    return f"{figure.median:.2f} [{figure.low:.2f}, {figure.high:.2f}]"


def _safe(text: Any) -> str:
    """On one line, with line breaks and what else is not to be printed escaped."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
