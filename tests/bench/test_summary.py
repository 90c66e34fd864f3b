"""From runs to figures: each is that of NumPy, by hand, for runs made up here."""

import copy

import numpy as np
import pytest

from duo_mlx.bench import summary
from duo_mlx.bench.summary import summarise

FACTS = {
    "bytes_per_token": 100.0,
    "flops_per_token": 30.0,
    "route_mix": {"big": 0.5, "small": 0.5, "skip": 0.0},
    "baseline_bytes": 400.0,
    "baseline_flops": 90.0,
    "bandwidth_bytes_s": 50_000.0,
    "why_no_energy": "no meter here",
}
DRIFT = [1.0, 1.7, 0.6, 3.0]  # of the machine, round by round


def window(joules, tokens, seconds=2.0, net=None, **rails):
    return {
        "seconds": seconds,
        "joules": {"cpu": joules / 4, "gpu": joules * 3 / 4} | rails,
        "total_j": joules,
        "net_j": net,
        "why": {},
        "flags": [],
        "tokens": tokens,
    }


def made_run(number, token_s, ttft_s=(0.1,), prefill=None, decode=None, why=(), peak=1000):
    return {
        "round": number,
        "session": 0,
        "ttft_s": list(ttft_s),
        "token_s": [list(each) for each in token_s],
        "peak_bytes": peak,
        "working_bytes": peak // 10,
        "prefill_energy": prefill,
        "decode_energy": decode,
        "invalid_why": list(why),
    }


def cell(runs, batch=1):
    return {"runs": runs, "batch": batch, "prompt_tokens": 8}


def of(runs, baseline=None, batch=1, **facts):
    own = cell(runs, batch)
    return summarise(own, cell(baseline, batch) if baseline else own, FACTS | facts)


def steady(seconds, rounds=DRIFT, **more):
    """Two runs a round, each a generation of four tokens."""
    return [made_run(number, [[seconds * drift] * 3], **more) for number, drift in enumerate(rounds) for _ in "ab"]


