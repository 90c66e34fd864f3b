"""Strategies: how a layer carries out its tokens' routes.

`plan` turns a pass's routes into one entry a layer, `decide` asks a router where that is what gives the layer's routes,
and a strategy runs the FFNs by the result:

===========  ====================================================================================================
``dense``    both FFNs on every token, then a choice; differentiable, never reads a route; the reference
``planned``  only the FFNs that some token needs are in the graph; known on the host
``sorted``   tokens grouped by route, each FFN on its own group; reads two counts a layer if the device knows the route
``sync``     ``planned`` after reading the layer's routes from the device: one sync a layer
``masked``   products that a route on the device masks out (`duo_mlx.masked`); ``sorted`` for more than 8 tokens
``fused``    kernels that read the route on the device (`duo_mlx.kernels`); ``sorted`` for more than 8 tokens
``auto``     ``planned`` where all tokens of a layer share a route that the host knows, else by the table of
             `duo_mlx.auto`; routes of a whole pass on the device are read once
===========  ====================================================================================================

Routes in NumPy are known by the host, routes in an `mx.array` by the device, and those of a router by the device only
when a layer is reached.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import auto, masked
from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFN, FFNs
from duo_mlx.kernels import fused, launch
from duo_mlx.router import Router
from duo_mlx.routes import FEW, Route, Routes, check_routes

# What one layer's tokens do: one route for all of them, or [batch, tokens] on the host or on the device; [batch] for a
# single token of each sequence, whose hidden states are [batch, hidden].
LayerRoutes = Route | Routes | mx.array

_reads = 0


def host_reads() -> int:
    """How many times this process has waited for the device to read a route; take the difference of two calls."""
    return _reads


def read(array: mx.array) -> NDArray[Any]:
    """Wait for what the device knows, and count it, see `host_reads`."""
    global _reads
    _reads += 1
    return np.array(array)


def check_strategy(strategy: str) -> str:
    """``strategy`` if it exists and this machine can have it, else `DuoError`."""
    if strategy not in STRATEGIES:
        raise DuoError(f"strategy {strategy!r} does not exist; there are {', '.join(STRATEGIES)}")
    if strategy == "fused" and (reason := launch.unavailable()):
        raise DuoError(f"strategy 'fused' cannot run here: {reason}; use auto, sync, sorted or dense")
    return strategy


def plan(
    routes: Sequence[int] | NDArray[np.integer] | mx.array | Router,
    batch: int,
    tokens: int,
    layers: int,
    strategy: str,
) -> list[LayerRoutes | Router]:
    """One entry a layer from the routes of a pass, ``[layers]`` or ``[batch, tokens, layers]``, or from a router.

    Raises:
        DuoError: unknown strategy, wrong shape or value, or a strategy that cannot carry out such routes.
    """
    check_strategy(strategy)
    if isinstance(routes, Router):
        if strategy == "planned":
            raise DuoError(
                "strategy 'planned' needs routes that are known before the pass, and a router decides within it; "
                "use auto, fused, masked, sync, sorted or dense"
            )
        return [routes] * layers
    if isinstance(routes, mx.array):
        if strategy in ("auto", "planned"):
            routes = read(routes)
        else:
            if routes.shape not in ((layers,), (batch, tokens, layers)):
                check_routes(np.zeros(routes.shape, np.uint8), batch, tokens, layers)
            columns = mx.broadcast_to(routes, (batch, tokens, layers))
            return [columns[..., layer] for layer in range(layers)]
    host = check_routes(routes, batch, tokens, layers)
    if host.ndim == 1:
        return [Route(route) for route in host.tolist()]
    return [_shared(host[..., layer]) for layer in range(layers)]


def _shared(routes: Routes) -> Route | Routes:
    """The one route that all tokens share, or the routes as they are."""
    first = routes.flat[0]
    return Route(int(first)) if routes.size == 1 or (routes == first).all() else routes.astype(np.uint8, copy=False)


def decide(entry: LayerRoutes | Router, layer: int, x: mx.array, ffns: FFNs, strategy: str) -> tuple[LayerRoutes, str]:
    """The routes of a layer's tokens, and the strategy that carries them out.

    Small is skip where the layer says so (``small_skips``). A router is asked with the normalised ``x [..., hidden]``,
    and ``sync`` reads what the device knows.

    Raises:
        DuoError: the strategy cannot run here.
    """
    route, by = _decided(entry, layer, x, ffns, strategy)
    if not ffns.small_skips:
        return route, by
    if isinstance(route, Route):
        return Route.SKIP if route is Route.SMALL else route, by
    if isinstance(route, mx.array):
        return mx.where(route == Route.SMALL, Route.SKIP, route).astype(route.dtype), by
    return _shared(np.where(route == Route.SMALL, np.uint8(Route.SKIP), route)), by


def _decided(
    entry: LayerRoutes | Router, layer: int, x: mx.array, ffns: FFNs, strategy: str
) -> tuple[LayerRoutes, str]:
    route: LayerRoutes
    if isinstance(entry, Router):
        by = resolve(strategy, ffns, x, "device")
        single = x.ndim == 2  # a base that drops the axis of a single token
        route = entry.decide(layer, x[:, None] if single else x, in_one_kernel=by == "fused")
    elif isinstance(entry, mx.array):
        by, route = resolve(strategy, ffns, x, "device"), entry
    else:
        one = isinstance(entry, Route) and strategy != "dense"
        by = "planned" if one or strategy == "sync" else resolve(strategy, ffns, x, "host")
        return entry if isinstance(entry, Route) else entry.reshape(x.shape[:-1]), by
    route = route.reshape(x.shape[:-1])
    return (_shared(read(route)), by) if by == "sync" else (route, by)


def resolve(strategy: str, ffns: FFNs, x: mx.array, known_by: str) -> str:
    """What ``strategy`` comes to for tokens ``x [..., hidden]`` whose routes differ or only the device knows.

    ``auto`` chooses. ``masked`` and ``fused`` are for decoding: more tokens than a decoding batch has are ``sorted``.

    Raises:
        DuoError: the strategy cannot run here.
    """
    rows = x.size // x.shape[-1]
    if strategy == "auto":
        return auto.choose(ffns, rows, x.dtype, known_by)
    if strategy in ("masked", "fused"):
        if rows > FEW:
            return "sorted"
        auto.require(strategy, ffns, rows, x.dtype)
    return strategy


def run(ffns: FFNs, x: mx.array, route: LayerRoutes, by: str, residual: mx.array | None = None) -> mx.array:
    """The routed FFNs' output for the normalised ``x``, both ``[..., hidden]``, with zeros where a token skips.

    Args:
        ffns: a layer's.
        x: the input.
        route: ``[...]``.
        by: the strategy that `decide` found.
        residual: what to add, ``[..., hidden]``, for FFNs whose modules take it as a second argument; None: nothing.
    """
    if isinstance(route, Route) and by != "dense":
        if route is Route.SKIP:
            out = mx.zeros_like(x) if residual is None else residual
        else:
            module = _module(ffns, route)
            out = module(x) if residual is None else module(x, residual)
    else:
        out = RUN[by](ffns, x, route)
        out = out if residual is None else residual + out
    if by == "sync":
        mx.async_eval(out)  # the device works while the host builds the next layer, up to the route that it waits for
    return out


def unless_skipped(values: mx.array, otherwise: mx.array, route: LayerRoutes) -> mx.array:
    """``values [..., hidden]``, or ``otherwise`` at the tokens that skip the layer."""
    if isinstance(route, Route):
        return otherwise if route is Route.SKIP else values
    return mx.where(_on_device(route)[..., None] == Route.SKIP, otherwise, values)


def _on_device(route: Routes | mx.array) -> mx.array:
    return route if isinstance(route, mx.array) else mx.array(route)


def _dense(ffns: FFNs, x: mx.array, route: LayerRoutes) -> mx.array:
    column = mx.array(int(route)) if isinstance(route, Route) else _on_device(route)[..., None]
    nothing = mx.zeros((), x.dtype)
    small_or_nothing = mx.where(column == Route.SMALL, ffns.small(x), nothing)
    return mx.where(column == Route.BIG, ffns.big(x), small_or_nothing)


def _planned(ffns: FFNs, x: mx.array, route: Routes | mx.array) -> mx.array:
    if isinstance(route, mx.array):
        raise DuoError("strategy 'planned' needs routes that the host knows; use dense, sorted or sync")
    out = mx.zeros((), x.dtype)
    column = mx.array(route)[..., None]
    for needed in np.unique(route[route != Route.SKIP]).tolist():
        out = mx.where(column == needed, _module(ffns, Route(needed))(x), out)
    return out


def _sorted(ffns: FFNs, x: mx.array, route: Routes | mx.array) -> mx.array:
    rows = x.reshape(-1, x.shape[-1])
    order, back, skips, smalls = _grouping(route)
    bigs = len(rows) - skips - smalls
    parts = [mx.zeros((skips, rows.shape[1]), x.dtype)] if skips else []
    for count, start, module in ((smalls, skips, ffns.small), (bigs, skips + smalls, ffns.big)):
        if count:  # a quantised product over no rows kills the process
            # as one sequence: experts take no rows alone
            parts.append(module(rows[order[start : start + count]][None]).squeeze(0))
    grouped = mx.concatenate(parts) if len(parts) > 1 else parts[0]
    return grouped[back].reshape(x.shape)


def _grouping(route: Routes | mx.array) -> tuple[mx.array, mx.array, int, int]:
    """The order that groups tokens by route, its inverse, and how many tokens skip and go to small."""
    if isinstance(route, mx.array):
        flat = route.reshape(-1)
        order = mx.argsort(flat)
        skips, smalls = read(mx.stack([(flat == Route.SKIP).sum(), (flat == Route.SMALL).sum()])).tolist()
        return order, mx.argsort(order), skips, smalls
    host = np.argsort(route, axis=None, kind="stable").astype(np.uint32)
    counts = np.bincount(route.ravel(), minlength=len(Route))
    back = np.argsort(host).astype(np.uint32)
    return mx.array(host), mx.array(back), int(counts[Route.SKIP]), int(counts[Route.SMALL])


def _masked(ffns: FFNs, x: mx.array, route: Routes | mx.array) -> mx.array:
    return masked.run(ffns, x, _on_device(route))


def _fused(ffns: FFNs, x: mx.array, route: Routes | mx.array) -> mx.array:
    return fused.ffn(ffns, x, _on_device(route))


def _module(ffns: FFNs, route: Route) -> FFN:
    return ffns.big if route is Route.BIG else ffns.small


RUN: dict[str, Callable[..., mx.array]] = {
    "dense": _dense,
    "planned": _planned,
    "sorted": _sorted,
    "sync": _planned,
    "masked": _masked,
    "fused": _fused,
}
STRATEGIES = ("auto", *RUN)
