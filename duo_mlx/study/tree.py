"""Every pattern of a model, exactly: a depth-first walk over the tree of patterns.

Patterns share their beginnings, so a layer's attention is computed once for all patterns that agree before it, and its
FFNs once for each route in it: for 12 layers of big and small 4,095 attention and 8,190 FFN evaluations instead of
49,152 of either. The children of a node go on as one batch; what is not gone on with yet waits, so that memory is
bounded by the depth and not by the number of patterns.

`Text` walks over a text, all tokens of which have the same pattern; `duo_mlx.study.committed` over one token's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.llama_parts import Rotation
from duo_mlx.model import Layer, Model
from duo_mlx.products import on_cpu
from duo_mlx.routes import Route, Routes
from duo_mlx.study.losses import Losses, token_losses

Options = Sequence[Sequence[Route]]
LOG2_E = 1.4426950408889634


@dataclass
class Work:
    """How many times a module was evaluated on one sequence, or on one token."""

    attention: int = 0
    ffn: int = 0
    head: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.attention + other.attention, self.ffn + other.ffn, self.head + other.head)


def layer_options(model: Model, choices: Sequence[Route]) -> list[tuple[Route, ...]]:
    """The routes of each layer among ``choices``; a layer without a small FFN has no small beside big."""
    ordered = sorted(set(choices))
    both = {Route.SMALL, Route.BIG} <= set(ordered)
    return [
        tuple(route for route in ordered if not (both and route is Route.SMALL and not model.args.has_small(layer)))
        for layer in range(model.args.num_hidden_layers)
    ]


@mx.compile
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """SwiGLU's ``silu(gate) * up`` by powers of two, for which MLX takes a third of the exponential's time on a CPU."""
    return gate * up / (1 + mx.power(2.0, -LOG2_E * gate))


class Branches:
    """A layer's outputs for several routes of all tokens, from one evaluation of its attention.

    Args:
        layer: of a Duo.
        h: its input ``[batch, tokens, hidden]``.
        mask, rotate, cache: as a layer takes them.
    """

    def __init__(
        self, layer: Layer, h: mx.array, mask: mx.array | str | None, rotate: Rotation, cache: Any = None
    ) -> None:
        self._layer, self._h = layer, h
        self._attended = layer.self_attn(layer.input_layernorm(h), mask, cache, rotate, residual=h)
        self._x = layer.post_attention_layernorm(self._attended)

    def take(self, route: Route, of: Callable[[mx.array], mx.array]) -> mx.array:
        """The output under one route; ``of`` takes some nodes of a batch."""
        if route is Route.SKIP:
            return of(self._h if self._layer.skips_attention else self._attended)
        ffn = self._layer.mlp.big if route is Route.BIG else self._layer.mlp.small
        x, attended = of(self._x), of(self._attended)
        if not on_cpu():
            return ffn(x, attended)
        return attended + ffn.down_proj(gated(ffn.gate_proj(x), ffn.up_proj(x)))


class Walk(ABC):
    """The walk; a subclass says what a node is.

    Args:
        model: a Duo.
        options: each layer's routes.
        rows: patterns of one batch at most, which bounds the memory.
        wanted: of patterns' beginnings ``[n, depth]``, which to evaluate; None: all.
    """

    axis = 0  # of the nodes of a batch

    def __init__(
        self,
        model: Model,
        options: Options,
        rows: int,
        wanted: Callable[[Routes], NDArray[np.bool_]] | None = None,
    ):
        self.model = model
        self.work = Work()
        self._options, self._rows, self._wanted = options, rows, wanted

    @abstractmethod
    def root(self) -> mx.array:
        """The input of the first layer."""

    @abstractmethod
    def branches(self, depth: int, h: mx.array) -> Branches:
        """A layer's outputs for the nodes ``h``."""

    @abstractmethod
    def leaves(self, h: mx.array) -> Losses:
        """Losses ``[n, tokens]`` of the last layer's outputs."""

    def losses(self) -> Iterator[tuple[Routes, Losses]]:
        """Patterns ``[n, layers]`` and their losses ``[n, tokens]`` in nats, batch by batch."""
        yield from self._below(self.root(), np.zeros((1, 0), np.uint8))

    def _below(self, h: mx.array, begun: Routes) -> Iterator[tuple[Routes, Losses]]:
        depth = begun.shape[1]
        if depth == len(self._options):
            self.work.head += len(begun)
            yield begun, self.leaves(h)
            return
        self.work.attention += len(begun)
        branches = self.branches(depth, h)
        outputs, patterns = [], []
        for route in self._options[depth]:
            longer = np.concatenate([begun, np.full((len(begun), 1), route, np.uint8)], axis=1)
            kept = np.arange(len(begun)) if self._wanted is None else np.flatnonzero(self._wanted(longer))
            if not len(kept):
                continue
            self.work.ffn += 0 if route is Route.SKIP else len(kept)
            outputs.append(branches.take(route, partial(self._some, kept)))
            patterns.append(longer[kept])
        if not outputs:
            return
        children, longer = mx.concatenate(outputs, axis=self.axis), np.concatenate(patterns)
        mx.eval(children)
        del branches, outputs, h
        for start in range(0, len(longer), self._rows):
            stop = min(start + self._rows, len(longer))
            part = children[start:stop] if self.axis == 0 else children[:, start:stop]
            yield from self._below(part, longer[start:stop])

    def _some(self, kept: NDArray[np.intp], h: mx.array) -> mx.array:
        return h if len(kept) == h.shape[self.axis] else mx.take(h, mx.array(kept.astype(np.int32)), axis=self.axis)


class Beginnings:
    """Whether beginnings are those of any of some patterns ``[n, layers]``: what a `Walk` over these alone wants."""

    def __init__(self, patterns: Routes):
        self._known = [{pattern[:depth].tobytes() for pattern in patterns} for depth in range(patterns.shape[1] + 1)]

    def __call__(self, beginnings: Routes) -> NDArray[np.bool_]:
        known = self._known[beginnings.shape[1]]
        return np.array([beginning.tobytes() in known for beginning in beginnings], np.bool_)


class Text(Walk):
    """The patterns over a text, each of which all of its tokens have.

    Args:
        model, options, rows, wanted: see `Walk`.
        inputs: ids ``[tokens]``.
        targets: the true next tokens ``[tokens]``.
    """

    def __init__(
        self,
        model: Model,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        options: Options,
        rows: int = 64,
        wanted: Callable[[Routes], NDArray[np.bool_]] | None = None,
    ):
        super().__init__(model, options, rows, wanted)
        self._targets = targets
        self._embedded = model.model.embed_tokens(mx.array(inputs)[None])
        self._masks = model.model.masks(self._embedded, [None] * len(options))
        self._rotate = model.layers[0].self_attn.rotation(len(inputs), None)

    def root(self) -> mx.array:
        return self._embedded

    def branches(self, depth: int, h: mx.array) -> Branches:
        layer = self.model.layers[depth]
        return Branches(layer, h, self._masks[layer.use_sliding], self._rotate)

    def leaves(self, h: mx.array) -> Losses:
        return token_losses(self.model.head(self.model.model.norm(h)), self._targets)
