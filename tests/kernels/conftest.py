"""FFNs of every format, and what a layer with them must give, in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama

# Of the largest value of the reference. The 16-bit types round what is between the two kernels.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@dataclass(frozen=True)
class Ffns:
    """A layer's two modules."""

    big: llama.MLP
    small: llama.MLP


def mlp(hidden: int, width: int, up: str, down: str, dtype: mx.Dtype, seed: int) -> llama.MLP:
    """A SwiGLU module whose projections are stored as ``float`` or ``qBITSgGROUP``, with ``+bias`` or without."""
    module = llama.MLP(SimpleNamespace(hidden_size=hidden, intermediate_size=width, mlp_bias=False))
    random = np.random.default_rng(seed)
    for name, form in (("gate_proj", up), ("up_proj", up), ("down_proj", down)):
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
    """``ffns_of(hidden, big, small, dtype)``: big and small given as ``(width, up, down)``; small None is big."""

    def make(hidden: int, big: tuple[int, str, str], small: tuple[int, str, str] | None, dtype: mx.Dtype) -> Ffns:
        first = mlp(hidden, *big, dtype=dtype, seed=0)
        return Ffns(first, first if small is None else mlp(hidden, *small, dtype=dtype, seed=1))

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


@pytest.fixture(scope="session")
def expected() -> Callable[..., np.ndarray]:
    """``expected(ffns, x, route, residual)`` in float64."""

    def of(ffns: Any, x: mx.array, route: np.ndarray, residual: mx.array) -> np.ndarray:
        out = exact(residual)
        for which, module in ((1, ffns.small), (2, ffns.big)):
            gate, up = (linear(projection, exact(x)) for projection in (module.gate_proj, module.up_proj))
            out = out + (route == which)[..., None] * linear(module.down_proj, gate / (1 + np.exp(-gate)) * up)
        return out

    return of


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    """``close(got, wanted)``: every number is there, and within the tolerance of its dtype."""

    def check(got: mx.array, wanted: np.ndarray) -> None:
        error = np.abs(exact(got) - wanted).max()
        assert error <= TOLERANCE[got.dtype] * np.abs(wanted).max()

    return check
