"""A results folder: what is refused there and left as it is, what goes on, and files that are whole."""

import json
from pathlib import Path

import pytest

from duo_mlx.bench import folder, results, tables
from duo_mlx.errors import DuoError


@pytest.fixture
def fresh(made_result):
    """A result of which nothing is measured yet."""
    result = made_result() | {"complete": False}
    for cell in result["cells"]:
        cell |= {"runs": [], "summary": None, "valid": False, "invalid_why": ["not measured"]}
    return result


@pytest.fixture
def unfinished(made_result, tmp_path):
    """A folder with an unfinished result of the same question, and that result."""
    out, result = tmp_path / "out", made_result() | {"complete": False}
    folder.save(out, result)
    return out, result


def content(directory):
    return {str(path): path.is_file() and path.read_bytes() for path in directory.rglob("*")}


def refused(out, fresh, force=False):
    """The line with which a folder is refused, without any change to it or to what stands beside it."""
    before = content(out.parent)
    with pytest.raises(DuoError) as caught:
        folder.begin(out, fresh, force)
    assert content(out.parent) == before
    line = str(caught.value)
    assert "\n" not in line and str(out) in line
    return line


@pytest.mark.parametrize("force", [False, True])
def test_no_folder_and_an_empty_one_begin_afresh(tmp_path, fresh, force):
    assert folder.begin(tmp_path / "none", fresh, force) is fresh
    assert folder.begin(tmp_path, fresh, force) is fresh
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_refused(tmp_path, fresh, force):
    (tmp_path / "out").write_text("mine")
    assert "is a file; give the name of a folder" in refused(tmp_path / "out", fresh, force)


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_something_else_is_refused_even_by_force(tmp_path, fresh, force):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years")
    assert "is not empty and no results folder" in refused(out, fresh, force)


def test_a_finished_result_is_refused_and_replaced_by_force(made_result, fresh, tmp_path):
    out = tmp_path / "out"
    folder.save(out, made_result())
    assert "holds a finished result; give --force to replace it, or another name" in refused(out, fresh)
    assert folder.begin(out, fresh, force=True) is fresh


OTHERS = {
    "settings": lambda fresh: fresh["settings"].update(seed=1),
    "model": lambda fresh: fresh["model"].update(sha256="f" * 64),
    "texts": lambda fresh: fresh["texts"]["held_out"].update(sha256="f" * 64),
    "meter": lambda fresh: fresh["meter"].update(label="no meter", why="it is gone"),
    "cells": lambda fresh: fresh["cells"].pop(),
    "device": lambda fresh: fresh["system"].update(device="Test M10"),
    "versions": lambda fresh: fresh["system"]["versions"].update(mlx="0.99"),
    "settings and cells and versions": lambda fresh: [OTHERS[key](fresh) for key in ("settings", "cells", "versions")],
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_question_model_machine_or_version_is_refused(unfinished, fresh, what):
    out, _ = unfinished
    OTHERS[what](fresh)
    assert f"holds an unfinished run with other {what}, so" in refused(out, fresh)
    assert folder.begin(out, fresh, force=True) is fresh


def test_the_same_question_goes_on_with_all_that_was_measured(unfinished, fresh):
    out, result = unfinished
    fresh["command"], fresh["meter"]["idle"] = "duo-mlx bench run --preset paper --force", None
    fresh["system"] |= {"power_source": "Battery Power"}  # a run in which it changes is invalid by itself
    assert folder.begin(out, fresh, force=False) == result


def test_settings_are_the_same_after_json(unfinished, fresh):
    """As they come from a dataclass, such as a float without a fraction, and as they are read."""
    out, result = unfinished
    result["settings"] = fresh["settings"] = {"minutes": 1.0, "precision": 0.1 / 3, "window": 15.0, "preset": "quick"}
    folder.save(out, result)
    assert folder.begin(out, fresh, force=False)["settings"] == fresh["settings"]


def test_a_damaged_result_is_refused_and_replaced_by_force(unfinished, fresh):
    out, _ = unfinished
    (out / results.FILE).write_text('{"schema": "duo-')
    assert "is no JSON, or only the beginning of it" in refused(out, fresh)
    assert folder.begin(out, fresh, force=True) is fresh


def test_what_is_saved_is_what_is_read_with_its_tables(made_result, tmp_path):
    result = made_result()
    result["command"] = "duo-mlx bench run --model modèle"
    folder.save(tmp_path / "a" / "b", result)
    assert results.read(tmp_path / "a" / "b") == result
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "results.csv",
        "results.json",
        "results.md",
    ]
    assert (tmp_path / "a" / "b" / "results.csv").read_text() == tables.csv_text(result)
    assert (tmp_path / "a" / "b" / "results.md").read_text() == tables.markdown(result)


@pytest.mark.parametrize("name", ["results.json", "results.csv", "results.md"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_half_written_file_is_never_seen(unfinished, made_result, monkeypatch, name, error):
    out, _ = unfinished
    before, write = (out / name).read_bytes(), Path.write_text

    def interrupted(path, text, **how):
        if path.suffix != Path(name).suffix:
            return write(path, text, **how)
        write(path, text[: len(text) // 2], **how)
        raise error

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises((DuoError, KeyboardInterrupt)) as caught:
        folder.save(out, made_result(slower=2.0))
    if isinstance(error, OSError):
        assert str(caught.value) == f"{out / name}: cannot be written: No space left on device"
    assert (out / name).read_bytes() == before
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "results.json", "results.md"]
    json.loads((out / results.FILE).read_text())
