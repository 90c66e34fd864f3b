"""Charts as data: what they show of a result, what they say where there is nothing, and figures of them."""

import copy
import itertools
import re

import plotly.graph_objects as go
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx.bench.report import costs, figures, page, projected, rows, themes, tradeoffs
from duo_mlx.bench.report.charts import Axis, Chart, Point, Series, frontier, ticks, written
from duo_mlx.projection import machines


@pytest.fixture
def results(made_result):
    """``results(*changes)``: results, made with these arguments each."""

    def make(*changes):
        return rows.labelled([(f"run{at}", made_result(**each)) for at, each in enumerate(changes or [{}])])

    return make


def series(chart, name):
    return next(each for each in chart.series if each.name == name)


def labels(points):
    return [point.label for point in points]


coordinates = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@given(coordinates)
def test_the_frontier_is_what_no_point_beats(points):
    beaten = {
        one
        for one, other in itertools.product(range(len(points)), repeat=2)
        if points[other] != points[one] and all(a <= b for a, b in zip(points[other], points[one], strict=True))
    }
    found = frontier(points)
    assert set(found) == set(range(len(points))) - beaten
    assert found == sorted(found, key=lambda at: (points[at], at))


@given(st.floats(1e-9, 1e9), st.floats(1e-6, 1e6), st.booleans())
def test_ticks_are_few_and_within(low, extent, log):
    high = low * (1 + extent) if log else low + extent
    found = ticks(low, high, log)
    assert 1 <= len(found) <= 9
    assert all(low * (1 - 1e-9) <= each <= high * (1 + 1e-9) for each in found)


def test_quality_is_shown_against_gross_energy(results):
    (result,) = results()
    worse = copy.deepcopy(result.record["cells"][2])  # BBss
    worse |= {"route": "router"}
    worse["quality"]["loss"] = {"median": 3.6, "low": 3.5, "high": 3.8}
    chart = tradeoffs.quality(rows.labelled([("", result.record | {"cells": [*result.record["cells"], worse]})]))
    kept = series(chart, "no cell is better in both").points
    assert labels(kept) == ["small", "BBss", "big"]
    assert [point.y for point in kept] == [3.5, 3.2, 3.0]
    assert "Left out, as their loss would flatten all others: skip (7)." in chart.notes
    assert kept[-1].x == pytest.approx(20 * 0.020 / 3) and kept[-1].x_span == pytest.approx((0.132, 0.13467), rel=1e-3)
    (beaten,) = series(chart, "another is better in both").points
    assert (beaten.label, beaten.y_span, beaten.row[-1]) == ("router", (3.5, 3.8), "no")
    assert series(chart, "another is better in both").look is None and chart.x.log and chart.better
    assert [point.label for point in series(chart, "frontier").points] == labels(kept)
    assert "mlx-lm is left out: its quality was not measured." in chart.notes
    assert series(chart, "frontier").kind == "step" and len(chart.rows) == 4


def test_without_energy_quality_is_shown_against_latency_and_the_reason_is_said(results):
    found = results({"metered": False})
    chart = tradeoffs.quality(found)
    assert chart.title == "Quality against latency" and "TPOT" in chart.x.title
    assert series(chart, "frontier").points[0].x == pytest.approx(12.0)
    why = "There is no energy: no meter: this is a test."
    assert why in chart.notes
    for none in (tradeoffs.latency_energy(found), tradeoffs.energy_layers(found)):
        assert not none.series and none.why == why


def test_machines_without_energy_are_named(results):
    chart = tradeoffs.latency_energy(results({}, {"metered": False, "device": "Test M1"}))
    assert {each.name for each in chart.series} == {"Test M9, embedded · duo-mlx", "Test M9, embedded · mlx-lm"}
    assert chart.notes == [
        "Energy on Test M9, embedded is gross, with the idle computer's share: a fake SoC (cpu, gpu).",
        "There is no energy on Test M1, embedded: no meter: this is a test.",
    ]


def test_no_energy_is_not_zero(results):
    (result,) = results()
    result.record["cells"][1]["summary"]["decode_energy"]["j_per_token"] = {"median": 0.0, "low": 0.0, "high": 0.0}
    chart = tradeoffs.latency_energy([result])
    assert "big" not in [point.row[1] for point in series(chart, "duo-mlx").points]


