"""From a cell's runs to its figures.

The unit is a round: the mean of its runs there and back. Medians and intervals are over rounds, ratios are paired
within them. A round of which a run is invalid does not count for its cell; nothing else is left out.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from duo_mlx.intervals import Interval, interval

Run = dict[str, Any]
Rounds = dict[int, list[Run]]


def valid_rounds(runs: Sequence[Run]) -> Rounds:
    """Runs by round, of the rounds that ran there and back and were disturbed by nothing."""
    found: Rounds = defaultdict(list)
    for run in runs:
        found[run["round"]].append(run)
    return {
        number: both for number, both in found.items() if len(both) == 2 and not any(run["invalid_why"] for run in both)
    }


def ttft(run: Run) -> float:
    """Seconds to the first token, a mean over a run's prefills."""
    return statistics.fmean(run["ttft_s"])


def tpot(run: Run) -> float:
    """Seconds a token after the first, over all of a run's generations."""
    return sum(map(sum, run["token_s"])) / sum(map(len, run["token_s"]))


def joules(phase: str, key: str = "total_j") -> Callable[[Run], float | None]:
    """What gives the joules a token of a run's ``prefill`` or ``decode``; None where there are none."""

    def of(run: Run) -> float | None:
        window = run[f"{phase}_energy"]
        return None if window is None or window[key] is None else window[key] / window["tokens"]

    return of


def by_round(rounds: Rounds, of: Callable[[Run], float | None]) -> dict[int, float] | None:
    """A quantity in each round; None if any run lacks it."""
    found = {}
    for number, both in rounds.items():
        values = [value for value in map(of, both) if value is not None]
        if len(values) < len(both):
            return None
        found[number] = statistics.fmean(values)
    return found or None


def paired_ratio(numerator: Mapping[int, float], denominator: Mapping[int, float]) -> Interval | None:
    """The ratio of two quantities within the rounds that both have; None without any."""
    common = sorted(numerator.keys() & denominator.keys())
    return interval([numerator[number] / denominator[number] for number in common]) if common else None


def tpot_ratio(cell: Sequence[Run], baseline: Sequence[Run]) -> Interval | None:
    """TPOT of the baseline over the cell's."""
    own, others = (by_round(valid_rounds(runs), tpot) for runs in (cell, baseline))
    return None if own is None or others is None else paired_ratio(others, own)


def speculation(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What speculation came to over the valid runs, a cell's ``speculation``; None without any."""
    counts = [run["speculation"] for both in valid_rounds(runs).values() for run in both if run.get("speculation")]
    if not counts:
        return None
    drafted, accepted = (
        [sum(place) for place in zip_longest(*(count[key] for count in counts), fillvalue=0)]
        for key in ("drafted", "accepted")
    )
    verifications = sum(count["verifications"] for count in counts)
    tokens = verifications + sum(accepted)
    return {
        "drafted": drafted,
        "accepted": accepted,
        "verifications": verifications,
        "tokens_per_verification": tokens / verifications,
        "bytes_per_token": sum(count["weight_bytes"] + count["cache_bytes"] for count in counts) / tokens,
        "flops_per_token": sum(count["flops"] for count in counts) / tokens,
    }


def summarise(cell: dict[str, Any], baseline: dict[str, Any], facts: Mapping[str, Any]) -> dict[str, Any] | None:
    """A cell's ``summary``; None without a valid round.

    Args:
        cell: as in a result, with its runs.
        baseline: the first cell of the group.
        facts: what is counted and not timed: ``bytes_per_token``, ``flops_per_token`` and ``route_mix`` of the cell,
            ``baseline_bytes``, ``baseline_flops``, ``bandwidth_bytes_s`` (or None) and ``why_no_energy``.
    """
    rounds = valid_rounds(cell["runs"])
    seconds, first = by_round(rounds, tpot), by_round(rounds, ttft)
    if seconds is None or first is None:
        return None
    runs = [run for both in rounds.values() for run in both]
    tokens = [second for run in runs for generation in run["token_s"] for second in generation]
    p50, p95, p99 = np.quantile(tokens, (0.5, 0.95, 0.99)).tolist()
    of_tpot, of_ttft, batch = interval(list(seconds.values())), interval(list(first.values())), cell["batch"]
    decode = _energy(rounds, "decode")
    bandwidth = facts["bandwidth_bytes_s"]
    speed_up = tpot_ratio(cell["runs"], baseline["runs"])
    return {
        "rounds": len(rounds),
        "ttft_s": of_ttft.record(),
        "prefill_tps": _inverse(batch * cell["prompt_tokens"], of_ttft),
        "decode_tps": _inverse(batch, of_tpot),
        "tpot_s": of_tpot.record(),
        "inter_token_s": {"p50": p50, "p95": p95, "p99": p99},
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "working_bytes": max(run["working_bytes"] for run in runs),
        "bytes_per_token": facts["bytes_per_token"],
        "flops_per_token": facts["flops_per_token"],
        "roofline_share": bandwidth and facts["bytes_per_token"] * batch / of_tpot.median / bandwidth,
        "route_mix": facts["route_mix"],
        "prefill_energy": _energy(rounds, "prefill"),
        "decode_energy": decode,
        "why_no_energy": "" if decode else _why(runs, facts["why_no_energy"]),
        "edp_js": decode and decode["j_per_token"]["median"] * of_tpot.median,
        "speed_up": speed_up and speed_up.record(),
        "byte_ratio": facts["baseline_bytes"] / facts["bytes_per_token"],
        "flop_ratio": facts["baseline_flops"] / facts["flops_per_token"],
    }


def _inverse(amount: float, seconds: Interval) -> dict[str, float]:
    return Interval(amount / seconds.median, amount / seconds.high, amount / seconds.low).record()


def _why(runs: Sequence[Run], unmeasured: str) -> str:
    """Why a cell's decoding has no energy: there is no meter, or what the meter said of a window."""
    said = [run["decode_energy"]["why"].get("total", "") for run in runs if run["decode_energy"]]
    return next((why for why in said if why), unmeasured)


def _energy(rounds: Rounds, phase: str) -> dict[str, Any] | None:
    """Energy a token in a phase; None if a window has none."""
    gross, net = (by_round(rounds, joules(phase, key)) for key in ("total_j", "net_j"))
    if gross is None:
        return None
    windows = [run[f"{phase}_energy"] for both in rounds.values() for run in both]
    watts = by_round(rounds, lambda run: run[f"{phase}_energy"]["total_j"] / run[f"{phase}_energy"]["seconds"])
    assert watts is not None
    rails: dict[str, float | None] = {}
    for rail in windows[0]["joules"]:
        drawn = [window["joules"].get(rail) for window in windows]
        complete = all(each is not None for each in drawn)
        rails[rail] = sum(drawn) / sum(window["tokens"] for window in windows) if complete else None
    return {
        "j_per_token": interval(list(gross.values())).record(),
        "net_j_per_token": None if net is None else interval(list(net.values())).record(),
        "mean_w": interval(list(watts.values())).record(),
        "rails_j_per_token": rails,
        "window_s": sum(window["seconds"] for window in windows),
        "flags": sorted({flag for window in windows for flag in window["flags"]}),
    }
