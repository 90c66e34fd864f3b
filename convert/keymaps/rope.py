"""The two layouts of RoPE: which rows of q and k turn together.

Meta's Llama and llama.cpp's pair neighbouring channels of a head (*interleaved*: 0 with 1, 2 with 3 ...), Hugging Face
pairs channels half a head apart (*half*). The same attention results when the rows of q and k are permuted within each
head.
A model whose config.json says ``rope_traditional`` runs interleaved rows itself.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from duo_mlx.convert.keymaps.base import KeyMap, width
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

LAYOUTS = ("half", "interleaved")
ROTATED = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)")

Permutation = Callable[[mx.array], mx.array]


def interleaved_to_half(heads: int, head_dim: int) -> Permutation:
    """Reorder the rows of a q or k weight ``[heads * head_dim, in]`` or bias ``[heads * head_dim]``."""
    return _swap(heads, head_dim // 2, 2)


def half_to_interleaved(heads: int, head_dim: int) -> Permutation:
    """The inverse of `interleaved_to_half`."""
    return _swap(heads, 2, head_dim // 2)


def _swap(heads: int, outer: int, inner: int) -> Permutation:
    def permute(array: mx.array) -> mx.array:
        return array.reshape(heads, outer, inner, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)

    return permute


def permuted(tensor: Tensor, direction: str, heads: int, head_dim: int) -> Tensor:
    """``tensor`` with its rows permuted; ``direction`` is "interleaved_to_half" or "half_to_interleaved".

    Raises:
        DuoError: heads of an odd width have no pairs.
    """
    if head_dim % 2:
        raise DuoError(f"config.json: heads of {head_dim} channels cannot be rotated; head_dim must be even")
    permute = {"interleaved_to_half": interleaved_to_half, "half_to_interleaved": half_to_interleaved}[direction]
    return tensor.apply(permute(heads, head_dim))


@dataclass(frozen=True)
class WithRope:
    """A map whose names' owner uses the layout ``rope``; None: the layout that config.json says the model runs."""

    names: KeyMap
    rope: str | None = None

    @property
    def name(self) -> str:
        return self.names.name

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        return self._permuted(self.names.to_canonical(tensors, config), config, self.rope, _layout(config))

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        return self.names.from_canonical(self._permuted(tensors, config, _layout(config), self.rope), config)

    def _permuted(
        self, tensors: Tensors, config: Mapping[str, Any], have: str | None, want: str | None
    ) -> dict[str, Tensor]:
        if have is None or want is None or have == want:
            return dict(tensors)
        result = {}
        for name, tensor in tensors.items():
            if match := ROTATED.fullmatch(name):
                rows, heads = {"q": ("q", "heads"), "k": ("kv", "kv_heads")}[match[1]]
                # one of another shape stays as it is: the plan says that it does not fit, beside all others
                if tensor.shape[:1] == (width(config, rows),):
                    sizes = width(config, heads), width(config, "head_dim")
                    tensor = permuted(tensor, f"{have}_to_{want}", *sizes)
            result[name] = tensor
        return result


def _layout(config: Mapping[str, Any]) -> str:
    return "interleaved" if config.get("rope_traditional") else "half"
