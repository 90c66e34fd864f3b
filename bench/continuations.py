"""Three ways to continue the same prompts: plain decoding, self-speculation, and mlx-lm's speculation by a draft model.

Each keeps KV caches of its own, which hold every prompt but its last token before a clock starts: mlx-lm reads a prompt
once more for its draft model, and that is left out. A continuation starts there, does not end early, and is taken back
before the next.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, speculative_generate_step
from mlx_lm.models.cache import trim_prompt_cache

from duo_mlx.bench.peer import step_bytes
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Routes
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import Speculation, speculate

Ids = list[int]


class Continuation(ABC):
    """One way to continue prompts by greedy or sampled tokens; what became of drafts is counted until it is reset.

    Args:
        model: a Duo.
        patterns: the routes ``[layers]`` that read the prompts, one for each cache.
        prompts: ids, at least one each.
        tokens: to generate after each prompt.
        sampling: of tokens.
    """

    def __init__(
        self, model: Model, patterns: Sequence[Routes], prompts: Sequence[Ids], tokens: int, sampling: Sampling
    ):
        self._model, self._prompts, self._tokens, self._sampling = model, prompts, tokens, sampling
        self._caches = [[_read(model, pattern, prompt[:-1]) for pattern in patterns] for prompt in prompts]
        self.reset()

    def reset(self) -> None:
        """Forget all rounds."""
        self.rounds: list[tuple[int, int]] = []  # of each verification: tokens drafted and accepted
        self.generated, self.bytes_read = 0, 0.0

    def __call__(self) -> list[Ids]:
        """The tokens after each prompt, from a fixed seed, waited for."""
        mx.random.seed(0)
        texts = []
        for prompt, caches in zip(self._prompts, self._caches, strict=True):
            for cache in caches:
                trim_prompt_cache(cache, cache[0].offset - len(prompt) + 1)
            texts.append(self._continued(prompt[-1], len(prompt) - 1, caches))
            self.generated += len(texts[-1])
        mx.synchronize(generation_stream)
        return texts

    @property
    def passes(self) -> int:
        """Verifying passes over the whole model that a run takes for each prompt, if it does not speculate."""
        return self._tokens

    @property
    def cache_bytes(self) -> int:
        """Of keys and values as they are allocated, for all prompts."""
        return sum(layer.nbytes for caches in self._caches for cache in caches for layer in cache)

    def record(self) -> dict[str, Any]:
        """What the runs since the last reset came to, for a result's JSON.

        ``host_waits_per_token``: how often the device stood still until the host had read what to do next; other keys
        as in `by_place`.
        """
        found: dict[str, Any] = {
            "tokens": self.generated,
            "bytes_per_token": self.bytes_read / self.generated,
            "cache_bytes": self.cache_bytes,
            "host_waits_per_token": waits(self.rounds) / self.generated,
        }
        if self.rounds:
            found |= {
                "verifications": len(self.rounds),
                "tokens_per_verification": self.generated / len(self.rounds),
            }
            found |= by_place(self.rounds)
        return found

    @abstractmethod
    def _continued(self, last: int, position: int, caches: list[list[Any]]) -> Ids:
        """The tokens after ``last``, which is at ``position`` and not in the caches yet."""


class Plain(Continuation):
    """Decoding by one pattern through mlx-lm's `generate_step`, as ``duo-mlx generate`` does it."""

    def __init__(self, model: Model, verify: Routes, prompts: Sequence[Ids], tokens: int, sampling: Sampling):
        super().__init__(model, [verify], prompts, tokens, sampling)
        self._verify = verify

    @property
    def passes(self) -> int:
        return self._tokens + 1  # `generate_step` is always one step ahead

    def _continued(self, last: int, position: int, caches: list[list[Any]]) -> Ids:
        routed = RoutedModel(self._model, FixedPolicy(self._verify), start=position)
        options = {"max_tokens": self._tokens, "sampler": self._sampling, "prompt_cache": caches[0]}
        found = [token for token, _ in generate_step(mx.array([last]), routed, **options)]
        self.bytes_read += len(found) * step_bytes(self._model, self._verify, position + 1 + len(found) // 2)
        return found


class Speculated(Continuation):
    """Self-speculation by a draft pattern, with the one cache."""

    def __init__(
        self,
        model: Model,
        verify: Routes,
        draft: Routes,
        draft_tokens: str,
        prompts: Sequence[Ids],
        tokens: int,
        sampling: Sampling,
    ):
        super().__init__(model, [verify], prompts, tokens, sampling)
        self._policies, self._draft_tokens = (FixedPolicy(verify), FixedPolicy(draft)), draft_tokens

    def _continued(self, last: int, position: int, caches: list[list[Any]]) -> Ids:  # noqa: ARG002
        found, before = [], Speculation()
        steps = speculate(
            self._model,
            [last],
            *self._policies,
            draft_tokens=self._draft_tokens,
            max_tokens=self._tokens,
            sampler=self._sampling,
            prompt_cache=caches[0],
        )
        for token in steps:
            counts = token.speculation
            if counts is not None and counts is not before:
                was, now = ((sum(each.drafted), sum(each.accepted)) for each in (before, counts))
                self.rounds.append((now[0] - was[0], now[1] - was[1]))
                before = counts
            found.append(token.token)
        self.bytes_read += before.weight_bytes + before.cache_bytes
        return found


class DraftModel(Continuation):
    """mlx-lm's `speculative_generate_step`, to which the same Duo on the draft pattern is a second model."""

    def __init__(
        self,
        model: Model,
        verify: Routes,
        draft: Routes,
        draft_tokens: int,
        prompts: Sequence[Ids],
        tokens: int,
        sampling: Sampling,
    ):
        super().__init__(model, [verify, draft], prompts, tokens, sampling)
        self._patterns, self._draft_tokens = (verify, draft), draft_tokens

    def _continued(self, last: int, position: int, caches: list[list[Any]]) -> Ids:
        models = [RoutedModel(self._model, FixedPolicy(pattern)) for pattern in self._patterns]  # alike everywhere
        steps = speculative_generate_step(
            mx.array([last]),
            *models,
            num_draft_tokens=self._draft_tokens,
            max_tokens=self._tokens,
            sampler=self._sampling,
            prompt_cache=[layer for cache in caches for layer in cache],
        )
        found, accepted, drafted = [], 0, min(self._draft_tokens, self._tokens)
        for token, _, from_draft in steps:
            found.append(token)
            accepted += from_draft
            if not from_draft or len(found) == self._tokens:  # a round ends with a token that nobody drafted
                self.rounds.append((drafted, accepted))
                self._count_bytes(position + 1 + len(found), drafted)
                accepted, drafted = 0, min(self._draft_tokens, self._tokens - len(found))
        return found

    def _count_bytes(self, context: int, drafted: int) -> None:
        verify, draft = (step_bytes(self._model, pattern, context) for pattern in self._patterns)
        self.bytes_read += verify + drafted * draft


def waits(rounds: Sequence[tuple[int, int]]) -> int:
    """After how many of the rounds the device stands still; not between two that draft nothing."""
    drafted = [drafts for drafts, _ in rounds] + [0]
    return sum(now > 0 or then > 0 for now, then in pairwise(drafted))


def by_place(rounds: Sequence[tuple[int, int]]) -> dict[str, list[Any]]:
    """What became of a round's first, second ... drafted token.

    Args:
        rounds: tokens drafted and accepted in each.

    Returns:
        How many were ``drafted``, ``tried`` (all before were accepted) and ``accepted``, and ``acceptance``, the share
        of the tried that were accepted, up to the last place where any was tried.
    """
    places = range(max((drafted for drafted, _ in rounds), default=0))
    tried = [sum(drafted > place <= accepted for drafted, accepted in rounds) for place in places]
    accepted = [sum(stood > place for _, stood in rounds) for place in places]
    return {
        "drafted": [sum(drafted > place for drafted, _ in rounds) for place in places],
        "tried": tried,
        "accepted": accepted,
        "acceptance": [stood / of for stood, of in zip(accepted, tried, strict=True) if of],
    }


def _read(model: Model, pattern: Routes, tokens: Ids) -> list[Any]:
    """A new cache with these tokens."""
    cache = model.make_cache()
    if tokens:
        model(mx.array([tokens]), cache, routes=pattern)
        mx.eval([layer.state for layer in cache])
    return cache
