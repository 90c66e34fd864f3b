"""Where the time goes: by part, by context, beside the memory's bandwidth, and from token to token."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from duo_mlx.bench.report.charts import Axis, Chart, Estimate, Point, Series, enumerate_once
from duo_mlx.bench.report.rows import PEER, Cell, Result, joined, usable
from duo_mlx.bench.report.tradeoffs import MS, NONE, TPOT, WHISKERS

REST = "rest: host, launches, overlap"
WHOLE = "the whole (TPOT)"
ORDER = ("attention", "big", "small", "router", "norms", "head", "sampling", "embedding")
QUANTILES = (5, 25, 50, 75, 95)
POSITIONS = 100  # that a curve shows at most


def parts(results: Sequence[Result]) -> Chart:
    """Time a token of each batch-1 duo-mlx cell without speculation, by part."""
    shown: list[tuple[Cell, float, dict[str, float]]] = []
    notes = []
    for cell in usable(results):
        single = cell.record["batch"] == 1 and not cell.speculates  # whose tokens share passes
        if not cell.peer and single and (alone := _alone(cell)):
            whole, total = cell.summary("tpot_s", "median"), sum(alone.values())
            if total > whole:
                more = f"by {MS * (total - whole):.3g} ms ({1 - whole / total:.0%} of their sum)"
                notes.append(f"{cell.title}: its parts, measured alone, together exceed the whole {more}.")
            shown.append((cell, whole, alone | {REST: whole - total}))
    measured = dict.fromkeys(part for *_, alone in shown for part in alone if part != REST)
    names = [*(part for part in ORDER if part in measured), *(part for part in measured if part not in ORDER), REST]
    series = [
        Series(
            part,
            "bars",
            [
                Point(max(MS * alone[part], 0.0), cell.title, (*cell.who, part, MS * alone[part]))
                for cell, _, alone in shown
                if part in alone
            ],
            number,
            number,
        )
        for number, part in enumerate(names)
    ]
    wholes = [Point(MS * whole, cell.title, (*cell.who, WHOLE, MS * whole)) for cell, whole, _ in shown]
    return Chart(
        "parts",
        "A token's time by part",
        "Parts are measured alone over all layers, big and small times the share of token x layer that met them; the "
        "rest is what the whole, TPOT of a batch of 1, takes more. Alone, a part finds other caches and launches than "
        "within the whole, so this is no exact account.",
        Axis("time a decoded token (ms)", zero=True),
        Axis(""),
        ("machine", "cell", "part", "time (ms)"),
        [*series, Series(WHOLE, "points", wholes, None)] if shown else [],
        "No parts were measured with the quantisation and context of a batch-1 cell of duo-mlx.",
        notes,
    )


def context(results: Sequence[Result]) -> Chart:
    """TPOT against how many tokens the cache holds."""
    cells = sorted(usable(results), key=lambda cell: int(cell.record["context"]))
    contexts = {cell.record["context"] for cell in cells}
    series = []
    for number, name in enumerate(dict.fromkeys(_line(cell) for cell in usable(results))):
        mine = [(cell, Estimate.of(cell.summary("tpot_s"), MS)) for cell in cells if _line(cell) == name]
        points = [
            Point(at, tpot.median, (*cell.who, at, *tpot), y_span=tpot.span)
            for cell, tpot in mine
            for at in [cell.record["context"]]
        ]
        series.append(Series(name, "line", points, number, number, mine[0][0].peer))
    return Chart(
        "context",
        "Cost against context",
        f"Time a decoded token by how many tokens were in the cache before the prompt. {WHISKERS}.",
        Axis("context (tokens)", zero=True),
        Axis(TPOT, zero=True),
        ("machine", "cell", "context (tokens)", TPOT, "low", "high"),
        series if len(contexts) > 1 else [],
        f"Only one context was measured, {contexts.pop()} tokens; this needs two or more." if contexts else NONE,
    )


def roofline(results: Sequence[Result]) -> Chart:
    """Achieved bytes a second as a share of the memory's bandwidth."""
    machines = enumerate_once(result.label for result in results)
    series = []
    for result in results:
        line = result.record["roofline"]
        bandwidth = line["bandwidth_bytes_s"] / 1e9 if line else 0.0
        for peer in (False, True):
            points = [
                Point(
                    100 * share,
                    cell.title,
                    (*cell.who, cell.summary("bytes_per_token") / 1e6, share * bandwidth, bandwidth, 100 * share),
                    label=f"{share * bandwidth:.3g} GB/s",
                )
                for cell in result.usable
                if line and cell.peer == peer and (share := cell.summary("roofline_share")) is not None
            ]
            name = joined(result.machine, PEER if peer else "duo-mlx")
            series.append(Series(name, "bars", points, machines[result.label], peer=peer))
    how = dict.fromkeys(
        f"{result.record['roofline']['bandwidth_bytes_s'] / 1e9:.3g} GB/s{' on ' * bool(result.machine)}"
        f"{result.machine}: {result.record['roofline']['how'].rstrip('.')}."
        for result in results
        if result.record["roofline"]
    )
    return Chart(
        "roofline",
        "Memory traffic beside the bandwidth",
        "Bytes of weights and KV cache that a token must read, over TPOT, as a share of the bandwidth measured on the "
        "same machine. Where the weights fit into caches the share may exceed 100 %.",
        Axis("share of the bandwidth (%)", zero=True),
        Axis(""),
        ("machine", "cell", "read a token (MB)", "achieved (GB/s)", "bandwidth (GB/s)", "share (%)"),
        [each for each in series if each.points],
        "The bandwidth was not measured, so there is no ceiling to compare with.",
        list(how),
        limit=100.0,
    )


