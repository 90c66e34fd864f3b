"""The ten claims of Duo-LLM (arXiv 2410.10846), each as the paper reads it and with a control that the paper lacks.

One function a claim takes the material and gives two outcomes, without and with control: `duo_mlx.study.verdict` says
how they are decided, `duo_mlx.study.controls` what the controls are. Budgets are scaled to the model: the paper's 4, 6
and 8 big layers of 12 are a third, half and two thirds. What the material does not hold leaves a claim undecided, with
the reason in words.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import comb, inf

import numpy as np
from numpy.typing import NDArray

from duo_mlx.routes import Route
from duo_mlx.study import router_claims
from duo_mlx.study.controls import SIZES, WORST
from duo_mlx.study.difficulty import HIGH, correlation, means, ranks
from duo_mlx.study.oracle_figures import (
    MEET,
    at_equal_n,
    late,
    lowest,
    mean_only,
    noise_less_routes,
    oracle_loss,
    third,
)
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed
from duo_mlx.study.verdict import Claim, Estimate, Figure, Outcome, Values, mean, of_runs, resampled, words

EVEN = 0.05  # how far from a half a share is still about even
# If a high loss implied a high gap, no token of high loss would have a gap below the median; if they had nothing to do
# with each other, half of them would. One in ten is more exceptions than an implication can bear.
EXCEPTIONS = 0.1
MOST = 0.5  # an early-exit pattern would be that of most tokens that skip
MIXED = ("random", "first_half", "alternating", "small")  # patterns of stage 1 in which small has a part
ROUTER = "needs a trained router"
SKIPPING = "needs a trained router that may skip"
NO_SKIPS = "needs an oracle that may skip"
NO_RUNS = "needs runs of both ways to train"
Outcomes = tuple[Outcome, Outcome]  # without and with control


@dataclass(frozen=True)
class Run:
    """A training run of stage 1, by ``examples/compare_stage1.py``."""

    method: str  # random or big_then_small
    seed: int
    tokens: int
    losses: Mapping[str, float]  # held-out nats a token, by pattern


@dataclass(frozen=True)
class Material:
    """What the claims are judged by.

    Args:
        found: an oracle of big and small: exact budgets 0 to L, ``none`` and schedules, with controls.
        skips: an oracle that may skip, too.
        stage1: runs of both ways to train.
        routers: on the text of ``found``.
    """

    found: Found
    skips: Found | None = None
    stage1: tuple[Run, ...] = ()
    routers: tuple[Routed, ...] = ()

    @property
    def open(self) -> str:
        """What is said of a claim's part about routers where there are none."""
        return "" if self.routers else f"router: {ROUTER}"


def oracle_is_lowest(material: Material) -> Outcomes:
    """Claim 1. Fixed is the one that was chosen on the other half of the sequences: no other is kept by sequence.

    With control: the minimum over equally many all-big passes with noise, whose mean loss is the budget's.
    """
    found, interior = material.found, range(1, material.found.layers)
    below = [
        Figure(f"{name} less oracle", mean(Values.baseline(found, k, of) - oracle_loss(found, k)), at=f"k={k}")
        for name, of in (("fixed, chosen on the other half,", "fixed_split"), ("random", "random"))
        for k in interior
    ]
    ends = [
        Figure(
            f"oracle at k={k} less all {of}",
            mean(oracle_loss(found, k) - Values.of(found, k, f"loss_{of}")),
            MEET,
        )
        for k, of in ((0, "small"), (found.layers, "big"))
    ]
    beside = [
        Figure(f"{name} less oracle", mean_only(found, k, of), None, f"k={k}")
        for name, of in (("fixed, chosen on the same,", "fixed"), ("random, best for each token,", "random_by_token"))
        for k in interior
    ]
    matched = {k: mean(Values.of(found, k, "noise_mean") - Values.of(found, k, "mean_loss")) for k in interior}
    return (
        Outcome(
            (*below, *ends, *router_claims.above_oracle(found, material.routers), *beside),
            holds="the oracle is below all in between, and all meet at the ends",
            fails="the oracle is not below all in between, or they do not meet at the ends",
            remark="an exhaustive oracle's minimum includes fixed and random and cannot be above them",
            open=material.open,
        ),
        Outcome(
            (
                *(noise_less_routes(found, k) for k in interior),
                *(Figure("mean of noise less that of routes", matched[k], None, f"k={k}") for k in interior),
            ),
            holds="at every budget between, routes beat as much noise",
            fails="at some budget, noise beats as many routes",
        ),
    )