def test_machines_and_peers_differ_in_more_than_colour(results):
    chart = tradeoffs.latency_layers(results({}, {"device": "Test M1", "slower": 2.0}))
    looks = {each.name: (each.look, each.marker, each.peer) for each in chart.series}
    assert looks == {
        "Test M9, embedded · duo-mlx": (0, 0, False),
        "Test M9, embedded · mlx-lm": (0, 0, True),
        "Test M1, embedded · duo-mlx": (1, 1, False),
        "Test M1, embedded · mlx-lm": (1, 1, True),
    }
    drawn = figures.figure(chart, themes.LIGHT)["data"]
    assert [each["marker"]["symbol"] for each in drawn] == ["circle", "star", "square", "star"]
    points = series(chart, "Test M1, embedded · duo-mlx").points
    assert [(point.x, round(point.y, 6)) for point in points] == [(4, 40), (2, 32), (0, 24), (0, 20)]


def test_the_same_device_twice_is_told_apart_by_folder(results):
    found = results({}, {}, {"device": "Test M1"})
    once = "Test M9, embedded"
    assert [each.label for each in found] == [f"{once} (run0)", f"{once} (run1)", "Test M1, embedded"]
    same = rows.labelled([("a", found[0].record), ("a", found[0].record)])
    assert [each.label for each in same] == ["Test M9, embedded (a)", "Test M9, embedded (a) #2"]


def test_names_hold_what_differs(results):
    (result,) = results({"contexts": (0, 512)})
    cells = copy.deepcopy(result.record["cells"])
    cells[1]["quantisation"], cells[2]["strategy_ran"], cells[3]["batch"] = "4-bit", "masked", 8
    names = [cell.name for cell in rows.labelled([("", result.record | {"cells": cells})])[0].cells]
    assert names[:4] == [
        "mlx-lm big · float32 · batch 1 · context 0",
        "big · planned · 4-bit · batch 1 · context 0",
        "BBss · masked · float32 · batch 1 · context 0",
        "small · planned · float32 · batch 8 · context 0",
    ]
    twice = copy.deepcopy(result.record["cells"][1:2]) * 2
    twice[1] = twice[1] | {"strategy": "planned"}
    asked = rows.labelled([("", result.record | {"cells": twice})])[0].cells
    assert [cell.name for cell in asked] == ["big · auto", "big · planned"]


def test_parts_are_scaled_by_the_route_and_rest_closes_the_account(results):
    (result,) = results()
    result.record["parts"][0]["seconds"]["router"] = 0.0005
    routed = copy.deepcopy(result.record["cells"][2]) | {"route": "router:0.5"}
    chart = costs.parts(rows.labelled([("", result.record | {"cells": [*result.record["cells"], routed]})]))
    assert chart.names == ["big", "BBss", "small", "skip", "router:0.5"]

    def time(part, name):
        return next((point.x for point in series(chart, part).points if point.y == name), None)

    assert [time("big", name) for name in chart.names] == pytest.approx([12, 6, 0, 0, 6])
    assert [time("small", name) for name in chart.names] == pytest.approx([0, 1.5, 3, 0, 1.5])
    assert time("router", "BBss") is None and time("router", "router:0.5") == pytest.approx(0.5)
    for name, tpot in (("big", 20), ("skip", 10), ("router:0.5", 16)):
        bars = [point.x for each in chart.series if each.kind == "bars" for point in each.points if point.y == name]
        assert sum(bars) == pytest.approx(tpot) == time(costs.WHOLE, name)
    assert not chart.notes and "alone" in chart.caption


def test_parts_that_exceed_the_whole_are_said_to(results):
    (result,) = results()
    result.record["parts"][0]["seconds"]["attention"] = 0.010
    chart = costs.parts([result])
    assert chart.notes == [
        "big: its parts, measured alone, together exceed the whole by 4.9 ms (20% of their sum).",
        "BBss: its parts, measured alone, together exceed the whole by 4.4 ms (22% of their sum).",
        "small: its parts, measured alone, together exceed the whole by 3.9 ms (25% of their sum).",
        "skip: its parts, measured alone, together exceed the whole by 2.9 ms (22% of their sum).",
    ]
    rest = series(chart, costs.REST).points
    assert [point.x for point in rest] == [0.0] * 4 and rest[0].row[-1] == pytest.approx(-4.9)


