"""The names that wrappers of training leave in a checkpoint, taken off again."""

from typing import TypeVar

from duo_mlx.convert.readers.text import shown
from duo_mlx.errors import DuoError

COMPILED = "_orig_mod."  # torch.compile, before the names of whatever module it wrapped
PARALLEL = "module."  # DataParallel and DistributedDataParallel, before all names

T = TypeVar("T")


def unwrapped(tensors: dict[str, T]) -> dict[str, T]:
    """``tensors`` without torch.compile's prefix anywhere, and without DDP's where all names have it.

    Raises:
        DuoError: two names become one.
    """
    names = {name: _without_compiled(name) for name in tensors}
    while names and all(name.startswith(PARALLEL) and name != PARALLEL for name in names.values()):
        names = {name: short.removeprefix(PARALLEL) for name, short in names.items()}
    found: dict[str, str] = {}
    for name, short in names.items():
        if short in found:
            raise DuoError(f"{shown(name)} and {shown(found[short])} are both {shown(short)} without their prefixes")
        found[short] = name
    return {short: tensors[name] for short, name in found.items()}


def _without_compiled(name: str) -> str:
    *segments, last = name.split(".")
    return ".".join([segment for segment in segments if segment != COMPILED.rstrip(".")] + [last])
