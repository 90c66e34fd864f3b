r"""Key maps that a user writes: a TOML file of rules, each a regular expression and what becomes of a name it matches.

    [[rule]]
    from = 'decoder\.(\d+)\.attn\.qkv\.weight'
    to = ['model.layers.\1.self_attn.q_proj.weight',
          'model.layers.\1.self_attn.k_proj.weight',
          'model.layers.\1.self_attn.v_proj.weight']
    sizes = ["q", "kv", "kv"]

    [[rule]]
    from = '.*\.rotary_table'
    drop = true

The first rule whose ``from`` matches a whole name has its say; names that none matches stay as they are. Keys, in the
order in which they act:

- ``drop = true``: the tensor is left out.
- ``reshape``: a list of sizes, at most one of them -1.
- ``transpose``: true reverses the axes; or a list of the axes in their new order.
- ``to``: a template with ``\1`` or ``\g<name>``, or a list of them, which splits the tensor along ``axis`` (0) into
  ``sizes``, without which the parts are equal.
- ``shape``: as reshape, of each part.
- ``permute``: "interleaved_to_half" or "half_to_interleaved", of the rows of RoPE's ``heads``: "q" or "kv"; of a split
  also a list with one of "q", "kv" and "none" for each part.

A size is an integer or a name for what config.json says: q, kv (rows of q_proj and k_proj), hidden, big, small, heads,
kv_heads, head_dim.
"""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, Self

from duo_mlx.convert.keymaps import base, rope
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

Size = int | str

NAMED = ("q", "kv", "hidden", "big", "small", "heads", "kv_heads", "head_dim")
HEADS = {"q": ("q", "heads"), "kv": ("kv", "kv_heads")}
PERMUTATIONS = ("interleaved_to_half", "half_to_interleaved")


