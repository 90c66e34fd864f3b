"""What the oracle's minimum over many candidates is worth: the controls that Duo-LLM (arXiv 2410.10846) lacks.

An oracle scores N patterns by the true next token and keeps the lowest loss, which falls with N even where patterns
differ by nothing but noise. So beside each budget's oracle stand

* ``best_of_N``: the minimum over equally many of the budget's patterns, whatever the budget;
* ``noise_N``: the minimum over as many all-big passes with noise in their hidden states, so much that their mean loss
  is that of the budget's patterns;
* ``split_by_input`` and ``split_by_entropy``: one pattern for all tokens of a kind, chosen on one half of the texts and
  scored on the other, where kinds need no look at the next token: what can be known before it;
* ``worst_routes``: the pattern of the highest loss, whose routes show where patterns matter much, for better or worse;
* the second context: the text is read again without its first quarter, and what was chosen in one context is scored in
  the other, on the same next token: whether a choice is the token's, or the accident of one pass.
"""

from collections.abc import Sequence
from math import lgamma
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers
from duo_mlx.routes import Route
from duo_mlx.study import oracle
from duo_mlx.study.limits import Limit, bigs
from duo_mlx.study.losses import Losses, token_losses

SIZES = (12, 66)  # candidates: the patterns with 1 and with 2 big layers of 12
SCALES = (0.0, *(0.02 * 1.5**step for step in range(11)))  # of noise, between which what it gives is interpolated
FEWEST = 16  # tokens of a kind from which its pattern is chosen; kinds of fewer take the one of all tokens
BINS = 10  # of entropy
NAMES = (
    *("mean_loss", *(f"best_of_{size}" for size in SIZES)),
    *("noise_mean", *(f"noise_{size}" for size in SIZES)),
    *("split_by_input", "split_by_entropy"),
    *("short_oracle", "to_short", "from_short"),
)  # of losses; and there is `WORST`
WORST = "worst_routes"
Arrays = dict[str, NDArray[Any]]


def expected_minimum(losses: Losses, size: int, allowed: NDArray[np.bool_] | None = None) -> Losses:
    """The mean, over all choices of ``size`` candidates without replacement, of their minimum.

    Args:
        losses: nats ``[n, tokens]``.
        size: how many are chosen.
        allowed: ``[n, tokens]`` or ``[n, 1]``, what may be chosen; None: everything.

    Returns:
        Nats ``[tokens]``; NaN where there are fewer candidates than ``size``.
    """
    may = np.broadcast_to(True if allowed is None else allowed, losses.shape)
    ordered = np.where(may, losses, np.float32(np.inf))
    ordered.sort(axis=0)
    found = np.full(losses.shape[1], np.nan, np.float32)
    counts = may.sum(axis=0)
    for count in np.unique(counts[counts >= size]).tolist():
        # the i-th lowest is the minimum where the size - 1 others are among the count - 1 - i above it
        above = np.arange(count - 1, size - 2, -1)
        weights = np.exp([_log_choose(each, size - 1) - _log_choose(count, size) for each in above.tolist()])
        columns = counts == count
        found[columns] = np.einsum("i,it->t", weights, ordered[: len(above), columns])
    return found


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


