"""What decoding one token takes, exactly: bytes to read, kernels to start on a GPU, and waits for the host.

Bytes are the sizes of arrays, which need not exist: a model of which only the shape is known is built and never
computed. Kernels are counted in the step's graph (`duo_mlx.dispatches`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.config import Config
from duo_mlx.cost import RouteTable
from duo_mlx.dispatches import count
from duo_mlx.errors import DuoError
from duo_mlx.ffn import RouterWeights
from duo_mlx.forms import form, unknown
from duo_mlx.kernels import fused
from duo_mlx.model import Model
from duo_mlx.routes import LETTERS, Route, Routes
from duo_mlx.weightless import weightless, without_graph

STRATEGIES = ("planned", "fused", "masked", "sync", "sorted", "dense")
ON_DEVICE = STRATEGIES[1:]  # their routes are a per-layer router's


class Work(NamedTuple):
    """What decoding one token takes, expected over its routes."""

    bytes: float  # weights and KV cache
    dispatches: float  # kernels
    waits: float  # times that the device stands still until the host has read a route


def imagined(args: Config, bits: int = 16, group_size: int = 64) -> Model:
    """A model of this shape, with routers, whose arrays have sizes but are never computed.

    Args:
        args: its shape.
        bits: 32 or 16 (plain floats); 8 or 4 (affine, with a 16-bit scale and bias for each group; what the group does
            not divide stays in float, as mlx-lm leaves it).
        group_size: weights that share a scale.

    Raises:
        DuoError: the hidden size cannot be quantised so.
    """
    if bits < 16 and args.hidden_size % group_size:
        raise DuoError(f"{bits} bits: hidden size {args.hidden_size} is no multiple of the group size {group_size}")

    def divides(_: str, module: nn.Module) -> bool:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    model = without_weights(Model(args))
    model.set_dtype(mx.float32 if bits == 32 else mx.bfloat16)
    if bits < 16:
        nn.quantize(model, group_size, bits, class_predicate=divides)
    return without_weights(model)


def without_weights(model: Model) -> Model:
    """Return a copy of a model whose arrays have their sizes but one number each, with a router in every layer.

    Every strategy except ``planned`` asks a router.
    """
    made, dtype = weightless(model), model.dtype
    for ffn in made.ffns if not model.config.router_choices else ():
        ffn.router = RouterWeights(replace(model.config, router_choices=LETTERS))
        ffn.router.set_dtype(dtype)
        ffn.router.update(without_graph(ffn.router.parameters()))
    return made


def shares(routes: Routes) -> NDArray[np.float64]:
    """A pattern ``[layers]`` as ``[layers, 3]``: the shares of skip, small and big in each layer."""
    return np.eye(len(Route))[routes]


def refusal(model: Model, strategy: str) -> str | None:
    """Why a strategy cannot decode such a model on a GPU; None if it can."""
    if strategy == "fused":
        reasons = (fused.refusal(ffn, 1, model.dtype) for ffn in model.ffns)
        return next(filter(None, reasons), None)
    if strategy == "masked":
        if any(isinstance(module, nn.QuantizedLinear) for ffn in model.ffns for module in ffn.modules()):
            return "MLX's masked product has no quantised form"
        modules = (module for ffn in model.ffns for module in (ffn.big, ffn.small))
        return next((unknown(module) for module in modules if form(module) is None), None)
    return None


def works(
    model: Model, mixes: Mapping[str, NDArray[np.float64]], context: int, strategies: Iterable[str] = STRATEGIES
) -> dict[str, dict[str, Work]]:
    """What one token takes, by strategy and name of the mix.

    Args:
        model: one with routers; its weights are never read.
        mixes: shares of skip, small and big, ``[layers, 3]`` or ``[3]`` for all layers.
        context: positions that the token attends to.
        strategies: ``planned``, routes that the host knows; or others, where each layer's router decides on the device.

    Raises:
        DuoError: a strategy is unknown or cannot decode such a model.
    """
    found: dict[str, dict[str, Work]] = {}
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise DuoError(f"strategy {strategy!r} cannot be projected; there are {', '.join(STRATEGIES)}")
        if reason := refusal(model, strategy):
            raise DuoError(f"strategy {strategy!r}: {reason}; use {', '.join(usable(model))}")
        waits = len(model.layers) if strategy in ("sync", "sorted") else 0
        read, started = reads(model, strategy, context), dispatches(model, strategy)
        found[strategy] = {
            name: Work(_expected(read, mix), _expected(started, mix), waits) for name, mix in mixes.items()
        }
    return found


def usable(model: Model) -> list[str]:
    """The strategies that can decode such a model."""
    return [strategy for strategy in STRATEGIES if refusal(model, strategy) is None]


def _expected(table: RouteTable, mix: NDArray[np.float64]) -> float:
    return float(table.fixed + (table.by_route * mix).sum())


def reads(model: Model, strategy: str, context: int) -> RouteTable:
    """Bytes of weights and KV cache that a token reads."""
    weights = cost.weight_bytes(model, by_router=strategy != "planned").by_route
    cache = cost.cache_bytes(model, context).by_route
    if strategy not in ("planned", "sync"):
        # attention is in the graph before the route is known, so that even a skip of the layer reads it
        cache[:, Route.SKIP] = cache[:, Route.BIG]
        for costs, ffn in zip(weights, model.ffns, strict=True):
            costs[Route.SKIP] = costs[Route.BIG] - cost.active_bytes(ffn.big)
            if strategy == "dense":
                costs[:] = costs[Route.BIG] + cost.active_bytes(ffn.small)
    return RouteTable(cost.weight_bytes(model).fixed, weights + cache)


def dispatches(model: Model, strategy: str) -> RouteTable:
    """Kernels that a token starts on a GPU, sampling by argmax included."""
    if strategy in ("fused", "masked", "dense"):  # their graph is the same for every route
        outside, layers = count(model, strategy, Route.BIG)
        return RouteTable(outside, np.repeat(np.array(layers, np.int64)[:, None], len(Route), axis=1))
    counts = [count(model, strategy, route) for route in Route]
    return RouteTable(counts[0][0], np.array([layers for _, layers in counts], np.int64).T)
