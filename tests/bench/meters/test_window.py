"""The window's arithmetic gives the joules of a scripted meter back, and gives nothing where it cannot know them."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from duo_mlx.bench.meters import Rail
from duo_mlx.bench.meters.none import NoMeter
from duo_mlx.bench.meters.window import LIMIT, measure_idle


@pytest.fixture
def idle_of(clock):
    return lambda meter, seconds=30.0: measure_idle(meter, seconds, clock=clock, wall=clock.wall, sleep=clock.sleep)


def test_batched_rails_give_their_known_joules(fake, measure):
    meter = fake()
    energy = measure(meter)
    assert 60 <= energy.seconds < 60 + 2.2 + 0.05
    for rail in ("cpu", "gpu", "dram"):
        assert energy.joules[rail] == pytest.approx(meter.busy[rail] * energy.seconds, rel=0.01)
    assert energy.joules["ane"] == 0
    assert energy.total_j == pytest.approx(28 * energy.seconds, rel=0.01)
    assert energy.mean_w == pytest.approx(28, rel=0.01)
    assert energy.why == {} and energy.flags == () and energy.tail_s == 0


def test_the_same_counters_are_wrong_without_aligned_edges(fake, clock):
    meter = fake()
    clock.sleep(1.25)  # a batch has just come
    meter.work()
    first = meter.read()
    clock.sleep(10.9)  # the next has not quite
    wrong = meter.read().joules["cpu"] - first.joules["cpu"]
    assert abs(wrong / (meter.busy["cpu"] * 10.9) - 1) > 0.1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    period=st.floats(0.5, 3.0),
    phases=st.tuples(*[st.floats(0, 3)] * 3),
    watts=st.tuples(*[st.floats(0.5, 60)] * 3),
    token=st.floats(0.002, 4.0),
    minimum=st.floats(1, 120),
)
def test_an_error_is_within_the_uncertainty(fake, measure, period, phases, watts, token, minimum):
    """Whatever the phases and however rarely the work looks; what is known too badly is not given."""
    names = ("cpu", "dram", "ane")
    rails = {rail: Rail(period, nonzero=True) for rail in names} | {"gpu": Rail()}
    meter = fake(
        rails=rails,
        phase=dict(zip(names, phases, strict=True)),
        busy={"gpu": 9.0} | dict(zip(names, watts, strict=True)),
        idle=dict.fromkeys(rails, 0.1),
    )
    energy = measure(meter, minimum, token)
    for rail, joules in energy.joules.items():
        true = meter.busy[rail] * energy.seconds
        if joules is None:
            assert "measure longer" in energy.why[rail] and energy.seconds < 2 * period / LIMIT
        else:
            assert abs(joules - true) <= energy.uncertainty.get(rail, 0.0) * true + 0.003
    assert energy.joules["gpu"] is not None


def test_a_window_too_short_for_the_batches_is_not_given(fake, window_on, clock):
    meter = fake(phase={"dram": 1.0})
    window = window_on(meter, 0.0)
    window.open()
    meter.work()
    clock.sleep(0.3)
    energy = window.close()
    assert energy.joules["dram"] is None and "measure longer" in energy.why["dram"]
    assert energy.joules["gpu"] > 0  # stamped when it is read
    assert energy.total_j is None and energy.mean_w is None and energy.why["total"].startswith("dram: published")


def test_a_window_that_ends_by_itself_says_how_long_it_waited(fake, window_on, clock):
    meter = fake()
    window = window_on(meter, 60.0)
    window.open()
    meter.work()
    clock.sleep(20.0)
    meter.rest()
    energy = window.close()
    assert 0 < energy.tail_s <= 2.2 + 0.05
    assert energy.joules["cpu"] == pytest.approx(4.0 * 20 + 0.05 * energy.tail_s, rel=0.01)


def test_work_that_seldom_looks_is_flagged(fake, measure):
    energy = measure(fake(), minimum=40.0, token=1.0)
    assert [flag.partition(":")[0] for flag in energy.flags] == ["cpu", "dram"]
    assert energy.joules["cpu"] == pytest.approx(4.0 * energy.seconds, rel=energy.uncertainty["cpu"])
    assert energy.uncertainty["cpu"] > 0.01


def test_looking_costs_nothing_before_the_minimum_is_over(fake, measure):
    meter = fake()
    measure(meter, minimum=600.0, token=0.05)
    assert meter.reads < 2 * (2.2 / 0.02) + 600 / 10 + 5


def test_a_rail_at_zero_under_load_is_not_available(fake, measure):
    """macOS may hide CPU and DRAM from all but root: 0 J is not what was drawn."""
    meter = fake()
    meter.change = lambda _time, rail, joules: 0.0 if rail in ("cpu", "dram") else joules
    energy = measure(meter)
    assert energy.joules["cpu"] is None and energy.joules["dram"] is None
    assert energy.why["cpu"] and energy.total_j is None
    assert energy.joules["gpu"] == pytest.approx(21 * energy.seconds, rel=0.01)


def test_zero_is_not_available_without_ticks_either(fake, measure):
    meter = fake(tick=None)
    meter.change = lambda _time, rail, joules: 0.0 if rail == "cpu" else joules
    energy = measure(meter)
    assert energy.joules["cpu"] is None and "0 J under load" in energy.why["cpu"]
    assert energy.joules["dram"] == pytest.approx(3 * energy.seconds, rel=energy.uncertainty["dram"])


def test_a_counter_that_stops_in_the_window_is_not_given(fake, measure, clock):
    meter = fake()
    stop = clock.now + 30
    meter.change = lambda _time, rail, joules: min(joules, meter.true(rail, 0.0, stop)) if rail == "cpu" else joules
    energy = measure(meter)
    assert energy.joules["cpu"] is None and "stood still" in energy.why["cpu"] and energy.total_j is None
    assert energy.seconds > 60  # it ends all the same


@pytest.mark.parametrize("recovers", [False, True])
def test_a_reset_in_the_window_is_seen(fake, measure, clock, recovers):
    """Also one after which the counter grows past its value at the start."""
    meter = fake()
    at = clock.now + (14 if recovers else 50)
    meter.change = lambda time, rail, joules: (
        max(0.0, joules - meter.true(rail, 0.0, at)) if time > at and rail == "cpu" else joules
    )
    energy = measure(meter)
    assert energy.joules["cpu"] is None and "reset" in energy.why["cpu"]
    assert (meter.read().joules["cpu"] > 100) == recovers
    assert energy.why["total"].startswith("cpu: ")
    assert energy.joules["gpu"] == pytest.approx(21 * energy.seconds, rel=0.01)


def test_a_counter_that_began_anew_is_seen(fake, measure, clock):
    meter = fake()
    at = clock.now + 30
    meter.epoch_at = lambda time: int(time > at)
    energy = measure(meter)
    assert set(energy.joules.values()) == {None} and "anew" in energy.why["cpu"]


@pytest.mark.parametrize("present", [(0, 30), (30, math.inf), (20, 35)], ids=["goes", "comes", "blinks"])
def test_a_rail_that_comes_or_goes_is_not_given(fake, measure, clock, present):
    meter, start = fake(), clock.now
    inside = (lambda time: not 20 <= time - start < 35) if present == (20, 35) else (
        lambda time: present[0] <= time - start < present[1]
    )  # fmt: skip
    meter.change = lambda time, rail, joules: joules if rail != "dram" or inside(time) else None
    energy = measure(meter)
    assert energy.joules["dram"] is None and "not reported" in energy.why["dram"]
    assert energy.joules["cpu"] == pytest.approx(4 * energy.seconds, rel=0.01)
    assert energy.total_j is None


def test_sleep_within_the_window_voids_it(fake, measure, clock):
    def sleep_once(gone):
        clock.asleep = 600.0 if gone > 30 else 0.0

    energy = measure(fake(), during=sleep_once)
    assert set(energy.joules.values()) == {None} and "slept" in energy.why["total"]


def test_net_is_gross_less_idle(fake, measure, idle_of):
    meter = fake()
    idle = idle_of(meter)
    assert idle.joules["dram"] == pytest.approx(0.2 * idle.seconds, rel=0.02)
    gross = measure(meter)
    net = gross.net(idle)
    assert net.joules["dram"] == pytest.approx((3.0 - 0.2) * gross.seconds, rel=0.01)
    assert net.total_j == pytest.approx((28 - 0.26) * gross.seconds, rel=0.01)
    assert net.seconds == gross.seconds and gross.total_j == pytest.approx(28 * gross.seconds, rel=0.01)


def test_net_is_unknown_without_idle_of_the_same_meter(fake, measure, idle_of):
    meter = fake()
    gross = measure(meter)
    assert gross.net(None).total_j is None and gross.net(None).why["total"] == "idle was not measured"
    other = fake()
    other.label = "fake (cpu)"
    assert gross.net(idle_of(other)).why["total"] == "idle was measured by another meter: fake (cpu)"
    other.label = meter.label
    other.change = lambda _time, rail, joules: 0.0 if rail == "cpu" else joules
    net = gross.net(idle_of(other))
    assert net.joules["cpu"] is None and net.why["cpu"].startswith("idle: 0 J") and net.total_j is None
    assert net.joules["gpu"] is not None


def test_net_below_zero_is_kept_and_flagged(fake, measure, idle_of):
    meter = fake(
        busy=dict.fromkeys(("cpu", "gpu", "dram", "ane"), 0.1), idle=dict.fromkeys(("cpu", "gpu", "dram", "ane"), 5.0)
    )
    net = measure(meter).net(idle_of(meter))
    assert net.total_j < 0 and any("below zero" in flag for flag in net.flags)


def test_no_meter_measures_time_and_says_why(clock, measure):
    energy = measure(NoMeter({"rapl": "root only"}, clock), minimum=2.0)
    assert energy.total_j is None and energy.why == {"total": "rapl: root only"} and energy.seconds >= 2
    record = energy.record()
    assert json.loads(json.dumps(record))["total_j"] is None and record["mean_w"] is None


def test_what_a_meter_notes_stands_beside_every_figure(fake, measure):
    meter = fake()
    meter.notes = ("cpu: one die of two",)
    assert measure(meter).record()["flags"] == ["cpu: one die of two"]
