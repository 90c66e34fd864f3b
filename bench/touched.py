"""Bytes and FLOPs of a decoded token as its batch was routed: weights that several sequences need are read once."""

import mlx.core as mx
import numpy as np

from duo_mlx import cost
from duo_mlx.cost import RouteTable
from duo_mlx.model import Config, Model
from duo_mlx.routes import Route, Routes


def computes_everything(ran: str) -> bool:
    """Whether a strategy reads and computes what routes leave out: the reference does, and masked products on a CPU."""
    return ran == "dense" or (ran == "masked" and mx.default_device().type == mx.DeviceType.cpu)


def bytes_per_token(model: Model, routes: Routes, context: int, ran: str, by_router: bool = False) -> float:
    """Bytes of weights and KV cache that decoding one token of each sequence reads, over the number of sequences.

    Args:
        model: a Duo, with its weights as they are.
        routes: ``[passes, batch, layers]`` as realised; the mean over passes is given.
        context: positions attended to.
        ran: the strategy.
        by_router: the routers' weights are read, too.
    """
    _, batch, layers = routes.shape
    weights, caches = cost.weight_bytes(model, by_router), cost.cache_bytes(model, context)
    big, small = ((routes == route).any(axis=1) for route in (Route.BIG, Route.SMALL))
    if computes_everything(ran):
        big, small = np.ones_like(big), np.array([model.config.has_small(layer) for layer in range(layers)])
    second = np.array([cost.active_bytes(ffn.small) for ffn in model.ffns])
    skips, smalls, bigs = (weights.by_route[:, route] for route in (Route.SKIP, Route.SMALL, Route.BIG))
    read = np.where(big, bigs + np.where(small, second, 0), np.where(small, smalls, skips))
    # where skipping bypasses attention, too, it is done for all sequences or for none
    attended = caches.of(np.where(big | small, Route.BIG, Route.SKIP))
    return float((weights.fixed + read.sum(axis=1).mean()) / batch + attended.mean())


def round_flops(args: Config, table: RouteTable, drafting: Routes, verifying: Routes, shared: int) -> int:
    """FLOPs of a round of speculation: of each draft step, and of the pass that verifies.

    Args:
        args: a model's.
        table: FLOPs of one token (`duo_mlx.flops`).
        drafting: ``[drafts, layers]`` as realised.
        verifying: ``[drafts + 1, layers]`` as realised.
        shared: first layers that the verifying pass leaves to the drafts, but for its last token.
    """
    left = table.by_route[np.arange(shared), verifying[:-1, :shared]].sum()
    left += len(drafting) * 2 * args.hidden_size * (args.vocab_size - args.draft_vocabulary)
    return int(table.of(drafting).sum() + table.of(verifying).sum() - left)


def flops_per_token(args: Config, table: RouteTable, routes: Routes, ran: str) -> float:
    """FLOPs of one decoded token, a mean over ``routes [passes, batch, layers]``.

    Args:
        args: a model's.
        table: FLOPs of one token (`duo_mlx.flops`).
        routes: as realised.
        ran: the strategy.
    """
    if not computes_everything(ran):
        return float(table.of(routes).mean())
    smalls = sum(args.small_width(layer) for layer in range(args.num_hidden_layers))
    second = 2 * 3 * args.hidden_size * smalls
    return float(table.of(np.full(args.num_hidden_layers, Route.BIG, np.uint8)) + second)
