"""The ten claims: made oracles in which each one holds, fails and is undecided, and figures that brute force finds."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from duo_mlx.routes import Route
from duo_mlx.study import claims
from duo_mlx.study.claims import Material, Run, judge
from duo_mlx.study.results import Found
from duo_mlx.study.verdict import FAILS, HOLDS, UNDECIDED

SEQUENCES, LENGTH = 12, 20  # of the made oracle


def outcomes(claim, material):
    """The two outcomes of a claim by its number."""
    _, judged = claims.CLAIMS[claim - 1]
    return judged(material)


def verdicts(made, claim, **changes):
    return tuple(outcome.verdict for outcome in outcomes(claim, Material(made(**changes))))


def figure(outcome, name, at=""):
    """The one figure whose name begins so."""
    (found,) = (each for each in outcome.figures if each.name.startswith(name) and each.at.startswith(at))
    return found.estimate.interval


ORACLE, BEST, NOISE = "oracle_loss", "best_of_12", "noise_12"


@pytest.mark.parametrize(
    ("claim", "changes", "expected"),
    [
        (1, {}, (HOLDS, HOLDS)),
        (1, {"levels": {("2", "fixed_split"): 3.0}}, (FAILS, HOLDS)),
        (1, {"levels": {("5", "random"): 3.0}}, (FAILS, HOLDS)),
        (1, {"levels": {("0", ORACLE): 4.0}}, (FAILS, HOLDS)),
        (1, {"levels": {("6", ORACLE): 3.9}}, (FAILS, HOLDS)),
        (1, {"unsure": {("4", "random"): 5}}, (UNDECIDED, HOLDS)),
        (1, {"levels": {("1", NOISE): 3.0}}, (HOLDS, FAILS)),
        (1, {"unsure": {("3", NOISE): 0.6}}, (HOLDS, UNDECIDED)),
        (1, {"levels": {("6", NOISE): 0.0, ("0", NOISE): 0.0}}, (HOLDS, HOLDS)),  # only budgets in between count
        (2, {}, (HOLDS, HOLDS)),
        (2, {"levels": {("1", ORACLE): 3.1}}, (FAILS, HOLDS)),
        (2, {"levels": {("5", BEST): 3.0}}, (HOLDS, FAILS)),
        (2, {"levels": {("5", "fixed_split"): 5.0}}, (FAILS, FAILS)),
        (2, {"unsure": {("3", ORACLE): 5}}, (UNDECIDED, HOLDS)),
        (2, {"unsure": {("3", BEST): 5}}, (HOLDS, UNDECIDED)),
        (3, {}, (HOLDS, HOLDS)),
        (3, {"levels": {("1", ORACLE): 4.5}}, (FAILS, HOLDS)),
        (3, {"levels": {("1", NOISE): 3.0}}, (HOLDS, FAILS)),
        (3, {"levels": {("1", "to_short"): 4.5}}, (HOLDS, FAILS)),
        (3, {"levels": {("1", "from_short"): 4.5}}, (HOLDS, FAILS)),
        (3, {"unsure": {("1", ORACLE): 5, ("1", "from_short"): 5}}, (UNDECIDED, UNDECIDED)),
        (7, {}, (HOLDS, HOLDS)),
        (7, {"levels": {("4..2", ORACLE): 3.0}}, (FAILS, HOLDS)),
        (7, {"levels": {("2..4", BEST): 3.0}}, (HOLDS, FAILS)),
        (7, {"unsure": {("4..2", ORACLE): 5, ("2..4", BEST): 5}}, (UNDECIDED, UNDECIDED)),
    ],
)  # fmt: skip
def test_losses_decide(made, claim, changes, expected):
    assert verdicts(made, claim, **changes) == expected


def with_routes(made, placed, budget, **shares):
    """The made oracle with other shares of big in the late half at one budget."""
    found = made()
    table = {name: placed(int(budget), share) for name, share in shares.items()}
    return Material(replace(found, tables={**found.tables, budget: {**found.tables[budget], **table}}))


@pytest.mark.parametrize(
    ("budget", "shares", "expected"),
    [
        ("2", {}, (HOLDS, HOLDS)),
        ("2", {"oracle_routes": 0.3}, (FAILS, FAILS)),
        ("4", {"oracle_routes": 0.7}, (FAILS, FAILS)),
        ("3", {"oracle_routes": 0.7}, (FAILS, FAILS)),
        ("3", {"oracle_routes": 0.2}, (FAILS, FAILS)),
        ("2", {"oracle_routes": 0.5}, (UNDECIDED, UNDECIDED)),
        ("2", {"worst_routes": 0.95}, (HOLDS, FAILS)),
        ("4", {"worst_routes": 0.0}, (HOLDS, FAILS)),
        ("2", {"worst_routes": 0.8}, (HOLDS, UNDECIDED)),
        ("3", {"oracle_routes": 0.6, "worst_routes": 0.6}, (FAILS, HOLDS)),
    ],
)
def test_where_big_goes(made, placed, budget, shares, expected):
    assert tuple(outcome.verdict for outcome in outcomes(4, with_routes(made, placed, budget, **shares))) == expected


def test_the_share_of_late_layers_is_counted_token_by_token(made):
    random, found = np.random.default_rng(2), made()
    routes = np.full((SEQUENCES, LENGTH, 7), Route.SMALL, np.uint8)
    shares = np.zeros((SEQUENCES, LENGTH))
    for row in range(SEQUENCES):
        for token in range(LENGTH):
            big = random.choice(7, 4, replace=False)
            routes[row, token, big] = Route.BIG
            sides = [place > 3 for place in big if place != 3]  # the middle one of seven is on neither side
            shares[row, token] = np.mean(sides)
    tables = {name: {"oracle_routes": routes} for name in ("2", "3", "5")}
    without, _ = outcomes(4, Material(replace(found, tables={"none": {**found.any, "oracle_routes": routes}} | tables)))
    assert figure(without, "share of big in the late half at k=3").median == pytest.approx(shares.mean())
    assert [each.name[-3:] for each in without.figures] == ["k=2", "k=3", "k=5"]


def gaps(made, rows):
    """An oracle of these tokens: all-small's loss, the gap to the oracle, and that to all big, each ``[10]``."""
    small, gap, to_big = (np.tile(each, (SEQUENCES, 1)) for each in rows)
    small = small + np.linspace(0, 0.01, SEQUENCES)[:, None]
    found = made()
    table = {**found.any, "loss_small": small, "oracle_loss": small - gap, "loss_big": small - to_big}
    return Material(replace(found, tables={"none": table}))


