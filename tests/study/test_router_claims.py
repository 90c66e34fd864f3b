"""What the claims say of routers: made routers for which each one holds, fails and is undecided, and their figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from duo_mlx.routes import Route
from duo_mlx.study import claims
from duo_mlx.study.claims import Material, judge
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed
from duo_mlx.study.verdict import FAILS, HOLDS, UNDECIDED

LAYERS, SEQUENCES, LENGTH = 6, 12, 20  # of the made oracle
KS = (1, 3, 5)
FALLING = {1: 4.75, 3: 4.7, 5: 4.65}  # about as good as random, which is 4.7 at each budget
LATE, EVEN, EARLY = (0.1, 0.2, 0.3, 0.5, 0.6, 0.7), (0.4,) * 6, (0.7, 0.6, 0.5, 0.3, 0.2, 0.1)
SWING = np.where(np.arange(SEQUENCES) % 2, 1.0, -1.0)  # of what differs from sequence to sequence


@pytest.fixture
def router(made):
    """``router(...)``: one of which every claim holds.

    Args: mean losses by budget; the share of tokens with big by layer, and how much it is more in the first quarter of
    a sequence; that of skip by layer among what is not big, None: no skips; and how much losses, the first quarter's
    share and layers' shares (more in late layers) differ to either side from sequence to sequence.
    """
    base = made().tables["3"]["loss_big"] - 4.0  # what is a sequence's and a token's own

    def make(
        name="mine",
        losses=FALLING,
        by_layer=LATE,
        first=0.2,
        skips=None,
        unsure=0.0,
        unsure_first=0.0,
        unsure_layers=0.0,
    ):
        random = np.random.default_rng(3)
        by_sequence = SWING[:, None, None]
        early = (np.arange(LENGTH) < LENGTH // 4)[:, None] * (first + unsure_first * by_sequence)
        tilt = unsure_layers * by_sequence * (np.arange(LAYERS) - 2.5)
        shares = np.array(by_layer) + early + tilt
        routes = []
        for _ in losses:
            drawn = random.random((2, SEQUENCES, LENGTH, LAYERS))
            other = (
                Route.SMALL if skips is None else np.where(drawn[1] < np.array(skips) + tilt, Route.SKIP, Route.SMALL)
            )
            routes.append(np.where(drawn[0] < shares, Route.BIG, other).astype(np.uint8))
        loss = [level + base + unsure * SWING[:, None] for level in losses.values()]
        return Routed(name, tuple(losses), np.array(loss, np.float32), np.stack(routes))

    return make


@pytest.fixture
def judged(made):
    """``judged(claim, *routers)``: its two outcomes."""

    def judge(claim, *routers, found=None, skips=None):
        _, by = claims.CLAIMS[claim - 1]
        return by(Material(found or made(), skips, routers=routers))

    return judge


def skipping(pattern="-BBs"):
    """An oracle that may skip, all tokens of which have this pattern."""
    routes = np.tile(np.array(["-sB".index(letter) for letter in pattern], np.uint8), (SEQUENCES, LENGTH, 1))
    return Found(Path("skips"), {"budgets": {}}, {"none": {"oracle_routes": routes}})


def verdicts(outcomes):
    return tuple(outcome.verdict for outcome in outcomes)


def figure(outcome, name, at=""):
    """The one figure of that name."""
    (found,) = (each for each in outcome.figures if each.name == name and each.at == at)
    return found


@pytest.mark.parametrize(
    ("claim", "changes", "expected"),
    [
        (1, {}, (HOLDS, HOLDS)),
        (1, {"losses": {1: 4.7, 3: 3.0}}, (FAILS, HOLDS)),  # the oracle has 3.2 at k=3
        (1, {"losses": {1: 4.7, 3: 3.25}, "unsure": 1.0}, (UNDECIDED, HOLDS)),
        (2, {}, (HOLDS, HOLDS)),
        (2, {"losses": {1: 4.6, 5: 4.7}}, (FAILS, FAILS)),
        (2, {"losses": {1: 4.6, 3: 9.0, 5: 4.5}}, (HOLDS, HOLDS)),  # its ends are compared
        (2, {"losses": {3: 4.7}}, (UNDECIDED, UNDECIDED)),
        (5, {}, (HOLDS, HOLDS)),
        (5, {"by_layer": EARLY}, (FAILS, FAILS)),
        (5, {"by_layer": EVEN, "unsure_layers": 0.1}, (UNDECIDED, UNDECIDED)),
        (5, {"first": -0.1}, (FAILS, FAILS)),
        (5, {"first": 0.0, "unsure_first": 0.2}, (UNDECIDED, UNDECIDED)),
        (5, {"by_layer": (-1,) * 6}, (UNDECIDED, UNDECIDED)),  # no big at all
        (6, {}, (HOLDS, HOLDS)),
        (6, {"losses": {3: 4.0}}, (FAILS, FAILS)),
        (6, {"losses": {3: 5.0}}, (FAILS, FAILS)),
        (6, {"losses": {3: 4.7}, "unsure": 0.4}, (UNDECIDED, UNDECIDED)),
    ],
)  # fmt: skip
def test_one_router_decides(router, judged, claim, changes, expected):
    assert verdicts(judged(claim, router(**changes))) == expected


@pytest.mark.parametrize(
    ("skips", "unsure", "expected"),
    [
        ((0.1, 0.1, 0.1, 0.9, 0.9, 0.9), 0, (HOLDS, HOLDS)),
        ((0.9, 0.9, 0.9, 0.1, 0.1, 0.1), 0, (FAILS, FAILS)),
        ((0.5,) * 6, 0.15, (UNDECIDED, UNDECIDED)),
    ],
)
def test_where_a_router_skips_decides(router, judged, skips, unsure, expected):
    both = judged(9, router(by_layer=EVEN, skips=skips, unsure_layers=unsure), skips=skipping())
    assert verdicts(both) == expected and not any(outcome.open for outcome in both)
    without, control = (outcome.sentence.partition(":")[0] for outcome in both)
    assert (without, control) == {
        HOLDS: (
            "few tokens exit early, and routers skip late",
            "tokens exit early more seldom than by chance, and routers skip late",
        ),
        FAILS: (
            "most tokens exit early, or some router does not skip late",
            "tokens exit early more often than by chance, or some router does not skip late",
        ),
        UNDECIDED: ("undecided at this size",) * 2,
    }[expected[0]]


def test_a_router_that_does_not_skip_leaves_that_part_open(router, judged):
    without, control = judged(9, router(), skips=skipping())
    assert (without.verdict, control.verdict) == (HOLDS, HOLDS)
    assert without.open == control.open == "router: needs a trained router that may skip"
    assert without.sentence.startswith("few tokens exit early: ")
    for outcome in (without, control):
        assert not any("mine" in each.name for each in outcome.figures)


def test_one_router_of_several_is_enough_to_fail(router, judged):
    good = router("good")
    for claim, changes in ((1, {"losses": {3: 3.0}}), (2, {"losses": {1: 4.6, 5: 4.7}}), (5, {"by_layer": EARLY}),
                           (6, {"losses": {3: 4.0}})):  # fmt: skip
        assert verdicts(judged(claim, good))[0] == HOLDS
        without, _ = judged(claim, good, router("bad", **changes))
        assert without.verdict == FAILS
        assert {each.name.split()[0].rstrip(":") for each in without.figures if each.verdict == FAILS} == {"bad"}


def test_figures_of_losses_are_those_of_numpy(router, judged, made):
    mine, found = router(losses={1: 4.7, 3: 4.4, 5: 4.2}), made()
    ways, below = judged(6, mine)[0], judged(1, mine)[0]
    for place, k in enumerate(KS):
        table, summary = found.tables[str(k)], found.summary["budgets"][str(k)]
        oracle, loss = table["oracle_loss"].mean(dtype=np.float64), mine.loss[place].mean(dtype=np.float64)
        assert figure(below, "mine: less oracle", f"k={k}").estimate.interval.median == pytest.approx(loss - oracle)
        random = np.mean(summary["random_by_sequence"])
        way = figure(ways, "mine: way from random to the oracle", f"k={k}")
        assert way.estimate.interval.median == pytest.approx((random - loss) / (random - oracle))
        assert way.bounds == (-0.1, 0.1) and way.unit == "" and way.estimate.interval.low < way.estimate.interval.high
    gained = figure(judged(2, mine)[0], "mine at k=1 less that at k=5").estimate.interval.median
    assert gained == pytest.approx((mine.loss[0] - mine.loss[2]).mean(), abs=1e-6)


def test_figures_of_routes_are_those_of_numpy(router, judged):
    mine = router(by_layer=EVEN, skips=(0.1, 0.1, 0.4, 0.4, 0.7, 0.7))
    where, skips = judged(5, mine)[0], judged(9, mine, skips=skipping())[0]
    for k, routes in zip(mine.ks, mine.routes, strict=True):
        places = [(token, layer, route) for each in routes for (token, layer), route in np.ndenumerate(each)]
        late = np.mean([layer >= 3 for _, layer, route in places if route == Route.BIG])
        first, rest = (
            np.mean([route == Route.BIG for token, _, route in places if (token < 5) == early])
            for early in (True, False)
        )
        depth = np.mean([layer / 5 for _, layer, route in places if route == Route.SKIP])
        for outcome, name, expected in (
            (where, "mine: share of big in the late half", late),
            (where, "mine: share of big in the first quarter less that in the rest", first - rest),
            (skips, "mine: mean depth of its skips", depth),
        ):
            assert figure(outcome, name, f"k={k}").estimate.interval.median == pytest.approx(expected)


def test_a_layer_in_the_middle_is_in_neither_half(router, judged):
    mine = router()
    routes = np.full((3, SEQUENCES, LENGTH, 5), Route.SMALL, np.uint8)
    routes[..., 2] = Route.BIG
    routes[..., 4] = Route.BIG
    routes[:, :, ::2, 0] = Route.BIG
    late = figure(judged(5, replace(mine, routes=routes))[0], "mine: share of big in the late half", "k=3")
    assert late.estimate.interval.median == pytest.approx(2 / 3)


def test_sequences_without_big_or_skips_do_not_hide_the_others(router, judged):
    mine = router(by_layer=EVEN, skips=(0.1, 0.1, 0.1, 0.9, 0.9, 0.9))
    mine.routes[:, 0] = Route.SMALL
    late = figure(judged(5, mine)[0], "mine: share of big in the late half", "k=1").estimate
    assert late.interval.median == pytest.approx((mine.routes[0, ..., 3:] == 2).sum() / (mine.routes[0] == 2).sum())
    assert judged(9, mine, skips=skipping())[0].verdict == HOLDS
    mine.routes[1] = Route.SMALL
    assert figure(judged(5, mine)[0], "mine: share of big in the late half", "k=3").estimate.why == "it takes no big"
    without, _ = judged(9, mine, skips=skipping())
    depth = figure(without, "mine: mean depth of its skips", "k=3").estimate
    assert depth.interval is None and depth.why == "it skips nothing there"
    assert "nan" not in without.sentence


def test_the_control_of_claim_6_is_the_oracles_lead_over_noise(router, judged, made):
    mine, noise = router(losses={3: 4.7}), "noise less routes"
    without, control = judged(6, mine)
    assert [each.at for each in control.figures if each.name == noise] == ["k=3, best of 12"]
    assert without.figures == tuple(each for each in control.figures if each.name != noise)
    level = {("3", "noise_12"): 3.0}
    assert verdicts(judged(6, mine, found=made(levels=level))) == (HOLDS, FAILS)
    assert verdicts(judged(6, mine, found=made(levels={("2", "noise_12"): 3.0}))) == (HOLDS, HOLDS)  # not its budget


def test_what_the_oracle_lacks_leaves_a_routers_figures_undecided(router, judged, made):
    mine = router()
    without, _ = judged(6, mine, found=made(drop={"3"}))
    assert without.verdict == UNDECIDED and "budget 3 is missing" in without.sentence
    found = made()
    found.summary["budgets"]["1"]["random_by_sequence"] = None
    without, _ = judged(6, mine, found=found)
    assert without.verdict == UNDECIDED and "budget 1 has no random by sequence" in without.sentence
    single = judged(2, router(losses={3: 4.7}))[0]
    assert "mine at k=3 less that at k=3: it has one budget" in single.sentence


def test_few_sequences_decide_nothing(router, judged, made):
    mine = router()
    few = replace(mine, loss=mine.loss[:, :5], routes=mine.routes[:, :5])
    for claim in (1, 2, 5, 6):
        assert verdicts(judged(claim, few, found=made(sequences=5))) == (UNDECIDED, UNDECIDED)


def test_routers_are_looked_at_in_all_claims_about_them(router, made):
    material = Material(made(), skipping(), routers=(router(skips=(0.1,) * 3 + (0.9,) * 3),))
    found = {claim.number: claim for claim in judge(material)}
    with_router = {
        number
        for number, claim in found.items()
        if any("mine" in each.name for each in (*claim.without.figures, *claim.control.figures))
    }
    assert with_router == {1, 2, 5, 6, 9}
    for number in with_router:
        assert (found[number].without.verdict, found[number].control.verdict) == (HOLDS, HOLDS)
        assert not found[number].without.open and not found[number].control.open
    assert "no minimum is taken" in found[5].control.sentence
    alone = judge(Material(made(), skipping()))
    assert [claim.number for claim in alone if "router" in claim.without.open] == [1, 2, 9]
    assert alone[4].without.sentence == alone[5].control.sentence == "undecided: needs a trained router"
