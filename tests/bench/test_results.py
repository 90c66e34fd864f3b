"""Reading results: what is damaged is named in one line, whatever the damage; and those in docs/results are sound."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duo_mlx.bench import results
from duo_mlx.errors import DuoError

CONTRIBUTED = Path(__file__).parents[2] / "docs" / "results"

quickly = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def folder(made_result, tmp_path):
    (tmp_path / results.FILE).write_text(json.dumps(made_result()), encoding="utf-8")
    return tmp_path


def refused(path):
    """The one line by which a result is refused."""
    with pytest.raises(DuoError) as caught:
        results.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def unsound(root):
    """Which results below a directory cannot be read, and why."""
    whys = []
    for file in sorted(root.rglob(results.FILE)):
        try:
            results.read(file)
        except DuoError as error:
            whys.append(str(error))
    return whys


def test_a_folder_and_its_file_are_the_same_result(folder, made_result):
    assert results.read(folder) == results.read(folder / results.FILE) == made_result()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "is no JSON, or only the beginning of it"),
        (b"\xff\xfe{}", "is no JSON, or only the beginning of it"),
        (b"TPOT,TTFT\n1,2\n", "is no JSON, or only the beginning of it"),
        (b"[]", "it names no schema, and this version reads 'duo-mlx-bench/1'"),
        (b'{"schema": "duo-mlx-bench/2"}', "its schema is 'duo-mlx-bench/2', and this version reads 'duo-mlx-bench/1'"),
        (b'{"schema": "duo-mlx-bench/1"}', "is damaged at the top: '"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, line):
    file = tmp_path / "some.json"
    file.write_bytes(content)
    assert line in refused(file)


def test_half_a_file_is_refused(folder):
    file = folder / results.FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "only the beginning of it" in refused(folder)


def test_no_file_and_a_folder_of_something_else_are_refused(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: there is no such file"
    assert refused(tmp_path) == f"{tmp_path}: holds no results.json, so it is no results folder"


DAMAGES = {
    "meter.idle": lambda record: record["meter"].update(idle="2 W"),
    "cells.2.runs.3.ttft_s.0": lambda record: record["cells"][2]["runs"][3].update(ttft_s=["fast"]),
    "cells.1.engine": lambda record: record["cells"][1].update(engine="llama.cpp"),
    "cells.1.batch": lambda record: record["cells"][1].update(batch=0),
    "cells.1.summary": lambda record: record["cells"][1]["summary"]["tpot_s"].pop("low"),
    "cells.5.speculation": lambda record: record["cells"][5]["speculation"].update(drafted=[0]),
    "cells.5.runs.2.speculation": lambda record: record["cells"][5]["runs"][2]["speculation"].pop("flops"),
    "cells.1.quality": lambda record: record["cells"][1]["quality"].update(kl=None),
    "samples": lambda record: record["samples"]["policies"][0].update(patterns=["Bx"]),
    "texts.held_out": lambda record: record["texts"]["held_out"].pop("sha256"),
}


@pytest.mark.parametrize("place", DAMAGES)
def test_damage_is_named_by_its_place(folder, made_result, place):
    record = made_result(drafts=True)
    DAMAGES[place](record)
    (folder / results.FILE).write_text(json.dumps(record))
    assert f"is damaged at {place}" in refused(folder)


def test_a_place_with_line_breaks_is_one_line(folder, made_result):
    record = made_result()
    record["cells"][0]["runs"][0]["prefill_energy"]["joules"] = {"a\nb": False}
    (folder / results.FILE).write_text(json.dumps(record))
    assert "\n" not in refused(folder)


def places(value, path=()):
    """The paths to everything in a record."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield from places(each, (*path, key))


@quickly
@given(data=st.data())
def test_any_value_in_any_place_is_read_or_refused(folder, made_result, data):
    record = made_result()
    record["cells"] = record["cells"][:2]
    *above, last = data.draw(st.sampled_from([path for path in places(record) if path]))
    parent = record
    for key in above:
        parent = parent[key]
    parent[last] = data.draw(json_values)
    (folder / results.FILE).write_text(json.dumps(record), encoding="utf-8")
    try:
        assert results.read(folder) == record
    except DuoError as error:
        assert "\n" not in str(error) and results.FILE in str(error)


@quickly
@given(cut=st.floats(0, 1), inserted=st.binary(max_size=6))
def test_any_bytes_are_read_or_refused(folder, made_result, cut, inserted):
    whole = json.dumps(made_result()).encode()
    at = int(cut * len(whole))
    (folder / results.FILE).write_bytes(whole[:at] + inserted + whole[at + len(inserted) :])
    try:
        results.read(folder)
    except DuoError as error:
        assert "\n" not in str(error) and results.FILE in str(error)


def test_contributed_results_are_sound():
    assert CONTRIBUTED.is_dir() and unsound(CONTRIBUTED) == []


def test_an_unsound_contribution_is_found(folder, made_result):
    assert unsound(folder) == []
    broken = folder / "m4" / "broken" / results.FILE
    broken.parent.mkdir(parents=True)
    broken.write_text(json.dumps(made_result() | {"cells": {}}))
    (why,) = unsound(folder)
    assert why.startswith(f"{broken}: is damaged at cells")
