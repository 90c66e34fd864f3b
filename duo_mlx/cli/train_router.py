"""``duo-mlx train router``: stage 3, routers beside a model that stays as it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from duo_mlx.cli import train_options
from duo_mlx.errors import DuoError

if TYPE_CHECKING:
    from duo_mlx.model import Config
    from duo_mlx.training.stage import Stage

# equal to WEIGHTS of duo_mlx.training.mixture and TARGETS of duo_mlx.training.gains, which need mlx
OBJECTIVES = {
    "mixture": ("weights", "alpha", "temperature", "final_temperature"),
    "gains": ("target", "explore"),
    "labels": ("oracle", "oracle_budget"),
}
RATES = {"mixture": 5e-3, "gains": 3e-4, "labels": 5e-3}  # logits of gains are nats, and a layer's are few
CHOICES = ("sB", "-B", "-sB")


@click.command()
@train_options.folder
@train_options.texts
@click.option("--model", "path", metavar="DIR|HUB_ID", help="A Duo model.  [default: the embedded model]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--choices", type=click.Choice(CHOICES), default="sB", show_default=True,
              help="Routes to choose from: B big, s small, - skip.")  # fmt: skip
@click.option("--look-ahead", is_flag=True, help="Decide all layers' routes before a token's pass, see above.")
@click.option("--budget", "budgets", multiple=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
              default=(0.5,), show_default=True, metavar="SHARE",
              help="Of big, over all layers; may be repeated.")  # fmt: skip
@click.option("--objective", type=click.Choice(list(OBJECTIVES)), default="mixture", show_default=True,
              help="See above.")  # fmt: skip
@click.option("--weights", type=click.Choice(["soft", "straight-through", "gumbel"]), default="soft",
              show_default=True, help="Of a mixture's modules, see above.")  # fmt: skip
@click.option("--alpha", type=click.FloatRange(0), default=4.0, show_default=True, metavar="NATS",
              help="Of a mixture's (share of big - budget) squared.")  # fmt: skip
@click.option("--temperature", type=train_options.RATE, default=1.0, show_default=True, help="Of a mixture at first.")
@click.option("--final-temperature", type=train_options.RATE, default=0.1, show_default=True, help="And at last.")
@click.option("--target", type=click.Choice(["text", "big"]), default="text", show_default=True,
              help="Of gains: the text's next token, or what all big expects.")  # fmt: skip
@click.option("--explore", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, metavar="SHARE",
              help="Of gains' routes that are drawn at random; the others are the router's own.")  # fmt: skip
@click.option("--oracle", type=click.Path(path_type=Path), metavar="DIR", help="Of labels: what duo-mlx oracle made.")
@click.option("--oracle-budget", metavar="BUDGET", help="Of labels: its budget.  [default: SHARE of the layers]")
@train_options.training(tokens=200_000, batch=8, lr=None, warmup=20, dropout=None, decay=0.0, length=256)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Train a router, beside everything else as it is (stage 3).

    One linear map a layer decides each token's route, from the layer's hidden state or, with --look-ahead, from the
    token's embedding and the final state of the token before. DIR becomes a model directory with the router in it, and
    with several budgets a folder with one for each. Then `generate --route router` uses it, and `--route router:0.3`
    takes the threshold at which a router takes big in three tenths of all layers and tokens, as it was measured on the
    training text.

    \b
    Objectives:
      mixture  the paper's: modules weighted by the router's probabilities, which
               harden as the temperature falls. With straight-through the likeliest
               has all the weight from the start, and with gumbel after noise
      gains    what big is worth to each token in each layer, in nats, from pairs of
               passes with random routes; nothing goes backwards through the model
      labels   the routes that an oracle chose (--oracle); TEXT only validates
    \b
    Examples:
      duo-mlx train router novels/*.txt --budget 0.3 --budget 0.5 --out routed
      duo-mlx train router novels/*.txt --objective gains --out by-gains
      duo-mlx train router novels/*.txt --objective labels --oracle found --out by-labels

    Without --lr it is 0.005 for mixture and labels, and 0.0003 for gains. Ctrl-C keeps the last checkpoint, and
    --resume goes on from it bit for bit.
    """
    _check(context, options)
    options["lr"] = options["lr"] or RATES[options["objective"]]
    budgets = tuple(dict.fromkeys(options["budgets"]))
    out: Path = options["out"]
    for budget in budgets:
        _train(options | {"out": out if len(budgets) == 1 else out / f"{budget:g}"}, budget)


