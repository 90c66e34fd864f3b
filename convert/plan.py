"""What a conversion would do: which tensor becomes which, and what does not fit the configuration.

Everything here is known from names, shapes and types; nothing is loaded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duo_mlx.config import Config
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


def empty_model(args: Config) -> "Model":
    """The model with weights that are never computed: it is there for their names and shapes.

    Raises:
        DuoError: the settings make no model.
    """
    from duo_mlx.model import Model

    try:
        return Model(args)
    except (ValueError, KeyError, TypeError, OverflowError) as error:  # mlx-lm's and MLX's word for bad settings
        raise DuoError(f"config.json: no model can be made of it: {' '.join(str(error).split())}") from error


def expected_shapes(args: Config, dense: bool = False) -> dict[str, tuple[int, ...]]:
    """The canonical names of a model's weights and their shapes; ``dense``: of one without small FFNs and routers.

    They are said here once more, in the model's order, because the model needs mlx-lm, which takes seconds to import.

    Raises:
        DuoError: the settings make no model.
    """
    for name in ("head_dim", "num_key_value_heads"):
        value = getattr(args, name)
        if value is not None and (type(value) is not int or value < 1):
            raise DuoError(f"config.json: {name} is {value!r}; it must be a positive integer")
    if args.rope_scaling:
        empty_model(args)  # mlx-lm says what it can do
    hidden = args.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab_size, hidden)}
    for layer in range(args.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= _attention_shapes(args, f"{prefix}.self_attn")
        width, small = args.intermediate_size, args.small_intermediate_size
        shapes |= _ffn_shapes(f"{prefix}.mlp{'' if dense else '.big'}", hidden, width, args.mlp_bias)
        if not dense and args.has_small(layer):
            shapes |= _ffn_shapes(f"{prefix}.mlp.small", hidden, small, args.mlp_bias or args.small_bias)
        if not dense and args.router_choices:
            shapes |= _linear(f"{prefix}.mlp.router", len(args.router_choices), args.router_width, args.router_bias)
        shapes |= {f"{prefix}.{norm}.weight": (hidden,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes["model.norm.weight"] = (hidden,)
    if not args.tie_word_embeddings:
        shapes["lm_head.weight"] = (args.vocab_size, hidden)
    return shapes


def _attention_shapes(args: Config, prefix: str) -> dict[str, tuple[int, ...]]:
    width = args.head_dim or args.hidden_size // args.num_attention_heads
    rows = {"q": args.num_attention_heads, "k": args.num_key_value_heads, "v": args.num_key_value_heads}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, heads in rows.items():
        shapes |= _linear(f"{prefix}.{name}_proj", heads * width, args.hidden_size, args.attention_bias)
    return shapes | _linear(f"{prefix}.o_proj", args.hidden_size, args.num_attention_heads * width, args.attention_bias)


def _ffn_shapes(prefix: str, hidden: int, width: int, bias: bool) -> dict[str, tuple[int, ...]]:
    inwards = _linear(f"{prefix}.gate_proj", width, hidden, bias) | _linear(f"{prefix}.up_proj", width, hidden, bias)
    return inwards | _linear(f"{prefix}.down_proj", hidden, width, bias)


def _linear(module: str, rows: int, columns: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{module}.weight": (rows, columns)}
    return weight | {f"{module}.bias": (rows,)} if bias else weight


def kept(tensors: Tensors, tied: bool) -> dict[str, Tensor]:
    """Canonical ``tensors`` without what `Model.sanitize` drops: rotary tables and a second copy of a ``tied`` head."""
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


def table(rows: Iterable[Row]) -> str:
    """The rows as text in columns: source, target, shape, dtype and what does not fit; "-" stands for none."""
    cells = [("source", "target", "shape", "dtype", "")]
    for row in rows:
        note = row.problem or ("left out" if row.target is None else "")
        shape = "x".join(map(str, row.shape)) or "scalar"
        cells.append((row.source or "-", row.target or "-", shape, row.dtype or "-", note))
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(size) for cell, size in zip(line, wide, strict=True)).rstrip() for line in cells
    )
