"""What a pattern costs: parameters, FLOPs and bytes a token, by route and layer.

Every function returns a `RouteTable`, from which the cost of any pattern is looked up. Norms count as bytes but not
as FLOPs; the embedding counts as one row; a tied head is read whole, as a head of its own would be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from numpy.typing import NDArray

from duo_mlx import hosting
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes

CHOSEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "experts_per_tok", "k")  # how many experts


@dataclass(frozen=True)
class RouteTable:
    """A cost per token: ``fixed`` whatever the route, ``by_route [layers, 3]`` indexed by layer and `Route`."""

    fixed: int
    by_route: NDArray[np.int64]

    def of(self, routes: Routes) -> NDArray[np.int64]:
        """The cost of each pattern in ``routes [..., layers]``, as ``[...]``."""
        chosen: NDArray[np.int64] = self.by_route[np.arange(len(self.by_route)), routes].sum(axis=-1)
        return self.fixed + chosen

    def __add__(self, other: "RouteTable") -> "RouteTable":
        return RouteTable(self.fixed + other.fixed, self.by_route + other.by_route)


def weight_bytes(model: Model, by_router: bool = False) -> RouteTable:
    """Bytes of weights that decoding one token reads, from the sizes of the arrays that the model really holds.

    Of experts it reads the active ones. A norm whose output nothing but an FFN needs is not read where that is skipped.

    Args:
        model: a Duo.
        by_router: the model's own router decides, so its weights are read, too.
    """
    blocks, by_route = list(model.layers), np.zeros((model.config.num_hidden_layers, len(Route)), np.int64)
    for index, (costs, block, ffn) in enumerate(zip(by_route, blocks, model.ffns, strict=True)):
        costs[:] = nbytes(block) - nbytes(ffn)
        costs[Route.SKIP] -= sum(nbytes(norm) for norm in hosting.norms_of_ffn(block))
        if model.parts is not None:
            costs[Route.SKIP] = model.parts[index].skipped_bytes()
        costs[Route.BIG] += active_bytes(ffn.big)
        costs[Route.SMALL] = costs[Route.SKIP] if ffn.small_skips else costs[Route.SMALL] + active_bytes(ffn.small)
        if by_router:
            costs += nbytes(ffn.router)
    tables = _tables(model)
    whole = (
        nbytes(model) - sum(map(nbytes, blocks)) - sum(nbytes(table) for table in tables if table is not model.table)
    )
    return RouteTable(whole + sum(nbytes(table) // table.weight.shape[0] for table in tables), by_route)


def _tables(model: Model) -> list[Any]:
    """The embeddings, of which a token reads a row; besides the vocabulary's some bases have one for their layers."""
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)]


def active_bytes(module: nn.Module) -> int:
    """Bytes of an FFN's weights that one token reads: all, but of experts those that are chosen for it."""
    read = nbytes(module)
    for part in module.modules():
        if isinstance(part, SwitchLinear | QuantizedSwitchLinear):
            experts = part.weight.shape[0]
            chosen = chosen_experts(module)
            read -= nbytes(part) * (experts - chosen) // experts
    return read


def chosen_experts(module: nn.Module) -> int:
    """How many experts a token goes to.

    Raises:
        DuoError: the module does not say under a known name.
    """
    for part in module.modules():
        for holder in (part, getattr(part, "args", None)):  # some keep their configuration instead
            for name in CHOSEN:
                if type(value := getattr(holder, name, None)) is int:
                    return value
    raise DuoError(f"{type(module).__name__}: does not say how many experts a token goes to")


def draft_bytes(model: Model) -> RouteTable:
    """As `weight_bytes`, of a step that drafts: of the head it reads the part of ``draft_vocabulary`` alone."""
    table, args = weight_bytes(model), model.config
    unread = nbytes(model.table) // args.vocab_size * (args.vocab_size - args.draft_vocabulary)
    return RouteTable(table.fixed - unread, table.by_route)


