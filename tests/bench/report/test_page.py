"""The page as text: it needs nothing else, and what a result says stays text; the explorer's data, an oracle's."""

import copy
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from duo_mlx.bench.report import explorer, machines, markup, page, rows
from duo_mlx.errors import DuoError
from duo_mlx.study import search, sequence


def built(results, oracle=None):
    return page.page(results, page.charts(results), explorer.texts(results, oracle))


@pytest.fixture
def oracle(tmp_path):
    """``oracle(**arrays)``: a tokens.npz whose second sequence begins as the made text; None leaves one out."""

    def make(**changes):
        random = np.random.default_rng(0)
        arrays = {
            "inputs": np.array([[1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]], np.int32),
            "targets": np.zeros((2, 6), np.int32),
            "difficulty": np.arange(12, dtype=np.float32).reshape(2, 6),
            "oracle_routes": random.integers(0, 3, (2, 6, 4)).astype(np.int8),
        } | changes
        file = tmp_path / "tokens.npz"
        np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
        return file

    return make


def test_the_page_asks_for_nothing(made_result):
    text = built(rows.labelled([("", made_result())]))
    rest = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "default-src 'none'" in rest and not re.search(r"https?:|src=|@import|url\(", rest)
    assert set(re.findall(r'href="([^"]*)"', rest)) >= {"#main", "#quality", "#explorer"}
    assert all(link.startswith(("#", "data:,")) for link in re.findall(r'href="([^"]*)"', rest))


