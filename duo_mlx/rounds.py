"""One round of self-speculative decoding: draft, take back, verify, judge; see `duo_mlx.speculation`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generation_stream

from duo_mlx import conditional, cost
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.open_layers import can_open
from duo_mlx.policies import Policy
from duo_mlx.routes import Routes
from duo_mlx.sampling import Sampling, normalised, widened

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # of tokens [length] and logits [1, vocab], as mlx-lm's


@dataclass(frozen=True)
class Round:
    """What a round came to.

    Args:
        tokens: the drafted ones that stand, and one more.
        logprobs: of the verifying pass, ``[drafted + 1, vocab]``.
        drafted: how many were.
        weight_bytes: that all its passes read.
        cache_bytes: of keys and values that they read.
    """

    tokens: list[int]
    logprobs: mx.array
    drafted: int
    weight_bytes: int
    cache_bytes: int

    @property
    def accepted(self) -> int:
        """How many drafted tokens stand."""
        return len(self.tokens) - 1


@dataclass(frozen=True)
class Step:
    """A round without drafts that is under way: the device has it, and the host has not waited for it.

    Args:
        token: ``[1]``.
        logprobs: ``[1, vocab]``.
        weight_bytes: that its pass reads.
        cache_bytes: of keys and values that it reads.
    """

    token: mx.array
    logprobs: mx.array
    weight_bytes: int
    cache_bytes: int

    def read(self) -> Round:
        """The round, waited for."""
        tokens: Any = self.token.tolist()
        return Round(tokens, self.logprobs, 0, self.weight_bytes, self.cache_bytes)


class Rounds:
    """Rounds after what a cache holds, which nobody else may change meanwhile.

    Args:
        model: a Duo.
        verify: the verifying routes.
        draft: the drafts' routes. A router that looks ahead decides once a round, for the token after the last
            verified one, and all drafts of the round take these; they are read with the round's tokens.
        strategy: of all passes.
        cache: of one sequence; it can take tokens back.
        sampling: of drafted and of verified tokens.
        processors: of logits.
    """

    def __init__(
        self,
        model: Model,
        verify: Policy,
        draft: Policy | LookAhead,
        strategy: str,
        cache: list[Any],
        sampling: Sampling,
        processors: Sequence[LogitsProcessor] = (),
    ):
        self._model, self._verify, self._draft, self._strategy = model, verify, draft, strategy
        self._cache, self._sampling, self._processors = cache, sampling, processors
        self._weight_bytes, self._cache_bytes = cost.pass_bytes(model), cost.pass_cache_bytes(model)
        self._draft_bytes = cost.pass_bytes(model, cost.draft_bytes(model))
        self._draft_head, self._can_share = model.draft_head(), can_open(model)

        @lru_cache(maxsize=1024)
        def plans(routes: bytes, tokens: int, layers: int) -> list[Any]:
            passed = np.frombuffer(routes, np.uint8).reshape(1, tokens, layers)
            return list(conditional.plan(passed, 1, tokens, layers, strategy))

        self._plans = plans
        self.foreseen: Routes | None = None  # [layers], by a draft that looks ahead; None before the first round

    @property
    def looks_ahead(self) -> bool:
        """Whether each round must be read before the next, as the draft's routes come with it."""
        return isinstance(self._draft, LookAhead)

    def read(self, tokens: Sequence[int], chunk: int) -> None:
        """Fill the cache with ``tokens`` by the verifying routes, ``chunk`` in a pass."""
        with mx.stream(generation_stream):
            for start in range(0, len(tokens), chunk):
                part = mx.array([tokens[start : start + chunk]])
                position = self._cache[0].offset
                routes = patterns(self._model, self._verify, position, position + part.size)
                self._model(part, self._cache, routes=routes[None], strategy=self._strategy)
                mx.eval([layer.state for layer in self._cache])
                mx.clear_cache()

    def run(self, history: Sequence[int], wanted: int) -> Round:
        """One round after ``history``, whose last token is not in the cache yet.

        Fewer than ``wanted`` tokens are drafted where the draft's routes end.
        """
        start = self._cache[0].offset
        drafting = self._drafting(start, wanted)
        drafts = len(drafting)
        verifying = patterns(self._model, self._verify, start, start + drafts + 1)
        shared = shared_layers(drafting, verifying[:-1]) if self._can_share else 0
        with mx.stream(generation_stream):
            before = mx.array([*history[:-1]] if self._processors else [], mx.uint32)
            inputs, hidden, drafted = self._drafts(before, mx.array([[history[-1]]], mx.uint32), drafting, shared)
            self._take_back(drafts, shared)
            final = self._verified(inputs, hidden, verifying, shared)
            verified = self._scores(self._model.head(final), before, inputs)
            if drafts:
                tokens = mx.concatenate(inputs[1:], axis=1)[0]
                stands, instead = self._sampling.judge(mx.concatenate(drafted), tokens, verified)
                found = [stands.astype(mx.uint32), tokens, instead]
            else:
                found = [instead := self._sampling(verified)]
            logprobs = self._logprobs(verified)
            if isinstance(self._draft, LookAhead):  # the routes after each place, as if the text went on from there
                ahead = self._draft.routes(self._model.embedding(instead), final[0])
                found.append(ahead.reshape(-1))
            read: Any = mx.concatenate(found).tolist()  # the round's only wait
        accepted = (*read[:drafts], 0).index(0)
        self._take_back(drafts - accepted)
        chosen = [*read[drafts : drafts + accepted], read[2 * drafts + accepted]]
        if foreseen := read[3 * drafts + 1 :]:
            rows = np.array(foreseen, np.uint8).reshape(drafts + 1, -1)
            self.foreseen = self._model.config.realised(rows[accepted])
        return Round(chosen, logprobs, drafts, *self._reads(start, drafting, verifying, shared))

    def step(self, history: Sequence[int], after: Step | None = None) -> Step:
        """Begin a round without drafts after ``history``, or after the step that follows it, which nobody has read yet.

        So the device goes on while the host reads, as in plain decoding. A draft that looks ahead learns nothing of it.
        """
        start = self._cache[0].offset
        verifying = patterns(self._model, self._verify, start, start + 1)
        with mx.stream(generation_stream):
            known = history if after else history[:-1]
            before = mx.array([*known] if self._processors else [], mx.uint32)
            last = after.token.astype(mx.uint32)[None] if after else mx.array([[history[-1]]], mx.uint32)
            final = self._verified([last], [], verifying, 0)
            scores = self._scores(self._model.head(final), before, [last])
            token, logprobs = self._sampling(scores), self._logprobs(scores)
            mx.async_eval(token)
        return Step(token, logprobs, *self._reads(start, verifying[:0], verifying, 0))

    def _drafting(self, start: int, wanted: int) -> Routes:
        """The drafts' routes ``[drafts, layers]`` from position ``start`` on, at most ``wanted``."""
        if isinstance(self._draft, LookAhead):
            layers = self._model.config.num_hidden_layers
            if self.foreseen is None:
                return np.zeros((0, layers), np.uint8)
            return np.broadcast_to(self.foreseen, (wanted, layers))
        drafts = wanted if self._draft.length is None else max(0, min(wanted, self._draft.length - start))
        return patterns(self._model, self._draft, start, start + drafts)

    def _drafts(
        self, before: mx.array, last: mx.array, drafting: Routes, shared: int
    ) -> tuple[list[mx.array], list[mx.array], list[mx.array]]:
        """One draft step for each pattern, from the ``last`` token ``[1, 1]`` and what was ``before`` it.

        Returns:
            The last token and the drafted ones, ``[1, 1]`` each; what the shared layers made of all but the last,
            ``[1, 1, hidden]``; the scores by which the others were drafted, ``[1, draft_vocabulary]``.
        """
        inputs, hidden, scores = [last], [], []
        for pattern in drafting:
            planned = self._plan(pattern[None])
            if shared:
                hidden.append(self._states(inputs[-1], planned, 0, shared))
                out = self._states(inputs[-1], planned, shared, hidden=hidden[-1])
            else:
                out = self._states(inputs[-1], planned)
            scores.append(self._scores(self._draft_head(out), before, inputs))
            inputs.append(self._sampling(scores[-1]).astype(mx.uint32)[None])
            mx.async_eval(inputs[-1])  # the device works while the host builds the next step
        return inputs, hidden, scores

    def _verified(self, inputs: list[mx.array], hidden: list[mx.array], verifying: Routes, shared: int) -> mx.array:
        """What the last norm makes of each of the inputs, ``[1, inputs, hidden]``, by the verifying routes."""
        tokens = mx.concatenate(inputs, axis=1) if len(inputs) > 1 else inputs[0]
        planned = self._plan(verifying)
        if not shared:
            return self._states(tokens, planned)
        last = self._states(inputs[-1], self._plan(verifying[-1:]), 0, shared)
        h = mx.concatenate([*hidden, last], axis=1)
        return self._states(tokens, planned, shared, hidden=h)

    def _states(
        self,
        inputs: mx.array,
        planned: list[Any],
        start: int = 0,
        stop: int | None = None,
        hidden: mx.array | None = None,
    ) -> mx.array:
        """As `Model.states`."""
        return self._model.states(inputs, self._cache, planned, self._strategy, start, stop, hidden)

    def _plan(self, routes: Routes) -> list[Any]:
        """An entry a layer from ``routes [tokens, layers]``; not to be changed, since the same plan serves again."""
        return self._plans(routes.tobytes(), *routes.shape)

    def _scores(self, logits: mx.array, before: mx.array, inputs: Sequence[mx.array]) -> mx.array:
        """What sampling goes by, ``[tokens, vocab]``: log-probabilities, or logits, which do for the likeliest token.

        Log-probabilities take a sum over the vocabulary. Processors see what was ``before`` and the inputs up to each
        place, and all of the vocabulary.

        Args:
            logits: ``[1, tokens, vocab]``, at the last of the inputs.
            before: tokens ``[length]``.
            inputs: tokens after them, ``[1, 1]`` each.
        """
        rows = logits.squeeze(0)
        if self._processors:
            rows = widened(rows, self._model.config.vocab_size, -mx.inf)
            seen = mx.concatenate([before, *(each[0] for each in inputs)])
            first = len(seen) - len(rows) + 1
            rows = mx.concatenate(
                [self._processed(seen[: first + row], rows[row : row + 1]) for row in range(len(rows))]
            )
        return normalised(rows) if self._sampling.temp else rows

    def _logprobs(self, scores: mx.array) -> mx.array:
        """Log-probabilities of `_scores`, computed when somebody asks for them."""
        return scores if self._sampling.temp else normalised(scores)

    def _processed(self, seen: mx.array, logits: mx.array) -> mx.array:
        for processor in self._processors:
            logits = processor(seen, logits)
        return logits

    def _take_back(self, tokens: int, start: int = 0) -> None:
        """Drop the last ``tokens`` from the cache of the layers from ``start`` on."""
        for layer in self._cache[start:]:
            layer.trim(tokens)

    def _reads(self, start: int, drafting: Routes, verifying: Routes, shared: int) -> tuple[int, int]:
        """Bytes of weights, and of keys and values, that a round's passes after ``start`` positions read."""
        rest = verifying
        if shared:
            rest = verifying.copy()
            rest[:, :shared] = verifying[-1, :shared]  # the verifying pass has but its last token there
        steps, context = drafting[:, None], start + 1 + len(drafting) // 2  # in the middle of the round
        weights = sum(map(self._draft_bytes, steps)) + self._weight_bytes(rest)
        return weights, sum(self._cache_bytes(routes, context) for routes in (*steps, rest))


def patterns(model: Model, policy: Policy, start: int, stop: int) -> Routes:
    """A policy's routes at positions ``start`` to ``stop``, ``[stop - start, layers]``, as the model realises them."""
    layers = model.config.num_hidden_layers
    if start == stop:
        return np.zeros((0, layers), np.uint8)
    routes = model.config.realised(policy.routes(start, stop))
    return np.broadcast_to(routes, (1, stop - start, layers))[0]


def shared_layers(drafting: Routes, verifying: Routes) -> int:
    """How many first layers have the same routes in both ``[tokens, layers]``; the last layer is never one of them."""
    alike = (drafting == verifying).all(axis=0)[:-1]
    return int(np.logical_and.accumulate(alike).sum()) if len(drafting) else 0
