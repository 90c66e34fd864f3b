"""What a graft makes: small FFNs of their own, or nested ones; a kind says what is measured and how one is solved."""

from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.nested import solve_down
from duo_mlx.convert.graft.neurons import Neurons
from duo_mlx.convert.graft.solve import Copyable, Matrix, Moments, SmallFFN, solve
from duo_mlx.convert.graft.state import State
from duo_mlx.forms import ACTIVATIONS


class Small(Protocol):
    """A small FFN that was solved."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return what it gives for ``x [..., inputs]``."""

    def tensors(self) -> dict[str, Matrix]:
        """Return its weights by the names of a layer's small FFN."""


class Kind(Protocol):
    """One kind of small FFN for all layers of a model."""

    def width(self, layer: int) -> int:
        """Return how many neurons the layer's has; 0: it has no small FFN."""

    def copies(self, neurons: Neurons | None) -> Neurons | None:
        """Return big's neurons as far as the kind can use them."""

    def seen(self, x: mx.array) -> mx.array:
        """Return what of an FFN's inputs ``[..., inputs]`` its moments need, ``[..., some]``."""

    def solve(self, layer: int, moments: Moments, neurons: Neurons | None) -> Small:
        """Return the layer's small FFN."""

    def config(self) -> dict[str, Any]:
        """Return what config.json says of it."""


@dataclass(frozen=True)
class Own:
    """Gated FFNs of their own, partly linear and partly copied neurons, see `duo_mlx.convert.graft.solve`."""

    layers: tuple[bool, ...]  # which have one
    inner: int
    activation: str
    linear_share: float
    state: State

    def width(self, layer: int) -> int:
        return self.inner * self.layers[layer]

    def copies(self, neurons: Neurons | None) -> Neurons | None:
        return neurons if neurons is not None and neurons.activation == self.activation else None

    def seen(self, x: mx.array) -> mx.array:
        return x

    def solve(self, layer: int, moments: Moments, neurons: Neurons | None) -> "Small":
        linear = round(self.linear_share * self.inner)
        metric = self.state.load(f"metric-{layer}")
        found = solve(moments, Copyable.of(neurons, moments.inputs), metric, self.inner, linear, self.activation)
        return OwnSmall(found, self.activation)

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = {"small_intermediate_size": self.inner, "small_bias": True}
        if self.activation != "silu":
            found["small_activation"] = self.activation
        if not all(self.layers):
            found["small_layers"] = [layer for layer, has in enumerate(self.layers) if has]
        return found


@dataclass(frozen=True)
class OwnSmall:
    """A gated FFN of its own with its activation."""

    weights: SmallFFN
    activation: str

    def __call__(self, x: mx.array) -> mx.array:
        parts = {name: mx.array(value) for name, value in vars(self.weights).items()}
        gate, up = x @ parts["gate"].T + parts["gate_bias"], x @ parts["up"].T + parts["up_bias"]
        return (ACTIVATIONS[self.activation](gate) * up) @ parts["down"].T + parts["down_bias"]

    def tensors(self) -> dict[str, Matrix]:
        return self.weights.tensors()


@dataclass(frozen=True)
class Nested:
    """Big's first neurons in the order of `duo_mlx.convert.graft.nested.rank`, and a down projection of their own."""

    widths: tuple[int, ...]
    state: State

    def width(self, layer: int) -> int:
        return self.widths[layer]

    def copies(self, neurons: Neurons | None) -> Neurons | None:
        return neurons

    def seen(self, x: mx.array) -> mx.array:
        return x[..., :0]

    def solve(self, layer: int, moments: Moments, neurons: Neurons | None) -> "Small":
        assert neurons is not None
        order, width = self.state.load(f"order-{layer}"), self.widths[layer]
        return NestedSmall(neurons, order[:width], *solve_down(moments, order, width))

    def config(self) -> dict[str, Any]:
        same = len(set(self.widths)) == 1
        sizes = self.widths[0] if same else list(self.widths)
        return {"small_kind": "nested", "small_intermediate_size": sizes, "small_bias": True}


@dataclass(frozen=True)
class NestedSmall:
    """Some of big's neurons with a down projection ``[outputs, some]``."""

    neurons: Neurons
    chosen: NDArray[np.intp]
    down: Matrix
    bias: Matrix

    def __call__(self, x: mx.array) -> mx.array:
        return self.of(self.neurons(x))

    def of(self, inner: mx.array) -> mx.array:
        """Return what it gives where big's neurons say ``inner [..., neurons]``."""
        return inner[..., mx.array(self.chosen)] @ mx.array(self.down).T + mx.array(self.bias)

    def tensors(self) -> dict[str, Matrix]:
        return {"down_proj.weight": self.down, "down_proj.bias": self.bias}
