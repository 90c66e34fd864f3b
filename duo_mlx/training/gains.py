"""A router that learns what big is worth: in nats, for each token and layer, from passes alone.

Two passes read the same text, each with routes of its own, drawn at random. What the losses of a token differ by is
what its routes differ by: the router's logits are fitted, by least squares, to be the parts that add up to it,

    loss(b) - loss(a)  =  sum over layers of  logit(a's route) - logit(b's route).

So the difference of a layer's two logits is an estimate of big's gain there, averaged over what other layers do.
Nothing has to go backwards through the model. A budget is met by the threshold that the gains are compared with, one
for all layers, and any budget by the same router (`duo_mlx.threshold`).

What a layer is worth depends on the routes around it. With ``explore`` below 1 only that share of a pass's routes is
drawn; the others are the router's own, as it chooses after a first pass: of a sequence's tokens and layers those with
the largest gains take big, as many as the budget allows.

The loss is that of the true next token or, with ``target: big``, its mean over the next tokens that all big expects:
the same gain on average if all big were right, without the luck of which token came.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx.model import Model
from duo_mlx.routed import ask
from duo_mlx.routes import Route, Routes
from duo_mlx.training.routers import RouterLearns
from duo_mlx.training.routing import VALIDATION
from duo_mlx.training.stage import Drawn, randomness

TARGETS = ("text", "big")


@dataclass(frozen=True)
class Gains(RouterLearns):
    """Args beside those of `RouterLearns`:

    target: whose next tokens count, one of `TARGETS`.
    explore: the share of routes that are drawn.
    """

    target: str
    explore: float = 1.0

    columns: ClassVar[tuple[str, ...]] = ("hard", "share", "squared_error", "explained")
    text_losses: ClassVar[tuple[str, ...]] = ("hard",)

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        """Two passes' routes ``[2, length, layers]``, and which of them count if not all do.

        They are big with the budget's probability, else any other choice.
        """
        big = random.random((2, length, self.layers)) < self.budget
        others = np.array([choice for choice in self.choices if choice != Route.BIG], np.uint8)
        drawn = {"routes": np.where(big, np.uint8(Route.BIG), random.choice(others, big.shape))}
        return drawn if self.explore == 1 else drawn | {"explored": random.random(big.shape) < self.explore}

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        wanted, found = self._differences(model, windows, self.chosen(model, windows, drawn))
        return mx.square(wanted - found).mean(axis=-1)

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """``explained`` is the share of the differences' squares that the router explains."""
        length = windows.shape[1] - 1
        drawn = [self.draw(randomness(self.seed, VALIDATION, first + row), length, 0) for row in range(len(windows))]
        together = {name: np.stack([each[name] for each in drawn]) for name in drawn[0]}
        wanted, found = self._differences(model, windows, self.chosen(model, windows, together))
        missed, whole = (mx.square(each).mean(axis=-1) for each in (wanted - found, wanted))
        return self.hard(model, windows) | {"squared_error": missed, "explained": 1 - missed / whole}

    def chosen(self, model: Model, windows: mx.array, drawn: Drawn) -> Routes:
        """Both passes' routes ``[sequences, 2, length, layers]``: the drawn ones, and the router's own elsewhere."""
        routes = drawn["routes"]
        if "explored" not in drawn:
            return routes
        _, said = ask(model, windows[:, :-1], routes[:, 0])
        big = mx.array(self.choices) == Route.BIG
        others = mx.where(big, -mx.inf, said)
        gains = said[..., self.choices.index(Route.BIG)] - others.max(axis=-1)
        ranked = mx.sort(gains.reshape(len(routes), -1), axis=-1)
        least = ranked[:, int((1 - self.budget) * ranked.shape[1]), None, None]
        own = mx.where(gains >= least, int(Route.BIG), mx.array(self.choices)[mx.argmax(others, axis=-1)])
        return np.where(drawn["explored"], routes, np.array(mx.stop_gradient(own), np.uint8)[:, None])

    def _differences(self, model: Model, windows: mx.array, routes: Routes) -> tuple[mx.array, mx.array]:
        """What two passes' losses differ by, and what the router says, ``[sequences, length]``."""
        tokens = windows[:, :-1]
        expected = self._expected(model, windows)
        losses, sums = [], []
        for which in range(2):
            logits, said = ask(model, tokens, routes[:, which])
            logits = logits.astype(mx.float32)
            losses.append(mx.logsumexp(logits, axis=-1) - expected(logits))
            sums.append((said * self.one_hot(mx.array(routes[:, which]))).sum(axis=(-2, -1)))
        return mx.stop_gradient(losses[1] - losses[0]), sums[0] - sums[1]

    def _expected(self, model: Model, windows: mx.array) -> Callable[[mx.array], mx.array]:
        """What gives the logit of the next token, or its mean over those that all big expects."""
        if self.target == "text":
            return lambda logits: mx.take_along_axis(logits, windows[:, 1:, None], axis=-1)[..., 0]
        big = model(windows[:, :-1], routes=[Route.BIG] * self.layers).astype(mx.float32)
        weights = mx.stop_gradient(mx.softmax(big, axis=-1))
        return lambda logits: (weights * logits).sum(axis=-1)
