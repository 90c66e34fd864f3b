"""Routes and patterns: what a token does in each layer, and how that is written as text.

A *route* is what one token does in one layer. A *pattern* is one token's routes over all layers; as text it has one
character a layer: ``B`` big, ``s`` small, ``-`` skip. Arrays of routes hold the integers below as ``uint8``.
"""

from collections.abc import Iterable, Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError

Routes = NDArray[np.uint8]  # [layers], or [batch, tokens, layers]
FEW = 8  # tokens of a pass that decodes; more is a prefill


class Route(IntEnum):
    """What one token does in one layer."""

    SKIP = 0
    SMALL = 1
    BIG = 2


LETTERS = "-sB"  # indexed by Route
WORDS = {"skip": Route.SKIP, "small": Route.SMALL, "big": Route.BIG}


def parse_pattern(text: str, layers: int) -> Routes:
    """The pattern that ``text`` writes, ``[layers]``.

    ``text`` is ``big``, ``small`` or ``skip`` (that route in every layer), ``big@0,5,11`` (big in those layers, small
    elsewhere) or one character a layer, such as ``BBss--``.

    Raises:
        DuoError: unknown word or character, wrong length, or a layer that does not exist.
    """
    if text in WORDS:
        return np.full(layers, WORDS[text], dtype=np.uint8)
    if text.startswith("big@"):
        pattern = np.full(layers, Route.SMALL, dtype=np.uint8)
        pattern[_parse_layers(text, layers)] = Route.BIG
        return pattern
    unknown = sorted(set(text) - set(LETTERS))
    if unknown or not text:
        raise DuoError(
            f"route {text!r} is neither big, small, skip, big@LAYERS, random, router, budget:K nor a file, "
            "and not a pattern either: "
            f"a pattern has one of B (big), s (small), - (skip) for each of the {layers} layers"
        )
    if len(text) != layers:
        raise DuoError(f"route {text!r} has {len(text)} characters, but the model has {layers} layers")
    return np.array([LETTERS.index(letter) for letter in text], dtype=np.uint8)


def _parse_layers(text: str, layers: int) -> list[int]:
    numbers = text.removeprefix("big@").split(",")
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise DuoError(f"route {text!r}: after big@ come layer numbers with commas between, such as big@0,5")
    chosen = [int(number) for number in numbers]
    if max(chosen) >= layers:
        raise DuoError(f"route {text!r} names layer {max(chosen)}, but the {layers} layers are 0 to {layers - 1}")
    return chosen


def format_pattern(pattern: Iterable[int]) -> str:
    """One character a layer; the inverse of `parse_pattern`."""
    return "".join(LETTERS[route] for route in pattern)


def check_routes(routes: Sequence[int] | NDArray[np.integer], batch: int, tokens: int, layers: int) -> Routes:
    """``routes`` as ``uint8`` if its shape and values fit a pass over ``[batch, tokens]``, else `DuoError`."""
    array = np.asarray(routes)
    if array.shape not in ((layers,), (batch, tokens, layers)):
        raise DuoError(
            f"routes have shape {list(array.shape)}; they must be [{layers}] (one pattern for all tokens) "
            f"or [{batch}, {tokens}, {layers}] (batch, tokens, layers)"
        )
    if array.dtype.kind not in "iu" or (array.size and (array.min() < Route.SKIP or array.max() > Route.BIG)):
        raise DuoError("routes must be integers: 0 (skip), 1 (small) or 2 (big)")
    return array.astype(np.uint8, copy=False)


def histogram(routes: Routes) -> dict[str, int]:
    """How often each route occurs in an array of any shape, as ``{"big": n, "small": n, "skip": n}``."""
    counts = np.bincount(routes.ravel(), minlength=len(Route))
    return {"big": int(counts[Route.BIG]), "small": int(counts[Route.SMALL]), "skip": int(counts[Route.SKIP])}