RISING, FALLING = np.arange(10.0), np.arange(10.0)[::-1]


@pytest.mark.parametrize(
    ("gap", "to_big", "expected"),
    [
        (RISING, RISING, (FAILS, FAILS)),
        (FALLING, RISING, (HOLDS, FAILS)),
        (RISING, FALLING, (FAILS, HOLDS)),
    ],
)
def test_difficulty_and_loss(made, gap, to_big, expected):
    both = outcomes(8, gaps(made, (RISING + 5, gap, to_big)))
    assert tuple(outcome.verdict for outcome in both) == expected
    for outcome, each in zip(both, (gap, to_big), strict=True):
        assert figure(outcome, "rank correlation").median == pytest.approx(1 if each is RISING else -1, abs=0.05)


@pytest.mark.parametrize(("easy", "verdict"), [(0, FAILS), (2, UNDECIDED), (6, HOLDS)])
def test_exceptions_are_high_losses_with_a_gap_below_the_median(made, easy, verdict):
    gap = np.array([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 5.5])  # that of the high loss is a little above the median
    material = gaps(made, (RISING + 5, gap, gap))
    table = dict(material.found.any)
    table["oracle_loss"][:easy, 9] = table["loss_small"][:easy, 9]
    without, control = outcomes(8, Material(replace(material.found, tables={"none": table})))
    assert (without.verdict, control.verdict) == (verdict, FAILS)
    high = table["loss_small"] >= np.quantile(table["loss_small"], 0.9)
    gap = table["loss_small"] - table["oracle_loss"]
    expected = (high & (gap < np.median(gap))).sum() / high.sum()
    assert figure(without, "share of high losses").median == pytest.approx(expected) == pytest.approx(easy / 12)
    correlation = np.corrcoef(table["loss_small"].ravel(), gap.ravel())[0, 1]
    assert figure(without, "correlation").median == pytest.approx(correlation)


def skipping(made, patterns, sequences=SEQUENCES, budget="none"):
    """An oracle that may skip: in each sequence tokens of these patterns, as letters."""
    routes = np.array([["-sB".index(letter) for letter in pattern] for pattern in patterns], np.uint8)
    tables = {budget: {"oracle_routes": np.tile(routes, (sequences, 1, 1))}}
    return Material(made(), skips=Found(Path("skips"), {"budgets": {}}, tables))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["BBB-", "BB--", "sB--"], (FAILS, FAILS)),
        (["-BBs", "B-ss", "sB-B", "----", "BBBB"], (HOLDS, HOLDS)),
        (["BBB-", "-BBB", "B-BB"], (HOLDS, FAILS)),  # one in three, by chance one in four
        (["BBB-", "-BBB", "B-BB", "BB-B"], (HOLDS, UNDECIDED)),
        (["BBB-", "-BBB"], (UNDECIDED, FAILS)),
        (["BBBB", "----"], (UNDECIDED, UNDECIDED)),
    ],
)
def test_skips(made, patterns, expected):
    assert tuple(outcome.verdict for outcome in outcomes(9, skipping(made, patterns))) == expected


