"""The oracle: for each token of a text the pattern with the lowest loss on the true next token.

The method is Duo-LLM's (arXiv 2410.10846, stage 2), which leaves open what earlier tokens' keys and values are while
the patterns of a token are compared. `shared`: one pass over the text for each pattern, then a minimum for each token;
what is found is no sequence that could be generated. `committed`: from left to right, after what was chosen before.

A loss that was chosen by looking at it is biased downward, the more patterns it was chosen from: `Best` counts them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes
from duo_mlx.study.limits import Limit
from duo_mlx.study.losses import Losses, entropies, token_losses
from duo_mlx.study.tree import Options, Text, Walk, Work


class Space:
    """All patterns over the routes of each layer, with numbers and ranks.

    Ties between patterns of equal loss go to the lower rank: fewer bytes, then the lower route in the first layer that
    differs.

    Args:
        model: a Duo.
        options: each layer's routes.
    """

    def __init__(self, model: Model, options: Options):
        self.options = options
        self.patterns: Routes = np.array(list(product(*options)), np.uint8)  # [n, layers], by number
        order = np.lexsort((*self.patterns.T[::-1], cost.weight_bytes(model).of(self.patterns)))
        self.ranks = np.empty(len(order), np.int64)
        self.ranks[order] = range(len(order))

    def numbers(self, patterns: Routes) -> NDArray[np.int64]:
        """The numbers of patterns ``[n, layers]``."""
        found = np.zeros(len(patterns), np.int64)
        for column, routes in zip(patterns.T, self.options, strict=True):
            digits = np.full(len(Route), -1)
            digits[list(routes)] = range(len(routes))
            found = found * len(routes) + digits[column]
        return found


@dataclass
class Chosen:
    """Each token's best pattern, and what it was chosen from."""

    loss: Losses  # nats [tokens]
    patterns: Routes  # [tokens, layers]
    seen: NDArray[np.int64]  # patterns within its limit that each token was offered


@dataclass
class Best:
    """The lowest loss of each token among the patterns that were offered, and which pattern it was."""

    loss: Losses
    number: NDArray[np.int64]  # of the pattern in its `Space`
    rank: NDArray[np.int64]
    seen: NDArray[np.int64]  # patterns that were offered

    @classmethod
    def of(cls, tokens: int) -> "Best":
        """Nothing was offered yet."""
        return cls(np.full(tokens, np.inf, np.float32), *(np.zeros(tokens, np.int64) for _ in range(3)))

    def chosen(self, space: Space) -> Chosen:
        """What was found; ``space``: whose numbers these are."""
        return Chosen(self.loss, space.patterns[self.number], self.seen)

    def offer(self, losses: Losses, number: NDArray[np.int64], space: Space, allowed: NDArray[np.bool_]) -> None:
        """Take what is better, or equal and of a lower rank.

        Args:
            losses: nats ``[n, tokens]``.
            number: of the patterns ``[n]``.
            space: whose numbers these are.
            allowed: ``[n, tokens]``, or ``[n, 1]`` if it is the same for all tokens.
        """
        order = np.argsort(space.ranks[number])
        number, losses, allowed = number[order], losses[order], np.broadcast_to(allowed, losses.shape)[order]
        losses, rank = np.where(allowed, losses, np.float32(np.inf)), space.ranks[number]
        chosen = losses.argmin(axis=0)  # the first of equal ones
        found = losses[chosen, np.arange(losses.shape[1])]
        better = (found < self.loss) | (np.isfinite(found) & (found == self.loss) & (rank[chosen] < self.rank))
        self.loss = np.where(better, found, self.loss)
        self.number = np.where(better, number[chosen], self.number)
        self.rank = np.where(better, rank[chosen], self.rank)
        self.seen = self.seen + allowed.sum(axis=0)


def shared(
    model: Model,
    inputs: NDArray[np.integer],
    targets: NDArray[np.integer],
    space: Space,
    allowed: Mapping[str, NDArray[np.bool_]],
    rows: int,
    table: Losses | None = None,
    progress: Callable[[float], object] = lambda share: None,  # noqa: ARG005
) -> tuple[dict[str, Best], NDArray[np.float64], Work]:
    """Search all patterns of a space on one text.

    Args:
        model: a Duo.
        inputs: ids ``[tokens]``.
        targets: the true next tokens ``[tokens]``.
        space: what to search.
        allowed: by name, which patterns each token may have, ``[n, tokens]`` or ``[n, 1]``; each has its own answer.
        rows: patterns of one batch at most, which bounds the memory.
        table: ``[n, tokens]``, to be filled with the losses of all patterns.
        progress: is called with the share of the patterns that is done.

    Returns:
        The best by name, the mean loss of each pattern ``[n]`` in nats, and what was evaluated.
    """
    best = {name: Best.of(len(inputs)) for name in allowed}
    means = np.full(len(space.patterns), np.nan)
    walk = Text(model, inputs, targets, space.options, rows)
    for patterns, losses in walk.losses():
        number = space.numbers(patterns)
        means[number] = losses.mean(axis=1, dtype=np.float64)
        if table is not None:
            table[number] = losses
        for name, each in best.items():
            each.offer(losses, number, space, allowed[name][number])
        progress(walk.work.head / len(space.patterns))
    return best, means, walk.work


def lowest(walk: Walk, space: Space) -> Chosen:
    """The best of a walk over one token's patterns."""
    found = Best.of(1)
    for patterns, losses in walk.losses():
        found.offer(losses, space.numbers(patterns), space, np.ones((1, 1), bool))
    return found.chosen(space)


def committed(
    model: Model,
    inputs: NDArray[np.integer],
    choose: Callable[[list[Any], int], Chosen],
) -> Chosen:
    """Search token by token, each after the patterns that were chosen before it.

    Args:
        model: a Duo.
        inputs: ids ``[tokens]``.
        choose: gives one token's best, from a cache of the tokens before it and its place.
    """
    cache, steps = model.make_cache(), []
    for place in range(len(inputs)):
        step = choose(cache, place)
        model(mx.array(inputs[None, place : place + 1]), cache=cache, routes=step.patterns[0])
        mx.eval([layer.state for layer in cache])
        steps.append(step)
    return Chosen(*(np.concatenate([getattr(step, name) for step in steps]) for name in ("loss", "patterns", "seen")))


def uniform(
    model: Model, inputs: NDArray[np.integer], targets: NDArray[np.integer], route: Route
) -> tuple[Losses, Losses]:
    """Loss of the true next token and entropy, nats ``[tokens]``, under one route in every layer."""
    pattern = np.full(model.config.num_hidden_layers, route, np.uint8)
    logits = model(mx.array(inputs)[None], routes=pattern)
    return token_losses(logits, targets)[0], entropies(logits)[0]


def allowed_by(limits: Sequence[Limit], space: Space, tokens: int) -> dict[str, NDArray[np.bool_]]:
    """What `shared` takes, for limits."""
    return {limit.name: limit.allows(space.patterns, tokens) for limit in limits}