def spread(results: Sequence[Result]) -> Chart:
    """Quantiles of the times from token to token."""
    series, groups = [], enumerate_once(result.label for result in results)
    for result in results:
        points = []
        for cell in result.usable:
            times = MS * np.concatenate([*_generations(cell), []])
            if times.size:
                low, lower, median, upper, high, p99 = np.percentile(times, (*QUANTILES, 99)).tolist()
                box = (low, lower, median, upper, high)
                row = (*cell.who, *box, p99, float(times.max()), times.size)
                points.append(Point(median, cell.title, row, box=box))
        series.append(Series(result.label, "boxes", points, groups[result.label], groups[result.label]))
    return Chart(
        "token-latencies",
        "From token to token: how evenly",
        "Times from each token to the next, of all valid runs: the box holds the middle half of them, the line in it "
        "is the median, the whiskers reach from the 5th to the 95th percentile; the 99th and the longest are below.",
        Axis("time from token to token (ms)", zero=True),
        Axis(""),
        ("machine", "cell", *(f"p{each} (ms)" for each in QUANTILES), "p99 (ms)", "longest (ms)", "tokens"),
        [each for each in series if each.points],
        NONE,
        _together(results),
    )


def course(results: Sequence[Result]) -> Chart:
    """The median time from token to token along a generation."""
    series = []
    for number, cell in enumerate(usable(results)):
        generations = _generations(cell)
        length = min(map(len, generations), default=0)
        edges = np.linspace(0, length, min(length, POSITIONS) + 1).astype(int).tolist()
        points = []
        for low, high in pairwise(edges):
            tpot = MS * float(np.median([each[low:high] for each in generations]))
            points.append(Point(low + 1, tpot, (*cell.who, low + 1, tpot)))
        series.append(Series(cell.title, "line", points, number, number, cell.peer))
    return Chart(
        "token-course",
        "From token to token: over a generation",
        "Median over all generations of the time to the next token; a rise is the growing cache, a step in all of them "
        "a disturbance. On a CPU the first gap is two steps and the last is none: MLX queues so few operations there "
        "that a step which is started ahead has nearly run when the token before it is handed out.",
        Axis("generated token", zero=True),
        Axis("time to the next token (ms)", zero=True),
        ("machine", "cell", "generated token", "median (ms)"),
        [each for each in series if each.points],
        NONE,
        _together(results),
    )


def _together(results: Sequence[Result]) -> list[str]:
    """What must be said of times from token to token where tokens come several at once."""
    if not any(cell.speculates for cell in usable(results)):
        return []
    return ["Where drafts are verified, the tokens of a round come at once; its time is spread evenly over them."]


def _line(cell: Cell) -> str:
    return joined(cell.line, cell.result.machine)


def _alone(cell: Cell) -> dict[str, float]:
    """Seconds of each part as far as the cell's tokens meet it; none where they were not measured."""
    key = (cell.record["quantisation"], cell.record["context"])
    parts = cell.result.record["parts"]
    found = next((each["seconds"] for each in parts if (each["quantisation"], each["context"]) == key), None)
    if found is None:
        return {}
    routed = cell.record["route"].startswith("router")
    seconds = {part: time for part, time in found.items() if routed or part != "router"}
    return seconds | {part: seconds[part] * cell.summary("route_mix", part) for part in ("big", "small")}


def _generations(cell: Cell) -> list[list[float]]:
    """The times of each generation of the valid runs, in seconds."""
    return [times for run in cell.record["runs"] if not run["invalid_why"] for times in run["token_s"] if times]
