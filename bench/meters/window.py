"""From counters to joules: a window whose edges lie on the moments at which counters are published.

Apple's CPU, DRAM and ANE counters are published in batches about 2 s apart, so that a window which starts and ends
anywhere is wrong by up to a batch at each end. A `Window` starts when a batch has just come and ends when another
comes; how well it knows these moments is its uncertainty, and a figure that is too uncertain is not given. Use::

    window = Window(meter, minimum=60)
    window.open()                   # waits for a batch
    while not window.look():        # True once the minimum is over and a batch has come
        work()
    energy = window.close()

`look` costs next to nothing before the minimum is over, so call it as often as the work allows, best after each token:
what it sees late is uncertainty. Count the work up to the moment at which it says True.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from duo_mlx.bench.meters import Meter, Rail, Reading

SURE = 0.01  # relative uncertainty from which a figure carries a flag
LIMIT = 0.1  # and from which it is not given
BEAT = 10.0  # s between readings before the minimum is over: a reset in between must not go unseen
PATIENCE = 3  # periods without a tick before a counter is taken to stand still
CLOCK_STEP = 1.0  # s by which the clock on the wall may leave the meter's before something is wrong
ZERO = "0 J under load: not available (a newer macOS may give it to root only)"
NOT_REPORTED = "it was not reported throughout the window"


@dataclass(frozen=True)
class Energy:
    """What a meter says of a window. Where a rail or the total is None, ``why`` has a word under its name."""

    meter: str
    label: str
    scope: str
    seconds: float
    joules: dict[str, float | None]  # by rail, gross
    total_j: float | None  # of the rails that the label names
    uncertainty: dict[str, float] = field(default_factory=dict)  # relative, of the rails that are published in batches
    why: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()  # what must be said beside the figures
    tail_s: float = 0.0  # how long the window waited for its last batch after the work was done

    @property
    def mean_w(self) -> float | None:
        """Watts, of the total."""
        return None if self.total_j is None else self.total_j / self.seconds

    def net(self, idle: "Energy | None") -> "Energy":
        """Less what the computer draws without the work: idle watts x seconds, by the same meter, measured before.

        Below zero is kept, with a flag: noise, or idle was not idle.
        """
        if idle is None or (idle.meter, idle.label) != (self.meter, self.label):
            what = "idle was not measured" if idle is None else f"idle was measured by another meter: {idle.label}"
            names = ("total", *self.joules)
            return replace(
                self, joules=dict.fromkeys(self.joules), total_j=None, why=dict.fromkeys(names, what) | self.why
            )
        why = dict(self.why)

        def less(name: str, gross: float | None, drawn: float | None) -> float | None:
            if gross is None:
                return None
            if drawn is None:
                why[name] = f"idle: {idle.why.get(name, 'not reported')}"
                return None
            return gross - drawn / idle.seconds * self.seconds

        joules = {rail: less(rail, gross, idle.joules.get(rail)) for rail, gross in self.joules.items()}
        total = less("total", self.total_j, idle.total_j)
        flags = [*self.flags, *(f"idle: {flag}" for flag in idle.flags if flag not in self.flags)]
        if total is not None and total < 0:
            flags.append("net energy is below zero: idle was not idle, or the work draws too little to tell")
        return replace(self, joules=joules, total_j=total, why=why, flags=tuple(flags))

    def record(self) -> dict[str, Any]:
        """For a result's JSON."""
        return asdict(self) | {"flags": list(self.flags), "mean_w": self.mean_w}


@dataclass(frozen=True)
class _Edge:
    """One end of a window: counters and how old they may be, in s by batched rail."""

    reading: Reading
    ages: dict[str, float]
    wall: float


