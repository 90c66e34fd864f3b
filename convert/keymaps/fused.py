"""Canonical names with fewer and larger matrices: q, k and v as ``qkv_proj``, gate and up as ``gate_up_proj``."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo_mlx.convert.keymaps import routers
from duo_mlx.convert.keymaps.base import collect, join, split, width
from duo_mlx.convert.tensors import Tensor, Tensors

FUSED = re.compile(r"(model\.layers\.\d+\.)(self_attn\.qkv|mlp\.(?:big\.|small\.)?gate_up)_proj(\.\w+)")
PART = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp|mlp\.big|mlp\.small)\.)(q|k|v|gate|up)_proj(\.\w+)")
PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
WHOLE = {part: whole for whole, parts in PARTS.items() for part in parts}


@dataclass(frozen=True)
class Fused:
    """Rows of q, then k, then v; rows of gate, then up. On reading either may also be there in parts."""

    name: str = "fused"

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:
        pieces: list[tuple[str, str, Tensor]] = []
        router = routers.canonical(tensors)
        for name, tensor in tensors.items():
            match = FUSED.fullmatch(name)
            if match is None:
                pieces.append((name, router(name), tensor))
                continue
            module, _, whole = match[2].rpartition(".")
            if whole == "qkv":
                sizes = [width(config, size) for size in ("q", "kv", "kv")]
            else:  # layers may have small FFNs of different widths
                sizes = [math.prod(tensor.shape[:1]) // 2] * 2
            names = [f"{match[1]}{module}.{part}_proj{match[3]}" for part in PARTS[whole]]
            pieces += [(name, *part) for part in zip(names, split(name, tensor, sizes), strict=True)]
        return collect(pieces)

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        pieces: list[tuple[str, str, Tensor]] = []
        for name, tensor in tensors.items():
            match = PART.fullmatch(name)
            whole = WHOLE[match[2]] if match else ""
            names = [f"{match[1]}{part}_proj{match[3]}" for part in PARTS[whole]] if match else []
            if not match or any(part not in tensors for part in names):
                pieces.append((name, name, tensor))
            elif match[2] == PARTS[whole][0]:
                joined = join(names, [tensors[part] for part in names])
                pieces.append((name, f"{match[1]}{whole}_proj{match[3]}", joined))
        return collect(pieces)
