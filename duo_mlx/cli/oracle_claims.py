"""``duo-mlx oracle claims``: what an oracle says of Duo-LLM's ten claims, without and with control."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.columns import aligned
from duo_mlx.cli.typed import typed

if TYPE_CHECKING:
    from duo_mlx.study.claims import Material, Run
    from duo_mlx.study.results import Found
    from duo_mlx.study.verdict import Claim, Outcome

SCHEMA = "duo-mlx-claims/1"
KEPT = ("model", "text", "choices", "prefix", "search", "seed", "sequences", "length", "command")  # of a summary


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--skips", type=click.Path(path_type=Path), metavar="DIR", help="Oracle with --choices -sB, for claim 9.")
@click.option("--stage1", type=click.Path(path_type=Path), metavar="FILE",
              help="runs.json of examples/compare_stage1.py, for claim 10.")  # fmt: skip
@click.option("--routers", type=click.Path(path_type=Path), metavar="DIR",
              help="What duo-mlx oracle routers wrote, for claims 1, 2, 5, 6 and 9.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures as JSON.")
@click.option("--force", is_flag=True, help="Replace a file that exists.")
def command(
    folder: Path, skips: Path | None, stage1: Path | None, routers: Path | None, out: Path | None, force: bool
) -> None:
    """Judge Duo-LLM's ten claims by an oracle, as the paper reads them and with a control.

    DIR is what duo-mlx oracle --controls wrote, with the budgets none, every number of big layers, and schedules such
    as 6..2 and 2..6. An oracle is a minimum over many patterns, which luck lowers, too: the controls ask what is left
    of a claim beside that. A claim holds where the 95 % intervals over sequences of all of its figures lie where it
    says, fails where one lies wholly elsewhere, and is undecided otherwise, also where there is nothing to judge it by.
    What needs a trained router is open without --routers.

    \b
    Examples:
      duo-mlx oracle claims oracle
      duo-mlx oracle claims oracle --routers routers
      duo-mlx oracle claims oracle --skips skips --stage1 runs/stage1/runs.json --out claims.json
    """
    from duo_mlx.files import output_file, write_text
    from duo_mlx.study.claims import judge

    material = _material(folder, skips, stage1, routers)
    claims = judge(material)
    if out is not None:
        with output_file(out, force) as new:
            write_text(new, json.dumps(_record(material, stage1, claims), indent=1, allow_nan=False) + "\n")
    click.echo("\n".join(_lines(material, claims)))
    if out is not None:
        click.echo(f"wrote {out}", err=True)


def _material(folder: Path, skips: Path | None, stage1: Path | None, routers: Path | None) -> "Material":
    """What was given, if it fits."""
    from duo_mlx.errors import DuoError
    from duo_mlx.study.claims import Material
    from duo_mlx.study.routers import read_folder

    found = _oracle(folder, "sB", "DIR")
    skipping = None if skips is None else _oracle(skips, "-sB", "--skips")
    if skipping and _model(skipping) != _model(found):
        raise DuoError(f"--skips {skips}: is of another model than {folder}; give two oracles of one model")
    routed = () if routers is None else read_folder(routers, found)
    return Material(found, skipping, () if stage1 is None else _runs(stage1), routed)


def _oracle(folder: Path, choices: str, option: str) -> "Found":
    from duo_mlx.errors import DuoError
    from duo_mlx.study.results import read

    found = read(folder)
    if (has := found.summary.get("choices")) != choices:
        raise DuoError(f"{option} {folder}: is an oracle with --choices {has}; give one with --choices {choices}")
    return found


def _model(found: "Found") -> Any:
    """What tells one model from another."""
    return found.summary.get("model", {}).get("sha256")


def _runs(file: Path) -> "tuple[Run, ...]":
    """The runs of ``examples/compare_stage1.py``."""
    from duo_mlx.errors import DuoError
    from duo_mlx.study.claims import Run

    try:
        return tuple(
            Run(
                str(run["method"]),
                int(run["seed"]),
                int(run["tokens"]),
                {str(name): float(loss) for name, loss in run["validation_nats_per_token"].items()},
            )
            for run in json.loads(file.read_text(encoding="utf-8"))["runs"]
        )
    except OSError as error:
        raise DuoError(f"--stage1 {file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DuoError(f"--stage1 {file}: is no runs.json of examples/compare_stage1.py") from None


def _record(material: "Material", stage1: Path | None, claims: "tuple[Claim, ...]") -> dict[str, Any]:
    """The claims for programs."""
    from importlib.metadata import version

    from duo_mlx.study import claims as rules
    from duo_mlx.study.difficulty import HIGH
    from duo_mlx.study.oracle_figures import MEET
    from duo_mlx.study.router_claims import ALIKE
    from duo_mlx.study.verdict import FEWEST

    return {
        "schema": SCHEMA,
        "command": typed(),
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "numpy")},
        "sources": {
            "oracle": _source(material.found),
            "skips": material.skips and _source(material.skips),
            "routers": [
                {"name": each.name, "ks": list(each.ks), "share": each.share.tolist()} for each in material.routers
            ],
            "stage1": stage1 and {"file": stage1.name, "runs": len(material.stage1)},
        },
        "thresholds": {
            "fewest_sequences": FEWEST,
            "meet_nats": MEET[1],
            "even_share": rules.EVEN,
            "high_loss_quantile": HIGH,
            "exceptions_share": rules.EXCEPTIONS,
            "early_exit_share": rules.MOST,
            "like_random_share": ALIKE,
        },
        "claims": [claim.record() for claim in claims],
    }


def _source(found: "Found") -> dict[str, Any]:
    return {"folder": found.folder.resolve().name} | {name: found.summary.get(name) for name in KEPT}


def _lines(material: "Material", claims: "tuple[Claim, ...]") -> Iterator[str]:
    """The claims for people: a table of verdicts, and the sentences."""
    rows = [("", "without control", "with control", "claim")]
    rows += [(str(one.number), _verdict(one.without), _verdict(one.control), one.text) for one in claims]
    yield from aligned(rows)
    sequences, length = material.found.any["inputs"].shape
    yield ""
    yield f"{sequences} sequences of {length} tokens, {material.found.layers} layers; in brackets 95 % intervals"
    yield "of figures that are told as one it is the least, which speaks for the claim the least"
    for claim in claims:
        yield ""
        yield f"{claim.number} without control: {claim.without.sentence}"
        yield f"{claim.number} with control: {claim.control.sentence}"


def _verdict(outcome: "Outcome") -> str:
    """With a mark where the verdict is not about the whole claim."""
    return f"{outcome.verdict}, router open" if outcome.open else outcome.verdict
