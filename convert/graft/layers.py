"""A dense model's layers one at a time in float32, as its own pass calls them, with inputs and outputs of FFNs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.neurons import Neurons
from duo_mlx.device import on_cpu
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers, can_open

BATCH = 8  # windows in one call: what bounds the memory of activations


class Layers:
    """The layers of a Duo that has no small FFNs; hidden states are ``[windows, tokens, hidden]``.

    Args:
        model: the Duo.
        tokens: length of a window.

    Raises:
        DuoError: its layers cannot be run one by one.
    """

    def __init__(self, model: Model, tokens: int):
        if not can_open(model):
            raise DuoError(
                f"--graft: the layers of a {model.kind} cannot be run one by one, so there is no way to fit small FFNs"
            )
        if on_cpu():
            from duo_mlx import cpu

            cpu.quicken(model)
        self.model = model
        self._open = OpenLayers(model, mx.zeros((1, tokens), mx.uint32))

    def __len__(self) -> int:
        return self.model.config.num_hidden_layers

    def embed(self, windows: NDArray[np.integer]) -> NDArray[np.float32]:
        """The first layer's inputs for token ids ``[windows, tokens]``."""
        with self.outside_in_float32():
            parts = [OpenLayers(self.model, mx.array(windows[rows])).root for rows in batches(len(windows))]
            return np.concatenate([np.array(part.astype(mx.float32)) for part in parts])

    def in_float32(self, index: int) -> AbstractContextManager[None]:
        """Let a layer have its weights in float32 for the duration of a ``with`` block."""
        return _in_float32(self.model.layers[index].modules())

    def outside_in_float32(self) -> AbstractContextManager[None]:
        """The same for what stands before and after the layers."""
        inside = {id(module) for block in self.model.layers for module in block.modules()}
        return _in_float32([module for module in self.model.modules() if id(module) not in inside])

    def big(self, index: int) -> nn.Module:
        """A layer's own FFN."""
        return self.model.ffns[index].big

    def run(self, index: int, h: mx.array, nudge: mx.array | None = None) -> mx.array:
        """A layer's output, with ``nudge`` added to its FFN's."""
        return self._open.open(index, h, lambda ffn, x: _said(ffn, x) if nudge is None else _said(ffn, x) + nudge)

    def open(
        self, index: int, h: mx.array, neurons: Neurons | None = None
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """A layer's output, its FFN's input and output, and what its ``neurons`` say where they are known."""
        seen: list[Any] = []

        def see(ffn: Any, x: mx.array) -> mx.array:
            inner = None if neurons is None else neurons(x)
            said = _said(ffn, x) if neurons is None or inner is None else neurons.down(inner)
            seen.extend((x, said, inner))
            return said

        out = self._open.open(index, h, see)
        return out, seen[0], seen[1], seen[2]

    def give(self, index: int, h: mx.array, said: mx.array) -> mx.array:
        """A layer's output where its FFN says ``said``."""
        return self._open.open(index, h, lambda *_: said)

    def say(self, index: int, h: mx.array, small: Callable[[mx.array], mx.array]) -> mx.array:
        """A layer's output where ``small`` speaks for its FFN."""
        return self._open.open(index, h, lambda _, x: small(x))

    def adds(self, index: int, h: mx.array) -> bool:
        """Whether a layer does no more with its FFN's output than to add it, as found on ``h``."""
        out, _, said, _ = self.open(index, h)
        without = self.give(index, h, mx.zeros_like(said))
        return bool((mx.abs(without + said - out).max() <= 1e-4 * mx.abs(out).max()).item())

    def pull_back(self, index: int, h: mx.array, lost: mx.array) -> tuple[mx.array, mx.array]:
        """What a layer's FFN would have to say more for its output to gain ``lost``, about, and its tokens' loudness.

        Args:
            index: of the layer, which does more with its FFN's output than to add it: scales it, or puts it in a norm.
            h: the layer's input.
            lost: a small change of its output.

        Returns:
            The change of the FFN's output, and ``[windows, tokens, 1]``, how much larger a change is in the layer's
            output than it was in the FFN's.
        """
        nothing = mx.zeros_like(h)
        signs = 1 - 2 * mx.random.bernoulli(0.5, h.shape, key=mx.random.key(index))

        def out(nudge: mx.array) -> mx.array:
            return self.run(index, h, nudge)

        loudness, back = (mx.vjp(out, [nothing], [each])[1][0] for each in (signs.astype(h.dtype), lost))
        squared = mx.square(loudness).mean(axis=-1, keepdims=True)
        return back / mx.maximum(squared, 1e-20), mx.sqrt(squared)

    def logits(self, h: mx.array) -> mx.array:
        """Logits ``[1, tokens, vocab]`` of a window whose last hidden states are ``h [1, tokens, hidden]``."""
        return self._open.logits(h).astype(mx.float32)


@contextmanager
def _in_float32(modules: Iterable[nn.Module]) -> Iterator[None]:
    stored = [(module, name, value) for module in modules for name, value in module.items() if _is_narrow(value)]
    for module, name, value in stored:
        module[name] = value.astype(mx.float32)
    try:
        yield
    finally:
        for module, name, value in stored:
            module[name] = value


def _is_narrow(value: Any) -> bool:
    return isinstance(value, mx.array) and value.dtype in (mx.float16, mx.bfloat16)


def _said(ffn: Any, x: mx.array) -> mx.array:
    module = getattr(ffn.big, "by_powers", ffn.big)
    out: mx.array = module(x)
    return out


def batches(count: int) -> Iterator[slice]:
    """Slices over ``count`` windows."""
    return (slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH))
