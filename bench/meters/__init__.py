"""Energy meters: one small interface, one meter a file.

A meter reads counters that only grow; `duo_mlx.bench.meters.window` turns two readings into joules. What a meter cannot
tell is None with a word why, never an estimate. None of the meters of a Mac was run on one by this project: they follow
what others published about these counters, and are tested against recorded shapes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module

from duo_mlx.errors import DuoError

NAMES = ("ioreport", "powermetrics", "rapl", "battery")  # in the order in which `choose` tries them
ASKED = ("battery",)  # never chosen unasked: the whole computer, about once a minute, is a cross-check


class Unavailable(Exception):  # noqa: N818  (an answer, not an error)
    """A meter that cannot measure here; the text is one line that says why and what would help."""


@dataclass(frozen=True)
class Rail:
    """What is known about one counter of a meter."""

    period: float = 0.0  # s between publications; 0: stamped when it is read
    total: bool = True  # counted in the meter's total; False: part of another rail, or of unknown relation to it
    nonzero: bool = False  # never draws nothing: 0 J over a window means that the counter is not available


@dataclass(frozen=True)
class Reading:
    """Counters at one moment."""

    time: float  # s on the meter's clock
    joules: Mapping[str, float | None]  # cumulative, by rail; None: not reported now
    covered: float | None = None  # cumulative: a meter of means has watts x covered (seconds, or samples) for joules
    epoch: int = 0  # readings of different epochs cannot be subtracted: the counter began anew


class Meter(ABC):
    """Counters of energy. Make one by `choose`, measure with `duo_mlx.bench.meters.window.Window`."""

    name: str
    scope: str  # "soc", "package", "system"; "" without a meter
    label: str  # for people: what is measured, with the rails in the total
    rails: Mapping[str, Rail]
    tick: str | None = None  # the batched rail whose change shows that counters were published
    poll: float = 0.0  # s between looks for a tick
    covers_seconds: bool = False  # `Reading.covered` counts seconds, so that a gap shows
    notes: tuple[str, ...] = ()  # what must be said beside every figure
    why: str = ""  # why there is no energy, where there is none

    @abstractmethod
    def read(self) -> Reading:
        """The counters now."""

    def close(self) -> None:
        """Let go of what the meter holds."""
        return


@dataclass(frozen=True)
class Found:
    """One line of `bench doctor`: a meter and whether it can measure here."""

    name: str
    label: str  # "" if it cannot
    why: str  # "" if it can
    notes: tuple[str, ...] = ()


def _open(name: str, source: str | None) -> Meter:
    opener: Callable[[str | None], Meter] = import_module(f"{__name__}.{name}").open_meter
    return opener(source)


def found(stream: str | None = None) -> list[Found]:
    """Try every meter; takes a few seconds on a Mac, where one is tried in another process.

    Args:
        stream: the file that `powermetrics` writes, if the user started it.
    """
    rows = []
    for name in NAMES:
        try:
            meter = _open(name, stream if name == "powermetrics" else None)
        except Unavailable as error:
            rows.append(Found(name, "", str(error)))
        else:
            meter.close()
            rows.append(Found(name, meter.label, "", meter.notes))
    return rows


def choose(spec: str = "auto") -> Meter:
    """Open a meter.

    Args:
        spec: ``auto`` (the first of ioreport and rapl that can measure here, else none), ``none``, the name of a meter,
            or ``powermetrics:FILE``.

    Raises:
        DuoError: an unknown name, or a meter asked for by name that cannot measure here.
    """
    name, _, source = spec.partition(":")
    if name in NAMES and (not source or name == "powermetrics"):
        try:
            return _open(name, source or None)
        except Unavailable as error:
            raise DuoError(f"--meter {spec}: {error}") from error
    if spec not in ("auto", "none"):
        raise DuoError(f"--meter {spec}: no such meter; give auto, none, {', '.join(NAMES)}, or powermetrics:FILE")
    reasons: dict[str, str] = {}
    for name in NAMES if spec == "auto" else ():
        try:
            if name in ASKED:
                raise Unavailable(f"a cross-check of the whole computer; ask for it with --meter {name}")
            return _open(name, None)
        except Unavailable as error:
            reasons[name] = str(error)
    from duo_mlx.bench.meters.none import NoMeter

    return NoMeter(reasons)
