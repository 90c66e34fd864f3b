"""Nested small FFNs: a small FFN that is made of big's first neurons, as in MatFormer (arXiv 2310.07707).

It shares what big's neurons read and has a down projection of its own, so that it takes hardly any memory beside big.
Who sorts big's neurons by what they are worth gets the best from it (`duo_mlx.convert.graft`).
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from duo_mlx import forms
from duo_mlx.errors import DuoError


class NestedFFN(nn.Module):
    """What is a nested small FFN's own; `within` makes an FFN of it.

    Args:
        big: the FFN whose neurons it shares.
        hidden: width of its inputs and outputs.
        width: how many of big's neurons it has.
        bias: whether its down projection has a bias.

    Raises:
        DuoError: big's neurons cannot be told apart, or there are fewer.
    """

    def __init__(self, big: nn.Module, hidden: int, width: int, bias: bool):
        super().__init__()
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        *reads, down = linear_maps(big)
        neurons = outputs(big[reads[0]])
        if width > neurons:
            raise DuoError(f"a nested small FFN has {width} neurons, and its big one only {neurons}")
        # not as attributes: a module takes tuples for its children
        vars(self).update(reads=tuple(reads), down=down, width=width, made=((), None))

    def within(self, big: nn.Module) -> nn.Module:
        """Return the small FFN as a module of big's class; it is made anew when big's weights are other arrays."""
        parts = [big[name] for name in self.reads]
        given = [type(big), self.down_proj, *(type(part) for part in parts), *_arrays(parts)]
        made_of, made = self.made
        if len(given) != len(made_of) or any(one is not other for one, other in zip(given, made_of, strict=True)):
            made = _copy(big)
            for name, part in zip(self.reads, parts, strict=True):
                made[name] = _first(part, self.width)
            made[self.down] = self.down_proj
            vars(self)["made"] = given, made
        return made


def linear_maps(module: nn.Module) -> tuple[str, ...]:
    """Return the names of an FFN's linear maps, that of its down projection last.

    An FFN of unknown form is taken if its maps' sizes tell them apart: Gemma 3n's looks at all its neurons to silence
    most of them, and does so with the first ones, too.

    Raises:
        DuoError: it is no FFN of two or three linear maps.
    """
    found = forms.names(module)
    if found is not None:
        return found
    public = {name: part for name, part in module.items() if not name.startswith("_")}
    linear = [name for name, part in public.items() if type(part) in forms.LINEAR]
    others = [part for name, part in public.items() if name not in linear]
    if len(linear) == 3 and all(isinstance(part, nn.Module) and not part.parameters() for part in others):
        counts = [outputs(module[name]) for name in linear]
        down = [name for name, count in zip(linear, counts, strict=True) if counts.count(count) == 1]
        if len(down) == 1:
            return (*(name for name in linear if name != down[0]), down[0])
    raise DuoError(f"a small FFN cannot be nested in big: {forms.unknown(module)}; give small FFNs of their own")


def outputs(linear: Any) -> int:
    """Return how many outputs a linear map has."""
    count: int = linear.weight.shape[0]
    return count


class _FirstOutputs(nn.Module):
    """The first outputs of a map that is no plain linear one, such as LoRA's; all are computed."""

    def __init__(self, whole: nn.Module, count: int):
        super().__init__()
        self.whole, self.count = whole, count

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.whole(x)[..., : self.count]
        return out


def _first(part: nn.Module, count: int) -> nn.Module:
    """A linear map with the first ``count`` outputs of another; its arrays are views."""
    if not isinstance(part, forms.LINEAR):
        return _FirstOutputs(part, count)
    made = _copy(part)
    for name, array in part.items():
        made[name] = array[:count]
    return made


def _copy(module: nn.Module) -> nn.Module:
    """A module of the same class with the same parts but for private modules, which were made of others."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    for name, part in module.items():
        if name.startswith("_") and isinstance(part, nn.Module):
            vars(made)[name] = None
        else:
            made[name] = part
    return made


def _arrays(parts: Sequence[nn.Module]) -> list[mx.array]:
    return [value for part in parts for value in part.values() if isinstance(value, mx.array)]
