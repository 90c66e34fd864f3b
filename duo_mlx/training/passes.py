"""A pass that learns: a Duo's layers without a cache, with dropout, and computed anew for the gradient if so wished.

It is `duo_mlx.model`'s pass, with dropout on both residual branches as in the PyTorch reference. Routes are known to
the host, so each FFN runs on its own tokens (the strategy ``sorted``), and nothing waits for the device. The sizes of
these groups differ from step to step, so a step is not compiled: on a CPU ``dense`` compiled takes 0.37 s where this
takes 0.31, and compiles for 39 s (6 layers of the embedded model's width, 512 tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx import conditional
from duo_mlx.llama_parts import Rotation
from duo_mlx.model import Layer, Model
from duo_mlx.routes import Route, Routes

BRANCHES = 2  # of a layer into the residual stream: attention and FFN
STRATEGY = "sorted"

Keys = NDArray[np.uint32]  # of random numbers, [sequences, layers, branches, 2]
# from a layer and what its router sees, [sequences, length, hidden], to weights [sequences, length, choices] and
# something else, [sequences]
Weigh = Callable[[Layer, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Passes:
    """How passes are made while training.

    Args:
        dropout: the share of values that both branches of a layer lose.
        recompute: keep only what lies between layers for the gradient, and compute each layer twice.
    """

    dropout: float = 0.0
    recompute: bool = False

    def keys(self, random: np.random.Generator, layers: int) -> Keys:
        """Keys of the dropout in one sequence ``[layers, branches, 2]``."""
        return random.integers(1 << 32, size=(layers, BRANCHES, 2), dtype=np.uint32)

    def logits(
        self,
        model: Model,
        tokens: mx.array,
        routes: Routes,
        keys: Keys,
        caches: Sequence[Any] | None = None,
        head: Callable[[mx.array], mx.array] | None = None,
    ) -> mx.array:
        """Logits ``[sequences, length, vocab]`` in float32.

        Args:
            model: a Duo.
            tokens: ids ``[sequences, length]``, at least two of a sequence.
            routes: ``[sequences, length, layers]``, or ``[layers]`` for all tokens.
            keys: of the dropout.
            caches: one a layer, which are not changed (`duo_mlx.beside`); None: there is nothing before the tokens.
            head: gives the logits; None: the model's.
        """
        decoder, layers = model.model, model.layers
        caches = [None] * len(layers) if caches is None else list(caches)
        h = decoder.embed_tokens(tokens)
        planned = conditional.plan(routes, len(tokens), tokens.shape[1], len(layers), STRATEGY)
        masks = decoder.masks(h, caches)
        rotate = layers[0].self_attn.rotation(tokens.shape[1], caches[0])
        for number, layer in enumerate(layers):
            where = masks[layer.use_sliding], caches[number], rotate
            step = self._through(layer, *where, planned[number], mx.array(keys[:, number]))
            h = (nn.utils.checkpoint(layer, step) if self.recompute else step)(h)
        return (head or model.head)(decoder.norm(h)).astype(mx.float32)

    def mixture(
        self, model: Model, tokens: mx.array, choices: Sequence[int], weigh: Weigh
    ) -> tuple[mx.array, mx.array]:
        """Logits ``[sequences, length, vocab]`` where each layer adds a weighted sum of its modules' outputs.

        Args:
            model: a Duo.
            tokens: ids ``[sequences, length]``, at least two of a sequence.
            choices: the routes that have weights.
            weigh: gives a layer's weights ``[sequences, length, choices]``, see `Weigh`.

        Returns:
            The logits in float32, and what ``weigh`` found beside the weights, ``[layers, sequences]``.
        """
        decoder, layers, found = model.model, model.layers, []
        h = decoder.embed_tokens(tokens)
        masks = decoder.masks(h, [None] * len(layers))
        rotate = layers[0].self_attn.rotation(tokens.shape[1], None)
        for layer in layers:
            step = _mixed(layer, masks[layer.use_sliding], rotate, tuple(choices), weigh)
            h, beside = (nn.utils.checkpoint(layer, step) if self.recompute else step)(h)
            found.append(beside)
        return model.head(decoder.norm(h)).astype(mx.float32), mx.stack(found)

    def _through(
        self, layer: Layer, mask: mx.array | str | None, cache: Any, rotate: Rotation, route: Any, keys: mx.array
    ) -> Callable[[mx.array], mx.array]:
        """One layer as a function of its input; ``keys [sequences, branches, 2]``."""

        def through(x: mx.array) -> mx.array:
            attended = self._drop(layer.self_attn(layer.input_layernorm(x), mask, cache, rotate), keys[:, 0])
            if layer.skips_attention:
                attended = conditional.keep_unless_skipped(attended, route)
            h = x + attended
            normed = layer.post_attention_layernorm(h)
            out = conditional.run(layer.mlp, normed, route, STRATEGY, residual=mx.zeros((), h.dtype))
            return h + self._drop(out, keys[:, 1])

        return through

    def _drop(self, values: mx.array, keys: mx.array) -> mx.array:
        """Dropout of ``values [sequences, length, hidden]``; each sequence has its key, whatever its batch is."""
        if not self.dropout or not values.ndim:
            return values
        kept = mx.vmap(lambda key: mx.random.bernoulli(1 - self.dropout, values.shape[1:], key))(keys)
        return mx.where(kept, values / (1 - self.dropout), mx.zeros((), values.dtype))


def _mixed(
    layer: Layer, mask: mx.array | str | None, rotate: Rotation, choices: tuple[int, ...], weigh: Weigh
) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """One layer of a mixture as a function of its input."""

    def through(x: mx.array) -> tuple[mx.array, mx.array]:
        normed = layer.input_layernorm(x)
        attended = layer.self_attn(normed, mask, None, rotate)
        if layer.skips_attention:
            weights, beside = weigh(layer, normed)
            if Route.SKIP in choices:
                attended = attended * (1 - weights[..., choices.index(Route.SKIP), None])
        h = x + attended
        normed = layer.post_attention_layernorm(h)
        if not layer.skips_attention:
            weights, beside = weigh(layer, normed)
        for number, choice in enumerate(choices):
            if choice != Route.SKIP:
                module = layer.mlp.big if choice == Route.BIG else layer.mlp.small
                h = h + weights[..., number, None] * module(normed)
        return h, beside

    return through


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """The mean loss of each sequence ``[sequences]`` in nats a token; the arithmetic is float32."""
    losses: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return losses.mean(axis=-1)
