"""The comparison of fixed patterns: the patterns are what they are called, and the plot and record hold all of them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import budget as bench
from duo_mlx.errors import DuoError
from duo_mlx.routes import format_pattern


def test_evenly_spaced_and_random_patterns():
    assert format_pattern(bench.evenly_spaced(7, 3)) == "BssBssB"
    assert format_pattern(bench.evenly_spaced(4, 0)) == "ssss" and format_pattern(bench.evenly_spaced(4, 4)) == "BBBB"
    drawn = [format_pattern(bench.at_random(12, 5, seed)) for seed in range(4)]
    assert all(pattern.count("B") == 5 and pattern.count("s") == 7 for pattern in drawn) and len(set(drawn)) == 4


@pytest.fixture
def arguments(saved, tmp_path):
    known = [{"pattern": "BBBB", "loss": 1.0}, {"pattern": "BsBB", "loss": 1.1}, {"pattern": "ssss", "loss": 2.0}]
    directory, _ = saved(best_patterns=known)
    walk = np.random.default_rng(0).integers(0, 30, 11000)
    (tmp_path / "text").write_text(" ".join(f"w{word}" for word in walk))
    return [str(directory), str(tmp_path / "text"), "--held-out", "512", "--step", "2", "--random", "2"]


def test_every_point_is_recorded_and_drawn(arguments, tmp_path):
    out, plot = tmp_path / "out.json", tmp_path / "plot.svg"
    done = CliRunner().invoke(bench.command, [*arguments, "--out", str(out), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    points = json.loads(out.read_text())["nats_per_token"]
    assert [(point["kind"], point["big"]) for point in points if point["kind"] != "random"] == [
        (kind, big) for big in (0, 2, 4) for kind in ("best known", "evenly spaced")
    ]
    assert [point["pattern"] for point in points if point["kind"] == "best known"] == ["ssss", "ssss", "BBBB"]
    assert points[-1]["bytes"] == 1 and len({point["loss"] for point in points if point["pattern"] == "BBBB"}) == 1
    drawing = plot.read_text()
    assert drawing.startswith("<?xml") and "best known" in drawing
    again = CliRunner().invoke(bench.command, [*arguments, "--plot", str(plot)])
    assert isinstance(again.exception, DuoError) and plot.read_text() == drawing
