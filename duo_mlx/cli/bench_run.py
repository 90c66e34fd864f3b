"""``duo-mlx bench run``: what big, small and skip trade between latency, energy and quality, on this machine."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.typed import typed

if TYPE_CHECKING:
    from duo_mlx.bench.grid import Grid
    from duo_mlx.bench.rounds import Settings

PRESETS = ("quick", "paper", "full")
STRATEGIES = ("auto", "dense", "planned", "sorted", "sync", "masked", "fused")
# what a preset measures with, where no option says otherwise; a window is of a run without a meter as short as its work
LIMITS: dict[str, dict[str, Any]] = {
    "quick": {"least_rounds": 3, "most_rounds": 12, "minutes": 1.0, "window": 3.0, "quality_tokens": 1024},
    "paper": {"least_rounds": 5, "most_rounds": 20, "minutes": 120.0, "window": 15.0, "quality_tokens": 8192},
    "full": {"least_rounds": 5, "most_rounds": 20, "minutes": 600.0, "window": 15.0, "quality_tokens": 8192},
}
QUALITY_LENGTH = 256


@click.command()
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Model.  [default: the embedded one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--preset", type=click.Choice(PRESETS), default="quick", show_default=True, help="See above.")
@click.option("--route", "routes", multiple=True, metavar="SPEC", help="See duo-mlx generate --help.")
@click.option("--speculate", "drafts", multiple=True, metavar="SPEC|default",
              help="Let this cheaper route draft for the first --route that is known before its pass.")  # fmt: skip
@click.option("--draft-tokens", metavar="K|auto", help="Draft so many before verifying.  [default: auto]")
@click.option("--strategy", "strategies", multiple=True, type=click.Choice(STRATEGIES))
@click.option("--bits", multiple=True, type=click.Choice(["stored", "8", "4"]), help="Of the weights.")
@click.option("--prompt-tokens", "prompt_tokens", multiple=True, type=click.IntRange(1), help="Length of the prompts.")
@click.option("--tokens", "generated", multiple=True, type=click.IntRange(2), help="Generated after each.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1), help="Sequences at once.")
@click.option("--context", "contexts", multiple=True, type=click.IntRange(0), help="Tokens before the prompt.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Prompts, with empty lines between.  [default: bundled]"
)
@click.option("--text", type=click.Path(path_type=Path), help="Held-out text for quality.  [default: bundled]")
@click.option("--quality-tokens", type=click.IntRange(1), help="Tokens of it to predict.")
@click.option("--against", type=click.Choice(["mlx-lm", "none"]), default="none", show_default=True,
              help="Measure stock mlx-lm on the model's big FFNs in the same rounds.")  # fmt: skip
@click.option("--meter", "meter", default="auto", show_default=True, metavar="SPEC",
              help="auto, none, ioreport, powermetrics:FILE, rapl, battery.")  # fmt: skip
@click.option("--window", type=click.FloatRange(0, min_open=True), help="Seconds of energy in a run, twice.")
@click.option("--rounds", type=click.IntRange(1), help="At least so many rounds, and no more.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Time for all rounds together.")
@click.option("--precision", default=2.0, show_default=True, type=click.FloatRange(0, min_open=True),
              help="Per cent to which each ratio to the first cell is to be known.")  # fmt: skip
@click.option("--cool-down", default=0.0, show_default=True, type=click.FloatRange(0), help="Seconds between runs.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of random routes.")
@click.option("--out", type=click.Path(path_type=Path), help="Results folder.  [default: bench-MODEL-PRESET]")
@click.option("--force", is_flag=True, help="Replace a result that is there.")
def command(path: str | None, revision: str | None, preset: str, against: str, meter: str, out: Path | None,
            force: bool, **options: Any) -> None:  # fmt: skip
    """Measure what big, small and skip trade between latency, energy and quality, on this machine.

    Every combination of routes, strategies, bits and sizes is a cell. Cells of the same sizes are run in interleaved
    rounds, latency and energy from the same runs, quality under the same routes on held-out text. What is measured
    comes from a preset; each option that may be repeated replaces one of its lists.

    \b
    Presets:
      quick   big, every second layer big, small (and the router)   1 minute
      paper   k big layers from all to none, mixes with skip,       up to 2 hours
              the model's budgets, router and draft; deeper         with a meter
              contexts
      full    the same in 8 and 4 bits, longer prompts, batches,    up to 10 hours
              and against dense
    \b
    Examples:
      duo-mlx bench run
      duo-mlx bench run --model models/duo --preset paper --against mlx-lm
      duo-mlx bench run --route big --route budget:6 --tokens 64 --context 256
      duo-mlx bench run --speculate small --tokens 128
      duo-mlx bench report bench-embedded-quick

    Energy needs no root on a Mac (`duo-mlx bench doctor` lists the meters); without a meter it is null and the result
    says why. Ctrl-C keeps the rounds that are done, and the same command goes on from there.
    """
    from duo_mlx.bench import suite
    from duo_mlx.bench.meters import choose
    from duo_mlx.bench.subject import Subject
    from duo_mlx.bench.tables import markdown
    from duo_mlx.cli.progress import shown

    subject = Subject(path, revision)
    out = out or Path(f"bench-{subject.name.replace('/', '-')}-{preset}")
    question = suite.Question(
        _grid(preset, subject, options), against, options["prompts"], options["text"], _settings(preset, options),
        command=typed(),
    )  # fmt: skip
    chosen = choose(meter)
    try:
        with shown() as progress:
            result = suite.run(question, subject, out, chosen, force=force, progress=progress)
    except KeyboardInterrupt:
        click.echo(
            f"interrupted; {out} has the rounds that were done, and the same command goes on from there", err=True
        )
        sys.exit(130)
    finally:
        chosen.close()
    click.echo(markdown(result))
    click.echo(f"results in {out}; see them with duo-mlx bench report {shlex.quote(str(out))}", err=True)


def _grid(preset: str, subject: Any, options: dict[str, Any]) -> "Grid":
    """The preset's grid with the lists that stand on the command line in place of its own.

    A preset's draft is for its routes, and goes with them.
    """
    from dataclasses import replace

    from duo_mlx.bench import grid
    from duo_mlx.errors import DuoError
    from duo_mlx.generation import draft_spec

    given: dict[str, Any] = {
        "routes": options["routes"],
        "strategies": options["strategies"],
        "bits": tuple(grid.STORED if each == "stored" else int(each) for each in options["bits"]),
        "prompts": options["prompt_tokens"],
        "generated": options["generated"],
        "batches": options["batches"],
        "contexts": options["contexts"],
        "drafts": tuple(draft_spec(subject.model(subject.stored), each) for each in options["drafts"]),
    }
    if options["routes"]:  # asked for: then at all depths
        given["deep_routes"] = options["routes"]
    found: dict[str, Any] = {name: tuple(dict.fromkeys(each)) for name, each in given.items() if each}
    made = replace(grid.preset(preset, subject.args, subject.window), **found)
    if options["drafts"]:
        grid.check_drafts(made)
    elif options["routes"]:
        made = replace(made, drafts=())
    if options["draft_tokens"] is not None:
        if not made.drafts:
            raise DuoError("--draft-tokens without --speculate: say which route drafts")
        made = replace(made, draft_tokens=options["draft_tokens"])
    if options["bits"]:
        return made
    possible = [bits for bits in made.bits if not subject.refusal(grid.quantisation(bits, subject.stored))]
    return replace(made, bits=tuple(possible))  # a preset's, of a model that cannot be quantised


def _settings(preset: str, options: dict[str, Any]) -> "Settings":
    from duo_mlx.bench.rounds import Settings

    given = {
        "least_rounds": options["rounds"],
        "most_rounds": options["rounds"],
        "minutes": options["minutes"],
        "window": options["window"],
        "quality_tokens": options["quality_tokens"],
    }
    return Settings(
        preset=preset,
        precision=options["precision"] / 100,
        cool_down=options["cool_down"],
        quality_length=QUALITY_LENGTH,
        seed=options["seed"],
        **LIMITS[preset] | {name: value for name, value in given.items() if value is not None},
    )
