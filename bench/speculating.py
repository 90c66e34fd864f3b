"""Generation by speculation as ``duo-mlx bench run`` times it, and what it came to.

Prompts are read, and the cache is rewound, as without speculation (`duo_mlx.bench.engine`). The first token is a round
without drafts (`duo_mlx.rounds`), and decoding goes by rounds, each of which gives one token or more.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np

from duo_mlx import drafting
from duo_mlx.bench import touched
from duo_mlx.bench.engine import Generator, Ids
from duo_mlx.flops import flops
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.rounds import Rounds, patterns, shared_layers
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.routes import Routes
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import Speculation, checked, run_rounds


class Speculating(Generator):
    """Generation of one sequence by ``verify``, greedily, with drafts by ``draft``.

    What ``auto`` learns of acceptance and times stays from one generation to the next. A measured generation is a few
    dozen tokens, up to half of which learning alone would take; kept, the figures are those of a text that goes on.

    Args:
        model: a Duo.
        verify: the routes that decide the text.
        draft: cheaper ones.
        strategy: of all passes.
        context: ids of the tokens before every prompt; may be empty.
        draft_tokens: in a round, a number or ``auto``.
        clock: seconds.

    Raises:
        DuoError: nothing can be speculated with these.
    """

    def __init__(
        self,
        model: Model,
        verify: Source,
        draft: Source,
        strategy: str,
        context: Ids,
        draft_tokens: str = "auto",
        clock: Callable[[], float] = time.perf_counter,
    ):
        cache = model.make_cache()
        super().__init__(lambda start, _: RoutedModel(model, verify, strategy, start), cache, context, 1, clock)
        self._model, self._draft_tokens = model, draft_tokens
        self._verify, self._draft, self._lengths = checked(model, verify, draft, draft_tokens)
        self._rounds = Rounds(model, self._verify, self._draft, strategy, cache, Sampling())
        self._flops_at = flops(model)
        self._counts, self._begun = Speculation(), list[tuple[int, int, Routes | None]]()
        self._foreseen: Routes | None = None  # after the prompt, by a draft that looks ahead

    def forget(self) -> None:
        """Begin to learn anew how many tokens to draft."""
        self._lengths = drafting.lengths(self._draft_tokens)

    def prefill(self, prompts: Sequence[Ids]) -> float:
        """As without speculation; what `record` counts begins here."""
        self._counts, self._begun = Speculation(), []
        return super().prefill(prompts)

    def decode(
        self,
        tokens: int,
        after_each: Callable[[int], object] = lambda came: None,  # noqa: ARG005
    ) -> list[float]:
        """As without speculation, but the tokens of a round come together and share its time evenly.

        Args:
            tokens: with the first, which the prefill gave; no round goes beyond them.
            after_each: is called after each round with how many tokens it gave.
        """
        self._rewind(self._prompt)
        self._rounds.foreseen = foreseen = self._foreseen
        first: Any = self._first.item()
        history, seconds = [first], list[float]()
        before = self._clock()
        for done in run_rounds(self._rounds, history, self._lengths, tokens, clock=self._clock):
            now, came = self._clock(), len(done.tokens)
            self._counts = self._counts.after(done)
            self._begun.append((self._prompt + len(seconds), done.drafted, foreseen))
            foreseen = self._rounds.foreseen
            history += done.tokens
            seconds += [(now - before) / came] * came
            before = now
            after_each(came)
        return seconds

    def routes(self) -> Routes:
        """The verifying routes ``[tokens, 1, layers]`` of the tokens that were decoded last."""
        return patterns(self._model, self._verify, self._prompt, self._cache[0].offset)[:, None]

    def record(self) -> dict[str, Any]:
        """What the rounds since the last prefill came to, for a run's JSON: `Speculation`, and their ``flops``."""
        counts = {name: [*each] if isinstance(each, tuple) else each for name, each in asdict(self._counts).items()}
        return counts | {"flops": sum(self._flops(*each) for each in self._begun)}

    def _step(self, tokens: mx.array) -> mx.array:
        ids: Any = tokens.reshape(-1).tolist()
        done = self._rounds.run(ids, 0)
        self._foreseen = self._rounds.foreseen
        return mx.array([done.tokens])

    def _flops(self, start: int, drafts: int, foreseen: Routes | None) -> int:
        if isinstance(self._draft, LookAhead):
            drafting = np.broadcast_to(0 if foreseen is None else foreseen, (drafts, len(self._model.layers)))
        else:
            drafting = patterns(self._model, self._draft, start, start + drafts)
        verifying = patterns(self._model, self._verify, start, start + drafts + 1)
        table = self._flops_at(start + 1 + drafts // 2)
        shared = shared_layers(drafting, verifying[:-1])
        return touched.round_flops(self._model.config, table, drafting, verifying, shared)
