"""The battery's telemetry: means of samples, published once a minute."""

import plistlib

import pytest

from duo_mlx.bench.meters import Unavailable
from duo_mlx.bench.meters.battery import COMMAND, BatteryMeter, parse
from duo_mlx.bench.meters.window import Window
from duo_mlx.bench.system import Output


def entry(load, count):
    telemetry = {"AccumulatedSystemLoad": load, "SystemLoadAccumulatorCount": count, "SystemLoad": 19852}
    return plistlib.dumps([{"Serial": "F8Y123SERIAL", "PowerTelemetryData": telemetry}]).decode()


class Ioreg:
    """ioreg of a laptop: a sample of ``watts(second)`` each 2 s, published each 60 s."""

    def __init__(self, clock, watts):
        self.clock, self.watts, self.base = clock, watts, (1362141123, 74966)
        self.broken = False

    def __call__(self, command, limit):
        assert tuple(command) == COMMAND and command[0] == "/usr/sbin/ioreg" and limit <= 5
        if self.broken:
            return Output("", "no answer in 5 s")
        shown = int(self.clock.now // 60) * 30
        load = sum(int(self.watts(2 * n) * 1000) for n in range(shown))
        return Output(entry(self.base[0] + load, self.base[1] + shown))


def run_for(window, clock, seconds):
    window.open()
    end = clock.now + seconds
    while clock.now < end and not window.look():
        clock.sleep(0.25)
    return window.close()


@pytest.fixture
def window_of(clock):
    return lambda meter, minimum: Window(meter, minimum, clock=clock, wall=clock.wall, sleep=clock.sleep)


def test_mean_watts_of_the_samples_between_publications(clock, window_of):
    ioreg = Ioreg(clock, lambda second: 10.0 if second % 120 < 60 else 30.0)
    energy = run_for(window_of(BatteryMeter(ioreg, clock), 230), clock, 500)
    assert energy.seconds == pytest.approx(240, abs=1)
    assert energy.mean_w == pytest.approx(20, rel=0.01) and energy.total_j == pytest.approx(4800, rel=0.01)
    assert energy.scope == "system" and energy.flags == ()


def test_less_than_a_publication_is_not_given(clock, window_of):
    window = window_of(BatteryMeter(Ioreg(clock, lambda _second: 20.0), clock), 5)
    energy = run_for(window, clock, 500)
    assert energy.total_j == pytest.approx(20 * energy.seconds, rel=0.02) and energy.seconds > 59


@pytest.mark.parametrize("fault", ["broken", "reset"])
def test_a_telemetry_that_fails_midway_is_not_given(clock, window_of, fault):
    ioreg = Ioreg(clock, lambda _second: 20.0)
    window = window_of(BatteryMeter(ioreg, clock), 170)
    window.open()
    while not window.look():
        clock.sleep(0.25)
        if fault == "broken":
            ioreg.broken = 290 < clock.now < 305
        elif clock.now > 290:
            ioreg.base = (0, 0)
    energy = window.close()
    assert energy.total_j is None and energy.why["system"]


@pytest.mark.parametrize(
    "text",
    ["", "not a plist", plistlib.dumps([]).decode(), plistlib.dumps([{"PowerTelemetryData": {}}]).decode(),
     plistlib.dumps({"a": 1}).decode(), entry(1, 2)[:200], entry("much", 2)],
    ids=["desktop", "garbage", "empty", "old macOS", "no list", "cut", "no number"],
)  # fmt: skip
def test_no_battery_or_telemetry_is_a_reason(text):
    assert parse(text) is None
    with pytest.raises(Unavailable, match="no battery with power telemetry"):
        BatteryMeter(lambda _command, _limit: Output(text))


def test_what_ioreg_said_went_wrong_is_told():
    with pytest.raises(Unavailable, match=r"ioreg: No such file"):
        BatteryMeter(lambda _command, _limit: Output("", "No such file or directory"))