def test_parts_of_other_quantisations_and_batches_are_not_taken(results):
    (result,) = results()
    for cell in result.record["cells"][1:3]:
        cell["batch"] = 8
    result.record["cells"][3]["quantisation"] = "4-bit"
    assert costs.parts(rows.labelled([("", result.record)])).names == ["skip · float32 · batch 1"]
    result.record["parts"] = []
    assert not costs.parts([result]).series


def test_speculation_stands_beside_plain_decoding(results):
    (result,) = results({"drafts": True})
    name = "big, drafts by small"
    chart = tradeoffs.quality([result])
    assert labels(series(chart, "no cell is better in both").points) == ["small", "BBss", name]
    assert labels(series(chart, "another is better in both").points) == ["big"]
    points = {point.label: point for point in series(tradeoffs.latency_layers([result]), "duo-mlx").points}
    assert (points[name].x, points[name].y) == (points["big"].x, pytest.approx(0.85 * points["big"].y)) == (4, 17)
    assert name not in costs.parts([result]).names and "big" in costs.parts([result]).names
    assert name in costs.roofline([result]).names and name in costs.spread([result]).names
    (note,) = costs.spread([result]).notes
    assert "spread evenly" in note and note in costs.course([result]).notes and not costs.spread(results()).notes
    assert [each.name for each in costs.context(results({"drafts": True, "contexts": (0, 512)})).series][-1] == name
    assert name not in [row[1] for row in projected.speed_up([result]).rows]
    for chart in page.charts(results({"drafts": True, "contexts": (0, 512)}, {"device": "Test M1"})):
        go.Figure(figures.figure(chart, themes.LIGHT))
        assert all(len(row) == len(chart.columns) for row in chart.rows)


def test_long_routes_keep_their_drafts_apart(results):
    (result,) = results({"drafts": True})
    for cell, draft in zip(result.record["cells"][:3], ("", "B" * 30 + "s" * 30, "B" * 31 + "s" * 29), strict=True):
        cell |= {"engine": "duo-mlx", "route": "B" * 60, "speculate": draft, "draft_tokens": "auto"}
    names = [cell.name for cell in result.cells[:3]]
    assert len(set(names)) == 3 and names[1].startswith("B" * 47 + "…, drafts by " + "B" * 30 + "s")


def test_cost_against_context_needs_two(results):
    assert "Only one context was measured, 0 tokens" in costs.context(results()).why
    chart = costs.context(results({"contexts": (512, 0)}))
    assert [each.name for each in chart.series] == ["mlx-lm big", "big", "BBss", "small", "skip"]
    assert [(point.x, round(point.y, 9)) for point in series(chart, "big").points] == [(0, 20.0), (512, 22.5)]
    assert series(chart, "mlx-lm big").peer


def test_the_roofline_is_a_share_of_the_bandwidth(results):
    (result,) = results()
    chart = costs.roofline([result])
    bar = series(chart, "duo-mlx").points[0]
    assert (bar.x, bar.label, chart.limit) == (50.0, "5 GB/s", 100.0) and bar.row[2:] == (1.0, 5.0, 10.0, 50.0)
    assert figures.figure(chart, themes.DARK)["layout"]["xaxis"]["range"][1] > 100
    result.record["roofline"] = None
    assert not costs.roofline([result]).series and "bandwidth was not measured" in costs.roofline([result]).why


def test_token_latencies_leave_out_invalid_runs(results):
    (result,) = results()
    cell = result.record["cells"][1]
    for at, run in enumerate(cell["runs"]):
        run["token_s"] = [[0.001 * each for each in range(1, 102)]]
        if at == 0:
            run |= {"token_s": [[9.0] * 101], "invalid_why": ["the power source changed"]}
    box = series(costs.spread([result]), "Test M9, embedded").points[1]
    assert box.box == pytest.approx((6, 26, 51, 76, 96)) and box.row[-2] == pytest.approx(101.0)
    points = series(costs.course([result]), "big").points
    assert len(points) == costs.POSITIONS and max(point.y for point in points) <= 101.0
    assert (points[0].x, points[-1].x) == (1, 100)


