"""The check of the projection's sum: patterns are what they are called, and figures are what they say."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import mixes as bench
from duo_mlx.bench.interleave import Timings
from duo_mlx.errors import DuoError
from duo_mlx.routes import Route, format_pattern
from duo_mlx.work import Work


def test_the_mixes_are_what_they_are_called():
    found = bench.mixes(30)
    assert len(found) == 9
    counts = {
        name: tuple(int((each == route).sum()) for route in (Route.BIG, Route.SMALL)) for name, each in found.items()
    }
    assert counts == {
        "all big": (30, 0),
        "24 big, small": (24, 6),
        "18 big, small": (18, 12),
        "12 big, small": (12, 18),
        "6 big, small": (6, 24),
        "all small": (0, 30),
        "big, skip in turn": (15, 0),
        "big, small, skip in turn": (10, 10),
        "all skip": (0, 0),
    }
    assert format_pattern(bench.mixes(3)["big, small, skip in turn"]) == "Bs-"


def test_predictions_come_from_the_constants_alone():
    works = {"all big": Work(3e9, 1000, 0), "all small": Work(1e9, 500, 0)}
    timings = Timings(
        {
            "all big": [8.0, 8.0],  # two steps each
            "all small": [4.0, 4.0],
            "products": [2.0, 2.0],
            "chain": [1.0, 1.0],
            "head": [0.25, 0.25],  # and not the 0.5 that its bytes would come to
        }
    )
    result = bench.summary(timings, works, product_bytes=2 * 10**9, head_bytes=5 * 10**8, steps=2)
    assert result["constants"] == {"bandwidth_bytes_s": 1e9, "dispatch_s": 1e-3, "read_back_s": 0, "head_s": 0.25}
    big, small = result["mixes"]["all big"], result["mixes"]["all small"]
    assert (big["predicted_s"], small["predicted_s"]) == (3.75, 1.25)
    assert (big["median_s"], small["median_s"]) == (4.0, 2.0)
    assert small["predicted_ratio"] == pytest.approx(1 / 3) and small["measured_ratio"]["median"] == 0.5
    assert small["error"] == pytest.approx(-1 / 3) == -result["largest_error"]
    assert small["bytes_ratio"] == pytest.approx(1 / 3)
    assert "largest error 33.3% (limit 15%)" in bench.table(result)


def test_the_record(monkeypatch, tmp_path):
    small = {"hidden_size": 72, "intermediate_size": 96, "small_intermediate_size": 8, "vocab_size": 64}
    for module in ("mixes", "peer"):
        monkeypatch.setattr(f"duo_mlx.bench.{module}.SHAPE", bench.SHAPE | small)
    out = tmp_path / "mixes.json"
    options = ["--rounds", "2", "--tokens", "2", "--context", "8", "--layers", "3", "--megabytes", "1"]
    done = CliRunner().invoke(bench.command, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert record["patterns"]["big, skip in turn"] == "B-B"
    assert {len(runs) for runs in record["runs_s"].values()} == {4}
    assert set(record["runs_s"]) == {*record["patterns"], "products", "chain", "head"}
    assert 0.9e6 < record["product_bytes"] <= 1e6
    found = record["summary"]["mixes"]
    layers = np.array([found[name]["bytes"] for name in ("all big", "all small", "all skip")])
    assert (np.diff(layers) < 0).all()
    assert found["all big"]["bytes"] - found["all small"]["bytes"] == 3 * 3 * 72 * (96 - 8) * 4
    assert found["all skip"]["primitives"] < found["all small"]["primitives"] == found["all big"]["primitives"]
    assert record["command"].endswith(f"{' '.join(options)} --seed 0 --clock wall")
    again = CliRunner().invoke(bench.command, [*options, "--out", str(out)])
    assert isinstance(again.exception, DuoError)
