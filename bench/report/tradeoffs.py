"""What is paid for what: quality against energy, latency against energy, and both against how many layers are big."""

import math
from collections.abc import Callable, Sequence

from duo_mlx.bench.report.charts import Axis, Chart, Estimate, Point, Range, Series, Value, enumerate_once, frontier
from duo_mlx.bench.report.rows import PEER, Cell, Result, joined, usable

MS = 1e3
TPOT = "TPOT (ms)"
ENERGY = "energy a decoded token (J)"
FAR = math.log(10)  # nats above the best, ten times its perplexity: nobody would use that
NONE = "No cell has a valid round yet."
WHISKERS = "Whiskers are 95 % bootstrap intervals over rounds"


def quality(results: Sequence[Result]) -> Chart:
    """Loss against energy a token, or against TPOT where there is no energy at all."""
    cells = usable(results)
    metered = any(_joules(cell) for cell in cells)
    cost, name = (_joules, ENERGY) if metered else (_tpot, TPOT)
    known = {cell: found for cell in cells if cell.record["quality"] and (found := cost(cell))}
    best_loss = min((_loss(cell) for cell in known), default=0.0)
    shown = {cell: found for cell, found in known.items() if _loss(cell) <= best_loss + FAR}
    series = []
    groups = enumerate_once(cell.group for cell in shown)
    for group, number in groups.items():
        points = {
            cell: (found, Estimate.of(cell.record["quality"]["loss"]))
            for cell, found in shown.items()
            if cell.group == group
        }
        best = [list(points)[at] for at in frontier([(x.median, y.median) for x, y in points.values()])]
        kept = [_point(cell, *points[cell], cell.record["quality"]["kl"], "yes") for cell in best]
        others = [cell for cell in points if cell not in best]
        beaten = [_point(cell, *points[cell], cell.record["quality"]["kl"], "no") for cell in others]
        alone = len(groups) == 1
        series += [
            Series("frontier" if alone else "", "step", kept, number),
            Series("no cell is better in both" if alone else group, "points", kept, number, number),
            Series(joined("" if alone else group, "another is better in both"), "points", beaten, None, number),
        ]
    notes = [*(meters(results) if metered else []), *no_energy(results)]
    if any(cell.peer for cell in cells):
        notes.append(f"{PEER} is left out: its quality was not measured.")
    if far := [f"{cell.title} ({_loss(cell):.3g})" for cell in known if cell not in shown]:
        notes.append(f"Left out, as their loss would flatten all others: {', '.join(far)}.")
    what = "energy" if metered else "latency"
    return Chart(
        "quality",
        f"Quality against {what}",
        f"Loss on held-out text and {name} of the same routes. The steps join the cells that no other beats in both; "
        f"they are drawn among cells of the same machine and sizes. {WHISKERS}, of the loss over windows of text.",
        Axis(f"{name}, log scale", log=True),
        Axis("loss (nats a token)"),
        ("machine", "cell", name, "low", "high", "loss", "loss low", "loss high", "KL from all big", "on the frontier"),
        [each for each in series if each.points],
        "No cell has both quality and a valid round.",
        notes,
        better=True,
    )


def latency_energy(results: Sequence[Result]) -> Chart:
    """TPOT against energy a token."""
    return _scatter(
        results,
        "latency-energy",
        "Latency against energy",
        f"Time and energy a decoded token. {WHISKERS}.",
        (Axis(f"{ENERGY}, log scale", log=True), _joules),
        (Axis(f"{TPOT}, log scale", log=True), _tpot),
        meters(results),
        no_energy(results),
        better=True,
    )


def latency_layers(results: Sequence[Result]) -> Chart:
    """TPOT against the number of big layers."""
    return _scatter(
        results,
        "latency-big-layers",
        "Latency and big layers",
        f"Time a decoded token, and in how many layers it meets big, as realised. {WHISKERS}.",
        (_LAYERS, _layers),
        (Axis(TPOT, zero=True), _tpot),
    )


