"""The options that every ``duo-mlx train`` has, and a run from what they say."""

import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.typed import typed

if TYPE_CHECKING:
    from duo_mlx.model import Config
    from duo_mlx.training.stage import Stage
    from duo_mlx.training.start import Sizes

Function = Callable[..., Any]
Decorator = Callable[[Function], Function]

SHARE = click.FloatRange(0, 1)
COUNT = click.IntRange(1)
RATE = click.FloatRange(0, min_open=True)

ROUTING = ("p_big", "p_small", "p_skip", "whole_big")
# what a checkpoint must have been made with to be gone on with, beside texts, tokenizer and model
RECIPE = (
    "tokens", "batch", "length", "lr", "final_lr", "warmup", "weight_decay", "clip", "dropout", "seed", "dtype",
    *ROUTING,
)  # fmt: skip


def texts(function: Function) -> Function:
    """The texts, and how they are divided."""
    return _all(
        click.argument("files", metavar="TEXT...", nargs=-1, required=True, type=click.Path(path_type=Path)),
        click.option("--text-key", default="text", show_default=True, metavar="KEY", help="Of documents in JSONL."),
        click.option("--held-out", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05,
                     show_default=True, metavar="SHARE", help="At the end of every text, for validation."),
    )(function)  # fmt: skip


def folder(function: Function) -> Function:
    """Where the result of a run goes."""
    return _all(
        click.option("--out", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Folder of the run."),
        click.option("--resume", is_flag=True, help="Go on from the checkpoint in DIR."),
    )(function)


def routing(p_big: float, p_small: float, p_skip: float) -> Decorator:
    """Random routing and its defaults."""
    return _all(
        click.option("--p-big", type=SHARE, default=p_big, show_default=True, help="Probability of big."),
        click.option("--p-small", type=SHARE, default=p_small, show_default=True, help="Probability of small."),
        click.option("--p-skip", type=SHARE, default=p_skip, show_default=True, help="Probability of skip."),
        click.option("--whole-big", type=SHARE, default=0.0, show_default=True, metavar="SHARE",
                     help="Of sequences that take big everywhere."),
    )  # fmt: skip


def training(
    tokens: int, batch: int, lr: float | None, warmup: int, dropout: float | None, decay: float = 0.1, length: int = 512
) -> Decorator:
    """How long and how fast, and the defaults of it; no dropout with None."""
    dropping = click.option("--dropout", type=click.FloatRange(0, 1, max_open=True), default=dropout, show_default=True,
                            help="After attention and FFNs.")  # fmt: skip
    return _all(
        click.option("--tokens", type=COUNT, default=tokens, show_default=True, help="Training tokens in all."),
        click.option("--batch", type=COUNT, default=batch, show_default=True, help="Sequences a step."),
        click.option("--length", type=click.IntRange(2), default=length, show_default=True, help="Tokens a sequence."),
        click.option("--lr", type=RATE, default=lr, show_default=True, help="Learning rate after the warm-up."),
        click.option("--final-lr", type=SHARE, default=0.02, show_default=True, metavar="SHARE",
                     help="End of the cosine, as a share of --lr."),
        click.option("--warmup", type=click.IntRange(0), default=warmup, show_default=True, help="Steps."),
        click.option("--weight-decay", type=click.FloatRange(0), default=decay, show_default=True, help="Of matrices."),
        click.option("--clip", type=RATE, default=1.0, show_default=True, help="Norm of the gradients at most."),
        *([] if dropout is None else [dropping]),
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                     help="Of weights, windows, routes and dropout."),
        click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
                     help="Of the passes; what learns is kept in float32."),
        click.option("--accumulate", type=COUNT, default=1, show_default=True, metavar="N",
                     help="Compute a batch in N parts, one after the other: less memory."),
        click.option("--checkpoint-layers", is_flag=True, help="Compute layers twice: less memory."),
        click.option("--eval-every", type=COUNT, default=500, show_default=True, metavar="STEPS",
                     help="Between validations and checkpoints."),
        click.option("--eval-windows", type=COUNT, default=24, show_default=True, metavar="N",
                     help="That are validated while training."),
        click.option("--final-windows", type=COUNT, metavar="N", help="That are validated at the end.  [default: all]"),
        click.option("--stop-at", type=COUNT, metavar="STEP", help="Keep a checkpoint at this step and stop."),
    )  # fmt: skip


