"""The benchmark of converting: its checkpoint is one, its figures are what they say. Nothing here is timed."""

import json
from math import prod

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import convert_scale
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.errors import DuoError


@pytest.mark.parametrize("gigabytes", [0.05, 0.3, 1, 3, 20])
def test_the_shape_has_about_the_size_that_was_asked_for(gigabytes):
    config = convert_scale.shape(round(gigabytes * 1e9))
    shapes = convert_scale._shapes(config)
    assert 2 * sum(map(prod, shapes.values())) == pytest.approx(gigabytes * 1e9, rel=0.1)
    assert config["num_hidden_layers"] >= convert_scale.LAYERS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_checkpoint_is_sharded_fits_its_configuration_and_is_random(tmp_path, dtype):
    config = convert_scale.shape(10_000_000)
    largest = convert_scale.make(tmp_path, config, dtype, 3_000_000, seed=0)
    found = open_checkpoint(tmp_path)
    assert len(found.files) > 2
    assert largest == max(file.stat().st_size for file in found.files) <= 3_000_000 + 100_000
    assert {name: each.shape for name, each in found.tensors.items()} == convert_scale._shapes(config)
    for tensor in list(found.tensors.values())[:9]:
        values = np.array(tensor.load().astype(convert_scale.mx.float32))
        assert tensor.dtype == dtype and np.isfinite(values).all() and np.abs(values).max() < 2
        assert len(np.unique(values)) > 100


def test_a_copy_is_one_and_a_conversion_says_its_peak_or_why_not(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    convert_scale.make(source, convert_scale.shape(2_000_000), "float16", 1_000_000, seed=0)
    convert_scale.copy(source, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == {
        file.name: file.read_bytes() for file in (tmp_path / "copy").iterdir()
    }
    peak = convert_scale.convert(source, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").is_file()
    assert 50e6 < peak < 5e9  # Python and MLX; bytes, not kilobytes
    with pytest.raises(DuoError, match="duo-mlx convert failed: duo-mlx: error: .*exists already"):
        convert_scale.convert(source, tmp_path / "model")


def test_the_record(tmp_path, monkeypatch):
    outputs = []

    def convert(_, destination):
        destination.mkdir()
        outputs.append(destination)
        return 1000 * len(outputs)

    monkeypatch.setattr(convert_scale, "convert", convert)
    options = ["--gigabytes", "0.005", "--shard-gigabytes", "0.002", "--rounds", "2", "--directory", str(tmp_path)]
    out = tmp_path / "result.json"
    result = CliRunner().invoke(convert_scale.command, [*options, "--out", str(out)])
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text())
    summary = record["summary"]
    assert [len(record["runs_s"][name]) for name in ("copy", "convert")] == [4, 4]
    assert summary["peak_bytes"] == {
        "largest": 5000,
        "runs": [1000, 2000, 3000, 4000, 5000],
        "limit": summary["largest_shard_bytes"] + 10**9,
    }
    assert len(summary["convert_over_copy"]["rounds"]) == 2 and summary["convert_over_copy"]["limit"] == 2
    assert record["command"].endswith("--gigabytes 0.005 --shard-gigabytes 0.002 --dtype bfloat16 --rounds 2 --seed 0")
    assert "peak memory 0.00 GB, largest shard 0.00 GB (limit 1.00 GB)" in result.output
    assert len(set(outputs)) == 5 and [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path):
    result = CliRunner().invoke(convert_scale.command, ["--gigabytes", "1000000", "--directory", str(tmp_path)])
    assert isinstance(result.exception, DuoError) and "5100000.0 GB are needed and" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
