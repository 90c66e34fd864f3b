"""Self-speculative decoding: a cheap route drafts tokens, another verifies them in one pass, and decides the text.

One model does both (Draft & Verify, arXiv 2309.08168; LayerSkip, 2404.16710; SWIFT, 2410.06916), and one KV cache
serves both. A round after n positions in the cache:

1. Draft: the last token, and then each drafted one but the last, go through the draft's routes one by one, unseen by
   the host. They write keys and values at positions n, n + 1 ...
2. Take back: these positions leave the cache. Only the first layers, in which both routes are the same, keep theirs,
   and the hidden states after them: a verifying pass would find nothing else there.
3. Verify: one pass by the verifying routes over the last token and all drafted ones, from the layer where the routes
   part, writes positions n, n + 1 ... anew.
4. Judge: the host waits, once. Drafted tokens stand or fall as in `duo_mlx.sampling.Sampling.judge`, one token more
   comes from the same pass, and positions after those that stand leave the cache.

A round that drafts nothing is a step of plain decoding, and where the next drafts nothing either, it is begun before
the host waits.

So the cache holds the verifying routes' keys and values. The verifying pass makes its sums in another order than
decoding does, and its logits differ in the last bits: of two tokens as near to each other as that, either may come.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

from duo_mlx import cost, drafting, sampling
from duo_mlx.errors import DuoError
from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.policies import Policy
from duo_mlx.rounds import LogitsProcessor, Round, Rounds, Step, patterns
from duo_mlx.routed import Source
from duo_mlx.router import Router

COMPARED = 1024  # positions over which a draft's bytes are compared with the verifier's
TIDY = 256  # rounds after which MLX's cache of free memory is emptied


@dataclass(frozen=True)
class Speculation:
    """What speculation came to so far.

    A verification gives one token, and those drafted ones that stand. Of a round that is begun all count.

    Args:
        verifications: how many there were.
        drafted: by position, how many tokens were drafted there.
        accepted: how many of them stood.
        weight_bytes: that all passes read, drafts and verifications (`duo_mlx.cost`).
        cache_bytes: of keys and values that they read.
    """

    verifications: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    weight_bytes: int = 0
    cache_bytes: int = 0

    @property
    def tokens(self) -> int:
        """What the verifications gave."""
        return self.verifications + sum(self.accepted)

    @property
    def acceptance(self) -> list[float]:
        """By draft position, the share of tokens that stood."""
        return [stood / drafted for stood, drafted in zip(self.accepted, self.drafted, strict=True)]

    def after(self, done: Round) -> "Speculation":
        """With one round more."""
        return Speculation(
            self.verifications + 1,
            _counted(self.drafted, done.drafted, done.drafted),
            _counted(self.accepted, done.accepted, done.drafted),
            self.weight_bytes + done.weight_bytes,
            self.cache_bytes + done.cache_bytes,
        )


def _counted(counts: tuple[int, ...], more: int, places: int) -> tuple[int, ...]:
    """``counts`` with one more at the first places, of which there are at least so many."""
    longer = counts + (0,) * (places - len(counts))
    return tuple(count + (place < more) for place, count in enumerate(longer))


@dataclass(frozen=True)
class Token:
    """One generated token.

    Args:
        token: its id.
        logprobs: ``[vocab]``, of the pass that verified it.
        from_draft: it was drafted, and stood.
        corrected: it came instead of a drafted one that did not stand.
        speculation: the count up to its round; None where nothing speculates.
    """

    token: int
    logprobs: mx.array
    from_draft: bool = False
    corrected: bool = False
    speculation: Speculation | None = None


def speculate(
    model: Model,
    prompt: Sequence[int],
    verify: Source,
    draft: Source,
    *,
    draft_tokens: int | str | drafting.Lengths = "auto",
    strategy: str = "auto",
    max_tokens: int = 256,
    sampler: object = None,
    logits_processors: Sequence[LogitsProcessor] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
    **unknown: Any,
) -> Generator[Token, None, None]:
    """Generate what ``verify`` gives, for one sequence, with drafts by ``draft``.

    Args:
        model: a Duo.
        prompt: ids of the tokens to read, at least one.
        verify: the routes that decide the text, known to the host.
        draft: cheaper ones, known to the host, or a router that looks ahead; where they end, nothing is drafted.
        draft_tokens: how many to draft in a round, ``auto``, or what else chooses (`duo_mlx.drafting`).
        strategy: of all passes.
        max_tokens: to generate; the verifying routes must reach as far.
        sampler: a `duo_mlx.sampling.Sampling`; None: the likeliest token.
        logits_processors: as mlx-lm's. They see drafted tokens, too, and so must depend on nothing but their arguments.
        prompt_cache: what was read before the prompt, by the verifying routes. When the generator has ended or is
            closed, it holds the prompt and the tokens that were yielded, without the last.
        prefill_step_size: tokens of the prompt in one pass.

    Yields:
        One `Token` after the other. The first comes from the prompt, as without speculation.

    Raises:
        DuoError: routes, a sampler, a cache or an argument with which nothing can be speculated.
    """
    if unknown:
        raise DuoError(f"speculation does not know {', '.join(sorted(unknown))}; leave it out, or do not speculate")
    verify, draft, lengths = checked(model, verify, draft, draft_tokens)
    cache = prompt_cache or model.make_cache()
    start: int = cache[0].offset
    _check_cache(cache, start + len(prompt) + max_tokens - 1)
    rounds = Rounds(model, verify, draft, strategy, cache, sampling.known(sampler), logits_processors or ())
    history, counts = list(prompt), Speculation()
    try:
        rounds.read(history[:-1], prefill_step_size)
        for done in run_rounds(rounds, history, lengths, len(prompt) + max_tokens, 0):
            counts = counts.after(done)
            for place, token in enumerate(done.tokens):
                history.append(token)
                from_draft = place < done.accepted
                yield Token(token, done.logprobs[place], from_draft, not from_draft and place < done.drafted, counts)
            if counts.verifications % TIDY == 0:
                mx.clear_cache()
    finally:
        for layer in cache:
            layer.trim(max(0, layer.offset - (start + len(history) - 1)))


def run_rounds(
    rounds: Rounds,
    history: Sequence[int],
    lengths: drafting.Lengths,
    until: int,
    wanted: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Round, None, None]:
    """Rounds until ``history`` has ``until`` tokens; whoever takes one adds its tokens there before the next.

    ``wanted`` is how many tokens the first one is to draft; None: what ``lengths`` chooses, as for all others. Where
    two rounds after each other draft nothing, the second is begun before the first is waited for. ``clock`` gives the
    seconds that ``lengths`` learns from.
    """
    under_way: Step | None = None
    while (left := until - len(history)) > 0:
        drafts = min(lengths.choose() if wanted is None else wanted, left - 1)
        wanted, before = None, clock()
        if drafts or rounds.looks_ahead:
            done = rounds.run(history, drafts)
        else:
            step, under_way = under_way or rounds.step(history), None
            if left > 1:
                wanted = lengths.choose()
                under_way = None if min(wanted, left - 2) else rounds.step(history, step)
            done = step.read()
        lengths.observe(done.drafted, done.accepted, clock() - before)
        yield done


def checked(
    model: Model, verify: Source, draft: Source, draft_tokens: int | str | drafting.Lengths
) -> tuple[Policy, Policy | LookAhead, drafting.Lengths]:
    """What `speculate` works with, of its arguments of the same names.

    Raises:
        DuoError: nothing can be speculated with them.
    """
    lengths = drafting.lengths(draft_tokens)
    verify, draft = _known(model, verify, draft)
    _check_length(model, lengths)
    return verify, draft, lengths


def _known(model: Model, verify: Source, draft: Source) -> tuple[Policy, Policy | LookAhead]:
    """Both, if the host knows them in time and the draft's routes are not the dearer ones, as far as that is known."""
    if isinstance(verify, Router | LookAhead):
        raise DuoError(
            "a router cannot verify: it decides token by token, and verification needs routes that are known before; "
            "choose another route, or do not speculate"
        )
    if isinstance(draft, Router):
        raise DuoError(
            "a router cannot draft: it decides within the pass, and speculation needs routes that are known before; "
            "speculate by small, a pattern or budget:K, or by one that looks ahead"
        )
    if isinstance(draft, LookAhead):
        return verify, draft
    drafted = _mean_bytes(model, draft, cost.draft_bytes(model))
    verified = _mean_bytes(model, verify, cost.weight_bytes(model))
    if drafted > verified:
        raise DuoError(
            f"the draft's routes read {drafted:,.0f} bytes of weights a token and the verifying ones {verified:,.0f}; "
            "speculate by cheaper routes"
        )
    return verify, draft


def _mean_bytes(model: Model, policy: Policy, table: cost.RouteTable) -> float:
    """What ``table`` says of a token, over the first positions."""
    stop = COMPARED if policy.length is None else min(COMPARED, policy.length)
    return float(table.of(patterns(model, policy, 0, stop)).mean())


def _check_length(model: Model, lengths: drafting.Lengths) -> None:
    context = model.config.max_position_embeddings
    if isinstance(lengths, drafting.Fixed) and context is not None and lengths.tokens >= context:
        raise DuoError(f"draft_tokens is {lengths.tokens}, but the model's context is {context}; draft fewer")


def _check_cache(cache: list[Any], positions: int) -> None:
    """Whether tokens can be taken back from a cache while it grows to so many positions."""
    for layer in cache:
        if type(layer) is RotatingKVCache and positions > layer.max_size:
            raise DuoError(
                f"speculation takes tokens back, which a RotatingKVCache cannot once it is full: its window is "
                f"{layer.max_size} tokens, and prompt and max_tokens come to {positions}"
            )
        if type(layer) not in (KVCache, QuantizedKVCache, RotatingKVCache):
            raise DuoError(f"speculation takes tokens back, which is not known of a {type(layer).__name__}")
