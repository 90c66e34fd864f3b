"""``duo-mlx convert``: any checkpoint becomes a model directory, and a model directory a PyTorch checkpoint."""

import sys
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from duo_mlx.cli.convert_options import check, parse_layers

if TYPE_CHECKING:
    from duo_mlx.convert.directory import Watch

# equal to what duo_mlx.convert knows, which needs mlx
DTYPES = ("float32", "float16", "bfloat16")
LAYOUTS = ("half", "interleaved")
NAMES = ("transformers", "canonical", "llama", "fused")  # that an export can have
SMALL_KINDS = ("own", "nested")
BITS = (2, 3, 4, 5, 6, 8, 16)
GROUP_SIZES = (32, 64, 128)
CHOICES = tuple("".join(routes) for count in (2, 3) for routes in permutations("-sB", count))  # of a router

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=FILE)
@click.option("--to", type=click.Choice(["mlx", "torch"]), default="mlx", show_default=True, help="What to make.")
@click.option("--config", type=FILE, help="config.json in place of the source's own, or of a file that has none.")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face id.")
@click.option("--key-map", metavar="NAME|FILE", help="canonical, llama, fused, or a TOML file of rules.")
@click.option("--rope", type=click.Choice(LAYOUTS), help="Layout of q and k.  [default: what goes with the names]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of all weights.  [default: as stored]")
@click.option("--default-route", metavar="SPEC", help="What the model does when nobody says.")
@click.option(
    "--router-choices",
    type=click.Choice(CHOICES),
    metavar="ROUTES",
    help="What its routers' rows stand for, such as sB.",
)
@click.option("--dry-run", is_flag=True, help="Print what would become what, and what does not fit; write nothing.")
@click.option("--graft", is_flag=True, help="Make a Duo of a dense model: its FFNs are big, small ones are fitted.")
@click.option(
    "--slicing",
    metavar="NAME|FILE",
    help="Make a Duo of Gemma 3n: how much of it small is.  [default: E2B]",
)
@click.option("--calibrate", metavar="TEXT", multiple=True, type=FILE, help="UTF-8 text for --graft and measuring.")
@click.option("--calibration-tokens", type=click.IntRange(min=1), default=20_000, show_default=True, help="Of a graft.")
@click.option(
    "--measure-tokens", type=click.IntRange(min=0), default=1024, show_default=True, help="0: do not measure."
)
@click.option(
    "--small-kind", type=click.Choice(SMALL_KINDS), default="own", show_default=True, help="nested: big's best neurons."
)
@click.option(
    "--small-ratio", type=click.FloatRange(min=1, max=4096), help="big's width / small's.  [default: own 16, nested 2]"
)
@click.option(
    "--small-layers", metavar="SPEC", callback=parse_layers, help="1-28 or 0,2,4-9; the others stay big only."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the graft's random routes.")
@click.option("--bits", type=click.Choice(BITS), help="Quantise; 16: float where --small-bits quantises.")
@click.option("--small-bits", type=click.Choice(BITS), help="Of the small FFNs.  [default: as --bits]")
@click.option("--group-size", type=click.Choice(GROUP_SIZES), default=64, show_default=True, help="Weights a scale.")
@click.option("--names", type=click.Choice(NAMES), default="transformers", show_default=True, help="Of --to torch.")
@click.option("--dequantise", is_flag=True, help="Let --to torch take the numbers that quantised weights stand for.")
@click.option("--allow-nonfinite", is_flag=True, help="Take NaN and infinity in weights.")
@click.option("--verify", is_flag=True, help="Compare with another implementation; write if both agree.")
@click.option("--force", is_flag=True, help="Replace DST if it is a model directory, or a file of --to torch.")
@click.pass_context
def command(context: click.Context, /, source: str, destination: Path, **options: Any) -> None:
    """Turn a checkpoint into a model directory, or a model directory into a PyTorch checkpoint.

    SRC is a directory with config.json, weights and tokenizer files, a weights file (.safetensors, .pt, .pth, .bin,
    .gguf), an index of shards, or a Hugging Face id (OWNER/NAME, OWNER/NAME:FILE). It holds a Duo model, or with
    --graft a dense one that mlx-lm runs, in float or quantised by MLX. Gemma 3n needs no --graft: its small FFNs are
    parts of its own. `duo-mlx convert inspect PATH` says what a
    checkpoint is. DST is what `duo-mlx generate --model` and mlx-lm load; with --to torch a .pt, .pth or .bin file, or
    a directory of safetensors.

    Texts of --calibrate are what --graft fits small FFNs to. Their last tokens are set aside: on them the best fixed
    patterns are measured, which `--route budget:K` picks from. Without --graft they are all for that. A graft that was
    interrupted goes on when the same command is given again.

    Exit code 1: --verify found a difference; nothing is written then.

    \b
    Examples:
      duo-mlx convert runs/duo models/duo --verify
      duo-mlx convert weights.pt models/duo --config config.json --key-map llama
      duo-mlx convert model.gguf models/duo --graft --calibrate emma.txt
      duo-mlx convert models/duo models/duo-4bit --bits 4 --small-bits 8
      duo-mlx convert google/gemma-3n-E4B-it models/gemma --slicing E2.98B-block --bits 4
      duo-mlx convert models/duo duo.pt --to torch
    """
    given = {name for name in options if context.get_parameter_source(name) != click.core.ParameterSource.DEFAULT}
    check(options, given)
    if options["dry_run"]:
        _print_table(source, options)
        return

    from duo_mlx.cli.progress import shown
    from duo_mlx.convert.directory import DisagreementError, Watch
    from duo_mlx.convert.plan import MisfitError

    try:
        with shown() as progress:
            watch = Watch(progress, _note, _Tables().show)
            if options["to"] == "torch":
                _export(source, destination, options, watch)
            else:
                _convert(source, destination, options, watch)
    except MisfitError as error:
        for misfit in error.misfits:
            click.echo(str(misfit), err=True)
        raise
    except DisagreementError as error:
        _note(str(error))
        sys.exit(1)
    click.echo(f"wrote {destination} (peak memory {_peak() / 1e9:.2f} GB)", err=True)


# options that say how to read SRC
READING = ("config", "revision", "key_map", "rope", "dtype", "default_route", "router_choices", "slicing")


def _print_table(source: str, options: dict[str, Any]) -> None:
    from duo_mlx.convert.source import open_source

    found = open_source(source, graft=options["graft"], **{name: options[name] for name in READING})
    click.echo(found.table())
    found.check()


def _convert(source: str, destination: Path, options: dict[str, Any], watch: "Watch") -> None:
    from duo_mlx.convert.calibration import Calibration
    from duo_mlx.convert.directory import Bits, convert

    graft = None
    if options["graft"]:
        from duo_mlx.convert.graft import Graft

        graft = Graft(
            kind=options["small_kind"],
            small_ratio=options["small_ratio"],
            small_layers=options["small_layers"],
            tokens=options["calibration_tokens"],
            seed=options["seed"],
        )
    texts, bits, small_bits = options["calibrate"], options["bits"], options["small_bits"]
    convert(
        source,
        destination,
        **{name: options[name] for name in READING},
        graft=graft,
        calibrate=Calibration(texts, options["measure_tokens"]) if texts else None,
        bits=Bits(bits, small_bits, options["group_size"]) if bits or small_bits else None,
        allow_nonfinite=options["allow_nonfinite"],
        verify=options["verify"],
        force=options["force"],
        watch=watch,
    )


def _export(source: str, destination: Path, options: dict[str, Any], watch: "Watch") -> None:
    from duo_mlx import checkpoint
    from duo_mlx.convert.directory import judge, require_torch
    from duo_mlx.convert.export import export

    names = options["names"]
    if options["revision"] and Path(source).exists():
        raise click.UsageError(f"--revision: {source} is no hub id (OWNER/NAME)")
    if options["verify"]:
        require_torch()
    directory = checkpoint.resolve(source, options["revision"])
    if options["verify"]:
        from duo_mlx.convert import references

        if line := references.note(checkpoint.read_config(directory)):
            watch.note(line)

    def verify(exported: Path) -> None:
        from duo_mlx.convert import parity

        judge(watch, "the export", parity.measure_export(exported, directory, names=names))

    export(
        directory,
        destination,
        names=names,
        dequantise=options["dequantise"],
        force=options["force"],
        verify=verify if options["verify"] else None,
    )


class _Tables:
    """What was verified, on standard output; the second table and those after it say of what they are."""

    def __init__(self) -> None:
        self.printed = 0

    def show(self, what: str, found: list[Any]) -> None:
        from duo_mlx.convert import parity

        if self.printed:
            click.echo(f"\n{what}:")
        self.printed += 1
        click.echo("\n".join([parity.HEAD, *map(str, found)]))


def _note(line: str) -> None:
    click.echo(f"duo-mlx: {line}", err=True)


def _peak() -> int:
    """Bytes of the process' largest resident set."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
