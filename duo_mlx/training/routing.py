"""Stage 1 of Duo-LLM: random routing (arXiv 2410.10846, section "Stage 1").

In every layer each token is sent to the big FFN, the small one or past both, at random. No router is trained here: it
would bias the small FFNs. The paper draws big and small with 0.5 each and never skips; ``skip`` (so that skipping works
afterwards) and ``whole_big``, the share of sequences that take big everywhere, go beyond it.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx.model import Model
from duo_mlx.policies import RandomPolicy
from duo_mlx.routes import Route, Routes
from duo_mlx.training.passes import Passes, cross_entropy
from duo_mlx.training.stage import Drawn, module_of, randomness

UNIFORM = {"big": Route.BIG, "random": None, "small": Route.SMALL, "skip": Route.SKIP}  # None: random routing
VALIDATION = 1  # where random numbers of validation are, beside those of training


@dataclass(frozen=True)
class RandomRouting:
    """All of a Duo learns but its routers, and an FFN that no route leads to.

    Args:
        layers: the model's.
        big, small, skip: probabilities.
        whole_big: share of sequences that take big everywhere.
        seed: of the routes of validation.
        passes: how passes are made.
    """

    layers: int
    big: float = 0.5
    small: float = 0.5
    skip: float = 0.0
    whole_big: float = 0.0
    seed: int = 0
    passes: Passes = field(default_factory=Passes)

    columns: ClassVar[tuple[str, ...]] = tuple(UNIFORM)
    text_losses: ClassVar[tuple[str, ...]] = tuple(UNIFORM)

    def learns(self, name: str) -> bool:
        used = {"small": self.small > 0, "big": self.big > 0 or self.whole_big > 0, "router": False}
        return used.get(module_of(name), True)

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        routes = self._routes(random, length)
        if random.random() < self.whole_big:
            routes[:] = Route.BIG
        return {"routes": routes, "keys": self.passes.keys(random, self.layers)}

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        logits = self.passes.logits(model, windows[:, :-1], drawn["routes"], drawn["keys"])
        return cross_entropy(logits, windows[:, 1:])

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """The loss by route: one for all layers, and random routing."""
        count, length = windows.shape[0], windows.shape[1] - 1
        drawn = np.stack([self._routes(randomness(self.seed, VALIDATION, first + row), length) for row in range(count)])
        return {
            name: cross_entropy(
                model(windows[:, :-1], routes=drawn if route is None else [route] * self.layers), windows[:, 1:]
            )
            for name, route in UNIFORM.items()
        }

    def _routes(self, random: np.random.Generator, length: int) -> Routes:
        seed = int(random.integers(1 << 63))
        return RandomPolicy(self.layers, self.big, self.small, self.skip, seed).routes(0, length)[0]
