"""Small FFNs learn to say what big would have led to: distilling of all big into routed passes.

The loss is the mean Kullback-Leibler divergence from the next-token distribution of all big to that of a routed pass
over the same text. Each sequence has its own share of big, so that the small FFNs get used to every budget, and every
other sequence has one pattern for all of its tokens, since fixed patterns are what many models are used with.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx.model import Model
from duo_mlx.policies import RandomPolicy
from duo_mlx.routes import Route
from duo_mlx.training.routing import UNIFORM, VALIDATION
from duo_mlx.training.small import SmallLearns, divergence
from duo_mlx.training.stage import Drawn, randomness


@dataclass(frozen=True)
class Distill(SmallLearns):
    """Args as of `RandomRouting`; ``big`` is the mean of the sequences' shares of big, which are drawn evenly."""

    columns: ClassVar[tuple[str, ...]] = (*UNIFORM, "kl", "greedy")

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        big = self.big + min(self.big, 1 - self.big) * (2 * random.random() - 1)
        rest = self.small + self.skip
        shares = big, (1 - big) * self.small / rest, (1 - big) * self.skip / rest
        routes = RandomPolicy(self.layers, *shares, int(random.integers(1 << 63))).routes(0, length)[0]
        if random.random() < 0.5:
            routes[:] = routes[:1]
        return {"routes": routes, "keys": self.passes.keys(random, self.layers)}

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        tokens = windows[:, :-1]
        routed = self.passes.logits(model, tokens, drawn["routes"], drawn["keys"])
        return divergence(self._wanted(model, tokens), routed).mean(axis=-1)

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """The losses by route; of random routing ``kl``, the divergence, and how often the likeliest token is big's."""
        tokens = windows[:, :-1]
        count, length = tokens.shape
        drawn = np.stack([self._routes(randomness(self.seed, VALIDATION, first + row), length) for row in range(count)])
        wanted, routed = self._wanted(model, tokens), model(tokens, routes=drawn).astype(mx.float32)
        return super().measure(model, windows, first) | {
            "kl": divergence(wanted, routed).mean(axis=-1),
            "greedy": (wanted.argmax(axis=-1) == routed.argmax(axis=-1)).mean(axis=-1),
        }

    def _wanted(self, model: Model, tokens: mx.array) -> mx.array:
        """All big's logits, to which no gradient goes."""
        return mx.stop_gradient(model(tokens, routes=[Route.BIG] * self.layers).astype(mx.float32))
