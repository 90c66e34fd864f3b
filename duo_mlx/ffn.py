"""A layer's FFNs: the base's own as big, another as small, and a router beside them.

`DuoFFN` stands in a block in the place of the FFN that it holds as big. Routes are no argument of a block's call to its
FFN, so a DuoFFN reads them from the pass that is open (`duo_mlx.hosting`).
"""

from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu

from duo_mlx.config import Config
from duo_mlx.forms import ACTIVATIONS
from duo_mlx.hosting import current
from duo_mlx.nested import NestedFFN

FFN = Any  # a module: [..., hidden] to [..., hidden]


class FFNs(Protocol):
    """The two modules of a layer; where it has no small one, ``small`` is ``big``."""

    small_skips: bool  # whether the small route means skip

    @property
    def big(self) -> Any: ...

    @property
    def small(self) -> Any: ...


class GatedFFN(nn.Module):
    """A small FFN: ``down(activation(gate(x)) * up(x))``.

    Args:
        hidden: width of its inputs and outputs.
        inner: how many neurons it has.
        activation: one of `duo_mlx.forms.ACTIVATIONS`.
        bias: whether its linear maps have biases.
    """

    def __init__(self, hidden: int, inner: int, activation: str = "silu", bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        """Return the outputs of ``x [..., hidden]``."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        inner = swiglu(gate, up) if self.activation == "silu" else ACTIVATIONS[self.activation](gate) * up
        out: mx.array = self.down_proj(inner)
        return out


class RouterWeights(nn.Module):
    """A layer's linear router. It is no `nn.Linear`, so that quantising a model leaves these few weights alone."""

    def __init__(self, config: Config):
        super().__init__()
        self.weight = mx.zeros((len(config.router_choices), config.router_width))
        if config.router_bias:
            self.bias = mx.zeros(len(config.router_choices))

    def __call__(self, x: mx.array) -> mx.array:
        """Return logits ``[..., choices]`` in float32 of normalised hidden states ``x [..., hidden]``."""
        logits = (x @ self.weight.T).astype(mx.float32)
        return logits + self.bias if "bias" in self else logits


class DuoFFN(nn.Module):
    """A layer's big and small FFN.

    Args:
        big: the base's own FFN.
        small: the other one; None where the layer has none, and the small route uses the big one. A nested one stands
            here with what is its own, and as the attribute ``small`` with what it shares with big, too.
        router: of the layer, if it has one.
        index: of the layer.
        small_skips: whether the small route means skip.
    """

    replaces_ffn = True

    def __init__(
        self,
        big: nn.Module,
        small: nn.Module | None,
        router: RouterWeights | None,
        index: int,
        small_skips: bool = False,
    ):
        super().__init__()
        self.big = big
        if small is not None:
            self["small"] = small  # as an attribute it would seem to be there already
        if router is not None:
            self.router = router
        self.index, self.small_skips = index, small_skips

    def __getattr__(self, key: str) -> Any:
        if key != "small":
            return super().__getattr__(key)
        small = self.get("small", self.big)
        return small.within(self.big) if isinstance(small, NestedFFN) else small

    def __call__(self, x: mx.array) -> mx.array:
        """Return what the open pass makes of ``x [..., hidden]``; big's output where no pass is open."""
        opened = current()
        out: mx.array = self.big(x) if opened is None else opened.ffn(self, x)
        return out


def nbytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights as they are stored."""
    return sum(value.nbytes for value in dict(tree_flatten(module.parameters())).values())
