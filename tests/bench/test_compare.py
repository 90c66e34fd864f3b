"""Comparing two results: verdicts on known differences, how often noise alone decides, and what is refused."""

import copy
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx.bench import compare as module
from duo_mlx.bench.compare import METRICS, compare, fraction
from duo_mlx.errors import DuoError
from duo_mlx.intervals import interval

BIG = "duo-mlx big auto float32 p32 g16 b1 c0"


def cell(result, name=BIG):
    return next(each for each in result["cells"] if each["id"] == name)


def rows(comparison, metric, name=None):
    return [row for row in comparison.rows if row.metric == metric and name in (None, row.cell)]


def row(comparison, metric, name=BIG):
    (found,) = rows(comparison, metric, name)
    return found


def with_tpot(result, values):
    """A copy with one cell, whose TPOT are ``values``, one a round."""
    only = cell(result)
    run = only["runs"][0]
    runs = [
        run | {"round": number // 2, "token_s": [[value, value]]} for number, value in enumerate(np.repeat(values, 2))
    ]
    return result | {"cells": [only | {"runs": runs}]}


def without_floor(result):
    """A copy of which nobody knows how far it differs from itself."""
    return result | {"sessions": [session | {"noise_floor": None} for session in result["sessions"]]}


def test_ten_percent_slower_is_worse_and_the_other_way_better(made_result):
    fast, slow = made_result(), made_result(slower=1.1)
    worse = compare(fast, slow)
    for metric in ("tpot_s", "ttft_s", "decode_j_per_token"):
        assert [each.verdict for each in rows(worse, metric)] == ["worse"] * 5, metric
        assert fraction(row(worse, metric).change.median) == pytest.approx(0.1)
    assert {
        each.verdict for metric in ("prefill_j_per_token", "loss", "peak_bytes") for each in rows(worse, metric)
    } == {"same"}
    assert worse.regressed and worse.overall.verdict == "worse" and worse.overall.b == pytest.approx(1.1)
    better = compare(slow, fast)
    assert {each.verdict for each in rows(better, "tpot_s")} == {"better"} and not better.regressed


def test_speculation_is_compared_with_the_same_speculation(made_result):
    name = f"{BIG} speculate small auto"
    found = compare(made_result(drafts=True), made_result(drafts=True, slower=1.1))
    assert fraction(row(found, "tpot_s", name).change.median) == pytest.approx(0.1)
    assert compare(made_result(drafts=True), made_result()).only == {"A": [name], "B": []}
    other = made_result(drafts=True)
    other["cells"][-1] |= {"id": f"{BIG} speculate small 3", "draft_tokens": "3"}
    assert name not in {each.cell for each in compare(made_result(drafts=True), other).rows}


def test_against_itself_all_is_the_same(made_result):
    found = compare(made_result(), made_result())
    assert {each.verdict for each in found.rows} == {"same"} and not found.regressed and not found.notes
    assert {each.metric for each in found.rows} == set(METRICS)
    assert all(each.change == (0, 0, 0) for each in found.rows)


def test_noise_as_large_as_the_difference_is_undecided(made_result):
    result, noise = made_result(), np.exp([-0.05, -0.03, -0.01, 0, 0.01, 0.03, 0.05])
    found = compare(with_tpot(result, 0.02 * noise), with_tpot(result, 0.021 / noise))
    change = row(found, "tpot_s").change
    assert fraction(change.median) == pytest.approx(0.05) and change.low < 0
    assert row(found, "tpot_s").verdict == "undecided" and not found.regressed


def decided(result, noise, slower, rounds, pairs, seed):
    """How often each verdict falls for a known slowdown under noise from round to round, and the intervals."""
    random = np.random.default_rng(seed)
    verdicts, changes = [], []
    for _ in range(pairs):
        a, b = (with_tpot(result, 0.02 * by * np.exp(random.normal(0, noise, rounds))) for by in (1, slower))
        found = row(compare(a, b, metrics=["tpot_s"]), "tpot_s")
        verdicts.append(found.verdict)
        changes.append(found.change)
    return {verdict: verdicts.count(verdict) / pairs for verdict in set(verdicts)}, changes


def test_noise_within_the_threshold_never_decides(made_result):
    shares, _ = decided(made_result(), noise=0.008, slower=1.0, rounds=5, pairs=100, seed=0)
    assert set(shares) <= {"same", "undecided"} and shares["same"] > 0.6


def test_noise_far_beyond_the_threshold_seldom_decides(made_result):
    shares, changes = decided(without_floor(made_result()), noise=0.1, slower=1.0, rounds=7, pairs=200, seed=1)
    assert shares.get("worse", 0) + shares.get("better", 0) < 0.12
    holds = np.mean([change.low <= 0 <= change.high for change in changes])
    assert 0.86 < holds <= 1.0  # a bootstrap of few rounds holds a little less than it says


def test_a_slowdown_beyond_the_noise_is_found(made_result):
    shares, _ = decided(made_result(), noise=0.015, slower=1.1, rounds=7, pairs=100, seed=2)
    assert shares["worse"] > 0.97


@given(st.lists(st.tuples(*[st.floats(1e-6, 1e3)] * 2), min_size=3, max_size=8))
def test_a_against_b_is_the_mirror_of_b_against_a(pairs):
    one, other = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
    there, back = (module._paired("cell", "tpot_s", sides, 0.02) for sides in ([one, other], [other, one]))
    assert (there.change.median, there.change.low, there.change.high) == pytest.approx(
        (-back.change.median, -back.change.high, -back.change.low)
    )


def test_a_round_is_the_mean_of_its_runs_there_and_back_and_counts_if_both_do(made_result):
    a = made_result()
    b = copy.deepcopy(a)
    for number, run in enumerate(cell(b)["runs"]):  # warmed up on the way there, cold on the way back
        sign = 1 if number % 2 else -1
        run["token_s"] = [[0.020 + 0.004 * sign] * 4, [0.020 + 0.004 * sign] * 8]
        run["ttft_s"] = [0.32 + 0.1 * sign] * 3
    found = compare(with_tpot(a, [0.02] * 5), b)
    assert row(found, "tpot_s").change == pytest.approx((0, 0, 0))
    assert row(found, "ttft_s").change == pytest.approx((0, 0, 0))
    cell(b)["runs"][0] |= {"token_s": [[9.0]], "ttft_s": [9.0], "invalid_why": ["the thermal pressure changed"]}
    found = compare(with_tpot(a, [0.02] * 5), b)
    assert (row(found, "tpot_s").b, row(found, "tpot_s").rounds) == (pytest.approx(0.02), 4)


def test_joules_a_token_are_those_of_each_run(made_result):
    a, b = made_result(), made_result()
    for there, back in zip(cell(b)["runs"][::2], cell(b)["runs"][1::2], strict=True):
        there["decode_energy"] |= {"total_j": 30.0, "tokens": 100}
        back["decode_energy"] |= {"total_j": 20.0, "tokens": 200}
    assert row(compare(a, b), "decode_j_per_token").b == pytest.approx(0.2)


def test_rounds_are_paired_by_number(made_result):
    result, values = made_result(), [0.01, 0.02, 0.04, 0.08, 0.16]
    a, b = with_tpot(result, values), with_tpot(result, [1.05 * value for value in values])
    cell(b)["runs"].reverse()
    cell(a)["runs"][1] = cell(a)["runs"][1] | {"invalid_why": ["swapped"]}
    found = row(compare(a, b), "tpot_s")
    assert found.change == pytest.approx((math.log(1.05),) * 3) and found.rounds == 4
    assert found.a == pytest.approx(0.06)  # of the rounds that both have


def test_fewer_than_three_rounds_decide_nothing(made_result):
    found = compare(made_result(rounds=2), made_result(rounds=5, slower=2.0))
    assert row(found, "tpot_s").why == "too few rounds: 2 in common, 3 needed"
    assert row(found, "tpot_s").verdict == "undecided" and row(found, "tpot_s").change is None
    assert found.overall is None and row(found, "loss").verdict == "same" and not found.regressed


def test_few_rounds_come_with_what_they_are_worth(made_result):
    assert "75% of cases" in " ".join(compare(made_result(rounds=3), made_result(rounds=3)).notes)
    assert not compare(made_result(rounds=5), made_result(rounds=5)).notes


@pytest.mark.parametrize(
    ("nats", "verdict"), [(0.03, "worse"), (0.019, "same"), (0.0, "same"), (-0.019, "same"), (-0.03, "better")]
)
def test_a_loss_is_compared_exactly_as_a_change_of_the_perplexity(made_result, nats, verdict):
    a, b = made_result(), made_result()
    a["sessions"][0]["noise_floor"] |= {"low": 0.5, "high": 1.5}  # of times: no matter for a loss
    cell(b)["quality"]["loss"]["median"] += nats
    found = row(compare(a, b), "loss")
    assert (found.verdict, found.rounds) == (verdict, None)
    assert fraction(found.change.median) == pytest.approx(math.exp(nats) - 1)


def test_losses_over_other_windows_are_not_compared(made_result):
    a, b = made_result(), made_result(slower=1.1)
    cell(b)["quality"] |= {"tokens": 512}
    cell(b)["quality"]["loss"]["median"] = 30.0
    assert row(compare(a, b), "loss").why == "over another number of held-out tokens"
    b["texts"]["held_out"]["sha256"] = "3" * 64
    found = compare(a, b, allowed=["texts"])
    assert {(each.verdict, each.why) for each in rows(found, "loss")} == {("undecided", "over another held-out text")}
    assert row(found, "tpot_s").verdict == "worse"


def test_memory_is_compared_exactly(made_result):
    a, b = made_result(), made_result()
    cell(b)["summary"]["peak_bytes"] = 2_100_000
    assert row(compare(a, b), "peak_bytes").verdict == "worse"
    assert row(compare(a, b, threshold=0.06), "peak_bytes").verdict == "same"


@pytest.mark.parametrize("noisy", [0, 1])
def test_a_threshold_below_the_noise_floor_is_raised_to_it(made_result, noisy):
    pair = [made_result(), made_result(slower=1.1)]
    pair[noisy]["sessions"].append(copy.deepcopy(pair[noisy]["sessions"][0]))
    pair[noisy]["sessions"][1]["noise_floor"] |= {"low": 0.99, "high": 1.15}
    found = compare(*pair)
    assert {each.verdict for each in rows(found, "tpot_s")} == {"same"}
    assert found.threshold == pytest.approx(0.15) and found.asked == 0.02
    assert found.notes == ["the threshold of times and energy is raised from 2.00% to the noise floor, 15.00%"]
    assert compare(*pair, threshold=0.2).threshold == 0.2


def test_no_noise_floor_is_said(made_result):
    assert "B has no noise floor" in " ".join(compare(made_result(), without_floor(made_result())).notes)


DIFFERENT = {
    "chip": [("system", "device", "M1")],
    "power": [("system", "power_source", "Battery Power"), ("system", "power_mode", {"powermode": 1})],
    "model": [("model", "sha256", "f" * 64)],
    "texts": [("texts", "prompts", {"source": "x", "sha256": "f" * 64, "tokens": 1, "count": 1})],
}


@pytest.mark.parametrize(("flag", "change"), [(flag, change) for flag, each in DIFFERENT.items() for change in each])
def test_what_was_not_measured_alike_is_refused_unless_allowed(made_result, flag, change):
    a, b = made_result(), made_result()
    part, key, value = change
    b[part][key] = value
    with pytest.raises(DuoError, match=f"not measured alike: .* in A, .* in B; --allow-different {flag} compares"):
        compare(a, b, allowed=set(DIFFERENT) - {flag})
    found = compare(a, b, allowed=[flag])
    assert {each.verdict for each in found.rows} == {"same"} and "in A" in found.notes[0]


def test_cores_and_revisions_count_where_both_are_known(made_result):
    a, b = made_result(), made_result()
    b["model"]["revision"], b["system"]["cores"], b["system"]["power_mode"] = "abc", {"physical": 14}, {}
    assert not compare(a, b).notes
    a["model"]["revision"], a["system"]["cores"] = "def", {"physical": 16}
    with pytest.raises(
        DuoError, match="cores: .*revision of the model: def in A, abc in B; --allow-different chip --allow"
    ):
        compare(a, b)


def test_another_router_counts_where_a_cell_asks_it(made_result):
    a, b = made_result(), made_result()
    a["model"]["routing_sha256"], b["model"]["routing_sha256"] = "a" * 64, "b" * 64
    assert not compare(a, b).notes
    for result in (a, b):
        result["cells"][-1]["route"] = "router:0.5"
    with pytest.raises(
        DuoError, match="router and known patterns: a+.* in A, b+.* in B; --allow-different router compares"
    ):
        compare(a, b)
    assert "router" in compare(a, b, allowed=["router"]).notes[0]
    del a["model"]["routing_sha256"]  # of a version that did not keep it
    assert not compare(a, b).notes


def test_a_session_on_battery_makes_the_power_differ(made_result):
    a, b = made_result(), made_result()
    b["sessions"].append(b["sessions"][0] | {"conditions": {"power_source": "Battery Power"}})
    with pytest.raises(DuoError, match="power source: AC Power in A, AC Power and Battery Power in B"):
        compare(a, b)


def test_another_meter_has_other_joules(made_result):
    a, b = made_result(), made_result(slower=1.1)
    b["meter"]["label"] = "the whole computer"
    found = row(compare(a, b), "decode_j_per_token")
    assert (found.verdict, found.change) == ("undecided", None) and "by another meter" in found.why


def test_what_only_one_has_is_told(made_result):
    a, b = made_result(contexts=(0, 64)), made_result(metered=False)
    found = compare(a, b)
    assert len(found.only["A"]) == 5 and not found.only["B"] and len(rows(found, "tpot_s")) == 5
    assert "decode_j_per_token is not compared in 5 of 5 cells: only A has it there" in found.notes
    with pytest.raises(
        DuoError, match="--metric decode_j_per_token: no cell has it in both A and B; no meter: this is"
    ):
        compare(a, b, metrics=["decode_j_per_token"])


def test_what_is_not_valid_is_told_and_not_compared(made_result):
    a, b = made_result(), made_result(slower=1.1)
    cell(b).update(valid=False, invalid_why=["it got hot"], summary=None)
    found = compare(a, b)
    assert found.invalid == {BIG: "in B: it got hot"} and not rows(found, "tpot_s", BIG)
    assert found.overall.cell == "4 cells"
    for each in a["cells"]:
        each["valid"] = False
    with pytest.raises(DuoError, match="no cell is valid in both A and B: mlx-lm big"):
        compare(a, b)


def test_nothing_in_common_is_refused(made_result):
    a, b = made_result(), made_result()
    for each in b["cells"]:
        each["id"] += "x"
    with pytest.raises(DuoError, match="no cell in common: A has 5; the first is mlx-lm big .* c0, B 5; the first is"):
        compare(a, b)
    with pytest.raises(DuoError, match="B 0; the first is none at all"):
        compare(a, b | {"cells": []})
    empty = {"runs": [], "summary": None, "quality": None}
    with pytest.raises(DuoError, match="no figure in common"):
        compare(a, a | {"cells": [each | empty for each in a["cells"]]})


def test_an_unfinished_result_and_other_versions_are_noted(made_result):
    a, b = made_result(), made_result()
    b["complete"], b["system"]["versions"]["mlx"], b["sessions"][0]["cautions"] = False, "0.33", ["it is warm"]
    assert compare(a, b).notes == [
        "mlx: 0.32.4 in A, 0.33 in B",
        "B is not finished: what it has is compared",
        "B was measured with a caution: it is warm",
    ]


def test_overall_is_the_geometric_mean(made_result):
    a, b = made_result(), made_result()
    for each, by in zip(b["cells"][:2], (2.0, 0.5), strict=True):
        for run in each["runs"]:
            run["token_s"] = [[by * value for value in run["token_s"][0]]]
    a["cells"], b["cells"] = a["cells"][:2], b["cells"][:2]
    found = compare(a, b)
    assert [each.verdict for each in rows(found, "tpot_s")] == ["worse", "better"]
    assert found.overall.b == pytest.approx(1.0) and found.overall.verdict == "same"
    cell(b)["runs"] = [run | {"round": run["round"] + 100} for run in cell(b)["runs"]]
    cell(a)["runs"] = [run | {"round": run["round"] + 100} for run in cell(a)["runs"]]
    found = compare(a, b)
    assert found.overall is None and "TPOT over all cells is not given" in " ".join(found.notes)


def test_the_record_is_json_whatever_the_figures(made_result):
    a, b = made_result(), made_result()
    cell(b)["quality"]["loss"]["median"] = 1e5
    b["cells"] = [b["cells"][0] | {"runs": []}, *b["cells"][1:]]
    found = json.loads(json.dumps(compare(a, b).record(), allow_nan=False))
    assert found["regressed"] and found["rows"][0]["change"]["median"] == 0 and found["overall"]["rounds"] == 5
    assert "tpot_s is not compared in 1 of 5 cells: only A has it there" in found["notes"]


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_figure_that_is_none_is_no_figure(made_result, value):
    a = made_result()
    b = with_tpot(a, [value, *[0.02] * 4])
    assert row(compare(a, b), "tpot_s").rounds == 4
    cell(b)["quality"] = cell(a)["quality"] | {"loss": {"median": value, "low": 0, "high": 0}}
    assert not rows(compare(a, b), "loss")


def test_the_interval_is_that_of_the_paired_log_ratios(made_result):
    random = np.random.default_rng(5)
    one, other = random.uniform(0.01, 0.03, (2, 9))
    found = row(compare(with_tpot(made_result(), one), with_tpot(made_result(), other)), "tpot_s")
    assert found.change == pytest.approx(interval(np.log(other / one)))
