"""The best fixed patterns of a model: what each layer's big FFN is worth, and which to give up first.

`measure` starts from all big and goes down, one move a step: a layer's big becomes small or skip, or its small becomes
skip. It takes the move that costs least loss for each byte that it saves. Prices change with every step, so the
cheapest moves are measured anew on the pattern as it is until one of them is the cheapest of all (lazy greedy search);
a list sorted once by each layer's own price would not see that layers which compensate each other cannot both go.

A pass is resumed at the first layer that changed, from the hidden states of the layers before it. The search, which
takes many passes, has one part of the text; the losses of the patterns that it found are those of the other part, where
nothing is flattered by having been chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx import cost
from duo_mlx.budget import shares_of_bytes
from duo_mlx.model import KnownPattern, Model
from duo_mlx.open_layers import OpenLayers
from duo_mlx.routes import Route, format_pattern
from duo_mlx.study.losses import token_losses

LOWER = {Route.BIG: (Route.SMALL, Route.SKIP), Route.SMALL: (Route.SKIP,), Route.SKIP: ()}
REMEASURED = 4  # prices measured anew in a step before the cheapest of them is taken
SEARCH = 0.8  # of the time that measuring takes
LEAST = 256  # tokens: a text with fewer in a half of its windows is searched and measured as a whole


class PatternLoss:
    """Mean next-token loss in nats of fixed patterns on the same windows ``[windows, tokens + 1]``."""

    def __init__(self, model: Model, windows: mx.array):
        self.model = model
        self.targets = np.array(windows[:, 1:])
        self.pattern = np.full(model.config.num_hidden_layers, Route.BIG, np.uint8)
        self._layers = OpenLayers(model, windows[:, :-1])
        self._states = [self._layers.root]  # the input of each layer, and the last one's output, under `pattern`
        self.passes = 0
        self._tried: tuple[int, Route] | None = None  # the last move that was tried on `pattern`, and its outcome
        self._outcome: tuple[float, list[mx.array]] = (0.0, [])
        self.loss = self.move(0, Route.BIG)

    def try_move(self, layer: int, route: Route) -> float:
        """The loss of `pattern` with ``route`` in ``layer``."""
        self._tried, self._outcome = (layer, route), self._run(layer, route)
        return self._outcome[0]

    def move(self, layer: int, route: Route) -> float:
        """Change `pattern`, and give its loss."""
        if self._tried != (layer, route):
            self.try_move(layer, route)
        self.loss, self._states[layer + 1 :] = self._outcome
        self.pattern[layer] = route
        self._tried = None
        return self.loss

    def _run(self, first: int, route: Route) -> tuple[float, list[mx.array]]:
        self.passes += 1
        h, states = self._states[first], []
        for index in range(first, len(self.model.layers)):
            h = self._layers.run(index, h, route if index == first else Route(int(self.pattern[index])))
            mx.eval(h)
            states.append(h)
        total = 0.0
        for row, targets in zip(h, self.targets, strict=True):
            total += float(token_losses(self._layers.logits(row[None]), targets).sum(dtype=np.float64))
        return total / self.targets.size, states


@dataclass(frozen=True)
class Measurement:
    """What `measure` found, losses in nats a token."""

    loss: float  # all big, on the same text as those of `small` and `skip`
    small: list[float | None]  # by layer: the loss with small there alone; None where there is no small
    skip: list[float]  # by layer: the loss with skip there alone
    patterns: list[KnownPattern]  # from all big downward
    bytes: list[float]  # of each pattern: weight bytes a token over all-big's
    passes: int
    tokens: int

    def record(self) -> dict[str, Any]:
        """The same as JSON keys."""
        known = [dict(pattern) | {"bytes": share} for pattern, share in zip(self.patterns, self.bytes, strict=True)]
        return {
            "tokens": self.tokens,
            "passes": self.passes,
            "loss": {"big": self.loss, "small_in_one_layer": self.small, "skip_in_one_layer": self.skip},
            "patterns": known,
        }


def measure(model: Model, windows: mx.array, progress: Callable[[float], None] = lambda _: None) -> Measurement:
    """Each layer's sensitivity to small and to skip, and the best patterns from all big down to no big at all.

    Args:
        model: its weights as they will be used.
        windows: token ids ``[windows, tokens + 1]``; every window is a text of its own.
        progress: is called with the share that is done.
    """
    layers = model.config.num_hidden_layers
    half = len(windows) // 2
    apart = half * (windows.shape[1] - 1) >= LEAST
    loss = PatternLoss(model, windows[:half] if apart else windows)

    def searched(share: float) -> None:
        progress(share * (SEARCH if apart else 1))

    alone: dict[tuple[int, Route], float] = {}
    for layer in range(layers):
        for route in LOWER[Route.BIG]:
            if route is not Route.SMALL or model.config.has_small(layer):
                alone[layer, route] = loss.try_move(layer, route)
        searched((layer + 1) / (2 * layers))
    big = loss.loss
    search = _Search(model, loss, alone)
    found, losses, moves = [loss.pattern.copy()], [loss.loss], []
    while move := search.step():
        moves.append(move)
        found.append(loss.pattern.copy())
        losses.append(loss.loss)
        searched(1 - (loss.pattern == Route.BIG).sum() / (2 * layers))
    passes, tokens = loss.passes, loss.targets.size
    if apart:
        other = PatternLoss(model, windows[half:])
        losses = [other.loss]
        for number, move in enumerate(moves, 1):
            losses.append(other.move(*move))
            progress(SEARCH + (1 - SEARCH) * number / len(moves))
        passes, tokens = passes + other.passes, tokens + other.targets.size
    return Measurement(
        loss=big,
        small=[alone.get((layer, Route.SMALL)) for layer in range(layers)],
        skip=[alone[layer, Route.SKIP] for layer in range(layers)],
        patterns=[
            KnownPattern(pattern=format_pattern(pattern), loss=value)
            for pattern, value in zip(found, losses, strict=True)
        ],
        bytes=shares_of_bytes(model, np.stack(found)).tolist(),
        passes=passes,
        tokens=tokens,
    )


class _Search:
    """The prices of all moves that save bytes, as last measured: loss for each share of all-big's that is saved."""

    def __init__(self, model: Model, loss: PatternLoss, alone: dict[tuple[int, Route], float]):
        table = cost.weight_bytes(model)
        self.bytes = table.by_route / table.of(loss.pattern)
        self.loss = loss
        self.increase: dict[tuple[int, Route, Route], float] = {}  # by layer, route before and route after
        for (layer, route), value in alone.items():
            if self.bytes[layer, route] >= self.bytes[layer, Route.BIG]:
                continue  # a small that is no smaller
            self.increase[layer, Route.BIG, route] = value - loss.loss
            if route is Route.SMALL:
                self.increase[layer, Route.SMALL, Route.SKIP] = alone[layer, Route.SKIP] - value

    def _price(self, move: tuple[int, Route, Route]) -> float:
        layer, before, after = move
        return float(self.increase[move] / (self.bytes[layer, before] - self.bytes[layer, after]))

    def step(self) -> tuple[int, Route] | None:
        """Make the cheapest move and say which; None when no layer is big any more."""
        pattern = self.loss.pattern
        if not (pattern == Route.BIG).any():
            return None
        moves = [move for move in self.increase if move[1] == pattern[move[0]]]
        fresh: list[tuple[int, Route, Route]] = []
        while (best := min(moves if len(fresh) < REMEASURED else fresh, key=self._price)) not in fresh:
            self.increase[best] = self.loss.try_move(best[0], best[2]) - self.loss.loss
            fresh.append(best)
        self.loss.move(best[0], best[2])
        return best[0], best[2]
