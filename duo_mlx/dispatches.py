"""Count the kernels that a decoding step starts on a GPU, from the graph of that step.

A base's graph is mlx-lm's, so it is built and counted, whatever the base is. Nothing is computed: the model's arrays
hold one number each (`duo_mlx.weightless`). On a GPU each of MLX's fast operations is one kernel. On a CPU
they are many primitives, so stand-ins take their place while the graph is built. Other threads do not see them.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import auto, conditional, hosting
from duo_mlx.errors import DuoError
from duo_mlx.forward import Forward
from duo_mlx.hosting import Call
from duo_mlx.kernels import launch
from duo_mlx.model import Model
from duo_mlx.router import LinearRouter
from duo_mlx.routes import LETTERS, Route
from duo_mlx.weightless import arrays, forget, sized, without_graph

# Primitives that start no kernel: they view an array, or order others.
VIEWS = {
    "AsStrided", "Broadcast", "BroadcastAxes", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
}  # fmt: skip

_one_at_a_time = Lock()  # two that replace the same functions at once would not restore them
_counting: ContextVar[bool] = ContextVar("counting", default=False)


def count(model: Model, strategy: str, route: Route) -> tuple[int, list[int]]:
    """Return how many kernels a step starts outside the layers, sampling by argmax included, and in each layer.

    Args:
        model: one of `duo_mlx.weightless`; its routers decide, except under ``planned``.
        strategy: how the routes are carried out.
        route: of all layers.

    Raises:
        DuoError: the base computes its layers in parts.
    """
    token, layers = mx.array([[1]]), len(model.ffns)
    cache = model.make_cache()
    with _as_on_a_gpu(route) as pending:
        model(token, cache, routes=[Route.BIG] * layers)  # after it the caches have room
        forget(cache)
        entries = [route if strategy == "planned" else _router(model)] * layers
        step = _Step(model, entries, strategy, pending)
        with hosting.opened(step):
            logits = model.base_class.__call__(model, token, cache=cache)[:, -1]
        sampled = mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)
    if len(step.layers) != layers:
        raise DuoError(f"kernels of a {model.kind} cannot be counted layer by layer: it does not call its layers")
    return kernels([*step.outside, sampled]), step.layers


def kernels(outputs: list[mx.array]) -> int:
    """Return how many kernels the graph of unevaluated arrays starts on a GPU."""
    file = io.StringIO()
    mx.export_to_dot(file, *outputs)
    text = file.getvalue()
    inputs = re.findall(r'^"\w+" -> (\d+)', text, re.MULTILINE)
    primitives = re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text)
    # a concatenation copies its inputs one by one
    return sum(inputs.count(node) if name == "Concatenate" else name not in VIEWS for node, name in primitives)


class _Pending:
    """What a graph has besides a layer's output: launches of our own kernels, and arrays that the host reads."""

    def __init__(self) -> None:
        self.launches = 0
        self.read: list[mx.array] = []

    def taken(self) -> tuple[int, list[mx.array]]:
        """Return both, and begin anew."""
        found = self.launches, self.read
        self.launches, self.read = 0, []
        return found


class _Step(Forward):
    """A pass whose layers are counted one by one: each starts from arrays that have no graph."""

    def __init__(self, model: Model, entries: list[Any], strategy: str, pending: _Pending):
        super().__init__(entries, strategy, model.parts)
        self.layers: list[int] = []
        self.outside: list[mx.array] = []
        self._pending = pending

    def block(self, index: int, call: Call, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given = [h, args, named]
        self.outside += arrays(given)
        h, args, named = without_graph(given)
        out = self.run_block(index, call, h, args, named)
        launches, read = self._pending.taken()
        self.layers.append(launches + kernels(arrays(out) + read))
        return without_graph(out)


def _router(model: Model) -> LinearRouter:
    """A router in each layer, as the model's own is if it has one."""
    choices = [LETTERS.index(letter) for letter in model.config.router_choices or LETTERS]
    layers, hidden = len(model.ffns), model.config.hidden_size
    weight = sized(mx.zeros((len(choices), hidden), model.dtype))
    biases = [mx.zeros(len(choices))] * layers if model.config.router_bias else None
    router = LinearRouter([weight] * layers, choices, biases=biases)
    mx.eval(router.offsets)
    return router


@contextmanager
def _as_on_a_gpu(route: Route) -> Iterator[_Pending]:
    """Build graphs as on a GPU whose routers all decide for ``route``."""
    pending = _Pending()

    def one(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return mx.abs(x)

    def attend(queries: mx.array, keys: mx.array, values: mx.array, **named: Any) -> mx.array:
        shape = (*queries.shape[:-1], values.shape[-1])
        return mx.depends([mx.abs(mx.broadcast_to(queries[..., :1], shape))], [keys, values, *arrays(named)])[0]

    def dequantize(packed: mx.array, scales: mx.array, biases: mx.array | None = None, **named: Any) -> mx.array:
        shape = (*packed.shape[:-1], packed.shape[-1] * 32 // named["bits"])
        out = sized(mx.zeros(shape, scales.dtype if biases is not None else mx.bfloat16))
        return mx.abs(mx.depends([out], [packed, scales, *arrays([biases])])[0])

    def execute(launched: launch.Launch) -> list[mx.array]:
        pending.launches += 1
        outputs = [sized(mx.zeros(shape, dtype)) for _, shape, dtype in launched.outputs]
        found: list[mx.array] = mx.depends(outputs, [array for _, array in launched.inputs])
        return found

    def read(array: mx.array) -> NDArray[Any]:
        pending.read.append(array)
        if array.shape == (2,):  # how many tokens skip, and how many go to small
            return np.array([route is Route.SKIP, route is Route.SMALL], np.uint32)
        return np.full(array.shape, route)

    stand_ins: list[tuple[Any, str, Any]] = [
        *((mx.fast, name, one) for name in ("rms_norm", "layer_norm", "rope")),
        (mx.fast, "scaled_dot_product_attention", attend),
        (mx, "dequantize", dequantize),
        (mx, "async_eval", lambda *_: None),
        (launch, "execute", execute),
        (conditional, "read", read),
        (auto, "require", lambda *_: None),
        (auto, "router_refusal", lambda *_: None),
    ]
    with _one_at_a_time, ExitStack() as stack:
        token = _counting.set(True)
        stack.callback(_counting.reset, token)
        for owner, name, made in stand_ins:
            stack.enter_context(patch.object(owner, name, _here_alone(made, getattr(owner, name))))
        yield pending


def _here_alone(made: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls ``made`` while this thread counts, and ``own`` in all other threads."""
    return lambda *args, **named: (made if _counting.get() else own)(*args, **named)