@pytest.fixture
def runs():
    """Three rounds of two runs with generations of unequal times."""
    random = np.random.default_rng(3)
    return [
        made_run(number // 2, random.uniform(0.01, 0.05, (2, 3)), random.uniform(0.1, 0.3, 4), peak=1000 + number)
        for number in range(6)
    ]


@pytest.mark.parametrize("batch", [1, 4])
def test_times_are_those_of_numpy(runs, batch):
    found = of(runs, batch=batch)
    ttft = np.array([np.mean(run["ttft_s"]) for run in runs]).reshape(3, 2).mean(axis=1)
    tpot = np.array([np.mean(run["token_s"]) for run in runs]).reshape(3, 2).mean(axis=1)
    assert found["rounds"] == 3
    assert found["ttft_s"]["median"] == pytest.approx(np.median(ttft))
    assert found["tpot_s"]["median"] == pytest.approx(np.median(tpot))
    assert found["tpot_s"]["low"] >= tpot.min() and found["tpot_s"]["high"] <= tpot.max()
    assert found["decode_tps"]["median"] == pytest.approx(batch / np.median(tpot))
    assert found["decode_tps"]["low"] == pytest.approx(batch / found["tpot_s"]["high"])
    assert found["prefill_tps"]["median"] == pytest.approx(batch * 8 / np.median(ttft))
    every = np.concatenate([np.ravel(run["token_s"]) for run in runs])
    expected = dict(zip(("p50", "p95", "p99"), np.quantile(every, [0.5, 0.95, 0.99]), strict=True))
    assert found["inter_token_s"] == pytest.approx(expected)
    assert (found["peak_bytes"], found["working_bytes"]) == (1005, 100)


def test_tpot_is_end_to_end_without_ttft_over_the_tokens_after_the_first():
    tokens, ttft, steps = 5, 0.4, [0.1, 0.2, 0.15, 0.05]
    end_to_end = ttft + sum(steps)
    found = of([made_run(0, [steps], [ttft])] * 2)
    assert found["tpot_s"]["median"] == pytest.approx((end_to_end - ttft) / (tokens - 1))
    assert found["ttft_s"]["median"] == pytest.approx(ttft)


def test_generations_of_unequal_length_count_by_their_tokens():
    """A window may end a run's generations anywhere: TPOT is over tokens, and not a mean of means."""
    assert summary.tpot(made_run(0, [[1.0], [2.0, 2.0, 2.0]])) == pytest.approx(7 / 4)


def test_a_drift_of_whole_rounds_cancels_in_the_speed_up():
    found = of(steady(0.01), steady(0.03))
    assert found["speed_up"] == pytest.approx({"median": 3.0, "low": 3.0, "high": 3.0})
    assert found["tpot_s"]["high"] / found["tpot_s"]["low"] > 1.5  # while the times themselves drift


def test_the_baseline_is_as_fast_as_itself(runs):
    assert of(runs)["speed_up"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_the_speed_up_is_of_the_rounds_that_both_have():
    own, baseline = steady(0.01), steady(0.02)
    own[2]["invalid_why"] = ["hot"]  # round 1
    for run in baseline[4:6]:  # round 2
        run["token_s"] = [[0.05, 0.05]]
    baseline[6]["invalid_why"] = ["hot"]  # round 3
    found = of(own, baseline)
    ratios = [2.0, 0.05 / (0.01 * DRIFT[2])]
    assert found["speed_up"]["median"] == pytest.approx(np.median(ratios))
    nothing = [run | {"invalid_why": ["hot"]} for run in baseline]
    assert of(own, nothing)["speed_up"] is None


def test_ratios_and_the_roofline_come_from_what_is_counted():
    found = of([made_run(0, [[0.01]])] * 2, batch=2)
    assert (found["byte_ratio"], found["flop_ratio"]) == (4.0, 3.0)
    assert found["bytes_per_token"] == 100.0 and found["route_mix"] == FACTS["route_mix"]
    # two sequences of 100 bytes in 10 ms are 20 kB/s of 50
    assert found["roofline_share"] == pytest.approx(0.4)
    assert of([made_run(0, [[0.01]])] * 2, bandwidth_bytes_s=None)["roofline_share"] is None


def test_a_round_with_an_invalid_run_does_not_count():
    runs = steady(0.01, [1.0, 1.0, 1.0])
    slow = copy.deepcopy(runs)
    slow[3] |= {"token_s": [[9.0]], "ttft_s": [9.0], "peak_bytes": 9_000_000, "invalid_why": ["the power source"]}
    assert of(slow) == of([run for run in runs if run["round"] != 1])


def test_nothing_but_invalid_runs_is_left_out():
    runs = steady(0.01, [1.0, 1.0, 1.0])
    runs[4]["token_s"] = [[5.0]]
    assert of(runs)["inter_token_s"]["p99"] > 1


def test_a_round_without_its_way_back_does_not_count():
    runs = steady(0.01, [1.0, 1.0])
    assert of(runs[:-1])["rounds"] == 1
    assert of(runs[:1]) is None


@pytest.mark.parametrize("runs", [[], steady(0.01, why=["hot"])], ids=["no run", "none valid"])
def test_without_a_valid_round_there_is_no_summary(runs):
    assert of(runs) is None


def metered(rounds=3):
    """Runs of 60 tokens decoded in 2 s, of which round n takes 6 + n J a run, and 32 prompt tokens in 1 s for 8 J."""
    return [
        made_run(number // 2, [[0.02] * 3], prefill=window(8.0, 32, 1.0, net=4.0),
                 decode=window(6.0 + number // 2, 60, net=3.0 + number // 2))
        for number in range(2 * rounds)
    ]  # fmt: skip


def test_energies_are_those_by_hand():
    found = of(metered())
    decode, prefill = found["decode_energy"], found["prefill_energy"]
    assert decode["j_per_token"] == pytest.approx({"median": 7 / 60, "low": 6 / 60, "high": 8 / 60})
    assert decode["net_j_per_token"]["median"] == pytest.approx(4 / 60)
    assert decode["mean_w"]["median"] == pytest.approx(7 / 2)
    assert decode["rails_j_per_token"] == pytest.approx({"cpu": 7 / 60 / 4, "gpu": 7 / 60 * 3 / 4})
    assert decode["window_s"] == pytest.approx(12.0) and prefill["window_s"] == pytest.approx(6.0)
    assert prefill["j_per_token"]["median"] == pytest.approx(8 / 32)
    assert prefill["net_j_per_token"]["median"] == pytest.approx(4 / 32)
    assert prefill["mean_w"]["median"] == pytest.approx(8.0)
    assert found["edp_js"] == pytest.approx(7 / 60 * 0.02)
    assert found["why_no_energy"] == ""


def test_flags_of_all_windows_are_named_once():
    runs = metered()
    runs[0]["decode_energy"]["flags"] = ["b", "a"]
    runs[5]["decode_energy"]["flags"] = ["a"]
    found = of(runs)
    assert found["decode_energy"]["flags"] == ["a", "b"] and found["prefill_energy"]["flags"] == []


@pytest.mark.parametrize("missing", ["none", "absent"])
def test_a_rail_that_one_window_lacks_is_null(missing):
    runs = metered()
    joules = runs[3]["decode_energy"]["joules"]
    joules.update(cpu=None) if missing == "none" else joules.pop("cpu")
    found = of(runs)
    assert found["decode_energy"]["rails_j_per_token"] == pytest.approx({"cpu": None, "gpu": 7 / 60 * 3 / 4})
    assert found["prefill_energy"]["rails_j_per_token"]["cpu"] == pytest.approx(8 / 32 / 4)


def test_without_a_total_there_is_no_energy_and_the_windows_word_why():
    runs = metered()
    runs[2]["decode_energy"] |= {"total_j": None, "net_j": None, "why": {"total": "cpu: it stood still"}}
    found = of(runs)
    assert found["decode_energy"] is None and found["edp_js"] is None
    assert found["why_no_energy"] == "cpu: it stood still"
    assert found["prefill_energy"]["j_per_token"]["median"] == pytest.approx(8 / 32)


def test_a_total_that_only_an_invalid_round_lacks_is_not_missed():
    runs = metered()
    runs[2]["decode_energy"] |= {"total_j": None, "why": {"total": "cpu: it stood still"}}
    runs[2]["invalid_why"] = ["hot"]
    assert of(runs)["decode_energy"]["j_per_token"]["median"] == pytest.approx(7 / 60)


def test_without_net_joules_gross_ones_stand_alone():
    runs = metered()
    runs[1]["decode_energy"]["net_j"] = None
    found = of(runs)["decode_energy"]
    assert found["net_j_per_token"] is None and found["j_per_token"]["median"] == pytest.approx(7 / 60)


def test_without_a_meter_there_is_the_meters_word_why(runs):
    found = of(runs)
    assert found["prefill_energy"] is None and found["decode_energy"] is None and found["edp_js"] is None
    assert found["why_no_energy"] == "no meter here"
