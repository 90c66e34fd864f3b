"""Timing what drafts are for: verifying passes over several tokens, and speculation against plain decoding.

Everything is interleaved (`duo_mlx.bench.interleave`), and ratios are paired within rounds.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from duo_mlx import cost
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.drafting import LONGEST
from duo_mlx.errors import DuoError
from duo_mlx.intervals import interval
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Routes, parse_pattern
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import Speculation, speculate

PROMPT = 32  # tokens that are read before a run
PASSES = (1, 2, 4, LONGEST + 1)  # tokens of verifying passes that are timed
REPEATS = 10  # rounds of them
PLAIN = "plain"  # decoding by the verifying routes

Done = Callable[[int, int], object]  # what is done and what is to be


def check_room(model: Model, tokens: int) -> None:
    """Refuse runs of more tokens than a prompt leaves room for.

    Raises:
        DuoError: the model's context is too short, or its window, from which nothing is taken back once it is full.
    """
    limits = {
        "context": model.config.max_position_embeddings,
        "window": min(filter(None, cost.windows(model)), default=None),
    }
    for name, limit in limits.items():
        if limit is not None and PROMPT + max(tokens, LONGEST + 1) > limit:
            raise DuoError(f"--tokens {tokens}: after prompts of {PROMPT} tokens the model's {name} of {limit} is full")


def growth(model: Model, verify: Routes, prompt: Sequence[int], done: Done) -> dict[int, float]:
    """What a verifying pass over each number of `PASSES` costs over that of one token, after a prompt."""
    cache = model.make_cache()
    mx.eval(model(mx.array([prompt]), cache, routes=verify))

    def verifying(tokens: int) -> Callable[[], None]:
        inputs = mx.array([prompt[:tokens]])

        def call() -> None:
            mx.eval(mx.argmax(model(inputs, cache, routes=verify), axis=-1))
            for layer in cache:
                layer.trim(tokens)

        return call

    calls = {str(tokens): verifying(tokens) for tokens in PASSES}
    timings = interleave(calls, REPEATS, after_round=lambda number: done(number, REPEATS))
    return {tokens: statistics.median(timings.ratios(str(tokens), {"1": 1})) for tokens in PASSES}


def measure(
    model: Model,
    prompts: Sequence[list[int]],
    verify: Routes,
    drafts: Mapping[str, int],
    sampling: Sampling,
    tokens: int,
    rounds: int,
    done: Done,
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Speculation by each draft against plain decoding, in interleaved rounds.

    Args:
        model: a Duo.
        prompts: ids; a run takes the next, and all decoders take them in the same order.
        verify: the verifying routes ``[layers]``.
        drafts: by pattern, how many tokens a round drafts.
        sampling: of all.
        tokens: of a run that are timed, after a first one that comes from the prompt.
        rounds: how many, each there and back.
        done: is told of rounds.

    Returns:
        By pattern the speed-up with its interval and what became of drafts; the seconds of all runs.
    """
    policy, layers = FixedPolicy(verify), model.config.num_hidden_layers
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *drafts)}
    counts: dict[str, list[Speculation]] = {name: [] for name in drafts}

    def plain(prompt: list[int]) -> Iterator[Any]:
        routed = RoutedModel(model, policy)
        return generate_step(mx.array(prompt), routed, max_tokens=tokens + 1, sampler=sampling)

    def speculative(pattern: str, draft_tokens: int) -> Callable[[list[int]], Iterator[Any]]:
        def steps(prompt: list[int]) -> Iterator[Any]:
            found = speculate(
                model,
                prompt,
                policy,
                FixedPolicy(parse_pattern(pattern, layers)),
                draft_tokens=draft_tokens,
                max_tokens=tokens + 1,
                sampler=sampling,
            )
            for token in found:
                yield token
            assert token.speculation is not None  # every token of `speculate` has it
            counts[pattern].append(token.speculation)

        return steps

    def run(name: str, decode: Callable[[list[int]], Iterator[Any]]) -> Callable[[], None]:
        numbers = count()

        def call() -> None:
            number = next(numbers)
            mx.random.seed(number)
            steps = decode(prompts[number % len(prompts)])
            next(steps)
            start = time.perf_counter()
            for _ in steps:
                pass
            seconds[name].append(time.perf_counter() - start)

        return call

    decoders = {PLAIN: plain} | {name: speculative(name, length) for name, length in drafts.items()}
    calls = {name: run(name, decode) for name, decode in decoders.items()}
    interleave(calls, rounds, after_round=lambda number: done(number, rounds))
    runs = {name: each[1:] for name, each in seconds.items()}  # the first was for warming up
    timings = Timings(runs)
    measured = {
        name: {"draft_tokens": length, "speed_up": interval(timings.ratios(PLAIN, {name: 1})).record()}
        | _summed(counts[name])
        for name, length in drafts.items()
    }
    return measured, runs


def _summed(counts: Sequence[Speculation]) -> dict[str, Any]:
    """What drafts came to in all runs; the first position is that of a round's first drafted token."""
    drafted, accepted = (
        [sum(column) for column in zip(*(getattr(each, name) for each in counts), strict=True)]
        for name in ("drafted", "accepted")
    )
    return {
        "drafted_by_position": drafted,
        "acceptance_by_position": [stood / tried for stood, tried in zip(accepted, drafted, strict=True)],
        "tokens_per_verification": sum(each.tokens for each in counts) / sum(each.verifications for each in counts),
    }
