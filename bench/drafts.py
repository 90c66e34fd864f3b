"""The pattern that drafts best for given verifying routes: a search by expected speed-up, then a measurement.

What is expected of a pattern needs no decoding. Acceptance comes from one teacher-forced pass, costs from bytes: a
draft step costs the share of weight bytes that it reads, a verifying pass over several tokens what that costs against
one, but for layers in which both patterns begin alike, which a round computes once. The search starts from patterns of
known kinds and goes on by changes of one layer from the best that it knows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.bench import draft_timing
from duo_mlx.bench.acceptance import Acceptance, by_position
from duo_mlx.bench.budget import evenly_spaced
from duo_mlx.drafting import LONGEST, Floats, round_seconds, tokens_expected
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.rounds import shared_layers
from duo_mlx.routes import LETTERS, Route, Routes, format_pattern, parse_pattern
from duo_mlx.sampling import Sampling

BEAM = 3  # patterns from which the search steps before it ends
PARTS = 4  # numbers of big layers that starts have: quarters of all
AS_BYTES = {1: 1.0, LONGEST + 1: 1.0}  # what a verifying pass costs where only bytes count

Options = list[tuple[int, ...]]  # each layer's routes
Progress = Callable[[str, float, float], object]  # stage, what is done and what is to be


@dataclass(frozen=True)
class Settings:
    """What to search and to measure; all of it is in the result."""

    choices: str  # letters of the routes that a draft may have
    temp: float  # decides between patterns, and of the measurement
    costs: str  # measured, or bytes
    passes: int  # patterns to try, at most
    best: int  # patterns to measure
    rounds: int
    tokens: int  # timed in a run


@dataclass(frozen=True)
class Candidate:
    """A pattern and what is expected of it.

    Args:
        pattern: as text.
        bytes: weight bytes that a draft step reads, over those of the verifying routes.
        greedy: share of first drafted tokens that are accepted where the likeliest are taken.
        sampled: the same where tokens are sampled.
        acceptance: by position in a round, of the one that decides.
        draft_tokens: with which rounds give the most tokens a second, at least 1.
        speed_up: over plain decoding, with so many.
    """

    pattern: str
    bytes: float
    greedy: float
    sampled: float
    acceptance: tuple[float, ...]
    draft_tokens: int
    speed_up: float


@dataclass(frozen=True)
class Costs:
    """What rounds cost in the time of a plain decoding step.

    Args:
        table: weight bytes.
        drafting: those of a draft step.
        verify: the verifying routes ``[layers]``.
        growth: what a verifying pass over 1 to at least `LONGEST` + 1 tokens costs over one token's.
    """

    table: cost.RouteTable
    drafting: cost.RouteTable
    verify: Routes
    growth: Mapping[int, float]

    def share(self, pattern: Routes) -> float:
        """Weight bytes of a draft step over those of the verifying routes."""
        return float(self.drafting.of(pattern) / self.table.of(self.verify))

    def rounds(self, pattern: Routes) -> Floats:
        """Of rounds with 0 to `LONGEST` drafted tokens, ``[LONGEST + 1]``."""
        shared = shared_layers(pattern[None], self.verify[None])
        once = self.table.by_route[np.arange(shared), self.verify[:shared]].sum() / self.table.of(self.verify)
        verifying = {tokens: once + (1 - once) * growth for tokens, growth in self.growth.items()}
        return round_seconds(self.share(pattern), verifying)

    def best(self, pattern: Routes, acceptance: Sequence[float] | Floats) -> tuple[int, float]:
        """The best number of drafted tokens, at least 1, and the speed-up over plain decoding that it should bring."""
        speed_ups = tokens_expected(acceptance) / self.rounds(pattern)
        tokens = 1 + int(np.argmax(speed_ups[1:]))
        return tokens, float(speed_ups[tokens])

    def bound(self, pattern: Routes) -> float:
        """The speed-up if every drafted token were accepted."""
        return self.best(pattern, np.ones(LONGEST))[1]


def options(model: Model, choices: str) -> Options:
    """What ``choices`` (letters of routes) leave each layer, as the model realises them.

    Raises:
        DuoError: a letter that is no route's, or none.
    """
    if not choices or not set(choices) <= set(LETTERS):
        raise DuoError(f"choices {choices!r}: give letters of routes, such as sB or -sB")
    layers = model.config.num_hidden_layers
    realised = [model.config.realised(np.full(layers, LETTERS.index(letter), np.uint8)) for letter in choices]
    return [tuple(sorted({int(pattern[layer]) for pattern in realised})) for layer in range(layers)]


def starts(model: Model, choices: str) -> list[Routes]:
    """Patterns of known kinds: one route everywhere; some big layers, first, evenly spaced or the best known ones."""
    layers = model.config.num_hidden_layers
    lower = [route for route in (Route.SMALL, Route.SKIP) if LETTERS[route] in choices]
    found = [np.full(layers, route, np.uint8) for route in lower]
    known = [(each["loss"], parse_pattern(each["pattern"], layers)) for each in model.config.best_patterns]
    for count in sorted({max(1, layers * part // PARTS) for part in range(1, PARTS)}):
        for spaced in (np.arange(layers) < count, evenly_spaced(layers, count) == Route.BIG):
            found += [np.where(spaced, Route.BIG, route).astype(np.uint8) for route in lower]
        within = [each for each in known if (each[1] == Route.BIG).sum() <= count]
        found += [min(within, key=lambda each: each[0])[1]] if within else []
    return [model.config.realised(pattern) for pattern in found]


def search(
    judge: Callable[[Routes], Candidate],
    costs: Costs,
    starts: Sequence[Routes],
    options: Options,
    passes: int,
    tried: Callable[[int], object] = lambda _: None,
) -> list[Candidate]:
    """Patterns that were judged, the best first.

    Steps go to all patterns that differ in one layer, from the best pattern until none of the `BEAM` best is left to
    step from. What reads no less than the verifying routes, or could not be the best if all its drafts were accepted,
    is passed over.

    Args:
        judge: of a pattern ``[layers]``, by one pass.
        costs: of rounds.
        starts: to begin with.
        options: each layer's routes; a start with others is left out.
        passes: at most.
        tried: is called with the number of passes.
    """
    known: dict[str, Candidate] = {}
    stepped: set[str] = set()

    def add(pattern: Routes) -> None:
        text = format_pattern(pattern)
        if text in known or len(known) >= passes or costs.share(pattern) >= 1:
            return
        if known and costs.bound(pattern) <= max(each.speed_up for each in known.values()):
            return
        known[text] = judge(pattern)
        tried(len(known))

    def ranked() -> list[Candidate]:
        return sorted(known.values(), key=lambda each: (-each.speed_up, each.bytes, each.pattern))

    for pattern in starts:
        if all(route in own for route, own in zip(pattern, options, strict=True)):
            add(pattern)
    while ahead := [each.pattern for each in ranked()[:BEAM] if each.pattern not in stepped]:
        stepped.add(ahead[0])
        here = parse_pattern(ahead[0], len(options))
        for layer, own in enumerate(options):
            for route in own:
                add(np.where(np.arange(len(here)) == layer, route, here).astype(np.uint8))
    return ranked()


def study(
    model: Model, verify: Routes, tokens: NDArray[np.integer], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Search, measure the best and all small, and choose; the record of it all.

    Args:
        model: a Duo.
        verify: the verifying routes ``[layers]``, as the model realises them.
        tokens: ids ``[windows, tokens]`` of a text, more in a window than a prompt of `draft_timing.PROMPT`.
        settings: how much.
        progress: is told what is done.

    Raises:
        DuoError: no pattern reads less than the verifying routes do.
    """
    draft_timing.check_room(model, settings.tokens)
    prompts = [row[: draft_timing.PROMPT].tolist() for row in tokens]
    growth: Mapping[int, float] = AS_BYTES
    if settings.costs == "measured":
        growth = draft_timing.growth(model, verify, prompts[0], lambda *done: progress("timing passes", *done))
    costs = Costs(cost.weight_bytes(model), cost.draft_bytes(model), verify, growth)
    acceptance = Acceptance(model, verify, tokens, (Sampling(), Sampling(settings.temp or 1.0)))

    def judge(pattern: Routes) -> Candidate:
        greedy, sampled = acceptance.of(pattern)
        positions = by_position(sampled if settings.temp else greedy)
        means = float(greedy.mean()), float(sampled.mean())
        best = costs.best(pattern, positions)
        return Candidate(format_pattern(pattern), costs.share(pattern), *means, tuple(positions.tolist()), *best)

    found = search(
        judge,
        costs,
        starts(model, settings.choices),
        options(model, settings.choices),
        settings.passes,
        lambda done: progress("patterns", done, settings.passes),
    )
    if not found:
        raise DuoError(
            f"--choices {settings.choices}: no pattern reads fewer weights than --verify {format_pattern(verify)}"
        )
    small = format_pattern(model.config.realised(np.full(len(verify), Route.SMALL, np.uint8)))
    chosen = [each for place, each in enumerate(found) if place < settings.best or each.pattern == small]
    measured, seconds = draft_timing.measure(
        model,
        prompts,
        verify,
        {each.pattern: each.draft_tokens for each in chosen},
        Sampling(settings.temp),
        settings.tokens,
        settings.rounds,
        lambda *done: progress("decoding", *done),
    )
    best = max(measured, key=lambda pattern: measured[pattern]["speed_up"]["median"])
    return {
        "verify": format_pattern(verify),
        "draft_vocabulary": model.config.draft_vocabulary,
        "settings": asdict(settings),
        "verifying_passes": {str(count): each for count, each in growth.items()},
        "candidates": [asdict(each) for each in found],
        "measured": measured,
        "best": best,
        "faster": measured[best]["speed_up"]["low"] > 1,
        "runs_s": seconds,
    }
