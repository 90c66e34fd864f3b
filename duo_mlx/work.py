"""What decoding one token takes, exactly: bytes to read, kernels to start on a GPU, and waits for the host.

Bytes are those of arrays, which need not exist: a model of which only the shape is known is built and never computed.
Kernels are counted from how the strategies build their graphs (``tests/test_work.py`` holds the counts against the
graphs of real passes): on a GPU each of MLX's fast operations is one, and views of arrays are none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.cost import RouteTable
from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFN, nbytes
from duo_mlx.model import Config, Layer, Model, RouterWeights
from duo_mlx.routes import LETTERS, Route, Routes

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

    model = with_routers(Model(args))
    model.set_dtype(mx.float32 if bits == 32 else mx.bfloat16)
    if bits < 16:
        nn.quantize(model, group_size, bits, class_predicate=divides)
    return model


def with_routers(model: Model) -> Model:
    """The model, whose layers get a router where they have none: every strategy but ``planned`` asks one."""
    dtype = model.dtype
    for layer in model.layers if not model.config.router_choices else ():
        layer.mlp.router = RouterWeights(replace(model.config, router_choices=LETTERS))
        layer.mlp.router.set_dtype(dtype)
    return model


def shares(routes: Routes) -> NDArray[np.float64]:
    """A pattern ``[layers]`` as ``[layers, 3]``: the shares of skip, small and big in each layer."""
    return np.eye(len(Route))[routes]


def refusal(model: Model, strategy: str) -> str | None:
    """Why a strategy cannot decode such a model on a GPU; None if it can."""
    quantised = any(isinstance(module, nn.QuantizedLinear) for layer in model.layers for module in layer.mlp.modules())
    return "MLX's masked product has no quantised form" if strategy == "masked" and quantised else None


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
        for costs, layer in zip(weights, model.layers, strict=True):
            costs[Route.SKIP] = costs[Route.BIG] - nbytes(layer.mlp.big)
            if strategy == "dense":
                costs[:] = costs[Route.BIG] + nbytes(layer.mlp.small)
    return RouteTable(cost.weight_bytes(model).fixed, weights + cache)


def dispatches(model: Model, strategy: str) -> RouteTable:
    """Kernels that a token starts on a GPU, sampling by argmax included."""
    embedding = 4 if isinstance(model.model.embed_tokens, nn.QuantizedEmbedding) else 1  # three gathers, dequantize
    norm, head, sampling = 1, 1, 3  # logsumexp, its subtraction, argmax
    names = not LETTERS.startswith(model.config.router_choices)  # the index of the largest logit is not yet the route
    by_route = np.array([_layer(layer, strategy, router=2 + names) for layer in model.layers], np.int64)
    return RouteTable(embedding + norm + head + sampling, by_route)


def _layer(layer: Layer, strategy: str, router: int) -> tuple[int, int, int]:
    """Kernels of one layer under skip, small and big: sums of what is named here, of which each is one kernel.

    ``router`` are those of a router that is not part of a fused kernel.
    """
    attn, ffns = layer.self_attn, layer.mlp
    norm = add = rope = write = attend = compare = select = fill = gather = sort = 1
    remember = norm + _linear(attn.k_proj) + _linear(attn.v_proj) + rope + 2 * write
    apart = add if layer.skips_attention else 1 - _adds(attn.o_proj)
    attention = remember + _linear(attn.q_proj) + rope + attend + _linear(attn.o_proj) + apart
    small, big = _module(ffns.small), _module(ffns.big)
    alone = norm + small + 1 - _adds(ffns.small.down_proj), norm + big + 1 - _adds(ffns.big.down_proj)
    if strategy == "planned":
        skipped = remember if layer.skips_attention else attention
        return skipped, attention + alone[0], attention + alone[1]
    if strategy == "sync":
        skipped = remember + router if layer.skips_attention else attention + norm + router
        return skipped, attention + router + alone[0], attention + router + alone[1]
    if layer.skips_attention:  # attention has run before anybody knows; what it gave a token that skips is dropped
        attention += compare + select + fill
    if strategy == "fused":
        return (attention + norm + 1 + 2 + add,) * 3  # the router; gate, up and activation, and down
    before = attention + norm + router
    if strategy == "sorted":
        group = sort + 2 * (compare + add) + 2 * write + sort  # counts of skip and small, written to one array
        after = before + group + gather + add
        skipped = after + fill - (norm if layer.skips_attention else 0)  # the router has a norm of its own there
        return skipped, after + gather + small, after + gather + big
    if strategy == "masked":
        # a masked bias is zeros, a choice and an addition where the module's own was a part of the product
        masked_small, masked_big = (compare + _module(ffn) + 3 * _biases(ffn) for ffn in (ffns.small, ffns.big))
        both = masked_big if ffns.small is ffns.big else masked_small + masked_big + add
        return (before + both + add,) * 3
    return (before + small + big + 2 * (compare + select) + fill + add,) * 3  # dense


def _module(ffn: FFN) -> int:
    swiglu = 1
    return _linear(ffn.gate_proj) + _linear(ffn.up_proj) + swiglu + _linear(ffn.down_proj)


def _linear(linear: nn.Module) -> int:
    """A product with plain floats adds its bias itself; one with quantised weights leaves that to another kernel."""
    return 1 + (isinstance(linear, nn.QuantizedLinear) and "bias" in linear)


def _adds(linear: nn.Module) -> bool:
    """Whether its product also adds a residual, see `duo_mlx.products.onto`."""
    return type(linear) is nn.Linear and "bias" not in linear


def _biases(ffn: FFN) -> int:
    return sum("bias" in linear for linear in (ffn.gate_proj, ffn.up_proj, ffn.down_proj))
