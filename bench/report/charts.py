"""A chart as data, so that a page, a file and a table show the same; and what drawing it needs to know.

Colours and markers are numbers: `figures` and `static` have the palettes. A series that has no colour is grey.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Value = str | int | float | None
Range = tuple[float, float]
Record = dict[str, Any]

# where a label goes, best first (no step of a frontier is below a point); plotly's word, and half sizes right and up
PLACES = {
    "bottom center": (0, -1), "bottom left": (-1, -1), "top right": (1, 1), "middle right": (1, 0),
    "top center": (0, 1), "middle left": (-1, 0), "bottom right": (1, -1), "top left": (-1, 1),
}  # fmt: skip
MARK = 9.0  # px between a point and its label


@dataclass(frozen=True)
class Axis:
    """What is shown along it, with its unit."""

    title: str
    log: bool = False
    zero: bool = False  # it begins there

    def range(self, values: Sequence[float]) -> Range:
        """A little more than the values take."""
        if self.log:
            low, high = (math.log10(each) for each in (min(values), max(values)))
            pad = 0.08 * (high - low) or 0.1
            return 10 ** (low - pad), 10 ** (high + pad)
        low, high = min(values), max(values)
        pad = max(0.12 * (high - min(low, 0) if self.zero else high - low), abs(high) / 1e6) or 1.0
        if self.zero and low >= 0:
            return (0.0 if low else -pad / 3), high + pad
        return low - pad, high + pad

    def share(self, value: float, within: Range) -> float:
        """Where along the axis a value lies, 0 to 1."""
        low, high, value = (math.log10(each) if self.log else each for each in (*within, value))
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Point:
    """A point, whose whiskers reach from ``[0]`` to ``[1]``; the table's row about it is shown beside the pointer.

    A bar reaches from 0, or from the bar before it, to ``x``; ``y`` is its name. ``box`` is five quantiles along x.
    """

    x: float
    y: float | str
    row: tuple[Value, ...]
    label: str = ""
    x_span: Range | None = None
    y_span: Range | None = None
    box: tuple[float, float, float, float, float] | None = None


@dataclass(frozen=True)
class Series:
    """Points that look alike. A ``step`` is only a line; ``peer`` marks what is no Duo model; "" is in no legend."""

    name: str
    kind: Literal["points", "line", "step", "bars", "boxes"]
    points: list[Point]
    look: int | None = 0
    marker: int = 0
    peer: bool = False
    projected: bool = False  # not measured: a dashed line


@dataclass(frozen=True)
class Chart:
    """A chart and the table behind it; without series ``why`` says in a sentence what is missing."""

    key: str
    title: str
    caption: str
    x: Axis
    y: Axis
    columns: tuple[str, ...]
    series: list[Series]
    why: str
    notes: Sequence[str] = ()
    better: bool = False  # down and to the left
    limit: float | None = None  # x that nothing can exceed

    @property
    def rows(self) -> list[tuple[Value, ...]]:
        """The table, a row a point."""
        return [point.row for point in self._points()]

    @property
    def legend(self) -> list[Series]:
        """The series that a legend shows; a single one needs none."""
        named = [series for series in self.series if series.name]
        return named if len(named) > 1 else []

    @property
    def names(self) -> list[str]:
        """Of the bars or boxes, from the top; none where y is a number."""
        found = dict.fromkeys(point.y for series in self.series for point in series.points)
        return [name for name in found if isinstance(name, str)]

    @property
    def x_range(self) -> Range:
        ends = [self.limit] if self.limit else []
        return self.x.range([*ends, *(each for point in self._points() for each in (point.x, *(point.x_span or ())))])

    @property
    def y_range(self) -> Range:
        return self.y.range([each for point in self._points() for each in (_number(point), *(point.y_span or ()))])

    def _points(self) -> list[Point]:
        return [point for series in self.series if series.kind != "step" for point in series.points]

    def spots(self) -> list[tuple[Point, float, float]]:
        """Each point with where it lies, 0 to 1 of the plot."""
        wide, high = self.x_range, self.y_range
        return [(each, self.x.share(each.x, wide), self.y.share(_number(each), high)) for each in self._points()]

    def places(self, width: float, height: float) -> dict[int, str]:
        """By a point's ``id``, where its label is free of others in a plot of so many pixels; no place, no label."""
        spots = self.spots()
        taken = [(x * width, y * height, MARK / 2, MARK / 2) for _, x, y in spots]
        if self.better:
            corner = self.free_corner()
            taken.append((corner[0] * width, corner[1] * height, 60.0, 40.0))
        found = {}
        for point, x, y in spots:
            half = 3.6 * len(point.label), 7.0
            for place, (right, up) in PLACES.items():
                at = x * width + right * (half[0] + MARK), y * height + up * (half[1] + MARK - 2 * abs(right))
                box = (*at, *half)
                inside = half[0] <= at[0] <= width - half[0] and half[1] <= at[1] <= height - half[1]
                if point.label and inside and not any(_overlap(box, other) for other in taken):
                    taken.append(box)
                    found[id(point)] = place
                    break
        return found

    def free_corner(self) -> tuple[float, float]:
        """Of the plot's corners, a little inside, the one from which the nearest point is farthest; 0 to 1."""
        spots = self.spots()
        corners = [(x, y) for x in (0.9, 0.1) for y in (0.88, 0.12)]
        return max(corners, key=lambda corner: min(math.dist(corner, (x, y)) for _, x, y in spots))


class Estimate(NamedTuple):
    """An interval of a result's JSON, times a factor for its unit."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, record: Record, factor: float = 1.0) -> "Estimate":
        return cls(*(factor * record[key] for key in cls._fields))

    @property
    def span(self) -> Range:
        return self.low, self.high


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other beats: at most as much of both, and less of one. In the order of the first coordinate."""
    found: list[int] = []
    for index in sorted(range(len(points)), key=points.__getitem__):
        if not found or points[index][1] < points[found[-1]][1] or points[index] == points[found[-1]]:
            found.append(index)
    return found


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """Where a few round numbers lie within a range; of a log axis 1, 2 and 5 times powers of ten, if enough do."""
    if log:
        powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
        found = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
        if len(found) > 8:
            found = [power for power in powers if low <= power <= high]
            return found[:: math.ceil(len(found) / 8)]
        if len(found) > 2:
            return found
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    return [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def written(value: Value) -> str:
    """A figure for people: four digits, no more."""
    if not isinstance(value, float):
        return "-" if value is None else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def enumerate_once(names: Iterable[str]) -> dict[str, int]:
    """A number for each name, in the order in which they come."""
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _number(point: Point) -> float:
    return 0.0 if isinstance(point.y, str) else point.y


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return abs(one[0] - other[0]) < one[2] + other[2] and abs(one[1] - other[1]) < one[3] + other[3]
