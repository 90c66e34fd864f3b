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

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers
from duo_mlx.routes import Route, Routes
from duo_mlx.study.losses import Losses, token_losses

Options = Sequence[Sequence[Route]]


@dataclass
class Work:
    """How many times a module was evaluated on one sequence, or on one token."""

    attention: int = 0
    ffn: int = 0
    head: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.attention + other.attention, self.ffn + other.ffn, self.head + other.head)


def layer_options(model: Model, choices: Sequence[Route]) -> list[tuple[Route, ...]]:
    """The routes of each layer among ``choices``; a layer has no small beside what small means there."""
    ordered = sorted(set(choices))

    def options(small: Route) -> tuple[Route, ...]:
        again = small is not Route.SMALL and small in ordered
        return tuple(route for route in ordered if not (again and route is Route.SMALL))

    return [options(model.config.small_means(layer)) for layer in range(model.config.num_hidden_layers)]


class Walk(ABC):
    """The walk; a subclass says what a node is.

    Args:
        model: a Duo.
        options: each layer's routes.
        rows: patterns of one batch at most, which bounds the memory.
        wanted: of patterns' beginnings ``[n, depth]``, which to evaluate; None: all.
    """

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
    def layers(self) -> OpenLayers:
        """The model's layers as they are called over the nodes."""

    @abstractmethod
    def leaves(self, logits: mx.array) -> Losses:
        """Losses ``[n, tokens]`` of logits ``[n, tokens, vocab]``."""

    def losses(self) -> Iterator[tuple[Routes, Losses]]:
        """Patterns ``[n, layers]`` and their losses ``[n, tokens]`` in nats, batch by batch."""
        self._layers = self.layers()
        yield from self._below(self._layers.root, np.zeros((1, 0), np.uint8))

    def _below(self, h: mx.array, begun: Routes) -> Iterator[tuple[Routes, Losses]]:
        depth = begun.shape[1]
        if depth == len(self._options):
            self.work.head += len(begun)
            yield begun, self.leaves(self._layers.logits(h))
            return
        self.work.attention += len(begun)
        wanted, patterns = {}, []
        for route in self._options[depth]:
            longer = np.concatenate([begun, np.full((len(begun), 1), route, np.uint8)], axis=1)
            kept = np.arange(len(begun)) if self._wanted is None else np.flatnonzero(self._wanted(longer))
            if not len(kept):
                continue
            self.work.ffn += 0 if route is Route.SKIP else len(kept)
            wanted[route] = kept
            patterns.append(longer[kept])
        if not wanted:
            return
        children, longer = self._layers.children(depth, h, wanted), np.concatenate(patterns)
        mx.eval(children)
        del h
        for start in range(0, len(longer), self._rows):
            yield from self._below(children[start : start + self._rows], longer[start : start + self._rows])


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
        self._inputs, self._targets = mx.array(inputs)[None], targets

    def layers(self) -> OpenLayers:
        return OpenLayers(self.model, self._inputs)

    def leaves(self, logits: mx.array) -> Losses:
        return token_losses(logits, self._targets)
