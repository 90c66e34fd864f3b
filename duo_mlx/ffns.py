"""What strategies need to know of a layer: its two feed-forward modules."""

from typing import Protocol, TypeAlias

import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

FFN: TypeAlias = llama.MLP  # SwiGLU, [..., hidden] to [..., hidden]; its linear maps may be quantised and have biases


class FFNs(Protocol):
    """The two modules of a layer; where it has no small one, ``small`` is ``big``."""

    @property
    def big(self) -> FFN: ...

    @property
    def small(self) -> FFN: ...


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's weights as they are stored."""
    return sum(value.nbytes for value in dict(tree_flatten(module.parameters())).values())
