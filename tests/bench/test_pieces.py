"""The benchmark of products in pieces: both ways are what they are called, and what it prints and writes."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx import _blas
from duo_mlx.bench import pieces
from duo_mlx.cpu import products
from duo_mlx.errors import DuoError


def test_whole_is_whole_and_no_longer_than_the_call(blas):
    blas(_blas.Loaded("libopenblas.so.0", "SkylakeX", 1))
    weight, x, cut = mx.zeros((4096, 64)), mx.zeros((1, 64)), []
    pieces.whole(lambda: cut.append(products.pieces(weight, x)))()
    assert cut == [1] and products.pieces(weight, x) == 4


def test_ratios_are_paired_and_all_is_written(blas, saved, tmp_path):
    blas(_blas.Loaded("libopenblas.so.0", "SkylakeX", 1))
    out = tmp_path / "pieces.json"
    options = ["--model", saved()[0], "--rounds", 3, "--out", out]
    done = CliRunner().invoke(pieces.command, [str(each) for each in options])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    names = ["pass over 1", "pass over 2", "pass over 4", "pass over 8", "step of small"]
    assert list(record["summary"]) == names
    runs = record["runs_s"]
    for name in names:
        cut, whole = (np.array(runs[each]).reshape(3, 2).sum(axis=1) for each in (name, f"{name}, whole"))
        assert record["summary"][name]["over_whole"]["median"] == pytest.approx(np.median(cut / whole))
        assert record["summary"][name]["median_ms"] == pytest.approx(200 * np.median(runs[name]))  # of five passes
        assert f"{name} " in done.stdout
    again = CliRunner().invoke(pieces.command, [str(each) for each in options])
    assert isinstance(again.exception, DuoError) and "exists already" in str(again.exception)


def test_where_nothing_is_cut_nothing_is_measured(blas, saved):
    blas(_blas.Loaded("libopenblas.so.0", "Zen", 8))
    done = CliRunner().invoke(pieces.command, ["--model", str(saved()[0])])
    assert isinstance(done.exception, DuoError)
    assert "nothing is cut here: products are cut for OpenBLAS with kernels for Cooperlake" in str(done.exception)
    assert "this is libopenblas.so.0, kernels for Zen" in str(done.exception)
