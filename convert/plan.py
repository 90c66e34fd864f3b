"""What a conversion would do: which tensor becomes which, and what does not fit the configuration.

Everything here is known from names, shapes and types; nothing is loaded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.convert import dense
from duo_mlx.convert.keymaps import KeyMap
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

if TYPE_CHECKING:
    from duo_mlx.model import Model

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Misfit:
    """A tensor that does not fit the configuration; a shape of None: it is not there, or not wanted."""

    name: str
    found: tuple[int, ...] | None
    expected: tuple[int, ...] | None

    @property
    def problem(self) -> str:
        if self.found is None:
            return "missing"
        return "left over" if self.expected is None else "wrong shape"

    def __str__(self) -> str:
        shape = f"{list(self.expected or ()) if self.found is None else list(self.found)}"
        implied = f", config.json implies {list(self.expected or ())}" if self.problem == "wrong shape" else ""
        return f"{self.problem:11} {self.name} {shape}{implied}"


class MisfitError(DuoError):
    """Weights and configuration disagree; ``misfits`` lists every tensor, the message counts them."""

    def __init__(self, source: Path, misfits: list[Misfit]):
        super().__init__(f"{source}: {len(misfits)} tensors do not fit config.json; nothing was written")
        self.misfits = misfits


@dataclass(frozen=True)
class Row:
    """A line of the table: where a tensor comes from and goes to."""

    source: str | None  # name in the file; None: it is not there
    target: str | None  # canonical name; None: it is not needed and left out
    shape: tuple[int, ...]  # of the target; of what is not there: the expected one
    dtype: str
    problem: str = ""


def mapped(tensors: Tensors, keymap: KeyMap, config: Mapping[str, Any], source: Path) -> dict[str, Tensor]:
    """``tensors`` of the checkpoint ``source`` under canonical names; each knows its own name there.

    Raises:
        DuoError: the key map cannot be applied.
    """
    try:
        return keymap.to_canonical({name: replace(tensor, name=name) for name, tensor in tensors.items()}, config)
    except DuoError as error:
        raise DuoError(f"{source}: {error}") from None


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the names of a Duo's weights in float and their shapes, in the model's order.

    Raises:
        DuoError: the configuration makes no model.
    """
    return shapes_of(dense.empty(config))


def shapes_of(model: "Model") -> dict[str, tuple[int, ...]]:
    """Return the names of a model's weights and their shapes, in its order."""
    return {name: value.shape for name, value in checkpoint.parameters(model).items()}


def kept(tensors: Tensors, tied: bool) -> dict[str, Tensor]:
    """``tensors`` without what every base can do without: rotary tables and a second copy of a ``tied`` head."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
    }


def misfits(tensors: Tensors, expected: Shapes) -> list[Misfit]:
    """What is missing, left over or of the wrong shape."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    names = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    return [Misfit(name, found.get(name), expected.get(name)) for name in names]


def plan(source: Tensors, tensors: Tensors, expected: Shapes) -> list[Row]:
    """The rows of a conversion, by target in the order of layers; what is left out comes last.

    Args:
        source: the checkpoint's tensors by their own names.
        tensors: what is to be written, by canonical names, see `mapped` and `kept`.
        expected: see `expected_shapes`.
    """
    wrong = {misfit.name: misfit for misfit in misfits(tensors, expected)}
    rows = []
    for name in sorted(expected.keys() | tensors.keys(), key=_by_number):
        problem = wrong[name].problem if name in wrong else ""
        if (tensor := tensors.get(name)) is None:
            rows.append(Row(None, name, expected[name], "", problem))
            continue
        if problem == "wrong shape":
            problem += f", config.json implies {list(expected[name])}"
        rows.append(Row(tensor.name or None, name, tensor.shape, tensor.dtype, problem))
    used = {name for tensor in tensors.values() for name in tensor.name.split(" + ")}
    left_out = sorted(source.keys() - used, key=_by_number)
    return rows + [Row(name, None, source[name].shape, source[name].dtype) for name in left_out]


def _by_number(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _short(source: str | None) -> str:
    """A row's source; of more than three tensors, such as a layer's experts, the first and the last."""
    parts = (source or "-").split(" + ")
    return " + ".join(parts) if len(parts) <= 3 else f"{parts[0]} + ... + {parts[-1]} ({len(parts)})"


def table(rows: Iterable[Row]) -> str:
    """The rows as text in columns: source, target, shape, dtype and what does not fit; "-" stands for none."""
    cells = [("source", "target", "shape", "dtype", "")]
    for row in rows:
        note = row.problem or ("left out" if row.target is None else "")
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append((_short(row.source), row.target or "-", shape, row.dtype or "-", note))
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, wide, strict=True)).rstrip() for line in cells
    )
