"""Which meter is chosen, and what is said of the others."""

import pytest

from duo_mlx.bench import meters
from duo_mlx.bench.meters import Found, Unavailable, choose, found
from duo_mlx.bench.meters.none import NoMeter
from duo_mlx.errors import DuoError


@pytest.fixture
def present(monkeypatch, fake):
    """``present(*names)``: these meters measure here, the others do not; what each was opened with."""
    opened = {}

    def make(*names):
        def open_one(name, source):
            opened[name] = source
            if name not in names:
                raise Unavailable(f"no {name} here")
            meter = fake()
            meter.label, meter.notes = f"{name}!", ("a note",)
            return meter

        monkeypatch.setattr(meters, "_open", open_one)
        return opened

    return make


def test_every_meter_opens_or_says_why_in_one_line():
    rows = found()
    assert [row.name for row in rows] == list(meters.NAMES)
    for row in rows:
        assert bool(row.label) != bool(row.why) and "\n" not in row.why


def test_found_tells_label_notes_and_reasons(present):
    opened = present("ioreport")
    rows = found(stream="file")
    assert rows[0] == Found("ioreport", "ioreport!", "", ("a note",))
    assert rows[2] == Found("rapl", "", "no rapl here")
    assert opened["powermetrics"] == "file" and opened["ioreport"] is None


@pytest.mark.parametrize("names", [("ioreport", "rapl", "battery"), ("rapl", "battery")])
def test_auto_takes_the_first(present, names):
    present(*names)
    assert choose().label == f"{names[0]}!"


def test_auto_never_takes_the_battery_and_says_why_there_is_nothing(present):
    present("battery")
    meter = choose("auto")
    assert isinstance(meter, NoMeter)
    assert "ioreport: no ioreport here" in meter.why and "ask for it with --meter battery" in meter.why
    assert choose("battery").label == "battery!"


def test_none_is_none(present):
    opened = present("ioreport")
    assert choose("none").why == "no meter was asked for" and not opened


def test_a_meter_asked_for_by_name_must_be_there(present):
    opened = present("powermetrics")
    assert choose("powermetrics:some/file").label == "powermetrics!" and opened["powermetrics"] == "some/file"
    with pytest.raises(DuoError, match=r"^--meter rapl: no rapl here$"):
        choose("rapl")


@pytest.mark.parametrize("spec", ["", "wall", "rapl:file", "auto:x", ":"])
def test_an_unknown_meter_is_refused(spec):
    with pytest.raises(DuoError, match=r"no such meter; give auto, none, ioreport, .*powermetrics:FILE"):
        choose(spec)
