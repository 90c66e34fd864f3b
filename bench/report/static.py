"""Charts as SVG and PNG with matplotlib, and the table behind each as CSV."""

import csv
import io
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duo_mlx.bench.report.charts import Chart, Series, ticks
from duo_mlx.bench.report.themes import DASHES, HATCHES, LIGHT, MARKERS, PEER_HATCH, PEER_MARKER, PROJECTED
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, write_text, writing

DPI = 150
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "duo-mlx",  # the same chart is the same file
    "text.parse_math": False,
    "font.size": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT.muted,
    "axes.labelcolor": LIGHT.ink,
    "axes.titlelocation": "left",
    "grid.color": LIGHT.grid,
    "hatch.linewidth": 1.0,
    "text.color": LIGHT.ink,
}
# offset in points and alignment of a label by plotly's word for its place
SIDES = {"left": (-7, "right"), "center": (0, "center"), "right": (7, "left")}
HEIGHTS = {"top": (7, "bottom"), "middle": (0, "center"), "bottom": (-7, "top")}


def planned(charts: Sequence[Chart], directory: Path, force: bool) -> list[Path]:
    """The files that `write` writes.

    Raises:
        DuoError: one exists and ``force`` is not given; or matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise DuoError("--static needs matplotlib: pip install 'duo-mlx[plot]'") from None
    found = [directory / f"{chart.key}.{kind}" for chart in charts if chart.series for kind in ("svg", "png", "csv")]
    for file in found:
        if file.exists() and not force:
            raise DuoError(f"{file} exists already; give --force to replace it, or another directory")
    return found


def write(charts: Sequence[Chart], directory: Path, force: bool) -> None:
    """Write each chart that has something to show as SVG, PNG and CSV.

    Raises:
        DuoError: a file exists and ``force`` is not given, or cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    for chart in charts:
        if not chart.series:
            continue
        with mpl.rc_context(STYLE), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")  # then it is a box
            drawn = draw(chart, Figure)
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                with output_file(directory / f"{chart.key}.{kind}", force) as new, writing(new):
                    drawn.savefig(new, dpi=DPI, metadata=metadata)
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([chart.columns, *chart.rows])
        with output_file(directory / f"{chart.key}.csv", force) as new:
            write_text(new, lines.getvalue())


def draw(chart: Chart, figure_class: Any) -> Any:
    """A figure of matplotlib, which is drawn under `STYLE`."""
    names = chart.names
    legend = chart.legend
    below = 0.25 * -(-len(legend) // 2)  # in: the legend's lines
    figure = figure_class(figsize=(8, (1.4 + 0.45 * len(names) if names else 4.6) + below), layout="constrained")
    axes = figure.add_subplot()
    ends = dict.fromkeys(names, 0.0)
    handles = [_series(axes, series, ends) for series in chart.series]
    axes.set_title(chart.title)
    axes.set_xlabel(chart.x.title)
    if names:
        axes.set_yticks(range(len(names)), ["\n".join(textwrap.wrap(name, 30)) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
    else:
        axes.set_ylabel(chart.y.title)
        _scale(axes, chart)
        _labels(axes, chart)
    if chart.limit:
        axes.axvline(chart.limit, color=LIGHT.ink, linestyle="--")
    if names:
        axes.set_xlim(left=0)
    if legend:
        shown = {series.name: handle for series, handle in zip(chart.series, handles, strict=True) if series in legend}
        labels = [f"\u200b{name}" if name.startswith("_") else name for name in shown]  # which would hide it
        figure.legend(shown.values(), labels, loc="outside lower left", ncols=2, frameon=False)
    return figure


def _series(axes: Any, series: Series, ends: dict[str, float]) -> Any:
    """Draw a series and return what stands for it in the legend; ``ends`` is how far each row's bars reach so far."""
    colour, points = LIGHT.colour(series.look), series.points
    rows = {name: row for row, name in enumerate(ends)}
    x, y = [point.x for point in points], [rows[point.y] if isinstance(point.y, str) else point.y for point in points]
    if series.kind == "bars":
        hatch = PEER_HATCH if series.peer else HATCHES[series.marker % len(HATCHES)]
        left = [ends[str(point.y)] for point in points]
        bars = axes.barh(y, x, 0.7, left, color=colour, hatch=hatch[1], edgecolor=LIGHT.ground, linewidth=0)
        axes.bar_label(bars, [point.label for point in points], padding=4)
        for point in points:
            ends[str(point.y)] += point.x
        return bars
    if series.kind == "boxes":
        keys = ("whislo", "q1", "med", "q3", "whishi")
        boxes: Any = [dict(zip(keys, point.box, strict=True)) | {"fliers": []} for point in points if point.box]
        line = {"color": colour, "linewidth": 1.5}
        parts = dict.fromkeys(("boxprops", "medianprops", "whiskerprops", "capprops"), line)
        return axes.bxp(boxes, y, orientation="horizontal", widths=0.5, showfliers=False, **parts)["boxes"][0]
    if series.kind == "step":
        return axes.plot(x, y, color=colour, drawstyle="steps-post")[0]
    dash = PROJECTED if series.projected else DASHES[series.marker % len(DASHES)]
    return axes.errorbar(
        x,
        y,
        xerr=_whiskers([(point.x, point.x_span) for point in points]),
        yerr=_whiskers([(value, point.y_span) for value, point in zip(y, points, strict=True)]),
        color=colour,
        linestyle=dash[1] if series.kind == "line" else "none",
        marker=(PEER_MARKER if series.peer else MARKERS[series.marker % len(MARKERS)])[1],
        markersize=(4 if len(points) > 20 else 7) + 4 * series.peer,
        markerfacecolor="none" if series.look is None else colour,
        capsize=2,
        zorder=3,
    )


def _whiskers(points: Sequence[tuple[float, tuple[float, float] | None]]) -> list[list[float]] | None:
    if not any(span for _, span in points):
        return None
    spans = [(value, span or (value, value)) for value, span in points]
    # of a bootstrap, the median can lie outside by a rounding error
    return [[max(value - low, 0) for value, (low, _) in spans], [max(high - value, 0) for value, (_, high) in spans]]


def _scale(axes: Any, chart: Chart) -> None:
    for axis, span, name in ((chart.x, chart.x_range, "x"), (chart.y, chart.y_range, "y")):
        marks = ticks(*span, axis.log)
        axes.set(**{f"{name}scale": "log" if axis.log else "linear", f"{name}lim": span})
        axes.set(**{f"{name}ticks": marks, f"{name}ticklabels": [f"{mark:.6g}" for mark in marks]})
        axes.tick_params(axis=name, which="minor", length=0, labelbottom=False, labelleft=False)


def _labels(axes: Any, chart: Chart) -> None:
    places = chart.places(680, 350)
    for point, _, _ in chart.spots():
        if place := places.get(id(point)):
            height, side = place.split()
            (right, across), (up, upright) = SIDES[side], HEIGHTS[height]
            axes.annotate(
                point.label, (point.x, point.y), (right, up), textcoords="offset points", ha=across, va=upright
            )  # fmt: skip
    if chart.better:
        x, y = chart.free_corner()
        arrow = {"arrowstyle": "->", "color": LIGHT.muted, "linewidth": 1.5}
        ends = {"xycoords": "axes fraction", "textcoords": "axes fraction"}
        axes.annotate("better", (x - 0.04, y - 0.06), (x + 0.02, y + 0.04), arrowprops=arrow, **ends)