def test_the_share_of_early_exits_by_chance_is_that_of_all_orders(made):
    patterns = ["BB--", "B-s-", "---B", "sBB-", "BBBB", "----"]
    without, control = outcomes(9, skipping(made, patterns))
    some = [pattern for pattern in patterns if 0 < pattern.count("-") < 4]

    def early(pattern):
        return "-" not in "".join(pattern).rstrip("-")

    chance = np.mean([np.mean([early(order) for order in permutations(pattern)]) for pattern in some])
    share = np.mean([early(pattern) for pattern in some])
    assert figure(without, "share of tokens").median == pytest.approx(share) == pytest.approx(0.5)
    assert figure(control, "that share by chance").median == pytest.approx(chance - share)
    depth = np.mean([np.mean([place / 3 for place in range(4) if pattern[place] == "-"]) for pattern in some])
    assert figure(control, "mean depth").median == pytest.approx(depth)
    assert outcomes(9, skipping(made, patterns, budget="4"))[1].figures == control.figures
    assert "no token skips some" in outcomes(9, skipping(made, ["BBBB"]))[0].sentence
    both = {"2": skipping(made, ["BBB-"]).skips.any, "none": skipping(made, patterns).skips.any}
    material = skipping(made, patterns)
    assert outcomes(9, replace(material, skips=replace(material.skips, tables=both)))[1].figures == control.figures


def runs(made, random=(2.0, 2.1, 2.2), big_first=(2.5, 2.6, 2.7), twice=(2.4,), name=None):
    """Training runs by seed; only the losses of ``name``, if it is given, are those of big first."""
    kinds = (("random", 100, random), ("big_then_small", 100, big_first), ("big_then_small", 200, twice))
    found = []
    for method, tokens, losses in kinds:
        for seed, loss in enumerate(losses):
            by_pattern = dict.fromkeys(("big", *claims.MIXED), 3.0 + 0.01 * tokens * (method != "random"))
            by_pattern |= {each: loss for each in claims.MIXED if name in (None, each)}
            found.append(Run(method, seed, tokens, by_pattern))
    return Material(made(), stage1=tuple(found))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, (HOLDS, HOLDS)),
        ({"big_first": (1.9, 2.0, 2.1)}, (FAILS, HOLDS)),
        ({"big_first": (1.9, 2.2, 2.3)}, (UNDECIDED, HOLDS)),  # paired by seed: better with one of three
        ({"big_first": (2.15, 2.25, 2.35)}, (HOLDS, HOLDS)),  # though the first is worse than random's last
        ({"twice": (1.9,)}, (HOLDS, FAILS)),
        ({"twice": (2.05,)}, (HOLDS, UNDECIDED)),  # one run against each of random's
        ({"twice": ()}, (HOLDS, UNDECIDED)),
        ({"random": (2.0,), "big_first": (2.5,), "twice": (2.4,)}, (UNDECIDED, UNDECIDED)),  # one pair
        ({"big_first": ()}, (UNDECIDED, HOLDS)),
        ({"random": ()}, (UNDECIDED, UNDECIDED)),
        *(({"big_first": (1.9, 2.0, 2.1), "name": name}, (FAILS, HOLDS)) for name in claims.MIXED),
    ],
)
def test_training_both_ways(made, changes, expected):
    both = outcomes(10, runs(made, **changes))
    assert tuple(outcome.verdict for outcome in both) == expected


def test_training_is_compared_by_seed(made):
    without, control = outcomes(10, runs(made, big_first=(2.5, 2.5, 2.9)))
    assert tuple(figure(without, "big first less random, small")) == pytest.approx(((0.5 + 0.4 + 0.7) / 3, 0.4, 0.7))
    assert tuple(figure(control, "big first less random, small")) == pytest.approx((0.3, 0.2, 0.4))
    assert tuple(figure(without, "big first less random, big")) == pytest.approx((1, 1, 1))
    assert "seeds allow no interval" in without.sentence