def energy_layers(results: Sequence[Result]) -> Chart:
    """Energy a token against the number of big layers."""
    return _scatter(
        results,
        "energy-big-layers",
        "Energy and big layers",
        f"Energy a decoded token, and in how many layers it meets big, as realised. {WHISKERS}.",
        (_LAYERS, _layers),
        (Axis(ENERGY, zero=True), _joules),
        meters(results),
        no_energy(results),
    )


def meters(results: Sequence[Result]) -> list[str]:
    """A sentence for each meter: what its joules are of."""
    found = [result for result in results if any(cell.summary("decode_energy") for cell in result.usable)]
    return [
        f"Energy{f' on {result.machine}' if result.machine else ''} is gross, with the idle computer's share: "
        f"{result.record['meter']['label'].rstrip('.')}."
        for result in found
    ]


def no_energy(results: Sequence[Result]) -> list[str]:
    """A sentence for each reason why cells have no energy."""
    found = []
    for result in results:
        lacking = [cell for cell in result.usable if cell.summary("decode_energy") is None]
        for why in dict.fromkeys(cell.summary("why_no_energy") for cell in lacking):
            names = [cell.name for cell in lacking if cell.summary("why_no_energy") == why]
            whose = "" if len(names) == len(result.usable) else f" of {', '.join(names)}"
            on = f" on {result.machine}" if result.machine else ""
            found.append(f"There is no energy{whose}{on}: {why.rstrip('.') or 'the result does not say why'}.")
    return found


_LAYERS = Axis("layers in which a token meets big", zero=True)
Measure = Callable[[Cell], Estimate | None]


def _loss(cell: Cell) -> float:
    return float(cell.record["quality"]["loss"]["median"])


def _tpot(cell: Cell) -> Estimate | None:
    return _positive(Estimate.of(cell.summary("tpot_s"), MS))


def _joules(cell: Cell) -> Estimate | None:
    energy = cell.summary("decode_energy")
    return _positive(Estimate.of(energy["j_per_token"])) if energy else None


def _layers(cell: Cell) -> Estimate | None:
    layers = cell.record["big_layers"]
    return None if layers is None else Estimate(layers, layers, layers)


def _positive(found: Estimate) -> Estimate | None:
    """Zero and less is no time and no energy, and has no place on a log scale."""
    return found if found.low > 0 and found.median > 0 else None


def _point(cell: Cell, x: Estimate, y: Estimate, *more: Value) -> Point:
    return Point(x.median, y.median, (*cell.who, *x, *y, *more), cell.brief, _span(x), _span(y))


def _span(found: Estimate) -> Range | None:
    return found.span if found.low < found.high else None


def _scatter(
    results: Sequence[Result],
    key: str,
    title: str,
    caption: str,
    x: tuple[Axis, Measure],
    y: tuple[Axis, Measure],
    meant: Sequence[str] = (),
    lacking: Sequence[str] = (),
    better: bool = False,
) -> Chart:
    """Every usable cell that has both figures; mlx-lm apart."""
    found = {cell: (at, up) for cell in usable(results) if (at := x[1](cell)) and (up := y[1](cell))}
    groups = enumerate_once(cell.group for cell in found)
    series = []
    for group, number in groups.items():
        for peer in (False, True):
            points = [_point(cell, *both) for cell, both in found.items() if (cell.group, cell.peer) == (group, peer)]
            name = joined(group, PEER if peer else "duo-mlx")
            series.append(Series(name, "points", points, number, number, peer))
    named = (axis.title.removesuffix(", log scale") for axis, _ in (x, y))
    columns = ("machine", "cell", *(f"{name}{end}" for name in named for end in ("", " low", " high")))
    why = " ".join(lacking) or "No cell has both figures."
    shown = [each for each in series if each.points]
    return Chart(key, title, caption, x[0], y[0], columns, shown, why, [*meant, *lacking], better)
