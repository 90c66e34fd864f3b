"""The small FFNs of a grafted model learn beside the rest, which stays as it is.

Three objectives. ``lm``: the loss on the text under random routing, as in stage 1. ``distill``: all big's predictions
under random routing (`duo_mlx.training.distill`). ``draft``: what speculative decoding
wants of a draft, the next-token distribution that all big has. A draft reads keys and values that all big wrote when
it verified the text so far: each token of a text is a first draft after those before it (`duo_mlx.beside`). The loss is
the mean Kullback-Leibler divergence from all big's distribution to the draft's, both over the tokens that drafts choose
from (``draft_vocabulary``).

Texts are given, not generated ("teacher forced"); those that all big has written itself (`duo_mlx.training.continued`)
are what it will draft for. What is left aside: a round's later drafts also read keys and values of drafts.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import mlx.core as mx
import numpy as np

from duo_mlx import beside
from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.sampling import Sampling
from duo_mlx.training.routing import UNIFORM, RandomRouting
from duo_mlx.training.stage import Drawn, module_of

NUMBER = re.compile(r"\.(\d+)\.")  # of the layer in a weight's name, such as model.layers.3.mlp.small.up_proj.weight


@dataclass(frozen=True)
class SmallLearns(RandomRouting):
    """Random routing, in which nothing but the small FFNs learns."""

    def learns(self, name: str) -> bool:
        return module_of(name) == "small"


@dataclass(frozen=True)
class Draft(SmallLearns):
    """Distilling of all big into a draft's pattern.

    Args:
        pattern: the draft's routes, one a layer.
    """

    pattern: tuple[int, ...] = ()

    columns: ClassVar[tuple[str, ...]] = (*UNIFORM, "kl", "accepted", "greedy")

    def learns(self, name: str) -> bool:
        layer = NUMBER.search(name)
        return super().learns(name) and layer is not None and self.pattern[int(layer[1])] == Route.SMALL

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        return {"keys": self.passes.keys(random, self.layers)}

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        tokens = windows[:, :-1]
        big, caches = self._verified(model, tokens)
        pattern = np.array(self.pattern, np.uint8)
        draft = self.passes.logits(model, tokens, pattern, drawn["keys"], caches, model.draft_head())
        return divergence(big, draft).mean(axis=-1)

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """The loss by route; the divergence ``kl``, and the shares of drafted tokens that all big would accept.

        ``accepted`` is the probability with which a token that is sampled from the draft's distribution is accepted
        (Leviathan et al., arXiv 2211.17192), ``greedy`` how often the likeliest token is the same.
        """
        tokens = windows[:, :-1]
        big, caches = self._verified(model, tokens)
        draft = model(tokens, caches, routes=list(self.pattern))[..., : model.config.draft_vocabulary].astype(
            mx.float32
        )
        return super().measure(model, windows, first) | {
            "kl": divergence(big, draft).mean(axis=-1),
            "accepted": Sampling(1.0).acceptance(draft, big).mean(axis=-1),
            "greedy": Sampling().acceptance(draft, big).mean(axis=-1),
        }

    def _verified(self, model: Model, tokens: mx.array) -> tuple[mx.array, list[beside.Beside]]:
        """All big's logits ``[sequences, length, vocab]``, to which no gradient goes, and caches for drafts."""
        caches = beside.verifying(self.layers)
        big = model(tokens, caches, routes=[Route.BIG] * self.layers).astype(mx.float32)
        return mx.stop_gradient(big), beside.drafting(caches)


def divergence(p: mx.array, q: mx.array) -> mx.array:
    """Return KL(p || q) in nats of two distributions over the tokens of q, given by logits ``[..., vocab]``."""
    p = p[..., : q.shape[-1]]
    total_p, total_q = (mx.logsumexp(each, axis=-1) for each in (p, q))
    return (mx.exp(p - total_p[..., None]) * (p - q)).sum(axis=-1) - total_p + total_q
