"""What every key map is made of: renaming one to one, and splitting and joining tensors when they are loaded."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import mlx.core as mx

from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError


class KeyMap(Protocol):
    """Names of tensors, theirs and the canonical ones, for dense and Duo models alike.

    Nothing is loaded, nothing is lost, and on what it wrote itself each direction is the other's exact inverse. Names
    that it does not know pass unchanged; `duo_mlx.convert.plan` finds them left over.
    """

    @property
    def name(self) -> str: ...

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same weights under canonical names; ``config`` holds the keys of a config.json."""
        ...

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The same weights under this map's names."""
        ...


@dataclass(frozen=True)
class Names:
    """A renaming that goes both ways: modules of the model, and modules of a layer below ``prefix`` and its number."""

    prefix: str
    model: Mapping[str, str]
    layer: Mapping[str, str]

    def canonical(self, name: str) -> str:
        return self._translate(name, self.prefix, "model.layers.", self.model, self.layer)

    def theirs(self, name: str) -> str:
        return self._translate(name, "model.layers.", self.prefix, *self._inverse)

    @cached_property
    def _inverse(self) -> tuple[dict[str, str], dict[str, str]]:
        model, layer = ({value: key for key, value in names.items()} for names in (self.model, self.layer))
        return model, layer

    @staticmethod
    def _translate(name: str, old: str, new: str, model: Mapping[str, str], layer: Mapping[str, str]) -> str:
        module, _, kind = name.rpartition(".")
        if module in model:
            return f"{model[module]}.{kind}"
        found = re.fullmatch(rf"{re.escape(old)}(\d+)\.(.+)", module)
        if found is None or found[2] not in layer:
            return name
        return f"{new}{found[1]}.{layer[found[2]]}.{kind}"


def collect(pieces: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, of triples of the name that one came from, its new name and itself.

    Raises:
        DuoError: two get the same name.
    """
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for old, new, tensor in pieces:
        if new in result:
            raise DuoError(f"{origin[new]} and {old} are both {new}")
        result[new], origin[new] = tensor, old
    return result


def renamed(tensors: Tensors, name: Callable[[str], str]) -> dict[str, Tensor]:
    """``tensors`` by their new names; two of the same are an error."""
    return collect((old, name(old), tensor) for old, tensor in tensors.items())


def split(name: str, tensor: Tensor, sizes: Sequence[int], axis: int = 0) -> list[Tensor]:
    """The parts of ``tensor`` along ``axis``.

    Raises:
        DuoError: ``sizes`` do not add up to what is there.
    """
    if axis >= len(tensor.shape) or sum(sizes) != tensor.shape[axis]:
        raise DuoError(f"{name} {list(tensor.shape)} cannot be split into {list(sizes)} along axis {axis}")
    parts, start = [], 0
    for size in sizes:
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
        parts.append(tensor.apply(_slice(start, start + size, axis), shape))
        start += size
    return parts


def _slice(start: int, stop: int, axis: int) -> Callable[[mx.array], mx.array]:
    index = (slice(None),) * axis + (slice(start, stop),)
    return lambda array: array[index]


def join(names: Sequence[str], parts: Sequence[Tensor]) -> Tensor:
    """The rows of all ``parts``, one below the other.

    Raises:
        DuoError: they differ in type or width.
    """
    first = parts[0]
    for name, part in zip(names, parts, strict=True):
        if part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            raise DuoError(
                f"{names[0]} {list(first.shape)} {first.dtype} and {name} {list(part.shape)} {part.dtype} "
                "cannot be one tensor"
            )
    loads = [part.load for part in parts]
    return Tensor(
        (sum(part.shape[0] for part in parts), *first.shape[1:]),
        first.dtype,
        lambda: mx.concatenate([load() for load in loads]),
        stored=first.stored if len({part.stored for part in parts}) == 1 else "",
        name=" + ".join(part.name for part in parts if part.name),
    )


def widths(config: Mapping[str, Any]) -> dict[str, int]:
    """A model's sizes: heads, kv_heads, head_dim, hidden, q and kv (rows of q_proj and k_proj), big and small.

    Those that the configuration does not give are left out, and small where it differs from layer to layer.

    Raises:
        DuoError: a key is no positive integer.
    """
    keys = {
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden": "hidden_size",
        "big": "intermediate_size",
        "small": "small_intermediate_size",
    }
    found: dict[str, int] = {}
    for size, key in keys.items():
        value = config.get(key)
        if value is None or (key == "num_key_value_heads" and value == 0):  # both mean: as many as the others
            continue
        if size == "small" and isinstance(value, list | tuple):
            continue
        if type(value) is not int or value < 1:
            raise DuoError(f"config.json: {key} is {value!r}; it must be a positive integer")
        found[size] = value
    if "heads" in found:
        found.setdefault("kv_heads", found["heads"])
        if "hidden" in found:
            found.setdefault("head_dim", found["hidden"] // found["heads"])
        if "head_dim" in found:
            found["q"], found["kv"] = (found[heads] * found["head_dim"] for heads in ("heads", "kv_heads"))
    return found


def width(config: Mapping[str, Any], size: str) -> int:
    """One of `widths`.

    Raises:
        DuoError: the configuration does not give it.
    """
    found = widths(config)
    if size not in found:
        keys = {"big": "intermediate_size", "small": "small_intermediate_size"}
        raise DuoError(f"config.json lacks {keys.get(size, 'hidden_size and num_attention_heads')}")
    return found[size]
