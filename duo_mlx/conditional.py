"""Strategies: how a layer carries out its tokens' routes.

`plan` turns a pass's routes into one entry a layer, and a strategy runs the FFNs of one layer by that entry:

===========  ====================================================================================================
``dense``    both FFNs on every token, then a choice; differentiable, never reads a route; the reference
``planned``  only the FFNs that some token needs are in the graph; known on the host
``sorted``   tokens grouped by route, each FFN on its own group; reads two counts a layer if the device knows the route
``sync``     ``planned`` after reading the layer's routes from the device: one sync a layer
``auto``     ``planned`` where all tokens of a layer share a route, else ``sorted``; routes on the device are read
             once for the whole pass
===========  ====================================================================================================

Routes in NumPy are known by the host, routes in an `mx.array` by the device.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route, Routes, check_routes

# What one layer's tokens do: one route for all of them, or [batch, tokens] on the host or on the device.
LayerRoutes = Route | Routes | mx.array


class FFNs(Protocol):
    """The two modules of a layer; each maps ``[..., hidden]`` to ``[..., hidden]``."""

    @property
    def big(self) -> Callable[[mx.array], mx.array]: ...

    @property
    def small(self) -> Callable[[mx.array], mx.array]: ...


_reads = 0


def host_reads() -> int:
    """How many times this process has waited for the device to read a route; take the difference of two calls."""
    return _reads


def _read(array: mx.array) -> NDArray[Any]:
    global _reads
    _reads += 1
    return np.array(array)


def check_strategy(strategy: str) -> str:
    """``strategy`` if it exists, else `DuoError`."""
    if strategy not in STRATEGIES:
        raise DuoError(f"strategy {strategy!r} does not exist; there are {', '.join(STRATEGIES)}")
    return strategy


def plan(
    routes: Sequence[int] | NDArray[np.integer] | mx.array, batch: int, tokens: int, layers: int, strategy: str
) -> list[LayerRoutes]:
    """One entry a layer from the routes of a pass, ``[layers]`` or ``[batch, tokens, layers]``.

    Raises:
        DuoError: unknown strategy, wrong shape or value.
    """
    check_strategy(strategy)
    if isinstance(routes, mx.array):
        if strategy in ("auto", "planned"):
            routes = _read(routes)
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
    return Route(int(first)) if (routes == first).all() else routes


def settle(route: LayerRoutes, strategy: str) -> LayerRoutes:
    """A layer's entry as the strategy needs it when the layer begins: ``sync`` reads it here."""
    if strategy == "sync" and isinstance(route, mx.array):
        return _shared(_read(route).astype(np.uint8))
    return route


def run(ffns: FFNs, x: mx.array, route: LayerRoutes, strategy: str) -> mx.array:
    """The routed FFNs' output ``[batch, tokens, hidden]`` for the normalised ``x``; zeros where a token skips."""
    return STRATEGIES[strategy](ffns, x, route)


def keep_unless_skipped(values: mx.array, route: LayerRoutes) -> mx.array:
    """``values [batch, tokens, hidden]`` with zeros at the tokens that skip the layer."""
    if isinstance(route, Route):
        return mx.zeros_like(values) if route is Route.SKIP else values
    return mx.where(_column(route) == Route.SKIP, mx.zeros((), values.dtype), values)


def _column(route: Routes | mx.array) -> mx.array:
    return mx.array(route)[..., None]


def _dense(ffns: FFNs, x: mx.array, route: LayerRoutes) -> mx.array:
    column = mx.array(int(route)) if isinstance(route, Route) else _column(route)
    nothing = mx.zeros((), x.dtype)
    return mx.where(column == Route.BIG, ffns.big(x), mx.where(column == Route.SMALL, ffns.small(x), nothing))


def _planned(ffns: FFNs, x: mx.array, route: LayerRoutes) -> mx.array:
    if isinstance(route, Route):
        return _module(ffns, route)(x)
    if isinstance(route, mx.array):
        raise DuoError("strategy 'planned' needs routes that the host knows; use dense, sorted or sync")
    out = mx.zeros((), x.dtype)
    column = _column(route)
    for needed in np.unique(route[route != Route.SKIP]).tolist():
        out = mx.where(column == needed, _module(ffns, Route(needed))(x), out)
    return mx.broadcast_to(out, x.shape)


def _sorted(ffns: FFNs, x: mx.array, route: LayerRoutes) -> mx.array:
    if isinstance(route, Route):
        return _module(ffns, route)(x)
    rows = x.reshape(-1, x.shape[-1])
    order, back, skips, smalls = _grouping(route)
    bigs = rows.shape[0] - skips - smalls
    parts = [mx.zeros((skips, rows.shape[1]), x.dtype)] if skips else []
    for count, start, module in ((smalls, skips, ffns.small), (bigs, skips + smalls, ffns.big)):
        if count:  # a quantised product over no rows kills the process
            parts.append(module(rows[order[start : start + count]]))
    grouped = mx.concatenate(parts) if len(parts) > 1 else parts[0]
    return grouped[back].reshape(x.shape)


def _grouping(route: Routes | mx.array) -> tuple[mx.array, mx.array, int, int]:
    """The order that groups tokens by route, its inverse, and how many tokens skip and go to small."""
    if isinstance(route, mx.array):
        flat = route.reshape(-1)
        order = mx.argsort(flat)
        skips, smalls = _read(mx.stack([(flat == Route.SKIP).sum(), (flat == Route.SMALL).sum()])).tolist()
        return order, mx.argsort(order), skips, smalls
    host = np.argsort(route, axis=None, kind="stable").astype(np.uint32)
    counts = np.bincount(route.ravel(), minlength=len(Route))
    back = np.argsort(host).astype(np.uint32)
    return mx.array(host), mx.array(back), int(counts[Route.SKIP]), int(counts[Route.SMALL])


def _auto(ffns: FFNs, x: mx.array, route: LayerRoutes) -> mx.array:
    return (_planned if isinstance(route, Route) else _sorted)(ffns, x, route)


def _module(ffns: FFNs, route: Route) -> Callable[[mx.array], mx.array]:
    return {Route.BIG: ffns.big, Route.SMALL: ffns.small, Route.SKIP: mx.zeros_like}[route]


STRATEGIES: dict[str, Callable[[FFNs, mx.array, LayerRoutes], mx.array]] = {
    "auto": _auto,
    "dense": _dense,
    "planned": _planned,
    "sorted": _sorted,
    "sync": _planned,
}