class Window:
    """A stretch of time whose energy is measured; see the module.

    Args:
        meter: whose counters.
        minimum: s that the window lasts at least.
        clock: s, the meter's own; one that stands still while the computer sleeps.
        wall: s, of the day; one that goes on.
        sleep: waits for s.
    """

    def __init__(
        self,
        meter: Meter,
        minimum: float = 60.0,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.meter = meter
        self.minimum = minimum
        self._clock, self._wall, self._sleep = clock, wall, sleep
        self._start: _Edge | None = None
        self._end: _Edge | None = None
        self._last = Reading(0.0, {})
        self._armed: float | None = None  # when the search for the last tick began
        self._why: dict[str, str] = {}  # by rail, what was seen between the edges
        self._seen: dict[str, float] = {}  # when each rail was last seen to move

    def open(self) -> None:
        """Start; on a tick, which it waits for, if the meter has ticks."""
        self._last = self.meter.read()
        begin = self._last.time
        self._seen = dict.fromkeys(self.meter.rails, begin)
        edge = self._edge(self._last, self._last, begin)
        while edge is None:
            self._sleep(self.meter.poll)
            edge = self._edge(self._last, self._read(), begin)
        self._start = edge

    def look(self) -> bool:
        """Whether the window has ended, which it does on the first tick after its minimum."""
        if self._start is None:
            raise RuntimeError("a window is opened before it is looked at")
        if self._end is not None:
            return True
        now = self._clock()
        over = now - self._start.reading.time >= self.minimum
        if now - self._last.time < (self.meter.poll if over else BEAT):
            return False
        before, reading = self._last, self._read()
        if not over:
            return False
        if self._armed is None:
            self._armed = reading.time
            if self.meter.tick is not None:  # how old a batch is that came since the last reading is not known
                return False
        self._end = self._edge(before, reading, self._armed)
        return self._end is not None

    def close(self) -> Energy:
        """End the window, if it has not ended yet on the next tick, and say what was drawn."""
        called = self._clock()
        self.minimum = 0.0
        while not self.look():
            self._sleep(self.meter.poll)
        return self._energy(called)

    def _read(self) -> Reading:
        """The counters now, with an eye on what makes them worthless between the edges."""
        reading, last = self.meter.read(), self._last
        self._seen |= dict.fromkeys(self._moved(last, reading), reading.time)
        for rail in self.meter.rails if self._start else ():
            old, new = last.joules.get(rail), reading.joules.get(rail)
            if reading.epoch != last.epoch:
                self._why.setdefault(rail, "the counter began anew within the window, or was not read in time")
            elif old is None or new is None:
                self._why.setdefault(rail, NOT_REPORTED)
            elif new < old:
                self._why.setdefault(rail, "the counter went back within the window: it was reset")
        self._last = reading
        return reading

    def _moved(self, before: Reading, reading: Reading) -> set[str]:
        """The rails that were published between two readings."""
        if reading.covered != before.covered:
            return set(self.meter.rails)
        return {rail for rail in self.meter.rails if before.joules.get(rail) != reading.joules.get(rail)}

    def _edge(self, before: Reading, reading: Reading, begin: float) -> _Edge | None:
        """An edge at ``reading``, if it is one: the meter has no ticks, there was one, or none comes."""
        rails, tick = self.meter.rails, self.meter.tick
        moved = self._moved(before, reading)
        if tick is not None and tick not in moved and reading.time - begin < PATIENCE * rails[tick].period:
            return None
        gap = reading.time - before.time
        ages = {
            rail: min(gap, known.period) if rail in moved else max(known.period, reading.time - self._seen[rail])
            for rail, known in rails.items()
            if known.period
        }
        return _Edge(reading, ages, self._wall())

    def _energy(self, called: float) -> Energy:
        assert self._start is not None and self._end is not None
        meter, start, end = self.meter, self._start, self._end
        seconds = end.reading.time - start.reading.time
        whole, scale = self._whole(start, end, seconds)
        joules: dict[str, float | None] = {}
        why, flags, uncertainty = {}, list(meter.notes), {}
        for rail, known in meter.rails.items():
            drawn, unsure, reason = (None, 0.0, whole) if whole else self._rail(rail, known, start, end, seconds)
            joules[rail] = None if drawn is None else drawn * scale
            if reason:
                why[rail] = reason
            elif known.period:
                uncertainty[rail] = unsure
                if unsure > SURE:
                    flags.append(f"{rail}: uncertain by {unsure:.1%}, as its edges are")
        parts = {rail: joules[rail] for rail, known in meter.rails.items() if known.total}
        given = [part for part in parts.values() if part is not None]
        complete = bool(parts) and len(given) == len(parts)
        if not complete:
            lost = {rail: why[rail] for rail, part in parts.items() if part is None}
            why["total"] = whole or "; ".join(f"{rail}: {reason}" for rail, reason in lost.items()) or meter.why
        return Energy(
            meter.name, meter.label, meter.scope, seconds, joules, sum(given) if complete else None,
            uncertainty, why, tuple(flags), max(0.0, end.reading.time - called),
        )  # fmt: skip

    def _rail(
        self, rail: str, known: Rail, start: _Edge, end: _Edge, seconds: float
    ) -> tuple[float | None, float, str]:
        """What a rail's counter went up by, its relative uncertainty, and why it is not given, if it is not."""
        first, last = start.reading.joules.get(rail), end.reading.joules.get(rail)
        if rail in self._why or first is None or last is None:
            return None, 0.0, self._why.get(rail, NOT_REPORTED)
        drawn = last - first
        ages = (start.ages[rail], end.ages[rail]) if known.period else (0.0, 0.0)
        unsure = sum(ages) / seconds
        if not drawn and seconds > 2 * known.period:
            return (None, unsure, ZERO) if known.nonzero else (0.0, 0.0, "")  # batches came, with nothing in them
        if max(ages) > 2 * known.period:
            return None, unsure, f"its counter stood still for {max(ages):.3g} s"
        if unsure > LIMIT:
            edges = f"{sum(ages):.2g} s of {seconds:.3g} s"
            return None, unsure, f"published every {known.period:.2g} s or so, with {edges} in doubt: measure longer"
        return drawn, unsure, ""

    def _whole(self, start: _Edge, end: _Edge, seconds: float) -> tuple[str, float]:
        """Why nothing of a window can be used, if so, and by what its counters' growth is joules."""
        if seconds <= 0:
            return "the window has no length", 1.0
        if abs(end.wall - start.wall - seconds) > CLOCK_STEP:
            return "the computer slept, or its clock was set, within the window", 1.0
        if start.reading.covered is None or end.reading.covered is None:
            return "", 1.0
        covered = end.reading.covered - start.reading.covered
        if covered <= 0:
            return "nothing was published within the window", 1.0
        slack = sum(max(edge.ages.values(), default=0.0) for edge in (start, end))
        period = max((known.period for known in self.meter.rails.values()), default=0.0)
        if self.meter.covers_seconds and abs(covered - seconds) > slack + period / 4:
            return f"a gap: what was published covers {covered:.4g} s of a window of {seconds:.4g} s", 1.0
        return "", seconds / covered


def measure_idle(
    meter: Meter,
    seconds: float = 30.0,
    *,
    clock: Callable[[], float] = time.monotonic,
    wall: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Energy:
    """What the computer draws while this program waits, for `Energy.net`."""
    window = Window(meter, seconds, clock=clock, wall=wall, sleep=sleep)
    window.open()
    end = clock() + seconds
    while (left := end - clock()) > 0:
        sleep(min(BEAT, left))
        window.look()
    return window.close()