class Reader(HTMLParser):
    """Counts elements and gathers what is between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data):
        self.text += data


def hostile(value, what):
    """The record with ``what`` in place of every text that a result may choose."""
    kept = ("schema", "engine", "patterns", "sha256")
    if isinstance(value, dict):
        return {key: each if key in kept else hostile(each, what) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each, what) for each in value]
    return what if isinstance(value, str) else value


@pytest.mark.parametrize(
    "what", ["</script><img src=x onerror=alert(1)>", '"><b onclick="x">$data&lt;', "</style>{{x}}"]
)
def test_whatever_a_result_says_is_text(made_result, what):
    plain = rows.labelled([("", made_result())])
    result = rows.labelled([("", hostile(made_result(), what))])
    for make in (machines.about, lambda each: machines.summary([each])):
        expected, found = (Reader(markup.html(make(each[0]))) for each in (plain, result))
        assert (found.tags, found.attributes) == (expected.tags, expected.attributes)
        assert what in found.text
    text = built(result)
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert json.loads(data)["texts"][0]["tokens"][0] == what


def test_conditions_are_said(made_result):
    record = made_result(metered=False)
    record |= {"complete": False, "roofline": None}
    record["sessions"][0] |= {"cautions": ["it runs on Battery Power, not on mains"], "noise_floor": None}
    record["cells"][1] |= {"valid": False, "invalid_why": ["the power source changed"]}
    record["meter"]["notes"] = ["an Ultra chip"]
    (result,) = rows.labelled([("", record)])
    text = Reader(markup.html(machines.about(result))).text
    for said in (
        "NO: it was interrupted", "none: no meter: this is a test", "it runs on Battery Power", "an Ultra chip",
        "big: the power source changed", "duo-mlx bench run --preset paper", "mlx 0.32.4", "AC Power",
        "embedded: 4 layers, 1,000 parameters", "held-out bundled: 1024 tokens in 8",
    ):  # fmt: skip
        assert said in text, said
    metered = Reader(markup.html(machines.about(rows.labelled([("", made_result())])[0]))).text
    assert "a fake SoC (cpu, gpu) (fake, soc); idle 2 W" in metered and "ratio 1.0000 [0.9960, 1.0040]" in metered


def test_the_table_has_a_row_a_cell_in_a_group_a_machine(made_result):
    results = rows.labelled([("a", made_result()), ("b", made_result(metered=False, device="Test M1"))])
    table = machines.summary(results).find("table")
    bodies = table.findall("tbody")
    assert [body[0][0].text for body in bodies] == ["Test M9, embedded", "Test M1, embedded"]
    assert [len(body) for body in bodies] == [6, 6]
    columns = ["".join(cell.itertext()) for cell in table.find("thead")[0]]
    big, bare = (dict(zip(columns, ("".join(c.itertext()) for c in body[2]), strict=True)) for body in bodies)
    assert big | {"route": "big", "engine": "duo-mlx", "TPOT (ms)": "20 [19.8, 20.2]", "p95 (ms)": "22"} == big
    assert big | {"J/token gross": "0.1333 [0.132, 0.1347]", "J/token net": "0.12 [0.1188, 0.1212]"} == big
    assert big | {"loss": "3 [2.97, 3.03]", "agreement (%)": "100", "EDP (mJ·s)": "2.667", "% of roofline": "50"} == big
    assert bare["J/token gross"] == bare["EDP (mJ·s)"] == "-"


def test_the_table_says_what_speculation_came_to(made_result):
    table = machines.summary(rows.labelled([("", made_result(drafts=True))])).find("table")
    lines = [["".join(cell.itertext()) for cell in row] for row in (table.find("thead")[0], *table.find("tbody"))]
    assert {len(line) for line in lines} == {len(machines.COLUMNS) + 2}
    assert (lines[-1][0], lines[-1][-2:]) == ("big, drafts by small", ["2", "66.67"]) and lines[2][-2:] == ["-", "-"]
    text = built(rows.labelled([("", made_result(drafts=True))]))
    assert "big, drafts by small" in text and "tokens per verification" in text
    assert "tokens per verification" not in built(rows.labelled([("", made_result())]))


def test_a_number_beyond_all_numbers_is_refused(made_result, tmp_path):
    record = made_result()
    record["cells"][0]["summary"]["tpot_s"]["median"] = 12345.5
    (tmp_path / "results.json").write_text(json.dumps(record).replace("12345.5", "1e999"))
    with pytest.raises(DuoError, match="every figure should be a finite number"):
        rows.load([tmp_path])


def test_texts_that_break_files_are_mended(made_result, tmp_path):
    record = made_result()
    record["system"]["device"] = "a\ud800b\x00c\u202ed"
    (tmp_path / "results.json").write_text(json.dumps(record))
    (result,) = rows.load([tmp_path])
    assert result.label == "a\ufffdb\ufffdc\ufffdd, embedded"
    built([result]).encode()


def test_an_oracle_is_one_more_policy(made_result, oracle):
    file = oracle()
    (text,) = explorer.texts(rows.labelled([("", made_result())]), file)
    last = text["policies"][-1]
    routes = np.load(file)["oracle_routes"][1]
    assert last["name"] == "oracle"
    assert last["patterns"] == ["".join("-sB"[route] for route in token) for token in routes[:4]]
    assert text["difficulty"] == [None, 6.0, 7.0, 8.0]  # of a token: that of the position before, which predicts it


def test_a_shorter_sequence_fits_as_far_as_it_goes(made_result, oracle):
    file = oracle(
        inputs=np.array([[11, 12]]), difficulty=np.array([[0.5, np.nan]]), oracle_routes=np.zeros((1, 2, 4), int)
    )
    (text,) = explorer.texts(rows.labelled([("", made_result())]), file)
    assert (text["policies"][-1]["patterns"], text["difficulty"]) == (["----", "----"], [None, 0.5, None])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"inputs": np.zeros((2, 6), np.int32)}, "none of its sequences begins as the text"),
        ({"inputs": np.zeros((2, 1), np.int32)}, "do not fit one another"),
        ({"oracle_routes": None}, "oracle_routes"),
        ({"oracle_routes": np.full((2, 6, 4), 3)}, "0 skip, 1 small and 2 big"),
        ({"oracle_routes": np.zeros((2, 6), int)}, "should be [sequences, length, layers]"),
        ({"oracle_routes": np.zeros((2, 6, 5), int)}, "has routes of 5 layers"),
        ({"difficulty": np.array([["x"] * 6] * 2)}, "do not fit one another"),
        ({"inputs": np.array([[{}] * 6] * 2)}, "cannot be read as an oracle's tokens.npz (Object arrays"),
    ],
)
def test_an_oracle_that_does_not_fit_is_refused(made_result, oracle, changes, said):
    with pytest.raises(DuoError, match=re.escape(said)) as raised:
        explorer.texts(rows.labelled([("", made_result())]), oracle(**changes))
    assert str(raised.value).startswith(str(oracle())) and "\n" not in str(raised.value)


def test_a_file_that_is_no_archive_is_no_oracle(made_result, tmp_path):
    results = rows.labelled([("", made_result())])
    (tmp_path / "x.npz").write_bytes(b"PK nothing")
    with pytest.raises(DuoError, match="cannot be read"):
        explorer.texts(results, tmp_path / "x.npz")
    with pytest.raises(DuoError, match="there is no such file"):
        explorer.texts(results, tmp_path / "y.npz")


def test_policies_of_several_quantisations_have_names_of_their_own(made_result):
    record = made_result()
    other = copy.deepcopy(record["samples"]["policies"][0]) | {"quantisation": "4-bit"}
    record["samples"]["policies"].append(other)
    (text,) = explorer.texts(rows.labelled([("", record)]))
    assert [policy["name"] for policy in text["policies"]] == [
        "big · float32", "BBss · float32", "small · float32", "big · 4-bit",
    ]  # fmt: skip
    record["samples"] = None
    assert explorer.texts(rows.labelled([("", record)])) == []


@pytest.fixture
def folder(tmp_path, tiny_model, made_result):
    """The folder of a real oracle with three budgets, whose first sequence begins as the made text."""
    ids = made_result()["samples"]["ids"]
    windows = np.array([[*ids, 5, 6, 7], range(len(ids) + 3)])
    asked = sequence.Question("sB", "shared", ("none", "2", "0"), 0, {"source": "here"}, {"name": "tiny"})
    search.run(tiny_model(), windows, asked, tmp_path / "oracle", "typed", 1 << 24)
    return tmp_path / "oracle"


def test_an_oracles_folder_adds_a_chart_and_its_tables(made_result, folder):
    results, summary = rows.labelled([("", made_result())]), json.loads((folder / "summary.json").read_text())
    charts = page.charts(results, folder)
    assert [chart.key for chart in charts[:2]] == ["quality", "oracle"] and len(charts) == len(page.charts(results)) + 1
    oracle, random, fixed, measured = charts[1].series
    by_bytes = sorted(summary["budgets"].items(), key=lambda each: each[1]["bytes"])
    assert [(point.x, point.y) for point in oracle.points] == [(of["bytes"], of["oracle"]) for _, of in by_bytes]
    assert oracle.projected and [point.label for point in oracle.points] == [name for name, _ in by_bytes]
    assert oracle.points[0].y_span == tuple(summary["budgets"]["0"]["oracle_interval"])
    assert [point.y for point in fixed.points] == [summary["budgets"][k]["fixed_split"] for k in ("0", "2")]
    assert [point.y for point in random.points] == [summary["budgets"][k]["random"] for k in ("0", "2")]
    cells = [cell for cell in rows.usable(results) if not cell.peer and cell.record["quality"]]
    assert {point.x for point in measured.points} <= {1 / cell.summary("byte_ratio") for cell in cells}
    (text,) = explorer.texts(results, folder)
    named = {policy["name"]: policy["patterns"] for policy in text["policies"]}
    assert {"oracle none", "oracle 2", "oracle 0"} <= set(named) and set("".join(named["oracle 0"])) == {"s"}
    with np.load(folder / "tokens-none.npz") as table:
        expected = table["difficulty"][0, : len(text["tokens"]) - 1].tolist()
    assert text["difficulty"][1:] == pytest.approx(expected)


def test_a_folder_that_is_no_oracle_is_refused(made_result, tmp_path):
    results = rows.labelled([("", made_result())])
    with pytest.raises(DuoError, match="holds no tokens.npz of a finished duo-mlx oracle"):
        explorer.texts(results, tmp_path)
    with pytest.raises(DuoError, match="summary.json: cannot be read"):
        page.charts(results, tmp_path)