def oracle_is_u_shaped(material: Material) -> Outcomes:
    """Claim 2. Fixed is scored on sequences that it was not chosen on, so it is the same with control.

    With control: the minimum over equally many patterns at every budget. L/3 and 2L/3 have equally many as they are.
    """
    found, layers = material.found, material.found.layers
    fixed = mean(Values.baseline(found, 1, "fixed_split") - Values.baseline(found, layers - 1, "fixed_split"))
    few_big, half = third(layers), layers // 2
    few, many = (f"best_of_{size}" for size in SIZES)

    def outcome(curve: str, at_thirds: tuple[str, ...]) -> Outcome:
        middle = Values.of(found, half, curve)
        ends = [
            Figure(f"{words(curve)} less that at k={half}", mean(Values.of(found, k, curve) - middle), at=f"k={k}")
            for k in (1, layers - 1)
        ]
        sides = [
            Figure(
                f"{words(name)} at k={few_big} less that at k={layers - few_big}",
                mean(Values.of(found, few_big, name) - Values.of(found, layers - few_big, name)),
                None,
            )
            for name in at_thirds
        ]
        return Outcome(
            (
                *ends,
                lowest(found, curve),
                Figure(f"fixed at k=1 less that at k={layers - 1}", fixed),
                *router_claims.improves(material.routers),
                *sides,
            ),
            holds="lowest in the middle, and the others improve with k",
            fails="not lowest in the middle, or another does not improve with k",
            open=material.open,
        )

    return outcome("oracle_loss", ("oracle_loss",)), outcome(few, (few, many))


def one_beats_all(material: Material) -> Outcomes:
    """Claim 3. With control: the oracle's minimum is below that over as many all-big passes with noise.

    And its routes are below all big in the context that they were not chosen in, by the same next token, which takes
    away the accidents of one pass. Beside it the mirror image: as many patterns with one small layer among big ones.
    """
    found, layers = material.found, material.found.layers
    gain = Values.of(found, 1, "loss_big") - oracle_loss(found, 1)
    into_whole = Values.of(found, 1, "loss_big") - Values.of(found, 1, "from_short")
    into_short = Values.of(found, 1, "short_loss_big") - Values.of(found, 1, "to_short")
    mirror = mean(oracle_loss(found, 1) - oracle_loss(found, layers - 1))
    return (
        Outcome(
            (Figure("all big less oracle at k=1", mean(gain)),),
            holds="one big layer, chosen by the true next token, beats all",
            fails="all big beats one big layer, even chosen by the true next token",
        ),
        Outcome(
            (
                noise_less_routes(found, 1),
                Figure("all big less routes of the other context", mean(into_whole), at="k=1, chosen in the short"),
                Figure("all big less routes of the other context", mean(into_short), at="k=1, chosen in the whole"),
                Figure(f"oracle with one big layer less oracle with one small, k={layers - 1}", mirror, None),
            ),
            holds="the choice beats as much noise, and all big in another context, too",
            fails="noise does as well, or the choice is worth nothing in another context",
        ),
    )


def big_moves_early(material: Material) -> Outcomes:
    """Claim 4. With control: less that of the routes of the highest loss, which lie where a layer matters at all."""
    found, layers = material.found, material.found.layers
    few_big, half = third(layers), layers // 2
    budgets = {few_big: (0.0, inf), half: (-EVEN, EVEN), layers - few_big: (-inf, 0.0)}
    if len(budgets) < 3:
        none = Outcome.missing(f"{layers} layers have no three budgets L/3, L/2 and 2L/3")
        return none, none

    def outcome(name: str, even: float, shares: Mapping[int, Values]) -> Outcome:
        return Outcome(
            tuple(
                Figure(f"{name} at k={k}", mean(shares[k]), (even + low, even + high), unit="")
                for k, (low, high) in budgets.items()
            ),
            holds="late, even and early",
            fails="not late, even and early",
        )

    shares_late = {k: late(found, k, "oracle_routes") for k in budgets}
    return (
        outcome("share of big in the late half", 0.5, shares_late),
        outcome(
            "that share less the worst routes'",
            0.0,
            {k: shares_late[k] - late(found, k, WORST) for k in budgets},
        ),
    )


