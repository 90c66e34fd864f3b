"""The oracle of one text: for each token the pattern with the lowest loss on the true next token.

The method is Duo-LLM's (arXiv 2410.10846, stage 2), in the reading *shared*: a pass over the text for each pattern,
then a minimum for each token. A loss that was chosen by looking at it is biased downward, the more patterns it was
chosen from: `Found` counts them, and keeps minima over fewer patterns to compare with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes
from duo_mlx.study.limits import Limit
from duo_mlx.study.tree import Losses, Options, Text, Work, token_losses


def every(options: Options) -> Routes:
    """All patterns ``[n, layers]``, in the order of their numbers."""
    return np.array(list(product(*options)), np.uint8)


def numbers(patterns: Routes, options: Options) -> NDArray[np.int64]:
    """The places of patterns ``[n, layers]`` in `every`."""
    found = np.zeros(len(patterns), np.int64)
    for column, routes in zip(patterns.T, options, strict=True):
        digits = np.full(len(Route), -1)
        digits[list(routes)] = range(len(routes))
        found = found * len(routes) + digits[column]
    return found


class Cheapest:
    """How ties are broken: fewer bytes first, then the lower route in the first layer that differs."""

    def __init__(self, model: Model):
        self._table = cost.weight_bytes(model)

    def order(self, patterns: Routes) -> NDArray[np.int64]:
        """The rank of each of the patterns ``[n, layers]``; no two are equal."""
        found = np.lexsort((*patterns.T[::-1], self._table.of(patterns)))
        ranks = np.empty(len(patterns), np.int64)
        ranks[found] = range(len(patterns))
        return ranks


@dataclass
class Best:
    """The lowest loss of each token among the patterns that were offered, and which pattern it was."""

    loss: Losses
    number: NDArray[np.int64]  # of the pattern in `every`
    rank: NDArray[np.int64]
    seen: NDArray[np.int64]  # patterns that were offered

    @classmethod
    def of(cls, tokens: int) -> "Best":
        """Nothing was offered yet."""
        return cls(np.full(tokens, np.inf, np.float32), *(np.zeros(tokens, np.int64) for _ in range(3)))

    def offer(
        self, losses: Losses, number: NDArray[np.int64], rank: NDArray[np.int64], allowed: NDArray[np.bool_]
    ) -> None:
        """Take what is better, or equal and of a lower rank.

        Args:
            losses: nats ``[n, tokens]``.
            number, rank: of the patterns ``[n]``, in the order of their ranks.
            allowed: ``[n, tokens]``, or ``[n, 1]`` if it is the same for all tokens.
        """
        allowed = np.broadcast_to(allowed, losses.shape)
        losses = np.where(allowed, losses, np.float32(np.inf))
        chosen = losses.argmin(axis=0)
        found = losses[chosen, np.arange(losses.shape[1])]
        better = (found < self.loss) | (np.isfinite(found) & (found == self.loss) & (rank[chosen] < self.rank))
        self.loss = np.where(better, found, self.loss)
        self.number = np.where(better, number[chosen], self.number)
        self.rank = np.where(better, rank[chosen], self.rank)
        self.seen += allowed.sum(axis=0)


@dataclass
class Found:
    """What was found on one text of so many tokens."""

    best: dict[str, Best]  # by limit, and by subset
    uniform: dict[Route, Losses]  # all big, all small, all skip
    means: NDArray[np.float64]  # mean loss of each pattern, by number
    work: Work
    peak_bytes: int


def exhaustive(
    model: Model,
    inputs: NDArray[np.integer],
    targets: NDArray[np.integer],
    options: Options,
    limits: Sequence[Limit],
    subsets: Mapping[str, NDArray[np.bool_]],
    rows: int,
) -> Found:
    """Search all patterns over ``options`` on one text.

    Args:
        model: a Duo.
        inputs: ids ``[tokens]``.
        targets: the true next tokens ``[tokens]``.
        options: each layer's routes.
        limits: what tokens may spend; each has an answer of its own.
        subsets: of all patterns, by name; the best of each is found, too.
        rows: texts of one batch, which bounds the memory.
    """
    tokens = len(inputs)
    patterns = every(options)
    ranks = Cheapest(model).order(patterns)
    allowed = {limit.name: limit.allows(patterns, tokens) for limit in limits}
    allowed |= {name: chosen[:, None] for name, chosen in subsets.items()}
    best = {name: Best.of(tokens) for name in allowed}
    means = np.full(len(patterns), np.nan)
    tree = Text(model, inputs, targets, options, rows)
    mx.reset_peak_memory()
    for found, losses in tree.losses():
        number = numbers(found, options)
        by_rank = np.argsort(ranks[number])
        number, losses = number[by_rank], losses[by_rank]
        means[number] = losses.mean(axis=1, dtype=np.float64)
        for name, each in best.items():
            each.offer(losses, number, ranks[number], allowed[name][number])
    peak = mx.get_peak_memory()
    uniform = {route: uniform_losses(model, inputs, targets, route) for route in Route}
    return Found(best, uniform, means, tree.work, peak)


def uniform_losses(model: Model, inputs: NDArray[np.integer], targets: NDArray[np.integer], route: Route) -> Losses:
    """Nats ``[tokens]`` under one route in every layer."""
    pattern = np.full(model.args.num_hidden_layers, route, np.uint8)
    logits = model(mx.array(inputs)[None], routes=pattern).astype(mx.float32)
    return np.array(token_losses(logits, mx.array(targets))[0])
