"""What a pattern costs: parameters, FLOPs and bytes a token, by route and layer.

Every function returns a `RouteTable`, from which the cost of any pattern is looked up. Norms count as bytes but not
as FLOPs; the embedding counts as one row; a tied head is read whole, as a head of its own would be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from duo_mlx.ffns import nbytes
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import Route, Routes


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


def layer_parameters(args: ModelArgs) -> RouteTable:
    """Parameters of the layers' matrices that one token meets; embedding and head are left out (``fixed`` is 0)."""
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    queries = 2 * args.hidden_size * args.num_attention_heads * head_dim  # q_proj and o_proj
    keys = 2 * args.hidden_size * args.num_key_value_heads * head_dim  # k_proj and v_proj, which even a skip writes
    small, big = (3 * args.hidden_size * inner for inner in (args.small_intermediate_size, args.intermediate_size))
    skip = keys if args.skip_scope == "layer" else queries + keys
    by_route = np.zeros((args.num_hidden_layers, len(Route)), np.int64)
    by_route[:, Route.SKIP], by_route[:, Route.BIG] = skip, queries + keys + big
    for layer in range(args.num_hidden_layers):
        by_route[layer, Route.SMALL] = queries + keys + (small if args.has_small(layer) else big)
    return RouteTable(0, by_route)


def flops(args: ModelArgs, context: int) -> RouteTable:
    """FLOPs of one token that attends to ``context`` positions: two per parameter, and those of attention itself."""
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    matrices = layer_parameters(args)
    attention = 4 * args.num_attention_heads * head_dim * _attended(args, context)
    if args.skip_scope == "layer":
        attention[:, Route.SKIP] = 0
    return RouteTable(2 * args.hidden_size * args.vocab_size, 2 * matrices.by_route + attention)


def weight_bytes(model: Model, by_router: bool = False) -> RouteTable:
    """Bytes of weights that decoding one token reads, from the sizes of the arrays that the model really holds.

    ``by_router``: the model's own router decides, so its weights are read, too.
    """
    row = nbytes(model.model.embed_tokens) // model.args.vocab_size
    by_route = np.zeros((model.args.num_hidden_layers, len(Route)), np.int64)
    for costs, layer in zip(by_route, model.layers, strict=True):
        before = nbytes(layer.input_layernorm)
        attention, norm = before + nbytes(layer.self_attn), nbytes(layer.post_attention_layernorm)
        costs[Route.BIG] = attention + norm + nbytes(layer.mlp.big)
        costs[Route.SMALL] = attention + norm + nbytes(layer.mlp.small)
        costs[Route.SKIP] = attention
        if layer.skips_attention:
            costs[Route.SKIP] = before + nbytes(layer.self_attn.k_proj) + nbytes(layer.self_attn.v_proj)
        if by_router:
            costs += nbytes(layer.mlp.router)
    return RouteTable(nbytes(model.table) + row + nbytes(model.model.norm), by_route)


def draft_bytes(model: Model) -> RouteTable:
    """As `weight_bytes`, of a step that drafts: of the head it reads the part of ``draft_vocabulary`` alone."""
    table, args = weight_bytes(model), model.args
    unread = nbytes(model.table) // args.vocab_size * (args.vocab_size - args.draft_vocabulary)
    return RouteTable(table.fixed - unread, table.by_route)


def pass_bytes(model: Model, table: RouteTable | None = None) -> Callable[[Routes], int]:
    """Bytes of weights that one pass over several tokens reads, as a function of their routes ``[tokens, layers]``.

    Each FFN that some token needs is read once. The routes must be as the model realises them. ``table``: what one
    token reads; None: `weight_bytes`.
    """
    table = weight_bytes(model) if table is None else table
    small = np.array([nbytes(layer.mlp.small) for layer in model.layers])

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
    args = model.args
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    position = 2 * args.num_key_value_heads * head_dim * model.model.norm.weight.dtype.size
    by_route = position * _attended(args, context)
    if args.skip_scope == "layer":
        by_route[:, Route.SKIP] = position  # its own keys and values are still written
    return RouteTable(0, by_route)


def pass_cache_bytes(model: Model) -> Callable[[Routes, int], int]:
    """Bytes of an unquantised KV cache that one pass reads, by its routes ``[tokens, layers]`` and its context.

    As `cache_bytes`, with what a layer's dearest token reads. The context is the number of positions attended to.
    """
    args, window = model.args, model.args.sliding_window
    position = int(cache_bytes(model, 1).by_route[0, Route.BIG])
    slides = np.array([kind == "sliding_attention" for kind in args.layer_types])

    @lru_cache(maxsize=1024)
    def layers(routes: bytes) -> tuple[int, int, int]:
        """How many attend to all positions, to those of a window, and write theirs alone."""
        rows = np.frombuffer(routes, np.uint8).reshape(-1, len(slides))
        attend = (rows != Route.SKIP).any(axis=0) | (args.skip_scope != "layer")
        return int((attend & ~slides).sum()), int((attend & slides).sum()), int((~attend).sum())

    def read(routes: Routes, context: int) -> int:
        whole, windows, written = layers(routes.astype(np.uint8, copy=False).tobytes())
        return position * (whole * context + windows * min(context, window or context) + written)

    return read


def _attended(args: ModelArgs, context: int) -> NDArray[np.int64]:
    """To how many of ``context`` positions a token attends, ``[layers, 3]``."""
    within = min(context, args.sliding_window or context)
    by_layer = [within if kind == "sliding_attention" else context for kind in args.layer_types]
    return np.repeat(np.array(by_layer, np.int64)[:, None], len(Route), axis=1)
