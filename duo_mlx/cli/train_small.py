"""``duo-mlx train small``: the small FFNs of a grafted model."""

from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from duo_mlx.cli import train_options

if TYPE_CHECKING:
    from duo_mlx.training.stage import Stage

OBJECTIVES = ("lm", "distill", "draft")
DRAFTING = ("route", "draft_vocabulary")  # options of that objective alone


@click.command()
@train_options.folder
@train_options.texts
@click.option("--model", "path", metavar="DIR|HUB_ID", required=True, help="A grafted model.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="lm", show_default=True, help="See above.")
@click.option("--route", metavar="PATTERN", default="small", show_default=True, help="Of drafts.")
@click.option("--draft-vocabulary", type=click.IntRange(1), metavar="N",
              help="Let drafts choose from the first N tokens of the vocabulary alone.  [default: as the model "
                   "does]")  # fmt: skip
@train_options.routing(p_big=0.5, p_small=0.5, p_skip=0.0)
@train_options.training(tokens=1_000_000, batch=8, lr=2e-4, warmup=50, dropout=0.0)
@click.pass_context
def command(context: click.Context, /, **options: Any) -> None:
    """Train the small FFNs of a grafted model, beside everything else as it is.

    All big stays what it was, bit for bit. Losses by route, before and after, are printed and kept in training.json.

    \b
    Objectives:
      lm       the loss on the text under random routing, as in train routes
      distill  what all big says next, learnt under random routing. Each
               sequence draws its share of big, --p-big on average
      draft    for speculative decoding: the same, learnt by the tokens of
               --route that follow a text which took big
    kl is how far routed tokens are from all big in nats; accepted and greedy
    are the shares of them that all big would take, sampled and likeliest.

    \b
    Examples:
      duo-mlx train small novels/*.txt --model smollm2-duo --out better
      duo-mlx train small chats.jsonl --model smollm2-duo --objective draft --out drafts

    Ctrl-C keeps the last checkpoint, and --resume goes on from it bit for bit.
    """
    train_options.check(options)
    draft = options["objective"] == "draft"
    for name in train_options.ROUTING if draft else DRAFTING:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --objective {options['objective']}")
    if not draft and not options["p_small"]:
        raise click.UsageError("--p-small 0: no token would come to a small FFN")
    from duo_mlx import checkpoint
    from duo_mlx.errors import DuoError
    from duo_mlx.model import Config
    from duo_mlx.routes import parse_pattern
    from duo_mlx.training.distill import Distill
    from duo_mlx.training.passes import Passes
    from duo_mlx.training.small import Draft, SmallLearns

    passes = Passes(options["dropout"], options["checkpoint_layers"])
    how = train_options.random_routing(options) | {"passes": passes}

    def stage(args: Config) -> "Stage":
        layers = args.num_hidden_layers
        if draft:
            return Draft(layers, **how, pattern=tuple(parse_pattern(options["route"], layers).tolist()))
        return (Distill if options["objective"] == "distill" else SmallLearns)(layers, **how)

    model = checkpoint.resolve(options["path"], options["revision"])
    vocabulary = options["draft_vocabulary"]
    if vocabulary and vocabulary > (known := Config.from_dict(checkpoint.read_config(model)).vocab_size):
        raise DuoError(f"--draft-vocabulary {vocabulary}: the model's vocabulary has {known} tokens")
    config = {"draft_vocabulary": vocabulary} if vocabulary else {}
    own = {"objective": options["objective"]} | ({"route": options["route"]} | config if draft else {})
    train_options.run("small", options, stage, model, own, config=config)