def _all(*decorators: Callable[[Any], Any]) -> Decorator:
    def decorate(function: Function) -> Function:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def check(options: Mapping[str, Any]) -> None:
    """Refuse probabilities that are none.

    Raises:
        click.UsageError: in one line.
    """
    total = options["p_big"] + options["p_small"] + options["p_skip"]
    if not math.isclose(total, 1.0, abs_tol=1e-6):
        raise click.UsageError(f"--p-big, --p-small and --p-skip sum to {total:g}, not to 1")


def random_routing(options: Mapping[str, Any]) -> dict[str, Any]:
    """What `duo_mlx.training.routing.RandomRouting` takes of the options."""
    return {name.removeprefix("p_"): options[name] for name in ROUTING} | {"seed": options["seed"]}


def run(
    method: str,
    options: Mapping[str, Any],
    stage: "Callable[[Config], Stage]",
    model: Path | None,
    own: Mapping[str, Any],
    sizes: "Sizes | None" = None,
    **more: Any,
) -> None:
    """Train as the options say, show how it goes, and print what came of it.

    Args:
        method: its name.
        options: of `texts`, `folder`, `routing` and `training`, by their parameters' names.
        stage: makes the stage for a model.
        model: a model directory, if there is one.
        own: what else the result depends on.
        sizes: of a new model.
        more: of `duo_mlx.training.job.Job`.
    """
    from duo_mlx.cli.progress import shown
    from duo_mlx.processes import Processes
    from duo_mlx.training.data import Question
    from duo_mlx.training.folder import Folder
    from duo_mlx.training.job import Job, Watch
    from duo_mlx.training.optimizer import Schedule
    from duo_mlx.training.run import run as train
    from duo_mlx.training.start import TYPES
    from duo_mlx.training.trainer import Settings

    steps = math.ceil(options["tokens"] / (options["batch"] * options["length"]))
    settings = Settings(
        Schedule(steps, options["lr"], options["final_lr"], options["warmup"]),
        options["batch"],
        options["length"],
        options["weight_decay"],
        options["clip"],
        options["seed"],
        options["eval_every"],
        options["eval_windows"],
        options["accumulate"],
        TYPES[options["dtype"]],
    )
    job = Job(
        method,
        Question(options["files"], options["text_key"], options["held_out"]),
        options["out"],
        settings,
        stage,
        {"method": method} | {name: options[name] for name in RECIPE if name in options} | dict(own),
        typed(),
        model,
        sizes,
        resume=options["resume"],
        stop_at=options["stop_at"],
        final_windows=options["final_windows"],
        **more,
    )
    try:
        with shown() as progress:
            record = train(job, Watch(progress, lambda line: click.echo(line, err=True)))
    except KeyboardInterrupt:
        if Processes().rank == 0:
            click.echo(f"interrupted; {Folder(job.out).kept()}; --resume goes on", err=True)
        sys.exit(130)
    if record is not None:
        click.echo("\n".join(_lines(record)))
        click.echo(f"wrote {job.out}", err=True)


def _lines(record: Mapping[str, Any]) -> list[str]:
    """What was held out, and its losses, for people."""
    lines = []
    for name, value in record["validation"].items():
        bits = (record["validation_bits_per_byte"] or {}).get(name)
        unit = "" if bits is None else f" nats a token, {bits:.4f} bits a byte"
        before = f" (before: {record['before'][name]:.4f})" if record["before"] else ""
        lines.append(f"held out, {name}: {value:.4f}{unit}{before}")
    return lines