def _check(context: click.Context, options: dict[str, Any]) -> None:
    """Refuse options of another objective, and labels without an oracle."""
    objective = options["objective"]
    for other, names in OBJECTIVES.items():
        for name in names:
            if other != objective and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
                raise click.UsageError(f"--{name.replace('_', '-')} goes with --objective {other}, not {objective}")
    if objective == "mixture" and options["look_ahead"]:
        raise click.UsageError("--look-ahead goes with --objective gains or labels, not mixture")
    if objective == "labels" and options["oracle"] is None:
        raise click.UsageError("--objective labels needs --oracle DIR, what duo-mlx oracle made")


def _train(options: dict[str, Any], budget: float) -> None:
    """One router."""
    import math

    from duo_mlx import checkpoint
    from duo_mlx.routes import LETTERS
    from duo_mlx.training.calibration import settle
    from duo_mlx.training.gains import Gains
    from duo_mlx.training.labels import Labels
    from duo_mlx.training.mixture import Mixture
    from duo_mlx.training.passes import Passes

    model, objective = checkpoint.resolve(options["path"], options["revision"]), options["objective"]
    choices = tuple(LETTERS.index(letter) for letter in options["choices"])
    steps = math.ceil(options["tokens"] / (options["batch"] * options["length"]))
    own = {name: options[name] for name in OBJECTIVES[objective]}
    labels: dict[str, Any] = {}
    if objective == "labels":
        labels, own["oracle"] = _labels(options, budget, model)

    def stage(args: "Config") -> "Stage":
        common = (
            choices,
            args.num_hidden_layers,
            budget,
            options["seed"],
            Passes(recompute=options["checkpoint_layers"]),
        )
        if objective == "gains":
            return Gains(*common, options["target"], options["explore"])
        if objective == "labels":
            return Labels(*common, **labels)
        temperatures = options["temperature"], options["final_temperature"]
        return Mixture(*common, steps, options["alpha"], temperatures, options["weights"])

    train_options.run(
        "router",
        options,
        stage,
        model,
        own | {"objective": objective, "budget": budget} | {name: options[name] for name in ("choices", "look_ahead")},
        config={
            "router_choices": options["choices"],
            "router_bias": True,
            "router_looks_ahead": options["look_ahead"],
            "router_offsets": [],
        },
        settle=settle(choices, None if objective == "mixture" else budget),
    )


def _labels(options: dict[str, Any], budget: float, model: Path) -> tuple[dict[str, Any], str]:
    """The oracle's sequences and routes, and the model that it searched, as a fingerprint."""
    from duo_mlx import checkpoint
    from duo_mlx.study import results

    found = results.read(options["oracle"])
    name = options["oracle_budget"] or str(round(budget * found.layers))
    if name not in found.tables:
        raise DuoError(
            f"--oracle {options['oracle']}: has no budget {name}; its budgets are {', '.join(found.tables)}, and "
            "--oracle-budget names one"
        )
    searched = found.summary["model"]["sha256"]
    if searched != checkpoint.fingerprint(model):
        raise DuoError(f"--oracle {options['oracle']}: is of another model, {found.summary['model'].get('name')}")
    table = found.tables[name]
    return {"inputs": table["inputs"], "routes": table["oracle_routes"]}, f"{searched} {name}"
