"""Key maps: from the names, and the layout, of someone's checkpoint to canonical ones and back.

A map is pure and loads nothing. Maps by name go both ways; rules from a file (`from_file`) only lead to canonical
names.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from duo_mlx.convert.keymaps import rules
from duo_mlx.convert.keymaps.base import KeyMap
from duo_mlx.convert.keymaps.canonical import Canonical
from duo_mlx.convert.keymaps.fused import Fused
from duo_mlx.convert.keymaps.llama import Llama
from duo_mlx.convert.keymaps.rope import LAYOUTS, WithRope
from duo_mlx.errors import DuoError

__all__ = ["LAYOUTS", "NAMES", "KeyMap", "detect", "from_file", "named"]

MAPS = {
    "canonical": WithRope(Canonical()),
    "llama": WithRope(Llama(), "interleaved"),
    "fused": WithRope(Fused()),
}
NAMES = tuple(MAPS)

# what gives a checkpoint's names away, in the order in which it is looked for
SIGNS = {
    "llama": r"layers\.\d+\.(attention\.w[qkvo]|small_feed_forward|feed_forward(_small)?)\..*|tok_embeddings\.weight",
    "fused": r"model\.layers\.\d+\..*\.(qkv|gate_up)_proj\..*",
    "canonical": r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp)\..*|model\.embed_tokens\.weight",
}


def named(name: str, rope: str | None = None) -> KeyMap:
    """A map by its name.

    Args:
        name: one of `NAMES`.
        rope: the layout of q and k that goes with those names, one of `LAYOUTS`. None: interleaved for llama, for
            others what config.json says that the model runs.

    Raises:
        DuoError: there is no such map or layout.
    """
    if name not in MAPS:
        raise DuoError(f"there is no key map {name!r}; known are {', '.join(NAMES)}, or a file of rules")
    return MAPS[name] if rope is None else replace(MAPS[name], rope=_known(rope))


def from_file(path: Path, rope: str | None = None) -> KeyMap:
    """A map of the user's own rules, see `duo_mlx.convert.keymaps.rules`; ``rope`` as for `named`.

    Raises:
        DuoError: the file cannot be read, or a rule is wrong.
    """
    return WithRope(rules.read(path), None if rope is None else _known(rope))


def detect(tensors: Iterable[str], source: Path | None = None, rope: str | None = None) -> KeyMap:
    """The map that fits the names of ``tensors``.

    Args:
        tensors: by name, or the names alone.
        source: where they are from, for the message.
        rope: as for `named`.

    Raises:
        DuoError: none fits.
    """
    names = sorted(tensors)
    for name, sign in SIGNS.items():
        if any(re.fullmatch(sign, tensor) for tensor in names):
            return named(name, rope)
    seen = ", ".join(names[:3]) + (" ..." if names[3:] else "") if names else "nothing"
    raise DuoError(
        f"{f'{source}: ' if source else ''}its names ({seen}) fit none of the key maps {', '.join(NAMES)}; "
        "give rules with --key-map FILE"
    )


def _known(rope: str) -> str:
    if rope not in LAYOUTS:
        raise DuoError(f"the RoPE layout is {rope!r}; it must be {' or '.join(LAYOUTS)}")
    return rope
