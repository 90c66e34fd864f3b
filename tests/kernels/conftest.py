"""FFNs of every format, and what a layer with them must give, in float64."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

from duo_mlx import forms

# Of the largest value of the reference. The 16-bit types round what is between the two kernels.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@dataclass(frozen=True)
class Ffns:
    """A layer's two modules."""

    big: nn.Module
    small: nn.Module


class GatedFFN(llama.MLP):
    """A gated module with any of the activations."""

    def __init__(self, hidden: int, width: int, activation: str):
        super().__init__(SimpleNamespace(hidden_size=hidden, intermediate_size=width, mlp_bias=False))
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(forms.ACTIVATIONS[self.activation](self.gate_proj(x)) * self.up_proj(x))


class PlainFFN(nn.Module):
    """A module of two matrices."""

    def __init__(self, hidden: int, width: int, activation: str):
        super().__init__()
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.activation = activation

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(forms.ACTIVATIONS[self.activation](self.up_proj(x)))


def mlp(hidden: int, width: int, up: str, down: str, dtype: mx.Dtype, seed: int, form: str = "") -> nn.Module:
    """A module whose projections are stored as ``float`` or ``qBITSgGROUP``, with ``+bias`` or without.

    ``form`` is ``gated ACTIVATION``, ``plain ACTIVATION``, or "" for mlx-lm's SwiGLU.
    """
    kind, _, activation = form.partition(" ")
    if kind:
        module = {"gated": GatedFFN, "plain": PlainFFN}[kind](hidden, width, activation)
    else:
        module = llama.MLP(SimpleNamespace(hidden_size=hidden, intermediate_size=width, mlp_bias=False))
    random = np.random.default_rng(seed)
    stored_as = {"gate_proj": up, "up_proj": up, "down_proj": down}
    for name, form in stored_as.items():
        if name not in module:
            continue
        stored, *bias = form.split("+")
        linear = getattr(module, name)
        shape = linear.weight.shape
        linear.weight = mx.array(random.standard_normal(shape) * 1.5 / shape[1] ** 0.5, dtype)
        if bias:
            linear.bias = mx.array(random.standard_normal(shape[0]), dtype)
        if stored != "float":
            bits, group = map(int, stored[1:].split("g"))
            setattr(module, name, nn.QuantizedLinear.from_linear(linear, group, bits))
    return module


@pytest.fixture(scope="session")
def ffns_of() -> Callable[..., Ffns]:
    """``ffns_of(hidden, big, small, dtype)``: big and small given as ``(width, up, down)``; small None is big.

    A fourth element is the form, see `mlp`.
    """

    def make(hidden: int, big: tuple[Any, ...], small: tuple[Any, ...] | None, dtype: mx.Dtype) -> Ffns:
        def one(seed: int, width: int, up: str, down: str, form: str = "") -> nn.Module:
            return mlp(hidden, width, up, down, dtype, seed, form)

        first = one(0, *big)
        return Ffns(first, first if small is None else one(1, *small))

    return make


def linear(module: nn.Module, x: np.ndarray) -> np.ndarray:
    weight = module.weight
    if isinstance(module, nn.QuantizedLinear):
        scales, biases = (part.astype(mx.float32) for part in (module.scales, module.biases))
        weight = mx.dequantize(weight, scales, biases, module.group_size, module.bits)
    out = x @ exact(weight).T
    return out + exact(module.bias) if "bias" in module else out


def exact(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


EXACT: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "gelu_fast": lambda x: x / (1 + np.exp(-1.702 * x)),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
}


@pytest.fixture(scope="session")
def expected() -> Callable[..., np.ndarray]:
    """``expected(ffns, x, route)`` in float64."""

    def of(ffns: Any, x: mx.array, route: np.ndarray) -> np.ndarray:
        out = np.zeros(x.shape)
        for which, module in ((1, ffns.small), (2, ffns.big)):
            act = EXACT[getattr(module, "activation", "silu")]
            up = linear(module.up_proj, exact(x))
            inner = act(linear(module.gate_proj, exact(x))) * up if "gate_proj" in module else act(up)
            out = out + (route == which)[..., None] * linear(module.down_proj, inner)
        return out

    return of


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """``close(got, wanted)``: every number is there, and within the tolerance of its dtype."""

    def check(got: mx.array, wanted: np.ndarray) -> None:
        error = np.abs(exact(got) - wanted).max()
        assert error <= TOLERANCE[got.dtype] * np.abs(wanted).max()

    return check