def router_favours_late(material: Material) -> Outcomes:
    """Claim 5. It takes no minimum, so there is nothing to control."""
    if not material.routers:
        return Outcome.missing(ROUTER), Outcome.missing(ROUTER)
    outcome = Outcome(
        (*router_claims.late(material.routers), *router_claims.early(material.routers)),
        holds="every router favours late layers, and big for early tokens",
        fails="some router does not favour late layers, or big for early tokens",
    )
    return outcome, replace(outcome, remark="no minimum is taken, so this is as without control")


def router_is_like_random(material: Material) -> Outcomes:
    """Claim 6. With control: the oracle is far only if its lead is more than that of as many noisy passes."""
    if not material.routers:
        return Outcome.missing(ROUTER), Outcome.missing(ROUTER)
    way = router_claims.towards_oracle(material.found, material.routers)
    budgets = sorted({k for router in material.routers for k in router.ks})
    return (
        Outcome(
            tuple(way),
            holds="every router is about as good as random, and far from the oracle",
            fails="some router is better or worse than that",
        ),
        Outcome(
            (*way, *(noise_less_routes(material.found, k) for k in budgets)),
            holds="so it is, and the oracle's lead is more than luck's",
            fails="some router is better or worse than that, or the oracle's lead is no more than luck's",
        ),
    )


