"""The formulas of docs/scaling.md agree with counts at tiny sizes, and the program says where they do not."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import counted, growth
from duo_mlx.bench import scaling as bench
from duo_mlx.bench.scaling import Row, Size
from duo_mlx.errors import DuoError
from duo_mlx.model import ModelArgs
from duo_mlx.study.tree import Work

SIZES = (Size(4, 64, 192, 8, 96, 32), Size(5, 96, 192, 8, 128, 32))
PEAKS = {"training": 0.5, "search": 1.0}  # so small, how far the host is ahead of the device counts for much
PAPER = ModelArgs.from_dict(
    {
        "hidden_size": 2560,
        "num_hidden_layers": 12,
        "intermediate_size": 10240,
        "small_intermediate_size": 640,
        "num_attention_heads": 20,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    }
)

COMMITTED = Path(__file__).parents[2] / "docs" / "results" / "scaling" / "scaling.json"


def first_big(count, layers=12):
    return np.array([2] * count + [1] * (layers - count), np.uint8)


@pytest.fixture(scope="module")
def rows():
    """All figures at two tiny sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "PROCESSES", (2,))
        return list(bench.rows(SIZES))


@pytest.mark.parametrize("part", ["decoding", "training", "search", "processes"])
def test_predictions_are_what_is_counted(rows, part):
    those = [row for row in rows if row.part == part]
    assert {row.size for row in those} == {str(size) for size in SIZES} and len(those) > 5
    for row in those:
        if row.tolerance:
            assert "peak" in row.what and row.error <= PEAKS[part], row
        elif sys.platform == "linux" or row.counted is not None:
            assert row.predicted == row.counted > 0, row


@pytest.mark.parametrize(
    ("big", "share"), [(0, 0.297), (1, 0.355), (2, 0.414), (4, 0.531), (6, 0.648), (8, 0.766), (12, 1.0)]
)
def test_shares_of_the_papers_model(big, share):
    table = growth.layer_parameters(PAPER)
    assert table.of(first_big(big)) / table.of(first_big(12)) == pytest.approx(share, abs=0.0006)


def test_parameters_of_the_papers_model():
    table = growth.layer_parameters(PAPER)
    skip = np.zeros(12, np.uint8)
    assert table.of(skip) == pytest.approx(314.6e6, rel=1e-3)
    assert table.of(first_big(12)) - table.of(skip) == pytest.approx(943.7e6, rel=1e-3)
    assert table.of(first_big(0)) - table.of(skip) == pytest.approx(59.0e6, rel=1e-3)


def test_what_is_predicted_grows_as_the_page_says():
    args = [ModelArgs.from_dict(Size(layers, 64, 256, 16, 512, 64).config) for layers in (4, 8)]
    routes = np.random.default_rng(0).integers(0, 3, (256, 8)).astype(np.uint8)
    kept, checkpointed = (
        [growth.gradient_bytes(each, routes[:, : each.num_hidden_layers], 64, False, recompute) for each in args]
        for recompute in (False, True)
    )
    assert kept[1] - kept[0] > 4 * (checkpointed[1] - checkpointed[0]) > 0
    assert growth.ring_bytes(100, 2) == 100 and growth.ring_bytes(100, 4) == 150
    assert growth.tree(12, 2, 2).attention == 4095 and growth.tree(12, 2, 2).ffn == 8190
    assert growth.budgeted(6, 6) == Work(6, 6, 1)
    assert growth.sequences(5, 4) == [2, 1, 1, 1]


def test_the_committed_result_is_what_the_formulas_say():
    record = json.loads(COMMITTED.read_text())
    found = [Row(**{name: each[name] for name in Row._fields}) for each in record["rows"]]
    assert {row.size for row in found} == {str(size) for size in bench.SIZES} and len(found) > 100
    assert all(row.error <= row.tolerance for row in found)
    assert record["projected"]["of"] == bench.projected()
    learned = {row.size: row.predicted for row in found if row.what == "routes: parameters that learn"}
    for size in bench.SIZES:
        assert learned[str(size)] == growth.learned(ModelArgs.from_dict(size.config), small_only=False)


def test_the_record(tmp_path, monkeypatch):
    out = tmp_path / "scaling.json"
    row = Row("training", "4 x 64", "FLOPs", 100, 100)
    monkeypatch.setattr(bench, "rows", lambda _: iter([row, Row("training", "4 x 64", "peak", 104, 100, 0.05)]))
    done = CliRunner().invoke(bench.command, ["--out", str(out)])
    assert done.exit_code == 0 and "2 of 2 agree" in done.stdout, done.output
    record = json.loads(out.read_text())
    assert record["command"] == "python -m duo_mlx.bench.scaling" and record["rows"][1]["error"] == pytest.approx(0.04)
    all_big = record["projected"]["of"]["decoding"]["all big, context 1024"]
    assert all_big["weight_bytes"] == 538_062_336  # as docs/results/decode/memory.json has read them
    again = CliRunner().invoke(bench.command, ["--out", str(out)])
    assert isinstance(again.exception, DuoError) and "exists already" in str(again.exception)
    monkeypatch.setattr(bench, "rows", lambda _: iter([row._replace(counted=99)]))
    wrong = CliRunner().invoke(bench.command)
    assert "0 of 1 agree" in wrong.stdout and str(wrong.exception) == "predictions that are off: 4 x 64, FLOPs"


def test_a_process_that_fails_is_an_error_in_one_line():
    with pytest.raises(DuoError, match=r"search_peak: a process failed: .*config.json lacks") as refused:
        counted.together(counted.search_peak, {}, 4, 4)
    assert "\n" not in str(refused.value)