class Noise:
    """All-big passes over a text with noise in the hidden states after every layer.

    Args:
        model: a Duo.
        inputs: ids ``[tokens]``.
        targets: the true next tokens ``[tokens]``.
        rows: passes of one batch.
        seed: of this text.
    """

    def __init__(
        self,
        model: Model,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        rows: int,
        seed: Sequence[int] = (0,),
    ):
        self._layers, self._targets = OpenLayers(model, mx.array(inputs)[None]), targets
        self._depth, self._rows, self._seed = model.config.num_hidden_layers, rows, seed
        self._found: dict[int, Arrays] = {}

    def losses(self, scale: float, count: int, random: np.random.Generator) -> Losses:
        """Nats ``[count, tokens]`` of passes whose noise has ``scale`` times the size (RMS) of what it is added to.

        Each pass has a generator of its own: its noise is the same in batches of any size.
        """
        found, each = [], random.spawn(count)
        for start in range(0, count, self._rows):
            batch = each[start : start + self._rows]
            h = mx.broadcast_to(self._layers.root, (len(batch), *self._layers.root.shape[1:]))
            for depth in range(self._depth):
                h = self._layers.run(depth, h, Route.BIG)
                drawn = mx.array(np.stack([one.standard_normal(h.shape[1:], np.float32) for one in batch]))
                squares = mx.square(h.astype(mx.float32))  # which overflow float16 where a state is large
                h = h + (scale * mx.sqrt(mx.mean(squares, axis=-1, keepdims=True)) * drawn).astype(h.dtype)
            found.append(token_losses(self._layers.logits(h), self._targets))
        return np.concatenate(found)

    def at(self, place: int) -> Arrays:
        """``noise_mean`` and ``noise_N``, ``[tokens]``, of passes with the noise of one of `SCALES`."""
        if place not in self._found:
            scale = SCALES[place]
            losses = self.losses(scale, max(SIZES) if scale else 1, np.random.default_rng((*self._seed, place)))
            minima = {f"noise_{size}": expected_minimum(losses, size) if scale else losses[0] for size in SIZES}
            self._found[place] = {"noise_mean": losses.mean(axis=0)} | minima
        return self._found[place]

    def of_mean(self, loss: float) -> Arrays:
        """The same of noise whose passes have this mean loss in nats; no noise where all big's is no lower.

        Between the two scales whose means enclose it all values are interpolated by the mean.
        """
        means = [float(self.at(0)["noise_mean"].mean())]
        while means[-1] < loss and len(means) < len(SCALES):
            means.append(float(self.at(len(means))["noise_mean"].mean()))
        below, above = self.at(max(0, len(means) - 2)), self.at(len(means) - 1)
        share = float(np.interp(loss, means[-2:], (0.0, 1.0))) if len(means) > 1 else 1.0
        return {name: (below[name] + np.float32(share) * (above[name] - below[name])) for name in below}


def equal_n(table: Losses, allowed: NDArray[np.bool_]) -> Arrays:
    """``mean_loss`` and ``best_of_N`` of a budget, ``[tokens]``, from all patterns' losses ``[n, tokens]``."""
    kept = table if allowed.shape[1] > 1 else table[allowed[:, 0]]
    may = np.broadcast_to(allowed, table.shape) if kept is table else np.ones((len(kept), 1), bool)
    of_all = np.where(may, kept, 0).sum(axis=0, dtype=np.float64) / np.broadcast_to(may, kept.shape).sum(axis=0)
    return {"mean_loss": of_all.astype(np.float32)} | {
        f"best_of_{size}": expected_minimum(kept, size, may) for size in SIZES
    }


def noise(passes: Noise, limit: Limit, means: NDArray[np.floating], tokens: int) -> Arrays:
    """``noise_mean`` and ``noise_N`` of a budget, ``[tokens]``; NaN for a schedule, a share and a single pattern.

    Args:
        passes: over the text.
        limit: the budget.
        means: loss of each of the budget's patterns over the text.
        tokens: of the text.
    """
    if limit.scheduled or limit.price is not bigs or len(means) < 2:
        return {name: np.full(tokens, np.nan, np.float32) for name in ("noise_mean", *(f"noise_{n}" for n in SIZES))}
    return passes.of_mean(float(np.mean(means)))


def worst(table: Losses, allowed: NDArray[np.bool_], space: oracle.Space) -> NDArray[np.uint8]:
    """The pattern ``[tokens, layers]`` of a budget with the highest loss, from all patterns' losses ``[n, tokens]``."""
    found = oracle.Best.of(table.shape[1])
    found.offer(-table, np.arange(len(table)), space, allowed)
    return space.patterns[found.number]


