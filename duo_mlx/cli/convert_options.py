"""Which options of ``duo-mlx convert`` go together; what does not is said before anything is read."""

import re
from collections.abc import Mapping, Set
from typing import Any

import click

LEAST = 128  # tokens that measuring is worth something with; equal to what duo_mlx.convert.calibration needs
FLOAT = 16  # bits that mean: leave it in floating point

EXPORT = ("names", "dequantise")
WITH_EXPORT = {"source", "destination", "to", "revision", "verify", "force", *EXPORT}
# an option, and those of which it needs one
NEEDS = {
    "small_kind": ("graft",),
    "small_ratio": ("graft",),
    "small_layers": ("graft",),
    "calibration_tokens": ("graft",),
    "seed": ("graft",),
    "measure_tokens": ("calibrate",),
    "group_size": ("bits", "small_bits"),
}


def check(options: Mapping[str, Any], given: Set[str]) -> None:
    """Refuse options that contradict each other, or that would do nothing.

    Args:
        options: all, by their parameters' names.
        given: those that stand on the command line.

    Raises:
        click.UsageError: in one line.
    """
    if options["to"] == "torch":
        if beyond := _first(given - WITH_EXPORT, options):
            raise click.UsageError(f"{_option(beyond)} does not go with --to torch")
        return
    if beyond := _first(given & set(EXPORT), options):
        raise click.UsageError(f"{_option(beyond)} goes with --to torch")
    for name, needed in NEEDS.items():
        if name in given and not any(options[other] for other in needed):
            raise click.UsageError(f"{_option(name)} goes with {' or '.join(map(_option, needed))}")
    if options["graft"] and options["slicing"]:
        raise click.UsageError("--slicing takes small FFNs from Gemma 3n's own, and --graft makes new ones; give one")
    if options["graft"] and not options["calibrate"] and not options["dry_run"]:
        raise click.UsageError("--graft needs a text that the small FFNs are fitted to: --calibrate TEXT")
    if 0 < options["measure_tokens"] < LEAST:
        raise click.UsageError(f"--measure-tokens {options['measure_tokens']}: it must be 0 or at least {LEAST}")
    if options["calibrate"] and not options["graft"] and not options["measure_tokens"]:
        raise click.UsageError("--calibrate without --graft is for measuring, which --measure-tokens 0 declines")
    bits = [options[name] for name in ("bits", "small_bits") if options[name] is not None]
    if bits and set(bits) == {FLOAT}:
        raise click.UsageError(f"with {FLOAT} bits everywhere nothing is quantised; leave out --bits")


def parse_layers(_: click.Context, __: click.Parameter, spec: str | None) -> tuple[int, ...] | None:
    """Layer numbers of a spec such as ``1-28`` or ``0,2,4-9``.

    Raises:
        click.BadParameter: it is no such spec.
    """
    if spec is None:
        return None
    layers: set[int] = set()
    for part in spec.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(f"{spec!r} is no list of layers such as 1-28 or 0,2,4-9")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(layers))


def _first(names: Set[str], options: Mapping[str, Any]) -> str | None:
    """The first of ``names`` in the order in which the options are declared."""
    return next((name for name in options if name in names), None)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
