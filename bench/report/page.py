"""One page of HTML with everything in it: it asks for nothing from anywhere."""

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template

from duo_mlx.bench.report import costs, figures, machines, oracles, projected, tradeoffs
from duo_mlx.bench.report.charts import Chart, written
from duo_mlx.bench.report.explorer import Text
from duo_mlx.bench.report.markup import Node, data, html, node, table, unfolded
from duo_mlx.bench.report.rows import Result, joined
from duo_mlx.bench.report.themes import THEMES
from duo_mlx.errors import DuoError

CHARTS: tuple[Callable[[Sequence[Result]], Chart], ...] = (
    tradeoffs.quality,
    tradeoffs.latency_energy,
    tradeoffs.latency_layers,
    tradeoffs.energy_layers,
    costs.parts,
    costs.context,
    costs.roofline,
    costs.spread,
    costs.course,
    projected.speed_up,
)


def charts(results: Sequence[Result], oracle: Path | None = None) -> list[Chart]:
    """All charts, those without figures, too; and that of an oracle's folder."""
    found = [chart(results) for chart in CHARTS]
    return [found[0], oracles.quality(results, oracle), *found[1:]] if oracle else found


def page(results: Sequence[Result], shown: Sequence[Chart], texts: Sequence[Text]) -> str:
    """The page as HTML.

    Raises:
        DuoError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise DuoError("the page needs plotly: pip install 'duo-mlx[plot]'") from None
    sections = [_chart(chart) for chart in shown]
    drawn = {
        chart.key: {name: figures.figure(chart, theme) for name, theme in THEMES.items()}
        for chart in shown
        if chart.series
    }
    here = files(__name__.rpartition(".")[0])
    read = {name: here.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "explorer.js")}
    links = [node("li", node("a", title, href=f"#{key}")) for key, title in _contents(shown)]
    return Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=html(node("title", f"duo-mlx bench: {joined(*(result.label for result in results))}")),
        style=read["page.css"],
        contents=html(node("ul", *links)),
        machines="\n".join(html(machines.about(result)) for result in results),
        cells=html(machines.summary(results)),
        charts="\n".join(html(section) for section in sections),
        plotly=get_plotlyjs(),
        data=data({"charts": drawn, "texts": list(texts)}),
        script=read["page.js"] + read["explorer.js"],
    )


def _contents(shown: Sequence[Chart]) -> list[tuple[str, str]]:
    return [
        ("conditions", "Conditions"),
        ("summary", "All cells"),
        *((chart.key, chart.title) for chart in shown),
        ("explorer", "Routes of a text"),
    ]


def _chart(chart: Chart) -> Node:
    heading = node("h2", chart.title)
    caption = node("p", chart.caption)
    if not chart.series:
        return node(
            "section", heading, caption, node("p", chart.why, class_="why"), id=chart.key, aria_label=chart.title
        )
    label = f"{chart.title}, a chart. Its figures are in the table below it."
    rows = [[written(value) for value in row] for row in chart.rows]
    return node(
        "section",
        heading,
        caption,
        *(node("p", note, class_="note") for note in chart.notes),
        node("div", class_="chart", data_key=chart.key, role="group", aria_label=label),
        unfolded("The figures as a table", table(list(chart.columns), rows, f"{chart.title}: figures")),
        id=chart.key,
        aria_label=chart.title,
    )
