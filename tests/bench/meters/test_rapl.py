"""RAPL on a fake tree: nothing counted twice, wraps, and who may read."""

from pathlib import Path

import pytest

from duo_mlx.bench.meters import Unavailable
from duo_mlx.bench.meters.rapl import RaplMeter

ZONES = {
    "intel-rapl": None,  # the control type itself
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "uncore",
    "intel-rapl:0:2": "dram",
    "intel-rapl:1": "package-1",
    "intel-rapl:1:0": "dram",
    "intel-rapl:2": "psys",
    "intel-rapl-mmio:0": "package-0",  # the same counter once more
}
WATTS = {"package-0": 40.0, "package-0/core": 30.0, "package-0/uncore": 5.0, "package-0/dram": 4.0,
         "package-1": 20.0, "package-1/dram": 3.0, "psys": 90.0}  # fmt: skip
RANGE = 262143328850  # uJ


@pytest.fixture
def tree(tmp_path, clock):
    """A tree, and what writes its counters for the clock's time; they start just below their wrap."""
    start = RANGE - 200_000_000

    def write():
        for directory, name in ZONES.items():
            zone = tmp_path / directory
            zone.mkdir(exist_ok=True)
            if name is None:
                continue
            parent = ZONES.get(directory.rpartition(":")[0])
            watts = WATTS[f"{parent}/{name}" if parent else name]
            (zone / "name").write_text(name + "\n")
            (zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
            raw = start + watts * (clock.now - 100) * 1e6
            (zone / "energy_uj").write_text(f"{int(raw) % RANGE}\n")

    write()
    return tmp_path, write


@pytest.fixture
def meter(tree, clock):
    return RaplMeter(tree[0], clock)


def test_rails_and_their_total(meter):
    assert set(meter.rails) == set(WATTS)
    assert meter.label == "RAPL (package-0, package-0/dram, package-1, package-1/dram)"


def test_wrapping_counters_give_their_known_joules(meter, tree, measure):
    energy = measure(meter, minimum=20.0, token=0.5, during=lambda _gone: tree[1]())
    for rail, watts in WATTS.items():
        assert energy.joules[rail] == pytest.approx(watts * energy.seconds, rel=0.01)
    assert energy.mean_w == pytest.approx(67, rel=0.01) and energy.scope == "package" and energy.tail_s == 0


def test_a_counter_unread_for_longer_than_a_wrap_may_take_is_lost(meter, tree, clock, window_on):
    window = window_on(meter, 20.0)
    window.open()
    clock.sleep(300.0)  # 262 kJ at 1 kW take 262 s
    tree[1]()
    energy = window.close()
    assert energy.total_j is None and "not read in time" in energy.why["package-0"]


def test_only_root_may_read(tree, monkeypatch):
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(Unavailable, match=r"energy_uj: only root may read it"):
        RaplMeter(tree[0])


def test_a_counter_that_vanishes_costs_the_figure_only(meter, tree, measure):
    def vanish(gone):
        tree[1]()
        if gone > 15:
            (tree[0] / "intel-rapl:2/energy_uj").unlink()

    energy = measure(meter, minimum=20.0, token=0.5, during=vanish)
    assert energy.total_j is None and "not reported" in energy.why["total"]


@pytest.mark.parametrize("content", [None, "", "many"])
def test_no_rapl_is_a_reason(tmp_path, content):
    if content is not None:
        zone = tmp_path / "intel-rapl:0"
        zone.mkdir()
        (zone / "name").write_text("package-0")
        (zone / "max_energy_range_uj").write_text("1")
        (zone / "energy_uj").write_text(content)
    with pytest.raises(Unavailable, match="cannot be read" if content is not None else "no intel-rapl package"):
        RaplMeter(tmp_path)
    with pytest.raises(Unavailable, match="no intel-rapl package"):
        RaplMeter(tmp_path / "absent")
