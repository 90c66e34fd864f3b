"""Stage 3 of Duo-LLM: routers that learn as a mixture (arXiv 2410.10846, section "Stage 3").

A layer adds the sum of its modules' outputs, each weighted by the softmax of the router's logits over a temperature
that falls, so that in the end one module has all the weight. The loss is the text's plus alpha times the square of how
far the mean probability of big, over a sequence and all layers, is from the budget. Alpha and schedule are open in the
paper; here the temperature falls geometrically.

What is *straight-through* computes with the largest weight set to one and takes the softmax's gradient (Bengio et al.,
arXiv 1308.3432); *gumbel* does so after adding Gumbel noise to the logits (Jang et al., arXiv 1611.01144).
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx.ffn import DuoFFN
from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.training.passes import cross_entropy
from duo_mlx.training.routers import RouterLearns
from duo_mlx.training.stage import Drawn

WEIGHTS = ("soft", "straight-through", "gumbel")


@dataclass(frozen=True)
class Mixture(RouterLearns):
    """Args beside those of `RouterLearns`:

    steps: of training.
    alpha: of the budget's term, in nats.
    temperatures: of the first and of the last step.
    weights: how a layer weighs its modules, one of `WEIGHTS`.
    """

    steps: int
    alpha: float
    temperatures: tuple[float, float]
    weights: str

    columns: ClassVar[tuple[str, ...]] = ("hard", "soft", "share", "soft_share")
    text_losses: ClassVar[tuple[str, ...]] = ("hard", "soft")

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        """The step's temperature, and the keys of the noise."""
        first, last = self.temperatures
        return {
            "temperature": np.array(first * (last / first) ** (step / max(1, self.steps - 1)), np.float32),
            "keys": random.integers(1 << 32, size=(self.layers, 2), dtype=np.uint32),
        }

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        logits, shares = self._pass(model, windows, drawn["temperature"], self.weights, drawn["keys"])
        return cross_entropy(logits, windows[:, 1:]) + self.alpha * mx.square(shares - self.budget)

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:  # noqa: ARG002
        """By the router's own routes, and by the mixture at the last temperature."""
        last = np.full(len(windows), self.temperatures[1], np.float32)
        logits, shares = self._pass(model, windows, last, "soft")
        return self.hard(model, windows) | {"soft": cross_entropy(logits, windows[:, 1:]), "soft_share": shares}

    def _pass(
        self,
        model: Model,
        windows: mx.array,
        temperature: np.ndarray,
        how: str,
        keys: np.ndarray | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Logits, and the mean probability of big ``[sequences]``."""
        big = self.choices.index(Route.BIG)
        cooled = mx.array(temperature)[:, None, None]

        def weigh(ffn: DuoFFN, x: mx.array) -> tuple[mx.array, mx.array]:
            logits = ffn.router(x)  # the layer's, so that one that is computed twice has its gradient
            probabilities = mx.softmax(logits / cooled, axis=-1)
            share = probabilities[..., big].mean(axis=-1)
            if how == "gumbel":
                assert keys is not None
                noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[1:], key=key))(mx.array(keys[:, ffn.index]))
                probabilities = mx.softmax((logits + noise) / cooled, axis=-1)
            if how == "soft":
                return probabilities.astype(x.dtype), share
            fixed = mx.stop_gradient(probabilities)
            taken = self.one_hot(mx.array(self.choices)[mx.argmax(fixed, axis=-1)])
            return (taken - fixed + probabilities).astype(x.dtype), share

        logits, shares = self.passes.mixture(model, windows[:, :-1], self.choices, weigh)
        return logits, shares.mean(axis=0)