def pass_bytes(model: Model, table: RouteTable | None = None) -> Callable[[Routes], int]:
    """Bytes of weights that one pass over several tokens reads, as a function of their routes ``[tokens, layers]``.

    Each FFN that some token needs is read once. The routes must be as the model realises them. ``table``: what one
    token reads; None: `weight_bytes`.
    """
    table = weight_bytes(model) if table is None else table
    small = np.array([nbytes(ffn.small) for ffn in model.ffns])

    @lru_cache(maxsize=1024)  # rounds of speculation ask before every pass, mostly for the same routes
    def read(routes: bytes) -> int:
        rows = np.frombuffer(routes, np.uint8).reshape(-1, len(small))
        # a dearer route reads all that a cheaper one does, but for the small FFN beside big's
        dearest = table.by_route[np.arange(len(small)), rows].max(axis=0)
        both = (rows == Route.BIG).any(axis=0) & (rows == Route.SMALL).any(axis=0)
        return int(table.fixed + dearest.sum() + small[both].sum())

    return lambda routes: read(routes.astype(np.uint8, copy=False).tobytes())


def cache_bytes(model: Model, context: int) -> RouteTable:
    """Bytes of an unquantised KV cache that one token reads when it attends to ``context`` positions."""
    position, windows = _positions(model)
    seen = np.array([min(context, window or context) for window in windows])
    layers = model.config.num_hidden_layers
    if len(windows) != layers:  # layers share caches, or have several
        return RouteTable(int((position * seen).sum()), np.zeros((layers, len(Route)), np.int64))
    by_route = np.repeat((position * seen)[:, None], len(Route), axis=1)
    if model.parts is not None:
        by_route[:, Route.SKIP] = position  # its own keys and values are still written
        skips = list(model.config.small_skips)
        by_route[skips, Route.SMALL] = by_route[skips, Route.SKIP]
    return RouteTable(0, by_route)


def pass_cache_bytes(model: Model) -> Callable[[Routes, int], int]:
    """Bytes of an unquantised KV cache that one pass reads, by its routes ``[tokens, layers]`` and its context.

    As `cache_bytes`, with what a layer's dearest token reads. The context is the number of positions attended to.
    """
    position, windows = _positions(model)
    limits = np.array([window or np.iinfo(np.int64).max for window in windows])

    @lru_cache(maxsize=1024)
    def layers(routes: bytes) -> NDArray[np.bool_]:
        """Which layers attend; the others write their keys and values alone."""
        if model.parts is None or len(windows) != model.config.num_hidden_layers:  # layers share caches
            return np.ones(len(windows), np.bool_)
        rows = np.frombuffer(routes, np.uint8).reshape(-1, len(windows))
        attends: NDArray[np.bool_] = (rows != Route.SKIP).any(axis=0)
        return attends

    def read(routes: Routes, context: int) -> int:
        attends = layers(routes.astype(np.uint8, copy=False).tobytes())
        return int((position * np.where(attends, np.minimum(limits, context), 1)).sum())

    return read


def windows(model: Model) -> list[int | None]:
    """How many positions each layer's attention sees; None where it sees all."""
    return [cache.max_size if isinstance(cache, RotatingKVCache) else None for cache in model.make_cache()]


def attended(model: Model) -> NDArray[np.int64]:
    """How many positions each layer's attention sees at most, ``[layers]``."""
    args, seen = model.config, windows(model)
    if len(seen) != args.num_hidden_layers:  # layers share caches, or have several
        seen = [args.sliding_window if kind == "sliding_attention" else None for kind in args.layer_types]
    return np.array([window or np.iinfo(np.int64).max for window in seen], np.int64)


def _positions(model: Model) -> tuple[NDArray[np.int64], list[int | None]]:
    """Bytes of a position's keys and values in each layer, and `windows`. What a pass writes is built, not computed."""
    cache = model.make_cache()
    model(mx.zeros((1, 1), mx.uint32), cache, routes=[Route.BIG] * model.config.num_hidden_layers)
    return np.array([_position(layer) for layer in cache], np.int64), windows(model)


def _position(cache: Any) -> int:
    """Bytes of one position in a layer's cache, whose arrays are ``[batch, heads, positions, width]``."""
    state: Any = tree_flatten(cache.state)
    arrays = [array for _, array in state if isinstance(array, mx.array) and array.ndim == 4]
    return sum(array.nbytes // array.shape[2] for array in arrays)
