"""The small FFNs of a grafted model learn beside the rest, which stays as it is.

Two objectives. ``lm``: the loss on the text under random routing, as in stage 1. ``draft``: what speculative decoding
wants of a draft, the next-token distribution that all big has. A draft reads keys and values that all big wrote when it
verified the text so far, so a sequence's tokens take big up to a random place, and the draft's pattern from there; the
loss is the mean Kullback-Leibler divergence from all big's distribution to the draft's over the tokens from that place
on. Texts are given, not generated ("teacher forced"). What is left aside: a draft is a few tokens long, here it goes on
to the window's end.
"""

from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes
from duo_mlx.sampling import Sampling
from duo_mlx.training.routing import UNIFORM, VALIDATION, RandomRouting
from duo_mlx.training.stage import Drawn, randomness


@dataclass(frozen=True)
class SmallLearns(RandomRouting):
    """Random routing, in which nothing but the small FFNs learns."""

    def learns(self, name: str) -> bool:
        return ".mlp.small." in name


@dataclass(frozen=True)
class Draft(SmallLearns):
    """Distilling of all big into a draft's pattern.

    Args:
        pattern: the draft's routes, one a layer.
    """

    pattern: tuple[int, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (*UNIFORM, "kl", "accepted")

    def learns(self, name: str) -> bool:
        return super().learns(name) and self.pattern[int(name.split(".")[2])] == Route.SMALL  # model.layers.N.mlp ...

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        start = int(random.integers(length))
        return {
            "routes": self._after(start, length),
            "drafted": np.arange(length) >= start,
            "keys": self.passes.keys(random, self.layers),
        }

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        tokens = windows[:, :-1]
        draft = self.passes.logits(model, tokens, drawn["routes"], drawn["keys"])
        return _mean(_divergence(mx.stop_gradient(self._big(model, tokens)), draft), drawn["drafted"])

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """The loss by route; the divergence ``kl``, and the share of drafted tokens that all big ``accepted``.

        The probability with which a token that is sampled from the draft's distribution is accepted (Leviathan et al.,
        arXiv 2211.17192).
        """
        tokens, length = windows[:, :-1], windows.shape[1] - 1
        drawn = [self.draw(randomness(self.seed, VALIDATION, first + row), length, 0) for row in range(len(windows))]
        routes, drafted = (np.stack([each[name] for each in drawn]) for name in ("routes", "drafted"))
        big, draft = self._big(model, tokens), model(tokens, routes=routes).astype(mx.float32)
        return super().measure(model, windows, first) | {
            "kl": _mean(_divergence(big, draft), drafted),
            "accepted": _mean(Sampling(1.0).acceptance(draft, big), drafted),
        }

    def _big(self, model: Model, tokens: mx.array) -> mx.array:
        return model(tokens, routes=[Route.BIG] * self.layers).astype(mx.float32)

    def _after(self, start: int, length: int) -> Routes:
        routes = np.full((length, self.layers), Route.BIG, np.uint8)
        routes[start:] = self.pattern
        return routes


def _divergence(p: mx.array, q: mx.array) -> mx.array:
    """KL(p || q) in nats of two distributions given by logits ``[..., vocab]``."""
    log_p, log_q = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (p, q))
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _mean(values: mx.array, where: np.ndarray) -> mx.array:
    """The mean of each row's ``values [sequences, length]`` at the places that count."""
    weights = mx.array(where / where.sum(axis=-1, keepdims=True), mx.float32)
    return (values * weights).sum(axis=-1)