def test_invalid_cells_are_in_no_chart(results):
    (result,) = results({"contexts": (0, 512)})
    result.record["cells"][1] |= {"valid": False, "invalid_why": ["it became hot"]}
    result.record["cells"][2] |= {"summary": None}
    for chart in page.charts([result]):
        assert chart.series and not {"big · context 0", "BBss · context 0"} & {row[1] for row in chart.rows}, chart.key


def test_nothing_valid_is_said_everywhere(results):
    (result,) = results()
    for cell in result.record["cells"]:
        cell |= {"valid": False}
    assert all(not chart.series and chart.why.endswith(".") for chart in page.charts([result]))


@pytest.mark.parametrize("theme", themes.THEMES)
def test_plotly_accepts_every_figure(results, theme):
    for chart in page.charts(results({"contexts": (0, 512)}, {"metered": False, "device": "Test M1"})):
        go.Figure(figures.figure(chart, themes.THEMES[theme]))
        assert all(len(row) == len(chart.columns) for row in chart.rows)


HOSTILE = ("</script><img src=x onerror=alert(1)>", "<b>bold</b>", '<a href="https://x.test">x</a>', "&lt;", "%{x}")


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_hold_no_markup_of_a_result(results, name):
    (result,) = results()
    for cell in result.record["cells"]:
        cell["route"] = name
    for chart in page.charts([result]):
        if not chart.series:
            continue
        drawn = figures.figure(chart, themes.LIGHT)
        texts = [each["name"] for each in drawn["data"]]
        for each in drawn["data"]:
            texts += [*each.get("text", []), *each.get("hovertext", [])]
        texts += drawn["layout"]["yaxis"].get("ticktext", [])
        for text in texts:
            left = text.replace("<br>", "")
            assert not re.search(r"[<>]|%\{|&(?!amp;|lt;|gt;)", left), text


def test_labels_that_find_no_place_are_left_out():
    def chart(count):
        points = [Point(1.0 + at / 1e6, 1.0, (), label="a label") for at in range(count)]
        return Chart("", "", "", Axis(""), Axis(""), (), [Series("", "points", points)], "")

    assert len(chart(2).places(600, 300)) == 2
    assert len(chart(200).places(600, 300)) < 40


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", themes.THEMES.values(), ids=list(themes.THEMES))
def test_colours_can_be_seen(theme):
    assert contrast(theme.ink, theme.ground) >= 7
    assert all(contrast(each, theme.ground) >= 3 for each in (*theme.series, theme.muted))


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.00012345, "0.0001234"), (1234.5, "1,234"), (12, "12"), ("B", "B")]
)
def test_figures_are_short(value, text):
    assert written(value) == text


def test_a_projection_is_of_counted_work_and_drawn_dashed(results):
    (result,) = results()
    chart = projected.speed_up([result])
    assert all(each.projected and each.name.endswith("a projection") for each in chart.series) and chart.series
    for each, machine in zip(chart.series, machines(), strict=True):
        assert labels(each.points) == ["", "", ""] and [point.x for point in each.points] == [0.0, 2.0, 4.0]
        constants = machine.constants[0]
        big, small = (bytes_ / constants.bandwidth_bytes_s + 80 * constants.dispatch_s for bytes_ in (2e10, 1.2e10))
        assert [each.points[0].y, each.points[-1].y] == pytest.approx([big / small, 1.0])
        assert each.points[0].y_span[0] <= each.points[0].y <= each.points[0].y_span[1]
        line = next(
            trace["line"] for trace in figures.figure(chart, themes.LIGHT)["data"] if trace["name"] == each.name
        )
        assert line["dash"] == "longdash"
    assert "Nobody has run this project on a Mac yet." in chart.notes


def test_without_counted_work_there_is_no_projection(results):
    (result,) = results()
    for cell in result.record["cells"]:
        cell["gpu_work"] = None
    chart = projected.speed_up([result])
    assert not chart.series and "no counted work" in chart.why
