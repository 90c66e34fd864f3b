"""The search's benchmark: both ways find the same minimum, and gaps are to the exhaustive search."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import oracle as bench
from duo_mlx.routes import Route
from duo_mlx.study import oracle
from duo_mlx.study.tree import layer_options

IDS = np.random.default_rng(0).integers(0, 32, (2, 7)).astype(np.int32)


def test_the_first_layers_are_those_of_the_model(tiny_model):
    model = tiny_model()
    cut = bench.first_layers(model, 2)
    h = model.states(mx.array(IDS[:, :-1]), None, [Route.BIG] * 4, "planned", 0, 2)
    expected = model.head(model.trunk.norm(h))
    found = cut(mx.array(IDS[:, :-1]), routes=np.full(2, Route.BIG))
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5)
    assert bench.first_layers(model, 4) is model


@pytest.mark.parametrize("choices", [(Route.SMALL, Route.BIG), tuple(Route)])
def test_the_naive_loop_and_the_tree_find_the_same(tiny_model, choices):
    model = tiny_model()
    space = oracle.Space(model, layer_options(model, choices))
    best, work = bench.by_tree(model, IDS[0], space)
    np.testing.assert_allclose(best.loss, bench.naive(model, IDS[0], space), rtol=0, atol=1e-5)
    assert work.head == len(space.patterns) == len(choices) ** 4


def test_gaps_are_to_the_exhaustive_search(tiny_model):
    found = bench.gaps(tiny_model(), IDS, lambda _: None)
    for of in found.values():
        assert of["range_nats"] > 0
        for method in ("beam:8", "descent:4"):
            assert set(of[method]) == {"none", "1", "2"}
            for cell in of[method].values():
                assert -1e-5 <= cell["gap"] <= bench.LIMIT and 0 < cell["tried"] <= 16
    assert found["committed"]["beam:8"]["1"]["tried"] > 4  # single changes out of the budget are tried, too


def test_a_result_holds_what_the_table_shows(tmp_path, monkeypatch, tiny_model):
    monkeypatch.setattr(bench.duo_mlx, "load", lambda: (tiny_model(), None))
    monkeypatch.setattr(bench.reading, "windows", lambda *_: IDS)
    monkeypatch.setattr(bench, "CASES", {"2^4": (4, (Route.SMALL, Route.BIG)), "3^2": (2, tuple(Route))})
    out = tmp_path / "oracle.json"
    done = CliRunner().invoke(bench.command, ["--length", "6", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    race = record["summary"]["race"]["3^2"]
    assert race["naive_evaluations"] == {"attention": 18, "ffn": 12, "head": 9}
    assert race["tree_evaluations"] == {"attention": 4, "ffn": 8, "head": 9}
    runs = record["runs_s"]
    assert len(runs["2^4 naive"]) == len(runs["3^2 tree"]) == 2
    assert f"{race['naive_over_tree']['median']:.2f}" in done.stdout and "committed: gap to exhaustive" in done.stdout
    again = CliRunner().invoke(bench.command, ["--out", str(out)])
    assert again.exit_code != 0 and "exists already" in str(again.exception)
