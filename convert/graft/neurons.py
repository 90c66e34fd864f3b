"""Neurons of a big FFN that a small one may copy, whatever the base calls its linear maps.

A gated neuron is ``act(gate) * up``; one of two matrices is the same with ``up = 1``; gate and up may be rows of one
matrix. `duo_mlx.forms` knows the first two forms. The third is guessed from the shapes, and counts only where it gives
the module's own outputs. Experts, and FFNs of other forms, have no neurons to copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from duo_mlx.cost import chosen_experts
from duo_mlx.forms import ACTIVATIONS, Gated, TwoMatrices, form

CLOSE = 2e-3  # of the outputs' largest, in float32; activations that are confused differ by more on most inputs


@dataclass(frozen=True)
class Projection:
    """A linear map in float32."""

    weight: mx.array  # [neurons, inputs]
    bias: mx.array  # [neurons]

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.weight.T + self.bias


@dataclass(frozen=True)
class Neurons:
    """The neurons of an FFN: ``down(act(gate(x)) * up(x))``."""

    gate: Projection
    up: Projection | None  # None: 1
    down: Projection
    activation: str

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.gate.bias)

    def __call__(self, x: mx.array) -> mx.array:
        """What the neurons say of ``x [..., inputs]``, ``[..., neurons]``."""
        act = ACTIVATIONS[self.activation](self.gate(x))
        return act if self.up is None else act * self.up(x)


def name_neurons(module: nn.Module, x: mx.array) -> Neurons | None:
    """The neurons of an FFN, if together they give what it gives for the inputs ``x [..., hidden]``; else None."""
    out = module(x).astype(mx.float32)
    inputs = x.astype(mx.float32)
    found: list[tuple[float, Neurons]] = []
    for neurons in _guesses(module, x.shape[-1]):
        said = neurons.down(neurons(inputs))
        error = mx.abs(said - out).max(axis=-1) / mx.maximum(mx.abs(out).max(axis=-1), 1e-20)
        found.append((float(np.array(error.max())), neurons))
    nearest, best = min(found, key=lambda pair: pair[0], default=(1.0, None))
    return best if nearest < CLOSE else None


def active_width(module: nn.Module, hidden: int) -> int:
    """How wide a gated FFN with as many parameters as a token meets in ``module`` would be."""
    used = 0.0
    for part in module.modules():
        if "weight" in part and part.weight.ndim > 1:
            *experts, rows, columns = part.weight.shape
            columns = columns * 32 // part.bits if "scales" in part else columns
            used += rows * columns * (chosen_experts(module) / experts[0] if experts else 1)
    return round(used / (3 * hidden))


def _guesses(module: nn.Module, hidden: int) -> Iterator[Neurons]:
    """The neurons of a form that is known, or those that one matrix for gate and up may hold."""
    match form(module):
        case Gated(gate, up, down, activation):
            yield Neurons(_dense(gate), _dense(up), _dense(down), activation)
            return
        case TwoMatrices(up, down, activation):
            yield Neurons(_dense(up), None, _dense(down), activation)
            return
    parts = [_dense(part) for name, part in module.items() if not name.startswith("_") and _is_linear(part)]
    if len(parts) != 2:
        return
    for into, out in permutations(parts):
        fits = into.weight.shape[1] == out.weight.shape[0] == hidden
        if fits and len(into.bias) == 2 * out.weight.shape[1]:
            halves = [Projection(*pair) for pair in zip(*(mx.split(a, 2) for a in _arrays(into)), strict=True)]
            for one, other in permutations(halves):
                for name in ACTIVATIONS:
                    yield Neurons(one, other, out, name)


def _arrays(projection: Projection) -> tuple[mx.array, mx.array]:
    return projection.weight, projection.bias


def _is_linear(part: Any) -> bool:
    return isinstance(part, nn.Linear | nn.QuantizedLinear)


def _dense(part: Any) -> Projection:
    weight = part.weight
    if isinstance(part, nn.QuantizedLinear):
        weight = mx.dequantize(
            weight, part.scales, part.get("biases"), part.group_size, part.bits, getattr(part, "mode", "affine")
        )
    weight = weight.astype(mx.float32)
    return Projection(weight, part.bias.astype(mx.float32) if "bias" in part else mx.zeros(len(weight)))
