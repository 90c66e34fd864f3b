"""Sampling by a known distribution, and the acceptance of drafted tokens that leaves it as it is.

mlx-lm's samplers are functions that give tokens. Speculative sampling needs what they draw from, so `Sampling` is the
same sampler with its settings in sight: mlx-lm's own filters, in its order.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, greedy_sampler

from duo_mlx.errors import DuoError


@dataclass(frozen=True)
class Sampling:
    """What ``mlx_lm.sample_utils.make_sampler`` makes of the same settings; given to mlx-lm, it is such a sampler.

    Args:
        temp: the temperature; 0 takes the likeliest token.
        top_p: keep the likeliest tokens that together have this probability; 0 and 1 keep all.
        min_p: keep tokens that have at least this share of the likeliest one's probability.
        top_k: keep so many of the likeliest tokens; 0 keeps all.
        vocabulary: draw only from so many tokens, the first; 0: from all.

    Raises:
        DuoError: a setting is out of its range.
    """

    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    vocabulary: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temp < float("inf"):
            raise DuoError(f"temp is {self.temp:g}; it must be a number from 0")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if not 0 <= share <= 1:
                raise DuoError(f"{name} is {share:g}; it must be between 0 and 1")
        if type(self.top_k) is not int or self.top_k < 0:
            raise DuoError(f"top_k is {self.top_k!r}; it must be a whole number from 0")

    def __call__(self, logprobs: mx.array) -> mx.array:
        """One token ``[...]`` for each of ``logprobs [..., vocab]``; without a temperature logits do."""
        if not self.temp:
            return mx.argmax(self._within(logprobs), axis=-1)
        return mx.random.categorical(self._scaled(logprobs))

    def probabilities(self, logprobs: mx.array) -> mx.array:
        """The distribution ``[..., vocab]`` from which a token is drawn; the temperature must not be 0."""
        return mx.softmax(self._scaled(logprobs).astype(mx.float32), axis=-1)

    def acceptance(self, drafted: mx.array, verified: mx.array) -> mx.array:
        """The probability ``[...]`` with which `judge` lets a drafted token stand: the sum of min(p, q).

        Args:
            drafted: log-probabilities ``[..., vocab]`` by which it is drafted (q); logits do where nothing is filtered.
                Tokens at the end of the vocabulary that are never drafted may be missing.
            verified: those at the same places by which it is verified (p).
        """
        if not self.temp:
            agreed: mx.array = self(drafted) == self(verified)
            return agreed.astype(mx.float32)
        p, q = self.probabilities(verified), self.probabilities(drafted)
        return mx.minimum(p[..., : q.shape[-1]], q).sum(axis=-1)

    def judge(self, drafted: mx.array, tokens: mx.array, verified: mx.array) -> tuple[mx.array, mx.array]:
        """Which drafted tokens stand, and what comes instead of each: speculative sampling (arXiv 2211.17192).

        A token x drawn from q stands with the probability min(1, p(x) / q(x)), else one is drawn from max(p - q, 0),
        normalised. The tokens before the first that does not stand, and then the one that comes instead of it, are
        distributed as if each had been drawn from p. Without a temperature: the likeliest token stands.

        Args:
            drafted: log-probabilities ``[drafts, vocab]`` by which the tokens were drafted (q), at least one. Tokens at
                the end of the vocabulary that are never drafted may be missing.
            tokens: the drafted tokens ``[drafts]``.
            verified: log-probabilities ``[drafts + 1, vocab]`` at the same places and the next one (p). Without a
                temperature logits do, here and above.

        Returns:
            ``[drafts]``, true where a token stands if all before it do, and tokens ``[drafts + 1]``: one instead of
            each, and one after them all.
        """
        if not self.temp:
            likeliest = self(verified)
            return tokens == likeliest[:-1], likeliest
        p = self.probabilities(verified)
        q = widened(self.probabilities(drafted), p.shape[-1], 0.0)
        chosen = tokens[:, None]
        p_chosen, q_chosen = (mx.take_along_axis(each, chosen, axis=-1)[:, 0] for each in (p[:-1], q))
        stands = mx.random.uniform(shape=tokens.shape) * q_chosen < p_chosen
        # after them all there is no draft: what remains of p is p
        rest = mx.maximum(p - mx.pad(q, [(0, 1), (0, 0)]), 0)
        # p and q alike leave nothing, and then only rounding can have let the token fall
        rest = mx.where(rest.sum(axis=-1, keepdims=True) > 0, rest, p)
        return stands, mx.random.categorical(mx.log(rest))

    def _scaled(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities, not normalised, after the filters and the temperature, in mlx-lm's order."""
        logprobs = self._within(logprobs)
        if 0 < self.top_p < 1:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p:
            logprobs = apply_min_p(logprobs, self.min_p)
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, self.top_k)
        return logprobs * (1 / self.temp)

    def _within(self, logprobs: mx.array) -> mx.array:
        return logprobs[..., : self.vocabulary] if self.vocabulary else logprobs


def within(sampler: Callable[[mx.array], mx.array] | None, vocabulary: int) -> Callable[[mx.array], mx.array]:
    """A ``sampler`` of mlx-lm (None: the likeliest token) that draws only from the first ``vocabulary`` tokens."""
    if sampler is None or sampler is greedy_sampler:
        return Sampling(vocabulary=vocabulary)
    if isinstance(sampler, Sampling):
        return replace(sampler, vocabulary=min(sampler.vocabulary or vocabulary, vocabulary))
    return lambda logprobs: sampler(logprobs[..., :vocabulary])


def normalised(logits: mx.array) -> mx.array:
    """Log-probabilities ``[..., vocab]`` of logits."""
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def widened(values: mx.array, width: int, value: float) -> mx.array:
    """``values [rows, ...]`` as ``[rows, width]``, with ``value`` for what they lack at the end."""
    missing = width - values.shape[-1]
    return mx.pad(values, [(0, 0), (0, missing)], constant_values=value) if missing else values


def known(sampler: object) -> Sampling:
    """The `Sampling` that a ``sampler`` of mlx-lm's is, where that can be told.

    Raises:
        DuoError: its distribution cannot be known.
    """
    if sampler is None or sampler is greedy_sampler:
        return Sampling()
    if isinstance(sampler, Sampling):
        return sampler
    name = getattr(sampler, "__qualname__", type(sampler).__qualname__)
    raise DuoError(
        f"sampler {name}: speculation must know the distribution that a sampler draws from; "
        "give duo_mlx.sampling.Sampling(temp, top_p, min_p, top_k)"
    )
