"""Routers: routes that a pass decides for itself, layer by layer, from its hidden states.

A router is handed to a pass in place of routes. Each layer asks it once, and what it says stays on the device until a
strategy reads it. The learned one is Duo-LLM's (arXiv 2410.10846, stage 3): one linear map a layer, whose largest logit
names the route.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import auto
from duo_mlx.kernels import fused


class Router(ABC):
    """Decides the routes of one layer at a time; subclass it and write `routes`."""

    @abstractmethod
    def routes(self, layer: int, x: mx.array) -> mx.array:
        """Return integer routes ``[batch, tokens]`` of one layer from its normalised input ``[batch, tokens, hidden]``.

        The input is the input of the layer's FFN, or of its attention where skipping bypasses attention, too.
        """

    def decide(self, layer: int, x: mx.array, in_one_kernel: bool = False) -> mx.array:  # noqa: ARG002
        """The routes that `routes` finds; a kernel may do so where that is allowed."""
        return self.routes(layer, x)


class LinearRouter(Router):
    """The route with the largest logit of one linear map a layer.

    Args:
        weights: ``[choices, hidden]`` a layer.
        choices: the routes that the rows of the weights stand for.
        offsets: added to the logits of every layer, ``[choices]``; what moves the threshold between routes.
        biases: added to a layer's logits, ``[choices]`` a layer.
    """

    def __init__(
        self,
        weights: Sequence[mx.array],
        choices: Sequence[int],
        offsets: mx.array | None = None,
        biases: Sequence[mx.array] | None = None,
    ):
        self.weights = list(weights)
        self.choices = tuple(int(choice) for choice in choices)
        moved = mx.zeros(len(self.choices)) if offsets is None else offsets.astype(mx.float32)
        self.offsets = [moved + bias for bias in biases] if biases else [moved] * len(self.weights)
        self._moves = offsets is not None or bool(biases)
        self._columns = [weight.T for weight in self.weights]
        self._choices = mx.array(self.choices, mx.uint32)
        self._are_indices = self.choices == tuple(range(len(self.choices)))

    def logits(self, layer: int, x: mx.array) -> mx.array:
        """``[..., choices]`` of one layer from its normalised input ``x [..., hidden]``."""
        logits = x @ self._columns[layer]
        return logits.astype(mx.float32) + self.offsets[layer] if self._moves else logits

    def routes(self, layer: int, x: mx.array) -> mx.array:
        largest = mx.argmax(self.logits(layer, x), axis=-1)
        return largest if self._are_indices else self._choices[largest]

    def decide(self, layer: int, x: mx.array, in_one_kernel: bool = False) -> mx.array:
        rows = x.size // x.shape[-1]
        if in_one_kernel and auto.router_refusal(x.shape[-1], len(self.choices), rows, x.dtype) is None:
            return fused.decide(x, self.weights[layer], self.offsets[layer], self.choices)
        return self.routes(layer, x)


class Follow(Router):
    """Takes routes that are given, ``[batch, tokens, layers]``, and keeps what it saw, ``inputs``, one a layer."""

    def __init__(self, given: NDArray[np.integer]):
        self.given = mx.array(given)
        self.inputs: list[mx.array] = []

    def routes(self, layer: int, x: mx.array) -> mx.array:
        self.inputs.append(x)
        return self.given[..., layer]


class Recorder(Router):
    """Another router, whose routes of the last pass are kept, ``taken``: ``[batch, tokens]`` a layer."""

    def __init__(self, router: Router):
        self.router = router
        self.taken: list[mx.array] = []

    def routes(self, layer: int, x: mx.array) -> mx.array:
        return self.router.routes(layer, x)

    def decide(self, layer: int, x: mx.array, in_one_kernel: bool = False) -> mx.array:
        route = self.router.decide(layer, x, in_one_kernel)
        if layer == 0:
            self.taken = []
        self.taken.append(route)
        return route