def test_what_is_missing_leaves_claims_undecided_and_is_named(made):
    found = judge(Material(made(drop={"3", "4..2", "none"})))
    assert [claim.number for claim in found] == list(range(1, 11))
    decided = {claim.number: (claim.without.verdict, claim.control.verdict) for claim in found}
    assert {number: both for number, both in decided.items() if set(both) != {UNDECIDED}} == {
        3: (HOLDS, HOLDS),
        8: (UNDECIDED, FAILS),
    }
    sentences = {claim.number: claim.without.sentence for claim in found}
    for number in (1, 2, 4):
        assert sentences[number].startswith("undecided: ") and "budget 3 is missing" in sentences[number]
    assert "needs a falling schedule" in sentences[7] and "needs a rising schedule" in sentences[7]
    assert "budget none is missing" in sentences[8]
    assert sentences[5] == sentences[6] == "undecided: needs a trained router"
    assert sentences[9] == "undecided: needs an oracle that may skip"
    assert sentences[10] == "undecided: needs runs of both ways to train"


def test_without_controls_only_the_paper_is_read(made):
    names = ("best_of_12", "best_of_66", "noise_12", "noise_mean", "worst_routes", "mean_loss")
    found = judge(Material(made(drop={*names, "from_short", "to_short", "short_loss_big"})))
    assert [claim.number for claim in found if claim.without.verdict == HOLDS] == [1, 2, 3, 4, 7, 8]
    assert [claim.number for claim in found if claim.control.verdict != UNDECIDED] == [8]  # needs none
    for number in (1, 2, 3, 4, 7):
        assert "which takes --controls" in found[number - 1].control.sentence


def test_a_failure_counts_though_something_is_missing(made):
    levels = {("1", ORACLE): 3.0}
    assert verdicts(made, 2, levels=levels, drop={"3"})[0] == UNDECIDED
    assert verdicts(made, 1, levels={("2", "random"): 3.0}, drop={"3"})[0] == FAILS
    assert "2 hold" not in outcomes(1, Material(made(drop={"3"})))[0].sentence


@pytest.mark.parametrize("layers", range(1, 6))
@pytest.mark.parametrize("sequences", [1, 2, 7])
def test_any_number_of_layers_and_sequences_is_taken(layers, sequences):
    random, tables = np.random.default_rng(0), {}
    for budget in ("none", *map(str, range(layers + 1)), "2..0", "0..2"):
        names = ("loss_big", "loss_small", "oracle_loss", "best_of_12", "noise_12", "noise_mean", "mean_loss")
        tables[budget] = {name: random.normal(3, 1, (sequences, 4)) for name in names}
        for name in ("oracle_routes", "worst_routes"):
            tables[budget][name] = random.integers(0, 3, (sequences, 4, layers)).astype(np.uint8)
    found = Found(Path("made"), {"budgets": {budget: {} for budget in tables}}, tables)
    for claim in judge(Material(found, found)):
        for outcome in (claim.without, claim.control):
            assert outcome.verdict == UNDECIDED or sequences == 7
            assert ": " in outcome.sentence and "nan" not in outcome.sentence
            assert outcome.record()["verdict"] == outcome.verdict


def test_budgets_are_scaled_to_the_layers(made):
    routes = np.full((SEQUENCES, LENGTH, 12), Route.SMALL, np.uint8)
    tables = {name: {**made().any, "oracle_routes": routes} for name in ("none", "4", "6", "8")}
    found = judge(Material(replace(made(), tables=tables)))
    assert [each.name[-3:] for each in found[3].without.figures] == ["k=4", "k=6", "k=8"]
    lowest = next(each for each in found[1].without.figures if each.name.startswith("k of the lowest"))
    assert lowest.bounds == (3.5, 8.5)
    assert any("k=4 less that at k=8" in each.name for each in found[1].control.figures)


@pytest.mark.parametrize(
    ("best", "verdict"), [("2", HOLDS), ("3", HOLDS), ("4", HOLDS), ("1", FAILS), ("5", FAILS), (None, UNDECIDED)]
)
def test_the_lowest_budget_is_within_a_sixth_of_the_middle(made, best, verdict):
    levels, unsure = ({(best, ORACLE): 2.0}, {}) if best else ({("1", ORACLE): 3.2}, {("1", ORACLE): 1.0})
    without, _ = outcomes(2, Material(made(levels=levels, unsure=unsure)))
    (lowest,) = (each for each in without.figures if each.name == "k of the lowest oracle")
    assert lowest.verdict == verdict
    if best:
        assert tuple(lowest.estimate.interval) == (int(best),) * 3


