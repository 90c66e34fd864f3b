"""What decoding one token takes, exactly: bytes to read, kernels to start on a GPU, and waits for the host.

Bytes are those of arrays, which need not exist: a model of which only the shape is known is built and never computed.
Kernels are counted from how the strategies build their graphs (``tests/test_work.py`` holds the counts against the
graphs of real passes): on a GPU each of MLX's fast operations is one, and views of arrays are none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.config import Config
from duo_mlx.cost import RouteTable
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN, RouterWeights
from duo_mlx.hosting import norms_of_ffn
from duo_mlx.model import Model
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
    for ffn in model.ffns if not model.config.router_choices else ():
        ffn.router = RouterWeights(replace(model.config, router_choices=LETTERS))
        ffn.router.set_dtype(dtype)
    return model


def shares(routes: Routes) -> NDArray[np.float64]:
    """A pattern ``[layers]`` as ``[layers, 3]``: the shares of skip, small and big in each layer."""
    return np.eye(len(Route))[routes]


def refusal(model: Model, strategy: str) -> str | None:
    """Why a strategy cannot decode such a model on a GPU; None if it can."""
    quantised = any(isinstance(module, nn.QuantizedLinear) for ffn in model.ffns for module in ffn.modules())
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
        for costs, ffn in zip(weights, model.ffns, strict=True):
            costs[Route.SKIP] = costs[Route.BIG] - cost.active_bytes(ffn.big)
            if strategy == "dense":
                costs[:] = costs[Route.BIG] + cost.active_bytes(ffn.small)
    return RouteTable(cost.weight_bytes(model).fixed, weights + cache)


def dispatches(model: Model, strategy: str) -> RouteTable:
    """Kernels that a token starts on a GPU, sampling by argmax included.

    A block is counted by its modules: each product and norm is a kernel, a rotation two (queries and keys), and
    attention, two writes to the cache and two additions are there whatever the base is.
    """
    embedding = 4 if isinstance(model.embedding, nn.QuantizedEmbedding) else 1  # three gathers, dequantize
    norm, head, sampling = 1, 1, 3  # logsumexp, its subtraction, argmax
    names = not LETTERS.startswith(model.config.router_choices)  # the index of the largest logit is not yet the route
    by_route = np.array(
        [
            _layer(block, ffn, strategy, router=2 + names, skips=model.parts is not None)
            for block, ffn in zip(model.layers, model.ffns, strict=True)
        ],
        np.int64,
    )
    return RouteTable(embedding + norm + head + sampling, by_route)


def _layer(block: nn.Module, ffns: DuoFFN, strategy: str, router: int, skips: bool) -> tuple[int, int, int]:
    """Kernels of one layer under skip, small and big: sums of what is named here, of which each is one kernel.

    ``router`` are those of a router that is not a kernel of its own; ``skips`` says whether a skip bypasses attention.
    """
    norm = add = rope = write = attend = compare = select = fill = gather = sort = 1
    own = _kernels(block, without=ffns) + attend + 2 * write + 2 * add
    small, big = _kernels(ffns.small), _kernels(ffns.big)
    unread = len(norms_of_ffn(block))
    skipped = own - unread + fill
    if skips:
        attention: Any = block.self_attn
        skipped = norm + sum(map(_linear, (attention.k_proj, attention.v_proj))) + rope + 2 * write
        skipped += norm * ("k_norm" in attention)
    if strategy == "planned":
        return skipped, own + small, own + big
    if skips:
        router += norm  # which sees what attention does
    if strategy == "sync":
        skipped += router + (0 if skips else unread)
        return skipped, own + router + small, own + router + big
    if skips:  # attention has run before anybody knows; what it gave a token that skips is dropped
        own += compare + select
    if strategy == "fused":
        return (own + norm * skips + 1 + 2,) * 3  # the router; gate, up and activation, and down
    before = own + router
    if strategy == "sorted":
        group = sort + 2 * (compare + add) + 2 * write + sort  # counts of skip and small, written to one array
        after = before + group + gather
        return after + fill - unread * skips, after + gather + small, after + gather + big
    if strategy == "masked":
        # a masked bias is zeros, a choice and an addition where the module's own was a part of the product
        masked_small, masked_big = (compare + _kernels(ffn) + 3 * _biases(ffn) for ffn in (ffns.small, ffns.big))
        both = masked_big if ffns.small is ffns.big else masked_small + masked_big + add
        return (before + both,) * 3
    return (before + small + big + 2 * (compare + select) + fill,) * 3  # dense


def _kernels(module: nn.Module, without: nn.Module | None = None) -> int:
    """Kernels of a module's own modules; of an FFN there is one more, its activation."""
    left_out = {id(part) for part in without.modules()} if without is not None else set()
    leaves: Any = tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    counted = sum(_leaf(leaf) for _, leaf in leaves if id(leaf) not in left_out)
    return counted + (without is None)


def _leaf(module: nn.Module) -> int:
    if "rope" in type(module).__name__.lower():
        return 2
    return _linear(module)


def _linear(linear: nn.Module) -> int:
    """A product with plain floats adds its bias itself; one with quantised weights leaves that to another kernel."""
    return 1 + (isinstance(linear, nn.QuantizedLinear) and "bias" in linear)


def _biases(ffn: nn.Module) -> int:
    leaves: Any = tree_flatten(ffn.leaf_modules(), is_leaf=nn.Module.is_module)
    return sum("bias" in linear for _, linear in leaves)
