"""A model's layers one by one, called as its own pass calls them: what oracle, pattern search and graft are made of.

A pass in which every layer hands on its input tells what the base calls its layers with: masks, caches, whatever else.
Then each layer can be called by itself, on hidden states of any number of sequences.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.hosting import primitives
from duo_mlx.model import Model
from duo_mlx.routes import Route

Kept = Mapping[Route, NDArray[np.intp]]  # by route, the places of the nodes that take it


class OpenLayers:
    """The layers in passes over the same tokens ``[batch, tokens]``.

    Args:
        model: a Duo.
        inputs: token ids; hidden states given to a layer may have another batch size, if that of ``inputs`` is 1.
        cache: one entry a layer, as a pass takes it; None for passes without one.

    Raises:
        DuoError: the base's layers cannot be called one by one.
    """

    def __init__(self, model: Model, inputs: mx.array, cache: list[Any] | None = None):
        if not can_open(model):
            raise DuoError(f"the layers of a {model.kind} cannot be run one by one")
        self._record(model, inputs, cache)

    def _record(self, model: Model, inputs: mx.array, cache: list[Any] | None) -> None:
        self.model, self._inputs = model, inputs
        self._layers = model.config.num_hidden_layers
        self._memo: dict[Any, Any] = {}
        self._calls: list[Callable[[mx.array], mx.array]] = []
        roots: list[mx.array] = []

        def record(index: int, run: Callable[[mx.array], mx.array], h: mx.array) -> mx.array:
            if index == 0:
                roots.append(h)
            self._calls.append(run)
            return h

        # the calls that are recorded look up the pass that is open when they are made
        with model.carried_out([], "planned", on_block=record, memo=self._memo):
            model.trunk(inputs, cache=cache)
        root = roots[0]
        self._flat = root.ndim == 2  # a base may drop the axis of a single token
        self.root = root[:, None] if self._flat else root

    def run(self, index: int, h: mx.array, route: Route) -> mx.array:
        """A layer's output ``[n, tokens, hidden]`` for its input ``h``, where all tokens take ``route``."""
        return self.children(index, h, {route: np.arange(len(h))})

    def open(self, index: int, h: mx.array, on_ffn: Callable[[Any, mx.array], mx.array]) -> mx.array:
        """A layer's output for its input ``h``, with ``on_ffn`` in place of its FFN (`duo_mlx.forward.Forward`)."""
        with self.model.carried_out([], "planned", on_ffn=on_ffn, memo=self._memo):
            return self._call(index, h)

    def children(self, index: int, h: mx.array, kept: Kept) -> mx.array:
        """A layer's outputs under several routes from one evaluation of its attention.

        Args:
            index: of the layer.
            h: inputs ``[n, tokens, hidden]``.
            kept: by route, which of the n go on under it.

        Returns:
            ``[children, tokens, hidden]``, route after route.
        """
        whole = all(len(places) == len(h) for places in kept.values())
        skips = {Route.SKIP, Route.SMALL} if self.model.ffns[index].small_skips else {Route.SKIP}
        passed = [kept[route] for route in kept if route in skips] if self.model.parts is not None else []
        by_ffn = {route: places for route, places in kept.items() if not passed or route not in skips}
        outputs = [h[mx.array(places)] for places in passed]

        def each(ffn: Any, x: mx.array) -> mx.array:
            """The FFNs' outputs by route, ``[routes, n, ...]``; nodes that do not go on have zeros."""
            found = []
            for route, places in by_ffn.items():
                module = ffn.big if route is Route.BIG else ffn.small
                module = getattr(module, "by_powers", module)  # `duo_mlx.cpu`
                if route in skips:
                    found.append(mx.zeros_like(x))
                elif len(places) == len(x):
                    found.append(module(x))
                else:
                    at = mx.array(places)
                    found.append(mx.zeros_like(x).at[at].add(module(x[at])))
            return mx.stack(found)

        if by_ffn:
            stacked = self.open(index, h, each)
            if whole:
                outputs.append(stacked.reshape(-1, *h.shape[1:]))
            else:
                outputs += [stacked[row, mx.array(places)] for row, places in enumerate(by_ffn.values())]
        return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]

    def logits(self, h: mx.array) -> mx.array:
        """Logits ``[n, tokens, vocab]`` of the last layer's output ``h [n, tokens, hidden]``."""

        def last(index: int, _: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
            return (h[:, 0] if x.ndim == 2 else h) if index == self._layers - 1 else x

        return self.model(self._inputs, routes=[Route.BIG] * self._layers, on_block=last)

    def _call(self, index: int, h: mx.array) -> mx.array:
        out = self._calls[index](h[:, 0] if self._flat else h)
        return out[..., None, :] if self._flat else out


def can_open(model: Model) -> bool:
    """Whether the base's layers can be called one by one: the same graph comes of it as of a whole pass."""
    if "opens" not in vars(model):
        vars(model)["opens"] = _try_opening(model)
    found: bool = vars(model)["opens"]
    return found


def _all_big(ffn: Any, x: mx.array) -> mx.array:
    out: mx.array = ffn.big(x)
    return out


def _try_opening(model: Model) -> bool:
    tokens, big = mx.zeros((1, 3), mx.uint32), [Route.BIG] * model.config.num_hidden_layers
    layers = OpenLayers.__new__(OpenLayers)
    try:
        layers._record(model, tokens, None)
        h = layers.root
        if h.shape != (1, 3, model.config.hidden_size):
            return False
        for index in range(len(big)):
            h = layers.open(index, h, _all_big)
        return primitives(layers.logits(h)) == primitives(model(tokens, routes=big, on_ffn=_all_big))
    except (TypeError, ValueError, AttributeError, IndexError):
        return False  # the trunk hands on more than hidden states
