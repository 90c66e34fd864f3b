"""Canonical names: Hugging Face Llama's, with ``mlp.big`` and ``mlp.small`` in a Duo's layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo_mlx.convert.keymaps import routers
from duo_mlx.convert.keymaps.base import renamed
from duo_mlx.convert.tensors import Tensor, Tensors


@dataclass(frozen=True)
class Canonical:
    """The identity, but for routers of other names."""

    name: str = "canonical"

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        return renamed(tensors, routers.canonical(tensors))

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        return dict(tensors)
