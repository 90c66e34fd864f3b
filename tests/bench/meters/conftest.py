"""A clock that moves when told and a meter with known joules that does what real counters do."""

import math
from collections.abc import Callable, Mapping

import pytest

from duo_mlx.bench.meters import Meter, Rail, Reading
from duo_mlx.bench.meters.window import Window


class Clock:
    """Seconds; ``wall`` runs on while ``now`` stands still in sleep."""

    def __init__(self) -> None:
        self.now, self.asleep = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return 1e9 + self.now + self.asleep

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeMeter(Meter):
    """Rails that draw ``idle`` watts, and ``busy`` watts from the moment `work` is called until `rest` is.

    A batched rail shows what was drawn up to its last publication, at ``phase + n * period``. ``change`` may alter what
    is read: it takes the time, the rail and the true joules.
    """

    name, scope, label, poll = "fake", "soc", "fake (cpu, gpu, dram)", 0.02

    def __init__(
        self,
        clock: Clock,
        rails: Mapping[str, Rail],
        busy: Mapping[str, float],
        idle: Mapping[str, float],
        tick: str | None,
        phase: Mapping[str, float],
    ) -> None:
        self.clock, self.rails, self.tick, self.phase = clock, rails, tick, phase
        self.idle, self.busy = idle, busy
        self.began = self.ended = math.inf
        self.change: Callable[[float, str, float], float | None] = lambda _time, _rail, joules: joules
        self.epoch_at: Callable[[float], int] = lambda _time: 0
        self.reads = 0

    def work(self) -> None:
        self.began = self.clock.now

    def rest(self) -> None:
        self.ended = self.clock.now

    def true(self, rail: str, start: float, end: float) -> float:
        """Joules drawn between two moments."""
        busy = max(0.0, min(end, self.ended) - max(start, self.began))
        return self.busy[rail] * busy + self.idle[rail] * (end - start - busy)

    def read(self) -> Reading:
        self.reads += 1
        joules = {}
        for rail, known in self.rails.items():
            phase = self.phase.get(rail, 0.0)
            shown = self.clock.now
            if known.period:
                shown = phase + math.floor((shown - phase) / known.period) * known.period
            joules[rail] = self.change(self.clock.now, rail, math.floor(self.true(rail, 0.0, shown) * 1000) / 1000)
        return Reading(self.clock.now, joules, epoch=self.epoch_at(self.clock.now))


SOC = {"cpu": Rail(2.2, nonzero=True), "gpu": Rail(), "dram": Rail(2.2, nonzero=True), "ane": Rail(2.2)}
BUSY = {"cpu": 4.0, "gpu": 21.0, "dram": 3.0, "ane": 0.0}
IDLE = {"cpu": 0.05, "gpu": 0.01, "dram": 0.2, "ane": 0.0}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fake(clock: Clock) -> Callable[..., FakeMeter]:
    """``fake(busy=, idle=, rails=, tick="cpu", phase={})``: a meter; an SoC's if nothing is said."""

    def make(**changes: object) -> FakeMeter:
        settings = {"rails": SOC, "busy": BUSY, "idle": IDLE, "tick": "cpu", "phase": {}} | changes
        return FakeMeter(clock, **settings)

    return make


@pytest.fixture
def window_on(clock: Clock) -> Callable[..., Window]:
    """``window_on(meter, minimum=60)``: a window on the fake clock."""
    return lambda meter, minimum=60.0: Window(meter, minimum, clock=clock, wall=clock.wall, sleep=clock.sleep)


@pytest.fixture
def measure(clock: Clock, window_on: Callable[..., Window]) -> Callable[..., object]:
    """``measure(meter, minimum=60, token=0.013, during=None)``: work in tokens until the window ends; its `Energy`.

    ``during`` is called with the seconds gone after each token.
    """

    def run(meter: Meter, minimum: float = 60.0, token: float = 0.013, during: object = None) -> object:
        window = window_on(meter, minimum)
        window.open()
        start = clock.now
        if isinstance(meter, FakeMeter):
            meter.work()
        while not window.look():
            clock.sleep(token)
            if during is not None:
                during(clock.now - start)
        if isinstance(meter, FakeMeter):
            meter.rest()
        clock.sleep(1.0)  # what comes after is not in the window
        return window.close()

    return run