def constant_beats_schedule(material: Material) -> Outcomes:
    """Claim 7. With control: the minimum over equally many patterns at every token.

    On the way from 6 to 2 of 12 there are fewer patterns to choose from, on the (geometric) mean, than at 4.
    """
    found = material.found
    ways: dict[str, list[tuple[str, int]]] = {"falling": [], "rising": []}
    for plan in filter(None, (re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", name) for name in found.tables)):
        first, last = map(int, plan.groups())
        if first != last and (first + last) / 2 in found.exact:
            ways["falling" if first > last else "rising"].append((plan[0], (first + last) // 2))

    def outcome(less: Callable[[str, int], tuple[Values, str]]) -> Outcome:
        figures = []
        for way, plans in ways.items():
            for plan, k in plans:
                values, of = less(plan, k)
                figures.append(Figure(f"{of} of {plan} less {k}", mean(values)))
            if not plans:
                figures.append(Figure("", Estimate(None, f"needs a {way} schedule and a constant budget of its mean")))
        return Outcome(
            tuple(figures),
            holds="constant budgets beat schedules of the same mean",
            fails="a schedule beats a constant budget of the same mean",
        )

    return (
        outcome(lambda plan, k: (Values.of(found, plan, "oracle_loss") - oracle_loss(found, k), "oracle")),
        outcome(lambda plan, k: at_equal_n(found, (plan, "best_of"), (k, "best_of"))),
    )


def loss_is_not_difficulty(material: Material) -> Outcomes:
    """Claim 8. With control: the gap to all big, in which there is no minimum."""
    tables, sequences = material.found.tables, len(material.found.any["loss_small"])
    small, big = (material.found.any[name].astype(np.float64) for name in ("loss_small", "loss_big"))

    def outcome(gap: NDArray[np.float64]) -> Outcome:
        high, below = small >= np.quantile(small, HIGH), (gap < np.median(gap)).astype(np.float64)
        share = resampled(means({"below": below}, high)["below"], sequences)
        both = (("correlation of loss and gap", small, gap), ("rank correlation", ranks(small), ranks(gap)))
        beside = [
            Figure(name, resampled(correlation(x, y), sequences, Estimate(None, "one is constant")), None, unit="")
            for name, x, y in both
        ]
        return Outcome(
            (Figure("share of high losses with a gap below the median", share, (EXCEPTIONS, inf), unit=""), *beside),
            holds="a high loss does not imply a high gap",
            fails="a high loss implies a high gap, with few exceptions",
        )

    if "none" not in tables:
        return Outcome.missing("budget none is missing"), outcome(small - big)
    return outcome(small - tables["none"]["oracle_loss"]), outcome(small - big)


def skips_are_no_early_exit(material: Material) -> Outcomes:
    """Claim 9, on tokens that skip some layers but not all. With control: each one's routes in a random order.

    Routers take no minimum, so they are the same with control.
    """
    found = material.skips
    if found is None:
        return Outcome.missing(NO_SKIPS), Outcome.missing(NO_SKIPS)
    routed = router_claims.skips_late(material.routers)
    open_ = "" if routed else f"router: {SKIPPING}"
    skipped = (found.tables.get("none") or found.any)["oracle_routes"] == Route.SKIP
    count, layers = skipped.sum(axis=-1), found.layers
    some = (count > 0) & (count < layers)
    exits = (np.sort(skipped, axis=-1) == skipped).all(axis=-1).astype(np.float64)
    chance = np.array([1 / comb(layers, each) for each in range(layers + 1)])[count]
    depth = (skipped * np.linspace(0, 1, layers)).sum(axis=-1) / np.maximum(count, 1)
    shares = {
        name: resampled(share, len(skipped), Estimate(None, "no token skips some layers and not all"))
        for name, share in means({"exits": exits, "less": chance - exits, "depth": depth}, some).items()
    }
    return (
        Outcome(
            (
                Figure("share of tokens that skip just the last layers", shares["exits"], (-inf, MOST), unit=""),
                *routed,
            ),
            holds="few tokens exit early" + (", and routers skip late" if routed else ""),
            fails="most tokens exit early" + (", or some router does not skip late" if routed else ""),
            open=open_,
        ),
        Outcome(
            (
                Figure("that share by chance less the one found", shares["less"], unit=""),
                *routed,
                Figure("mean depth of a token's skips, 0 to 1", shares["depth"], None, unit=""),
            ),
            holds="tokens exit early more seldom than by chance" + (", and routers skip late" if routed else ""),
            fails="tokens exit early more often than by chance"
            + (", or some router does not skip late" if routed else ""),
            open=open_,
        ),
    )


def random_routing_trains_better(material: Material) -> Outcomes:
    """Claim 10. With control: big first has twice the tokens, so that its big saw as many as random routing in all."""
    if not material.stage1:
        return Outcome.missing(NO_RUNS), Outcome.missing(NO_RUNS)
    random, big_first = ([run for run in material.stage1 if run.method == way] for way in ("random", "big_then_small"))
    pairs = [(one, other) for one in random for other in big_first]

    def outcome(what: str, compared: list[tuple[Run, Run]]) -> Outcome:
        figures = []
        for name in (*MIXED, "big"):
            both = [(one.losses, other.losses) for one, other in compared]
            less = [second[name] - first[name] for first, second in both if name in first and name in second]
            estimate = of_runs(less, what)
            figures.append(Figure(f"big first less random, {name}", estimate, (0, inf) if name in MIXED else None))
        return Outcome(
            tuple(figures),
            holds="random routing is better in every pair of runs",
            fails="random routing is worse in every pair of runs, by some patterns",
            remark="in brackets the lowest and highest pair: so few seeds allow no interval",
        )

    equal = [(one, other) for one, other in pairs if (one.seed, one.tokens) == (other.seed, other.tokens)]
    twice = [(one, other) for one, other in pairs if 2 * one.tokens == other.tokens]
    return outcome("pairs of one seed", equal), outcome("pairs with twice the tokens", twice)


CLAIMS: tuple[tuple[str, Callable[[Material], Outcomes]], ...] = (
    ("Between budgets 0 and L the oracle is below fixed, router and random; at the ends all meet", oracle_is_lowest),
    ("The oracle's loss over k is a U, lowest near L/2; fixed and router improve with k", oracle_is_u_shaped),
    ("The oracle with one big layer beats big in all layers", one_beats_all),
    ("The oracle puts big late at L/3, about evenly at L/2 and early at 2L/3", big_moves_early),
    ("Routers favour late layers at every budget, and big for early tokens", router_favours_late),
    ("A trained router is about as good as the best of 100 random ones, far from the oracle", router_is_like_random),
    ("A constant budget beats one that falls or rises over the sequence to the same mean", constant_beats_schedule),
    ("A high all-small loss does not imply a high gap to the oracle", loss_is_not_difficulty),
    ("The oracle's skips are no early exit; a router's lean to late layers", skips_are_no_early_exit),
    ("Random routing from scratch beats big first, then small beside it frozen", random_routing_trains_better),
)


def judge(material: Material) -> tuple[Claim, ...]:
    """All claims, with what became of them."""
    return tuple(Claim(number, text, *of(material)) for number, (text, of) in enumerate(CLAIMS, 1))
