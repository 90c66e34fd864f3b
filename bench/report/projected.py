"""What routes should bring on Apple chips: a projection, drawn as one."""

from collections.abc import Sequence

from duo_mlx.bench.report.charts import Axis, Chart, Point, Series, Value
from duo_mlx.bench.report.rows import Cell, Result, joined
from duo_mlx.projection import ASSUMPTIONS, Machine, machines, project
from duo_mlx.work import Work

SPEED_UP = "times as fast as all big"


def speed_up(results: Sequence[Result]) -> Chart:
    """Decoding of each pattern of big and small over all big's, by chip, from each result's counted work."""
    on = machines()
    series: list[Series] = []
    for result in results:
        cells = _comparable(result)
        for machine in on if len(cells) > 1 else ():
            points = [
                _point(cell, cells[0], machine) for cell in sorted(cells, key=lambda each: each.record["big_layers"])
            ]
            name = joined(result.machine, f"{machine.name}, a projection")
            series.append(Series(name, "line", points, len(series), len(series), projected=True))
    return Chart(
        "projection",
        "Projection: what Apple chips should make of it",
        "Nothing here was measured on such a chip. Bytes, kernels and waits of a decoded token are counted, and times "
        "are made of them with constants that others report; whiskers reach from the fastest of these to the slowest. "
        "Routes of big and small only, at the first sizes that were measured.",
        Axis("layers in which a token meets big", zero=True),
        Axis(SPEED_UP, zero=True),
        ("machine", "cell", "projected for", SPEED_UP, "by the fastest constants", "by the slowest", "projected ms"),
        series,
        "The result holds no counted work of two routes of big and small.",
        [f"{each[0].upper()}{each[1:]}." for each in ASSUMPTIONS],
    )


def _comparable(result: Result) -> list[Cell]:
    """All big, then the other cells of its sizes, strategy and bits without any skip."""
    known = [cell for cell in result.usable if not cell.peer and cell.record.get("gpu_work")]
    known = [cell for cell in known if not cell.summary("route_mix", "skip")]
    big = next((cell for cell in known if cell.summary("route_mix", "big") == 1), None)
    if big is None:
        return []
    return [big, *(cell for cell in known if cell is not big and _like(cell) == _like(big))]


def _like(cell: Cell) -> tuple[Value, ...]:
    work = cell.record["gpu_work"]
    return cell.sizes, cell.record["strategy"], work["strategy"], work["bits"]


def _point(cell: Cell, big: Cell, machine: Machine) -> Point:
    own, others = (project(_work(each), machine) for each in (cell, big))
    gains = [other / one for other, one in zip(others, own, strict=True)]
    row: tuple[Value, ...] = (*cell.who, machine.name, *gains, 1e3 * own.typical)
    return Point(cell.record["big_layers"], gains[0], row, y_span=(min(gains), max(gains)))


def _work(cell: Cell) -> Work:
    return Work(*(cell.record["gpu_work"][key] for key in Work._fields))
