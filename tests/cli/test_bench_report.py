"""``duo-mlx bench report``: what it writes and where, and what it refuses in one line."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from duo_mlx.bench.report import page
from duo_mlx.cli import main

_spec = importlib.util.spec_from_file_location("bench_conftest", Path(__file__).parents[1] / "bench" / "conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
made_result = _module.made_result


@pytest.fixture
def run(made_result, tmp_path):
    """``run(*arguments)`` beside the results folders m9 and m1."""
    for name, changes in {"m9": {}, "m1": {"device": "Test M1", "metered": False}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(made_result(**changes)))
    return lambda *arguments: CliRunner().invoke(main, ["bench", "report", *map(str, arguments)], prog_name="duo-mlx")


def fails(done, line):
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr, done.stderr


def test_the_page_stands_beside_the_first_result(run, tmp_path):
    done = run(tmp_path / "m9" / "results.json", tmp_path / "m1")
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert done.stderr == f"wrote {tmp_path}/m9/report.html\n"
    text = (tmp_path / "m9" / "report.html").read_text()
    assert "Test M9, embedded" in text and "Test M1, embedded" in text
    assert not (tmp_path / "m1" / "report.html").exists()


def test_plots_and_their_tables_are_written_where_they_are_wanted(run, tmp_path):
    done = run(tmp_path / "m1", "--out", tmp_path / "new" / "x.html", "--static", tmp_path / "plots")
    assert done.exit_code == 0, done.output
    files = sorted(file.name for file in (tmp_path / "plots").iterdir())
    assert done.stderr == f"wrote {tmp_path}/new/x.html and {len(files)} files in {tmp_path}/plots\n"
    assert {"quality.svg", "quality.png", "quality.csv"} <= set(files) and len(files) == 21
    assert (tmp_path / "new" / "x.html").read_text().startswith("<!doctype html>")


def test_nothing_is_replaced_without_force(run, tmp_path):
    plots = tmp_path / "plots"
    assert run(tmp_path / "m1", "--static", plots).exit_code == 0
    before = {file: file.stat().st_mtime_ns for file in (*plots.iterdir(), tmp_path / "m1" / "report.html")}
    fails(run(tmp_path / "m1"), "report.html exists already; give --force")
    fails(run(tmp_path / "m1", "--out", tmp_path / "y.html", "--static", plots), ".svg exists already; give --force")
    assert not (tmp_path / "y.html").exists()
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert run(tmp_path / "m1", "--static", plots, "--force").exit_code == 0
    assert all(file.stat().st_mtime_ns > time for file, time in before.items())


def test_what_is_no_result_is_refused(run, tmp_path):
    fails(run(), "Missing argument")
    fails(run(tmp_path), f"{tmp_path}: holds no results.json")
    fails(run(tmp_path / "none.json"), "there is no such file")
    file = tmp_path / "m9" / "results.json"
    half = tmp_path / "half.json"
    half.write_text(file.read_text()[: file.stat().st_size // 2])
    fails(run(file, half), f"{half}: is no JSON, or only the beginning of it")
    half.write_text(json.dumps(json.loads(file.read_text()) | {"schema": "duo-mlx-bench/9"}))
    fails(run(half), "'duo-mlx-bench/9'")
    assert not (tmp_path / "m9" / "report.html").exists()


def test_an_oracle_of_another_text_is_refused(run, tmp_path):
    fails(run(tmp_path / "m9", "--oracle", tmp_path / "tokens.npz"), "tokens.npz: there is no such file")
    assert not (tmp_path / "m9" / "report.html").exists()


@pytest.mark.parametrize(("package", "options"), [("plotly", ()), ("matplotlib", ("--static", "plots"))])
def test_a_missing_package_is_named_before_anything_is_written(run, tmp_path, monkeypatch, package, options):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    fails(run("m9", *options), f"needs {package}: pip install 'duo-mlx[plot]'")
    assert not (tmp_path / "m9" / "report.html").exists()


def test_a_page_that_cannot_be_made_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "page", lambda *_: 1 / 0)
    assert isinstance(run(tmp_path / "m9").exception, ZeroDivisionError)
    assert [file.name for file in (tmp_path / "m9").iterdir()] == ["results.json"]
