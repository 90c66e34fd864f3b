"""Generation as ``duo-mlx bench run`` times it: prefill and decoding apart, token by token, the same for any engine.

Both follow mlx-lm's `generate_step`, greedily and for a batch, too: a prompt in chunks and its last token by itself;
while decoding, a step is started before the token of the last one is waited for. (MLX's queue for the CPU holds ten
operations, so that there the step ahead has nearly run by then: the first gap is two steps, the last none.) A cell
owns a cache whose beginning, the context, is filled once; what a run adds is taken back, so that runs can be repeated
without anything else between.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from numpy.typing import NDArray

from duo_mlx import conditional
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy, ReplayPolicy
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.router import Recorder, Router
from duo_mlx.routes import Routes

CHUNK = 2048  # tokens of a prompt in one pass, as in mlx-lm

Call = Callable[..., mx.array]
Ids = Sequence[int]


class Generator:
    """One way to generate, measured again and again.

    Args:
        bind: what maps tokens and a cache to logits, from a position on, where positions before another one are the
            prompt's; made anew for each run, since a `RoutedModel` counts positions.
        cache: a new prompt cache.
        context: ids of the tokens before every prompt, the same for each sequence of the batch; may be empty.
        batch: sequences at once.
        clock: seconds.
    """

    def __init__(
        self,
        bind: Callable[[int, int], Call],
        cache: list[Any],
        context: Ids,
        batch: int,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._bind, self._cache, self._clock, self._batch = bind, cache, clock, batch
        self._context, self._prompt = len(context), 0
        self._call = bind(0, len(context))
        self._first, self._final = mx.array([]), None
        if context:
            self._read(mx.array([list(context)] * batch))

    def prefill(self, prompts: Sequence[Ids]) -> float:
        """Seconds from ``prompts``, one for each sequence and all of one length, to their first tokens.

        What was read and generated before is taken back first.
        """
        self._rewind(self._context)
        self._prompt = self._context + len(prompts[0])
        self._call = self._bind(self._context, self._prompt - 1)
        start = self._clock()
        tokens = mx.array([list(prompt) for prompt in prompts])
        self._read(tokens[:, :-1])
        self._first = self._step(tokens[:, -1:])
        mx.eval(self._first)
        self._final = getattr(self._call, "final", None)  # what a router that looks ahead goes on from
        return self._clock() - start

    def decode(
        self,
        tokens: int,
        after_each: Callable[[int], object] = lambda came: None,  # noqa: ARG005
    ) -> list[float]:
        """Seconds from each token to the next, ``tokens - 1`` in number, after the prompts that were read last.

        Args:
            tokens: in each sequence, with the first, which the prefill gave.
            after_each: is called after each of them, with how many tokens came at once in each sequence.
        """
        self._rewind(self._prompt)
        self._call = self._bind(self._prompt, self._prompt)
        if isinstance(self._call, RoutedModel):
            self._call.final = self._final
        y, stamps = self._first, [self._clock()]  # that token is there; the step after it takes its time
        for number in range(tokens):
            following = self._step(y) if number + 1 < tokens else y
            mx.async_eval(following)
            y.tolist()  # the user has the token
            if number:
                stamps.append(self._clock())
                after_each(1)
            y = following
        return np.diff(stamps).tolist()

    def routes(self) -> NDArray[np.uint8]:
        """The routes ``[passes, batch, layers]`` of the last decoding's steps, as realised."""
        assert isinstance(self._call, RoutedModel), "mlx-lm has no routes"
        routed, layers = self._call, len(self._call.layers)
        if isinstance(routed.policy, Recorder):
            steps = [np.stack([np.array(each).reshape(-1) for each in taken], -1) for taken in routed.decided.values()]
            return routed.model.config.realised(np.stack(steps).astype(np.uint8))
        found = [routed.routes(place, place + 1, self._batch) for place in range(self._prompt, routed.position)]
        return np.stack([np.broadcast_to(each.reshape(-1, layers), (self._batch, layers)) for each in found])

    def _rewind(self, position: int) -> None:
        trim_prompt_cache(self._cache, self._cache[0].offset - position)

    def _read(self, tokens: mx.array) -> None:
        for start in range(0, tokens.shape[1], CHUNK):
            self._call(tokens[:, start : start + CHUNK], cache=self._cache)
            mx.eval([layer.state for layer in self._cache])

    def _step(self, tokens: mx.array) -> mx.array:
        return mx.argmax(self._call(tokens, cache=self._cache)[:, -1], axis=-1)[:, None]


def routed(
    model: Model,
    policy: Source,
    strategy: str,
    context: Ids,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator:
    """Generation by a Duo."""
    return Generator(
        lambda start, prompt: RoutedModel(model, policy, strategy, start, prompt),
        model.make_cache(),
        context,
        batch,
        clock,
    )


def stock(model: nn.Module, context: Ids, batch: int, clock: Callable[[], float] = time.perf_counter) -> Generator:
    """Generation by one of mlx-lm's models."""
    return Generator(lambda *_: model, make_prompt_cache(model), context, batch, clock)


def strategy_ran(model: Model, policy: Source, strategy: str, batch: int) -> str:
    """What a strategy comes to while a batch is decoded, in the first layer; ``auto`` is none.

    Raises:
        DuoError: it cannot run here.
    """
    alike = batch == 1 or isinstance(policy, FixedPolicy | ReplayPolicy)  # the sequences, where the host knows
    if not isinstance(policy, Router) and strategy != "dense" and (alike or strategy == "sync"):
        return "planned"
    known_by = "device" if isinstance(policy, Router) else "host"
    h = mx.zeros((batch, model.config.hidden_size), model.dtype)
    return conditional.resolve(strategy, model.ffns[0], h, known_by)


def shares(routes: Routes) -> dict[str, float]:
    """The shares of big, small and skip in ``routes [..., layers]``."""
    counts = np.bincount(routes.reshape(-1), minlength=3) / routes.size
    return {"big": float(counts[2]), "small": float(counts[1]), "skip": float(counts[0])}
