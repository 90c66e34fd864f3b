"""``duo-mlx train routes``: stage 1, random routing."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from duo_mlx.cli import train_options
from duo_mlx.cli.train_options import COUNT

if TYPE_CHECKING:
    from duo_mlx.model import Config
    from duo_mlx.training.stage import Stage

SIZES = ("layers", "hidden", "heads", "kv_heads", "big", "small", "skip_scope")


@click.command()
@train_options.folder
@train_options.texts
@click.option("--model", "path", metavar="DIR|HUB_ID", help="Go on training this model.  [default: make a new one]")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--tokenizer", type=click.Path(path_type=Path), metavar="DIR",
              help="With a tokenizer.json or tokenizer.model for a new model.  [default: train one]")  # fmt: skip
@click.option("--vocab", type=COUNT, default=4096, show_default=True, help="Pieces of a tokenizer that is trained.")
@click.option("--layers", type=COUNT, default=12, show_default=True, help="Of a new model.")
@click.option("--hidden", type=COUNT, default=128, show_default=True, help="Width of a new model.")
@click.option("--heads", type=COUNT, default=4, show_default=True, help="Of a new model's attention.")
@click.option("--kv-heads", type=COUNT, default=2, show_default=True, help="Of these, heads of keys and values.")
@click.option("--big", type=COUNT, default=896, show_default=True, help="Inner width of a new model's big FFNs.")
@click.option("--small", type=COUNT, default=56, show_default=True, help="Inner width of its small FFNs.")
@click.option("--skip-scope", type=click.Choice(["ffn", "layer"]), default="ffn", show_default=True,
              help="What skip bypasses in a new model.")  # fmt: skip
@train_options.routing(p_big=0.5, p_small=0.4, p_skip=0.1)
@train_options.training(tokens=10_000_000, batch=8, lr=2e-3, warmup=200, dropout=0.1)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Train a model with random routing (stage 1): a new one, or go on with one that is there.

    In every layer each token is sent to the big FFN, the small one or past both, at random. TEXT is UTF-8 text, JSONL,
    or one token file: a .npy with a row of token ids. DIR becomes a model directory; while training it holds
    checkpoints, from which --resume goes on bit for bit.

    \b
    Examples:
      duo-mlx train routes novels/*.txt --out duo
      duo-mlx train routes corpus.jsonl --layers 6 --tokens 2000000 --out duo
      duo-mlx train routes tokens.npy --tokenizer duo --out other
      duo-mlx train routes novels/*.txt --out duo --resume
      mlx.launch -n 2 --backend ring $(which duo-mlx) train routes a.txt --out duo

    Ctrl-C keeps the last checkpoint.
    """
    _check(context, options)
    from duo_mlx import checkpoint
    from duo_mlx.training.passes import Passes
    from duo_mlx.training.routing import RandomRouting
    from duo_mlx.training.start import Sizes

    passes = Passes(options["dropout"], options["checkpoint_layers"])
    how = train_options.random_routing(options) | {"passes": passes}

    def stage(args: "Config") -> "Stage":
        return RandomRouting(args.num_hidden_layers, **how)

    new = options["path"] is None
    sizes = {name: options[name] for name in SIZES} if new else {}
    train_options.run(
        "routes",
        options,
        stage,
        None if new else checkpoint.resolve(options["path"], options["revision"]),
        own=sizes,
        sizes=Sizes(**sizes) if new else None,
        tokenizer=options["tokenizer"],
        vocabulary=options["vocab"],
    )


def _check(context: click.Context, options: dict[str, Any]) -> None:
    """Refuse options that would do nothing, and probabilities that are none."""
    train_options.check(options)
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if options["path"] is None:
        beyond, reason = given & {"revision"}, "goes with --model"
    else:
        beyond, reason = given & {*SIZES, "tokenizer", "vocab"}, "does not go with --model, which has its own"
    if options["tokenizer"] is not None and "vocab" in given:
        beyond, reason = beyond | {"vocab"}, "does not go with --tokenizer, which has its own"
    for name in options:
        if name in beyond:
            raise click.UsageError(f"--{name.replace('_', '-')} {reason}")