class SecondContext:
    """The text without its first quarter; its tokens of the last half are compared with those of the whole text.

    Args:
        model, inputs, targets, space, rows: as `duo_mlx.study.oracle.shared` takes them.
        whole: losses of all patterns on the whole text, ``[n, tokens]``.
    """

    def __init__(
        self,
        model: Model,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        space: oracle.Space,
        rows: int,
        whole: Losses,
    ):
        tokens, cut = len(inputs), len(inputs) // 4
        short = np.empty((len(space.patterns), tokens - cut), np.float32)
        oracle.shared(model, inputs[cut:], targets[cut:], space, {}, rows, short)
        self._space, self._half = space, tokens // 2
        self._whole, self._short = whole[:, self._half :], short[:, self._half - cut :]
        self.losses: Arrays = {}
        for route in (Route.BIG, Route.SMALL):
            pattern = np.full(model.config.num_hidden_layers, route, np.uint8)
            logits = model(mx.array(inputs[cut:])[None], routes=pattern)
            name = f"short_loss_{route.name.lower()}"
            self.losses[name] = self._placed(token_losses(logits, targets[cut:])[0, self._half - cut :])

    def compare(self, allowed: NDArray[np.bool_], chosen: NDArray[np.int64]) -> Arrays:
        """What a budget's choices are worth in the other context, ``[tokens]``; NaN before the last half.

        Args:
            allowed: ``[n, tokens]`` or ``[n, 1]``.
            chosen: numbers of the patterns that the whole text's oracle chose, ``[tokens]``.
        """
        may = allowed[:, self._half :] if allowed.shape[1] > 1 else allowed
        best = oracle.Best.of(self._short.shape[1])
        best.offer(self._short, np.arange(len(self._short)), self._space, may)
        each = np.arange(self._short.shape[1])
        return {
            "short_oracle": self._placed(best.loss),
            "to_short": self._placed(self._short[chosen[self._half :], each]),
            "from_short": self._placed(self._whole[best.number, each]),
        }

    def _placed(self, losses: Losses) -> Losses:
        return np.concatenate([np.full(self._half, np.nan, np.float32), losses])


def split_by_kind(found: Sequence[Arrays], allowed: NDArray[np.bool_], kinds: NDArray[np.integer]) -> Losses:
    """Losses ``[sequences, tokens]`` of the patterns that the other half of the sequences chose for each kind of token.

    Args:
        found: of each sequence, ``table`` with the losses of all patterns ``[n, tokens]``.
        allowed: the budget's patterns ``[n, 1]``.
        kinds: of all tokens ``[sequences, tokens]``, from 0.
    """
    within, losses = np.flatnonzero(allowed[:, 0]), np.full(kinds.shape, np.nan, np.float32)
    every = int(kinds.max()) + 1
    for half in (0, 1):
        chosen_on, scored_on = range(half, len(found), 2), range(1 - half, len(found), 2)
        if not chosen_on or not scored_on:
            continue
        sums = np.zeros((len(within), every), np.float32)
        for at in chosen_on:
            here, member = np.unique(kinds[at], return_inverse=True)
            sums[:, here] += found[at]["table"][within] @ np.eye(len(here), dtype=np.float32)[member]
        counts = np.bincount(kinds[chosen_on].ravel(), minlength=every)
        best = np.where(counts >= FEWEST, sums.argmin(axis=0), sums.sum(axis=1).argmin())
        for at in scored_on:
            losses[at] = found[at]["table"][within[best[kinds[at]]], np.arange(kinds.shape[1])]
    return losses


def kinds_of(found: Sequence[Arrays]) -> dict[str, NDArray[np.integer]]:
    """Kinds ``[sequences, tokens]`` of tokens that are known before the next one: its id, and all-small's entropy."""
    ids, entropy = (np.stack([each[name] for each in found]) for name in ("inputs", "entropy_small"))
    edges = np.quantile(entropy, np.arange(1, BINS) / BINS)
    common = np.unique(ids, return_inverse=True)[1].reshape(ids.shape)
    return {"split_by_input": common, "split_by_entropy": np.searchsorted(edges, entropy)}


def memory(patterns: int, tokens: int) -> int:
    """Bytes that the controls of a text hold at most: losses of all patterns in both contexts, and copies at work."""
    return 4 * patterns * tokens * 5
