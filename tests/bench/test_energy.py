"""Counted work: joules a token of a meter whose joules are known, with counters that are published in batches."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest

from duo_mlx.bench import energy
from duo_mlx.bench.energy import Counted
from duo_mlx.bench.meters import Rail
from duo_mlx.bench.meters.none import NoMeter
from duo_mlx.bench.meters.window import Window, measure_idle

spec = importlib.util.spec_from_file_location("scripted_meters", Path(__file__).parent / "meters" / "conftest.py")
scripted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scripted)

WATTS, IDLE_WATTS = sum(scripted.BUSY.values()), sum(scripted.IDLE.values())
TOKEN = 0.013  # s


@pytest.fixture
def clock(monkeypatch):
    clock = scripted.Clock()
    monkeypatch.setattr(energy, "Window", partial(Window, clock=clock, wall=clock.wall, sleep=clock.sleep))
    return clock


@pytest.fixture
def meter(clock):
    return scripted.FakeMeter(
        clock, scripted.SOC, scripted.BUSY, scripted.IDLE, "cpu", dict.fromkeys(scripted.SOC, 0.7)
    )


def worked(counted, meter, clock, each=4, after=0):
    """Work in steps of ``each`` tokens until the window is over, and ``after`` more."""
    meter.work()
    while not counted.over:
        clock.sleep(TOKEN)
        counted.add(each)
    for _ in range(after):
        clock.sleep(TOKEN)
        counted.add(each)
    meter.rest()


@pytest.mark.parametrize("minimum", [30.0, 60.0])
@pytest.mark.parametrize("after", [0, 5000])
def test_joules_a_token_are_right_and_what_comes_after_does_not_count(meter, clock, minimum, after):
    counted = Counted(meter, minimum)
    worked(counted, meter, clock, after=after)
    clock.sleep(3.0)
    found = counted.record(None)
    assert found["total_j"] / found["tokens"] == pytest.approx(WATTS * TOKEN / 4, rel=0.01)
    assert found["joules"]["gpu"] / found["tokens"] == pytest.approx(21.0 * TOKEN / 4, rel=0.01)
    assert minimum <= found["seconds"] < minimum + 2 * 2.2
    assert found["tokens"] == pytest.approx(4 * found["seconds"] / TOKEN, rel=0.01)


def test_the_wait_for_the_first_batch_is_not_in_the_window(meter, clock):
    clock.sleep(0.3)
    began = clock.now
    counted = Counted(meter, 10.0)
    assert clock.now > began  # the edge lies on a batch
    opened = clock.now
    worked(counted, meter, clock)
    assert counted.record(None)["seconds"] == pytest.approx(clock.now - opened, abs=0.1)


def test_net_joules_are_less_what_the_idle_computer_draws(meter, clock):
    idle = measure_idle(meter, 20.0, clock=clock, wall=clock.wall, sleep=clock.sleep)
    counted = Counted(meter, 30.0)
    worked(counted, meter, clock)
    found = counted.record(idle)
    assert found["net_j"] / found["tokens"] == pytest.approx((WATTS - IDLE_WATTS) * TOKEN / 4, rel=0.01)


def test_without_idle_gross_joules_stand_alone(meter, clock):
    counted = Counted(meter, 30.0)
    worked(counted, meter, clock)
    found = counted.record(None)
    assert found["net_j"] is None and found["total_j"] > 0


def test_work_that_ends_before_the_window_is_measured_all_the_same(meter, clock):
    """Whoever stops early gets the window up to the next batch, and the tokens that were counted."""
    counted = Counted(meter, 60.0)
    meter.work()
    for _ in range(1000):
        clock.sleep(TOKEN)
        counted.add(1)
    found = counted.record(None)
    assert not counted.over and found["tokens"] == 1000
    assert 1000 * TOKEN <= found["seconds"] < 1000 * TOKEN + 2 * 2.2


def test_an_immediate_counter_needs_no_batches(clock):
    meter = scripted.FakeMeter(clock, {"gpu": Rail()}, {"gpu": 10.0}, {"gpu": 0.0}, None, {})
    counted = Counted(meter, 1.0)
    worked(counted, meter, clock, each=1)
    found = counted.record(None)
    assert found["seconds"] == pytest.approx(1.0, abs=TOKEN)
    assert found["total_j"] / found["tokens"] == pytest.approx(10 * TOKEN, rel=1e-3)


def test_without_a_meter_it_is_over_at_once(clock):
    counted = Counted(NoMeter({}, clock), 60.0)
    assert not counted.over  # some work must be done
    clock.sleep(TOKEN)
    counted.add(1)
    assert counted.over and counted.tokens == 1
    assert counted.record(None) is None