def test_figures_are_differences_of_sequences_means(made):
    found = made()
    without, control = outcomes(1, Material(found))
    table, summary = found.tables["2"], found.summary["budgets"]["2"]
    fixed = np.mean(summary["fixed_split_by_sequence"]) - table["oracle_loss"].mean(dtype=np.float64)
    assert figure(without, "fixed, chosen on the other half", "k=2").median == pytest.approx(fixed)
    same = figure(without, "fixed, chosen on the same", "k=2")
    assert tuple(same) == pytest.approx((4.5 - table["oracle_loss"].mean(),) * 3)
    by_token = figure(without, "random, best for each token", "k=2")
    assert by_token.median == pytest.approx(4.2 - table["oracle_loss"].mean())
    noise = (table["noise_12"] - table["best_of_12"]).mean(dtype=np.float64)
    assert figure(control, "noise less routes", "k=2, best of 12").median == pytest.approx(noise)
    assert "router: needs a trained router" in without.sentence and without.open


def with_66(made, budgets, level):
    """The made oracle with minima over 66, ``level`` above those over 12 by routes, for some budgets."""
    found = made()
    tables = dict(found.tables)
    for budget in budgets:
        of = tables[budget]
        tables[budget] = {**of, "best_of_66": of["best_of_12"] + level, "noise_66": of["noise_12"] - 0.5}
    return Material(replace(found, tables=tables))


def test_the_largest_equal_number_of_candidates_is_compared(made):
    _, control = outcomes(1, with_66(made, ["3"], 0.0))
    assert {each.at for each in control.figures if each.bounds} == {
        "k=1, best of 12", "k=2, best of 12", "k=3, best of 66", "k=4, best of 12", "k=5, best of 12",
    }  # fmt: skip
    assert control.verdict == FAILS and "k=3, best of 66" in control.sentence
    _, control = outcomes(7, with_66(made, ["3", "4..2"], 0.0))
    assert [each.name for each in control.figures] == ["best of 66 of 4..2 less 3", "best of 12 of 2..4 less 3"]


def test_texts_without_noise_are_left_out(made):
    found = made()
    table = dict(found.tables["5"])
    none = np.where(np.arange(SEQUENCES)[:, None] < 4, table["noise_mean"], table["noise_12"])
    tables = {**found.tables, "5": {**table, "noise_12": none}}
    _, control = outcomes(1, Material(replace(found, tables=tables)))
    expected = (table["noise_12"] - table["best_of_12"])[4:].mean(dtype=np.float64)
    assert figure(control, "noise less routes", "k=5").median == pytest.approx(expected)
    assert control.verdict == HOLDS
    tables["5"] = {**table, "noise_12": table["noise_mean"]}
    _, control = outcomes(1, Material(replace(found, tables=tables)))
    assert control.verdict == UNDECIDED and "all big costs no less than budget 5" in control.sentence


def test_the_mirror_image_of_one_big_is_told_and_decides_nothing(made):
    for level in (3.0, 4.5):
        found = made(levels={("5", ORACLE): level})
        _, control = outcomes(3, Material(found))
        expected = found.tables["1"]["oracle_loss"].mean() - found.tables["5"]["oracle_loss"].mean()
        assert figure(control, "oracle with one big").median == pytest.approx(expected, abs=1e-6)
        assert control.verdict == HOLDS


def test_schedules_are_compared_with_the_constant_budget_of_their_mean(made):
    names = ("5..3", "4..1", "3..3")
    found = made()
    tables = found.tables | dict.fromkeys(names, found.tables["4..2"])
    without, _ = outcomes(7, Material(replace(found, tables=tables)))
    assert [each.name for each in without.figures] == [
        "oracle of 4..2 less 3", "oracle of 5..3 less 4", "oracle of 2..4 less 3",
    ]  # fmt: skip


def test_the_record_holds_each_figure(made):
    found = judge(Material(made()))
    record = found[3].record()
    assert (record["number"], record["without_control"]["verdict"]) == (4, HOLDS)
    first = record["without_control"]["figures"][0]
    interval = figure(found[3].without, first["name"])
    assert first | {"over": ""} == {
        "name": "share of big in the late half at k=2", "at": "", "unit": "", "value": interval.median,
        "interval": [interval.low, interval.high], "over": "", "claimed": [0.5, None], "verdict": HOLDS, "why": "",
    }  # fmt: skip
    assert first["over"] == "95 % over 12 sequences"
    missing = found[8].record()["with_control"]["figures"][0]
    assert (missing["value"], missing["interval"], missing["why"]) == (None, None, "needs an oracle that may skip")
