"""A plotly figure of a chart, as plain data.

plotly takes some HTML, entities and placeholders in texts for markup: `text` takes their meaning away.
"""

import math
import textwrap
from html import escape
from typing import Any

from duo_mlx.bench.report.charts import Axis, Chart, Point, Range, Series, ticks, written
from duo_mlx.bench.report.themes import DASHES, HATCHES, MARKERS, PEER_HATCH, PEER_MARKER, PROJECTED, Theme

SIZE = (640.0, 330.0)  # px that labels are placed for
BAR = 36  # px
WRAP = 24  # characters of a bar's name in a line
Figure = dict[str, Any]


def figure(chart: Chart, theme: Theme) -> Figure:
    """``data`` and ``layout`` of a chart that has series."""
    names = chart.names
    places = {} if names else chart.places(*SIZE)
    return {"data": [_trace(chart, each, theme, places) for each in chart.series], "layout": _layout(chart, theme)}


def text(value: str) -> str:
    """A text that plotly shows as it is."""
    return escape(value, quote=False).replace("%{", "%\u200b{")


def _trace(chart: Chart, series: Series, theme: Theme, places: dict[int, str]) -> Figure:
    points, colour = series.points, theme.colour(series.look)
    marker = PEER_MARKER if series.peer else MARKERS[series.marker % len(MARKERS)]
    rows = {name: float(row) for row, name in enumerate(chart.names)}
    trace: Figure = {
        "name": text(series.name),
        "showlegend": series in chart.legend,
        "x": [point.x for point in points],
        "y": [rows[point.y] if isinstance(point.y, str) else point.y for point in points],
        "hoverinfo": "text",
        "hovertext": [_hover(chart, point) for point in points],
    }
    if series.kind == "bars":
        hatch = PEER_HATCH if series.peer else HATCHES[series.marker % len(HATCHES)]
        pattern = {"shape": hatch[0], "fillmode": "overlay", "fgcolor": theme.ground, "size": 7, "solidity": 0.25}
        return trace | {
            "type": "bar",
            "orientation": "h",
            "marker": {"color": colour, "pattern": pattern, "line": {"color": theme.ground, "width": 1}},
            "text": [text(point.label) for point in points],
            "textposition": "outside",
            "cliponaxis": False,
        }
    if series.kind == "boxes":
        quantiles = zip(*(point.box for point in points if point.box), strict=True)
        keys = ("lowerfence", "q1", "median", "q3", "upperfence")
        del trace["x"], trace["hovertext"]
        line = {"color": colour, "width": 2}
        found = dict(zip(keys, map(list, quantiles), strict=True))
        return trace | found | {"type": "box", "orientation": "h", "line": line, "width": 0.5, "hoverinfo": "x"}
    dash = PROJECTED if series.projected else DASHES[series.marker % len(DASHES)]
    trace |= {"type": "scatter", "line": {"color": colour, "width": 2, "dash": dash[0]}}
    if series.kind == "step":
        return trace | {"mode": "lines", "line": {"color": colour, "width": 2, "shape": "hv"}, "hoverinfo": "skip"}
    return trace | {
        "mode": "lines+markers" if series.kind == "line" else "markers+text",
        "marker": {
            "color": colour,
            "symbol": f"{marker[0]}-open" if series.look is None else marker[0],
            "size": (6 if len(points) > 20 else 9) + 4 * series.peer,
        },
        "text": [text(point.label) if id(point) in places else "" for point in points],
        "textposition": [places.get(id(point), "top center") for point in points],
        "cliponaxis": False,
        "error_x": _whiskers([(point.x, point.x_span) for point in points]),
        "error_y": _whiskers([(float(y), point.y_span) for point, y in zip(points, trace["y"], strict=True)]),
    }


def _hover(chart: Chart, point: Point) -> str:
    pairs = zip(chart.columns, point.row, strict=True)
    return "<br>".join(f"{text(column)}: {text(written(value))}" for column, value in pairs)


def _whiskers(points: list[tuple[float, Range | None]]) -> Figure:
    spans = [(value, span or (value, value)) for value, span in points]
    return {
        "visible": any(span for _, span in points),
        "symmetric": False,
        "array": [high - value for value, (_, high) in spans],
        "arrayminus": [value - low for value, (low, _) in spans],
        "thickness": 1.5,
        "width": 3,
    }


def _layout(chart: Chart, theme: Theme) -> Figure:
    names = chart.names
    stacked = len(chart.series) > 1 and chart.series[0].kind == "bars"
    across = _axis(chart.x, theme)
    if not names or chart.limit:
        across |= _scale(chart.x, chart.x_range)
    upright = _axis(chart.y, theme) | (_rows(names) if names else _scale(chart.y, chart.y_range))
    lines = -(-len(chart.legend) // 2)
    return {
        "height": (80 + BAR * len(names) if names else 420) + 22 * lines,
        "xaxis": across,
        "yaxis": upright,
        "barmode": "stack" if stacked else "overlay",
        "showlegend": bool(lines),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "modebar": {"orientation": "v", "color": theme.muted, "activecolor": theme.ink},
        "margin": {"l": 10, "r": 36, "t": 16, "b": 10},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": theme.ink},
        "paper_bgcolor": theme.ground,
        "plot_bgcolor": theme.ground,
        "hoverlabel": {"bgcolor": theme.ground, "bordercolor": theme.muted, "font": {"color": theme.ink}},
        "hovermode": "closest",
        "dragmode": False,
        "annotations": [_arrow(chart, theme)] if chart.better else [],
        "shapes": [_limit(chart.limit, theme)] if chart.limit else [],
    }


def _axis(axis: Axis, theme: Theme) -> Figure:
    return {
        "title": {"text": text(axis.title)},
        "type": "log" if axis.log else "linear",
        "rangemode": "tozero" if axis.zero else "normal",
        "gridcolor": theme.grid,
        "zerolinecolor": theme.grid,
        "linecolor": theme.muted,
        "automargin": True,
        "fixedrange": False,
    }


def _scale(axis: Axis, span: Range) -> Figure:
    low, high = span
    marks = ticks(low, high, axis.log)
    return {
        "range": [math.log10(low), math.log10(high)] if axis.log else [low, high],
        "tickvals": marks,
        "ticktext": [f"{mark:.6g}" for mark in marks],
    }


def _rows(names: list[str]) -> Figure:
    """Names of bars down the axis, wrapped."""
    return {
        "range": [len(names) - 0.5, -0.5],
        "tickvals": list(range(len(names))),
        "ticktext": ["<br>".join(text(line) for line in textwrap.wrap(name, WRAP)) for name in names],
        "showgrid": False,
        "zeroline": False,
    }


def _arrow(chart: Chart, theme: Theme) -> Figure:
    x, y = chart.free_corner()
    return {
        "text": "better", "xref": "paper", "yref": "paper", "x": x - 0.03, "y": y - 0.05, "ax": 44, "ay": -34,
        "arrowcolor": theme.muted, "arrowhead": 2, "arrowwidth": 2,
    }  # fmt: skip


def _limit(limit: float, theme: Theme) -> Figure:
    line = {"color": theme.ink, "width": 2, "dash": "dash"}
    return {"type": "line", "x0": limit, "x1": limit, "y0": 0, "y1": 1, "yref": "paper", "line": line}
