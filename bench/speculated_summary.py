"""What the timings of speculation say: ratios, counts, and the speed-up that acceptance and passes let expect."""

from collections.abc import Mapping, Sequence
from typing import Any

from duo_mlx import drafting
from duo_mlx.bench.continuations import Continuation, by_place
from duo_mlx.bench.decode import line
from duo_mlx.bench.interleave import Timings
from duo_mlx.bench.peer import spread

PLAIN, PEER = "plain", "mlx-lm"
PASSES = (1, 2, 4, drafting.LONGEST + 1)  # tokens of verifying passes that are timed
REPEATS = 5  # passes in a run
GOAL = 1.15  # the speed-up over plain decoding, at least, of the best
AUTO_GOAL = 0.97  # of ``auto``, at least, whatever drafts
PEER_GOAL = 1.00  # mlx-lm's time over ours, at least


def of_costs(timings: Timings) -> dict[str, Any]:
    """Seconds of each pass, and its time over that of a verifying pass over one token, paired within rounds."""
    one = f"pass over {PASSES[0]}"
    return {
        name: {"median_s": timings.median(name) / REPEATS, "over one": spread(timings.ratios(name, {one: 1}))}
        for name in timings.runs
    }


def expected(acceptance: Sequence[float], costs: Mapping[str, Any], spec: str) -> dict[str, Any]:
    """The number of drafted tokens that should be best by the costs of passes, and the speed-up with it.

    Positions beyond those of ``acceptance`` are not considered. Layers that both routes share are not left out.
    """
    over = {name: of["over one"]["median"] for name, of in costs.items()}
    longest = min(len(acceptance), drafting.LONGEST)
    verify = {tokens: over[f"pass over {tokens}"] for tokens in PASSES}
    seconds = drafting.round_seconds(over[f"step of {spec}"], verify, longest)
    known = acceptance[:longest]
    best = drafting.best_length(known, seconds)
    return {"draft_tokens": best, "speed_up": float(drafting.tokens_expected(known)[best] / seconds[best])}


def summary(
    timings: Timings, ways: Mapping[str, Continuation], costs: dict[str, Any], drafts: Sequence[str]
) -> dict[str, Any]:
    """Counts and ratios of all ways, the costs of passes, and what was to be expected of each draft."""
    records = {name: way.record() for name, way in ways.items()}
    steps = {name: way.passes for name, way in ways.items()}
    result: dict[str, Any] = {"ways": records, "costs": costs, "expected": {}}

    def ratio(name: str, other: str) -> dict[str, Any]:
        """``name``'s time over the ``other``'s, for as many tokens."""
        scale = steps[other] / steps[name]
        return spread([scale * each for each in timings.ratios(name, {other: 1})])

    for name in records:
        if name != PLAIN:
            goal = {"at_least": AUTO_GOAL} if name.endswith(", auto") else {}
            result[f"{PLAIN} / {name}"] = ratio(PLAIN, name) | goal
    for spec in drafts:
        peers = [name for name in records if name.startswith(f"{PEER}, {spec}, ")]
        for name in [name for name in records if name.startswith(f"{spec}, ")] if peers else []:
            peer = f"{PEER}, {name}" if f"{PEER}, {name}" in records else min(peers, key=timings.median)
            result[f"{peer} / {name}"] = ratio(peer, name) | {"at_least": PEER_GOAL}
            records[name]["cache_share"] = records[name]["cache_bytes"] / records[peer]["cache_bytes"]
        # texts, and so acceptance, are much alike whatever the number: together they tell more
        rounds = [each for name, way in ways.items() if name.startswith(f"{spec}, ") for each in way.rounds]
        if known := by_place(rounds)["acceptance"]:
            result["expected"][spec] = expected(known, costs, spec) | {"acceptance": known}
    ours = [name for name in records if name != PLAIN and not name.startswith(f"{PEER}, ")]
    best = max(ours, key=lambda name: result[f"{PLAIN} / {name}"]["median"])
    result["best"] = {"name": best, "speed_up": result[f"{PLAIN} / {best}"]["median"], "at_least": GOAL}
    return result


def table(result: dict[str, Any], apart: Sequence[dict[str, Any]], greedy: bool) -> str:
    """The summary for a reader."""
    lines = [
        f"{'':<28} {'tokens/verif.':>13} {'waits/token':>12} {'MB/token':>9} {'cache MB':>9}  accepted by position"
    ]
    for name, of in result["ways"].items():
        each = f"{of['tokens_per_verification']:.2f}" if "verifications" in of else ""
        acceptance = " ".join(f"{share:.2f}" for share in of.get("acceptance", ()))
        lines.append(
            f"{name:<28} {each:>13} {of['host_waits_per_token']:>12.2f} {of['bytes_per_token'] / 1e6:>9.2f} "
            f"{of['cache_bytes'] / 1e6:>9.2f}  {acceptance}".rstrip()
        )
    lines += [line(f"{name}, over a pass over 1", of["over one"]) for name, of in result["costs"].items()]
    lines += [line(name, of) for name, of in result.items() if "interval_95" in of]
    for spec, of in result["expected"].items():
        lines.append(f"{spec}: expected {of['speed_up']:.3f} with {of['draft_tokens']} drafted, by the costs of passes")
    best = result["best"]
    lines.append(f"best: {best['name']}, {best['speed_up']:.3f}, goal: >= {best['at_least']:.2f}")
    if greedy and not apart:
        lines.append("all texts are those of plain decoding, token by token")
    lines += [
        f"{of['name']}: prompt {of['prompt']} differs from token {of['token']}, logits {of['logits_apart']:.2g} apart"
        for of in apart
    ]
    return "\n".join(lines)