@dataclass(frozen=True)
class Rule:
    """One rule; the fields are its keys in the file."""

    pattern: re.Pattern[str]  # "from" in the file, which is no name in Python
    to: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    axis: int = 0
    reshape: tuple[Size, ...] = ()
    shape: tuple[Size, ...] = ()
    transpose: bool | tuple[int, ...] = False
    permute: str = ""
    heads: tuple[str, ...] = ()
    drop: bool = False

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> Self:
        """A rule from its TOML table.

        Raises:
            DuoError: the message goes behind the file and the rule's number.
        """
        known = ["from", *(field.name for field in fields(cls) if field.name != "pattern")]
        if unknown := sorted(table.keys() - set(known)):
            raise DuoError(f"{unknown[0]!r} is no key of a rule; known are {', '.join(known)}")
        if not isinstance(table.get("from"), str):
            raise DuoError("from must be a regular expression")
        try:
            pattern = re.compile(table["from"])
        except (re.error, RecursionError, OverflowError) as error:
            raise DuoError(f"from is no regular expression: {_one_line(error)}") from None
        values: dict[str, Any] = {}
        for key, value in table.items():
            if key in ("to", "heads") and isinstance(value, str):
                value = [value]
            values["pattern" if key == "from" else key] = tuple(value) if isinstance(value, list) else value
        rule = cls(**values | {"pattern": pattern})
        rule._check()
        return rule

    def _check(self) -> None:
        if not isinstance(self.drop, bool):
            raise DuoError(f"drop is {self.drop!r}; it must be true")
        if self.drop:
            if self != type(self)(self.pattern, drop=True):
                raise DuoError("drop = true goes with from alone")
            return
        if not isinstance(self.to, tuple) or not self.to or not all(isinstance(name, str) for name in self.to):
            raise DuoError("needs a to, a template or a list of them, or drop = true")
        if type(self.axis) is not int or self.axis < 0:
            raise DuoError(f"axis is {self.axis!r}; it must be 0 or more")
        for key in ("sizes", "reshape", "shape"):
            _check_sizes(key, getattr(self, key), unknown=0 if key == "sizes" else 1)
        if self.sizes and len(self.sizes) != len(self.to):
            raise DuoError(f"to has {len(self.to)} names, sizes {len(self.sizes)}")
        if not isinstance(self.transpose, (bool, tuple)):
            raise DuoError(f"transpose is {self.transpose!r}; it must be true or a list of axes")
        if isinstance(self.transpose, tuple) and {repr(axis) for axis in self.transpose} != {
            repr(axis) for axis in range(len(self.transpose))
        }:
            raise DuoError(f"transpose is {list(self.transpose)}; it must hold each axis once, 0 and up")
        if self.permute not in ("", *PERMUTATIONS):
            raise DuoError(f"permute is {self.permute!r}; it must be {' or '.join(PERMUTATIONS)}")
        if bool(self.permute) != bool(self.heads):
            raise DuoError('permute and heads ("q" or "kv") go together')
        if not isinstance(self.heads, tuple) or not all(name in (*HEADS, "none") for name in self.heads):
            raise DuoError(f'heads is {self.heads!r}; it must be "q" or "kv", or a list of them and "none"')
        if len(self.heads) not in (0, 1, len(self.to)):
            raise DuoError(f"to has {len(self.to)} names, heads {len(self.heads)}")
        # matches the empty string with groups that are all empty, so that each reference in a template can be tried
        groups = re.compile(f"{self.pattern.pattern}\n|").match("")
        assert groups is not None
        for template in self.to:
            try:
                groups.expand(template)
            except (re.error, IndexError) as error:
                raise DuoError(f"to {template!r}: {_one_line(error)}") from None

    def apply(self, match: re.Match[str], tensor: Tensor, config: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """New names and tensors.

        Raises:
            DuoError: the tensor is not what the rule expects.
        """
        if self.drop:
            return []
        names = [match.expand(template) for template in self.to]
        tensor = self._transposed(_reshaped(tensor, self.reshape, config, "reshape"))
        parts = [_reshaped(part, self.shape, config, "shape") for part in self._split(tensor, config)]
        heads = self.heads * len(parts) if len(self.heads) == 1 else self.heads or ("none",) * len(parts)
        parts = [self._permuted(part, rows, config) for part, rows in zip(parts, heads, strict=True)]
        return list(zip(names, parts, strict=True))

    def _transposed(self, tensor: Tensor) -> Tensor:
        if self.transpose is False:
            return tensor
        axes = tuple(reversed(range(len(tensor.shape)))) if self.transpose is True else self.transpose
        if len(axes) != len(tensor.shape):
            raise DuoError(f"transpose {list(axes)} does not fit its shape {list(tensor.shape)}")
        return tensor.apply(lambda array: array.transpose(axes), tuple(tensor.shape[axis] for axis in axes))

    def _split(self, tensor: Tensor, config: Mapping[str, Any]) -> list[Tensor]:
        if len(self.to) == 1 and not self.sizes:
            return [tensor]
        if self.axis >= len(tensor.shape):
            raise DuoError(f"its shape {list(tensor.shape)} has no axis {self.axis}")
        count, extent = len(self.to), tensor.shape[self.axis]
        if not self.sizes and extent % count:
            raise DuoError(f"its shape {list(tensor.shape)} has no {count} equal parts along axis {self.axis}")
        sizes = _resolved(self.sizes, config) if self.sizes else [extent // count] * count
        return base.split("its shape", tensor, sizes, self.axis)

    def _permuted(self, tensor: Tensor, heads: str, config: Mapping[str, Any]) -> Tensor:
        if heads == "none":
            return tensor
        rows, count = (base.width(config, size) for size in HEADS[heads])
        if tensor.shape[:1] != (rows,):
            raise DuoError(f"permute needs {rows} rows ({heads}), but its shape is {list(tensor.shape)}")
        return rope.permuted(tensor, self.permute, count, base.width(config, "head_dim"))


def _check_sizes(key: str, value: Any, unknown: int) -> None:
    if not isinstance(value, tuple):
        raise DuoError(f"{key} is {value!r}; it must be a list of sizes")
    for size in value:
        if size not in NAMED if isinstance(size, str) else type(size) is not int or (size < 1 and size != -1):
            raise DuoError(f"{key} has {size!r}; a size is a positive integer or one of {', '.join(NAMED)}")
    if value.count(-1) > unknown:
        raise DuoError(f"{key} is {list(value)}; it may hold {'no' if unknown == 0 else 'only one'} -1")


def _resolved(sizes: Sequence[Size], config: Mapping[str, Any]) -> list[int]:
    return [base.width(config, size) if isinstance(size, str) else size for size in sizes]


def _reshaped(tensor: Tensor, sizes: Sequence[Size], config: Mapping[str, Any], key: str) -> Tensor:
    if not sizes:
        return tensor
    shape, elements = _resolved(sizes, config), prod(tensor.shape)
    known = prod(size for size in shape if size != -1)
    if elements % known or (-1 not in shape and elements != known):
        raise DuoError(f"{key} {shape} does not fit its shape {list(tensor.shape)}")
    shape = [elements // known if size == -1 else size for size in shape]
    return tensor.apply(lambda array: array.reshape(shape), tuple(shape))


@dataclass(frozen=True)
class Rules:
    """The rules of a file, as a key map. There is no way back: what was dropped is gone, and a name may lose parts."""

    path: Path
    rules: tuple[Rule, ...]

    @property
    def name(self) -> str:
        return self.path.name

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        for name, tensor in tensors.items():
            where, parts = f"{name} (that no rule matches)", [(name, tensor)]
            for number, rule in enumerate(self.rules, 1):
                if match := rule.pattern.fullmatch(name):
                    where = f"rule {number}: {name}"
                    try:
                        parts = rule.apply(match, tensor, config)
                    except DuoError as error:
                        raise DuoError(f"{self.path}: {where}: {error}") from None
                    break
            for new, part in parts:
                if new in result:
                    raise DuoError(f"{self.path}: {where} becomes {new}, which {origin[new]} is already")
                result[new], origin[new] = part, where
        return result

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        raise DuoError(f"{self.path}: rules lead to canonical names, not back from them")


def read(path: Path) -> Rules:
    """The rules in the TOML file ``path``.

    Raises:
        DuoError: it cannot be read, or a rule is wrong; the line names the rule's number.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DuoError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DuoError(f"{path}: is no TOML ({_one_line(error)})") from None
    tables = content.pop("rule", None)
    if content:
        raise DuoError(f"{path}: has {min(content)!r}; a key map holds [[rule]] tables and nothing else")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise DuoError(f"{path}: must hold [[rule]] tables")
    rules = []
    for number, table in enumerate(tables, 1):
        try:
            rules.append(Rule.from_table(table))
        except DuoError as error:
            raise DuoError(f"{path}: rule {number}: {error}") from None
    return Rules(path, tuple(rules))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
