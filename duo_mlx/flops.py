"""FLOPs of a token, counted in the graph of a decoding step, so that they are known for any base.

Products of matrices, convolutions and attention count, two FLOPs for a multiply and an add. What is elementwise does
not: norms, activations, and the updates of a recurrent state.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from duo_mlx import cost, hosting
from duo_mlx.cost import RouteTable
from duo_mlx.errors import DuoError
from duo_mlx.forward import Forward
from duo_mlx.hosting import Call
from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.weightless import arrays, forget, weightless, without_graph

PRODUCTS = ("Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "GatherQMM")
CONTEXTS = (2, 4)  # positions attended to; from these two follow all others


def flops(model: Model) -> Callable[[int], RouteTable]:
    """Return the FLOPs of a decoded token as a function of the positions that it attends to.

    Raises:
        DuoError: the base's graph cannot be counted layer by layer.
    """
    model = weightless(model)
    with _without_compiling():
        first, second = (_step(model, context) for context in CONTEXTS)
    each = (second.by_route - first.by_route) // (CONTEXTS[1] - CONTEXTS[0])  # FLOPs of a position
    limits = cost.attended(model)

    def at(context: int) -> RouteTable:
        seen = np.minimum(context, limits)[:, None]
        return RouteTable(first.fixed, first.by_route + each * (seen - CONTEXTS[0]))

    return at


def _step(model: Model, context: int) -> RouteTable:
    """The FLOPs of a step that attends to few positions."""
    by_route = np.zeros((len(model.ffns), len(Route)), np.int64)
    for route in Route:
        cache = model.make_cache()
        model(mx.zeros((1, context - 1), mx.int32), cache)
        forget(cache)
        step = _Step(model, route, cache)
        try:
            with hosting.opened(step):
                outside = products(partial(model.base_class.__call__, model, cache=cache), mx.array([[1]]))
        except ValueError as error:
            raise DuoError(f"FLOPs of a {model.kind} cannot be counted: {error}") from None
        if len(step.layers) != len(by_route):
            raise DuoError(f"FLOPs of a {model.kind} cannot be counted: it does not call its layers one by one")
        by_route[:, route] = step.layers
    return RouteTable(outside, by_route)


class _Step(Forward):
    """A pass that counts its layers one by one, each from arrays that have no graph."""

    def __init__(self, model: Model, route: Route, cache: Any):
        super().__init__([route] * len(model.ffns), "planned", model.parts)
        self.layers: list[int] = []
        self._cache = cache

    def block(self, index: int, call: Call, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        h, args, named = without_graph([h, args, named])
        left: list[Any] = []

        def run(x: mx.array) -> list[mx.array]:
            left.append(self.run_block(index, call, x, args, named))
            return arrays(left)

        self.layers.append(products(run, h))
        forget(self._cache)
        return without_graph(left[0])


def products(function: Callable[..., Any], *inputs: mx.array, **named: mx.array) -> int:
    """Return the FLOPs of the products in the graph of a function's outputs, from the shapes of what they multiply."""
    found: list[dict[str, Any]] = []
    export: Any = mx.export_function  # whose type takes no arrays by name
    export(found.append, function, *inputs, **named)
    return sum(map(_of_primitive, found))


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Let functions be what they were written as: some of MLX's compiled ones, and copies, cannot be exported.

    What other threads compute meanwhile is the same, but for its speed.
    """
    mx.disable_compile()
    try:
        with patch.object(mx, "contiguous", lambda array, *_, **__: array):
            yield
    finally:
        if "MLX_DISABLE_COMPILE" not in os.environ:
            mx.enable_compile()


def _of_primitive(each: dict[str, Any]) -> int:
    name = each.get("name")
    if name in PRODUCTS:
        return 2 * math.prod(each["outputs"][0][1]) * int(each["inputs"][0][1][-1])
    if name == "Convolution":
        return 2 * math.prod(each["outputs"][0][1]) * math.prod(each["inputs"][1][1][1:])
    if name == "ScaledDotProductAttention":  # one primitive on a GPU, products on a CPU
        queries, keys, values = (shape for _, shape, *_ in each["inputs"][:3])
        return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])
    return 0
