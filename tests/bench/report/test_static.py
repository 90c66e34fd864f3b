"""Plots in files: each chart as SVG with text in it, PNG and CSV, whatever a result is called."""

import csv
import itertools
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure

from duo_mlx.bench.report import costs, page, rows, static, tradeoffs
from duo_mlx.errors import DuoError


def test_each_chart_is_written_with_its_table(made_result, tmp_path):
    charts = page.charts(rows.labelled([("", made_result(metered=False))]))
    planned = static.planned(charts, tmp_path, False)
    static.write(charts, tmp_path, False)
    assert sorted(tmp_path.iterdir()) == sorted(planned)
    assert {file.stem for file in tmp_path.iterdir()} == {
        "quality", "latency-big-layers", "parts", "roofline", "token-latencies", "token-course",
        "projection",
    }  # fmt: skip
    texts = [each.text for each in ElementTree.parse(tmp_path / "quality.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"BBss", "loss (nats a token)", "Quality against latency", "better"} <= set(texts)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "quality.csv").open(newline="") as opened:
        table = list(csv.DictReader(opened))
    assert [row["cell"] for row in table] == ["small", "BBss", "big"]
    assert float(table[2]["TPOT (ms)"]) == pytest.approx(20) and table[2]["loss"] == "3.0"


def test_the_same_chart_is_the_same_file(made_result, tmp_path):
    chart = tradeoffs.quality(rows.labelled([("", made_result())]))
    for name in "ab":
        static.write([chart], tmp_path / name, False)
    for kind in ("svg", "png", "csv"):
        assert (tmp_path / f"a/quality.{kind}").read_bytes() == (tmp_path / f"b/quality.{kind}").read_bytes()
    with pytest.raises(DuoError, match="exists already"):
        static.write([chart], tmp_path / "a", False)


def test_speculation_is_drawn_by_its_name(made_result, tmp_path):
    static.write(page.charts(rows.labelled([("", made_result(drafts=True))])), tmp_path, False)
    drawn = [each.text for each in ElementTree.parse(tmp_path / "quality.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert "big, drafts by small" in drawn
    assert "big, drafts by small" in (tmp_path / "roofline.csv").read_text()


@pytest.mark.parametrize("name", ["_hidden", "$x", "<b>&", "\u4f60\u597d", "B" * 200])
def test_any_name_can_be_drawn(made_result, tmp_path, name):
    record = made_result()
    for cell in record["cells"]:
        cell["route"] = name
    charts = [tradeoffs.quality, costs.parts, costs.course]
    static.write([chart(rows.labelled([("", record)])) for chart in charts], tmp_path, False)
    drawn = "".join(ElementTree.parse(tmp_path / "token-course.svg").getroot().itertext())
    assert rows.short(name) in drawn


def test_labels_do_not_overlap(made_result):
    results = rows.labelled([("a", made_result(contexts=(0, 512))), ("b", made_result(device="Test M1", slower=1.3))])
    with mpl.rc_context(static.STYLE):
        drawn = static.draw(tradeoffs.latency_energy(results), Figure)
        drawn.draw_without_rendering()
        boxes = [each.get_window_extent() for each in drawn.axes[0].texts if each.get_text() != "better"]
    assert len(boxes) > 8
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
