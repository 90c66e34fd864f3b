"""The record of what was found on a machine: kept over processes, apart by machine, and never a reason to stop."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from duo_mlx.kernels import verdicts
from duo_mlx.kernels.verdicts import Figures, Record, Verdict

FIGURES = Figures(bandwidth_bytes_s=1e11, dispatch_s=5e-6, read_back_s=3e-4, crossing_s=1e-4)
FOUND = {"fused": Verdict(True, slowdown=1.1), "masked": Verdict(False, "differs")}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path / "cache"))
    verdicts.record.cache_clear()
    yield tmp_path / "cache" / "verdicts.json"
    verdicts.record.cache_clear()


def test_what_is_stored_is_there_for_the_next_process(cache):
    assert Record().verdicts == {} and Record().figures is None
    assert Record().store(FOUND, FIGURES)
    assert cache.is_file() and list(cache.parent.iterdir()) == [cache]
    assert Record().verdicts == FOUND and Record().figures == FIGURES


def test_what_is_stored_later_is_added():
    record = Record()
    record.store({"fused": Verdict(False, "old"), "other": Verdict(True)}, FIGURES)
    newer = replace(FIGURES, fast_crossing_s=2e-5)
    record.store(FOUND)
    assert Record().figures == FIGURES
    record.store(figures=newer)
    for each in (record, Record()):
        assert each.verdicts == FOUND | {"other": Verdict(True)} and each.figures == newer


def test_what_another_process_stored_meanwhile_is_kept():
    server, doctor = Record(), Record()
    server.store({"fused": Verdict(False, "old"), "router": Verdict(True)})
    doctor.store({"fused": Verdict(True, slowdown=1.0)}, FIGURES)
    server.store({"masked": Verdict(True)})
    for each in (server, Record()):
        assert each.figures == FIGURES
        assert each.verdicts == {
            "fused": Verdict(True, slowdown=1.0), "router": Verdict(True), "masked": Verdict(True),
        }  # fmt: skip


def test_another_machine_is_another_entry(cache):
    Record(of="another").store(FOUND, FIGURES)
    assert Record().verdicts == {} and Record().figures is None
    Record().store({"fused": Verdict(True)})
    assert Record(of="another").verdicts == FOUND
    assert set(json.loads(cache.read_text())) == {"another", verdicts.machine()}


GOOD = {"verdicts": {"fused": {"passed": True}}, "figures": None}
BAD_ENTRIES = [
    None,
    [],
    "text",
    {"verdicts": []},
    {"verdicts": {"fused": True}},
    {"verdicts": {"fused": {}}},
    {"verdicts": {"fused": {"passed": 1}}},
    {"verdicts": {"fused": {"passed": True, "speed": 2}}},
    {"verdicts": {"fused": {"passed": True, "slowdown": 0}}},
    {"verdicts": {"fused": {"passed": True, "slowdown": "fast"}}},
    {"figures": 7},
    {"figures": {"bandwidth_bytes_s": 1e11}},
    {"figures": {**vars(FIGURES), "bandwidth_bytes_s": 0}},
    {"figures": {**vars(FIGURES), "dispatch_s": None}},
    {"figures": {**vars(FIGURES), "dispatch_s": "5 us"}},
    {"figures": {**vars(FIGURES), "read_back_s": float("nan")}},
    {"figures": {**vars(FIGURES), "read_back_s": float("inf")}},
    {"figures": {**vars(FIGURES), "fast_crossing_s": -1}},
]


@pytest.mark.parametrize("entry", BAD_ENTRIES, ids=str)
def test_an_entry_that_no_one_can_use_counts_as_none(cache, entry):
    cache.parent.mkdir()
    cache.write_text(json.dumps({verdicts.machine(): entry, "another": GOOD}))
    record = Record()
    assert record.verdicts == {} and record.figures is None
    assert record.store(FOUND, FIGURES)
    assert Record().verdicts == FOUND and Record(of="another").verdicts == {"fused": Verdict(True)}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"text"', b"\xff\xfe", b'{"a": 1'], ids=repr)
def test_a_file_that_cannot_be_read_counts_as_none(cache, content):
    cache.parent.mkdir()
    cache.write_bytes(content)
    record = Record()
    assert record.verdicts == {}
    assert record.store(FOUND)
    assert Record().verdicts == FOUND


def test_a_directory_in_the_place_of_the_file_is_left_alone(cache):
    cache.mkdir(parents=True)
    record = Record()
    assert not record.store(FOUND)
    assert cache.is_dir() and record.verdicts == FOUND


def test_where_nothing_can_be_written_this_process_still_knows(cache):
    cache.parent.write_text("a file")
    record = Record()
    assert not record.store(FOUND, FIGURES)
    assert record.verdicts == FOUND and record.figures == FIGURES
    assert not record.store({"other": Verdict(True)})
    assert record.verdicts == FOUND | {"other": Verdict(True)} and record.figures == FIGURES


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(cache):
    cache.parent.mkdir(mode=0o500)
    assert not Record().store(FOUND)


def test_the_record_is_read_once_a_process(cache):
    assert verdicts.figures() is None
    verdicts.record().store(FOUND, FIGURES)
    cache.unlink()
    assert verdicts.figures() == FIGURES and verdicts.record().verdicts == FOUND


def test_where_the_file_is(monkeypatch):
    monkeypatch.setenv(verdicts.CACHE, "/elsewhere")
    assert verdicts.cache_file() == Path("/elsewhere/verdicts.json")
    monkeypatch.delenv(verdicts.CACHE)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert verdicts.cache_file() == Path("/home/someone/Library/Caches/duo-mlx/verdicts.json")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert verdicts.cache_file() == Path("/home/someone/.cache/duo-mlx/verdicts.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert verdicts.cache_file() == Path("/caches/duo-mlx/verdicts.json")


def test_a_changed_kernel_is_another_machine(monkeypatch):
    assert verdicts.machine.__wrapped__() == verdicts.machine()
    read = Path.read_bytes
    for changed in ("up.metal", "common.metal", "fused.py", "masked.py", "forms.py"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path, changed=changed: read(path) + b" " * (path.name == changed))
            assert verdicts.machine.__wrapped__() != verdicts.machine(), changed
