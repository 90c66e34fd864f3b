"""The battery's telemetry: what the whole computer draws, as a cross-check on laptops, without root.

`ioreg` has the sum of load samples in mW and their number, published about once a minute. The mean of the samples
between two publications is measured; the joules are this mean times the time between them as this program saw it.
"""

import plistlib
import time
from collections.abc import Callable
from typing import Any
from xml.parsers.expat import ExpatError

from duo_mlx.bench.meters import Meter, Rail, Reading, Unavailable
from duo_mlx.bench.system import Run, run_command

COMMAND = ("/usr/sbin/ioreg", "-rn", "AppleSmartBattery", "-a")


def parse(text: str) -> tuple[int, int] | None:
    """Sum of the load in mW and number of its samples, from ioreg's plist; None where it has no such telemetry."""
    try:
        entries: Any = plistlib.loads(text.encode())
        data = entries[0]["PowerTelemetryData"]
        load, count = data["AccumulatedSystemLoad"], data["SystemLoadAccumulatorCount"]
    except (plistlib.InvalidFileException, ExpatError, ValueError, LookupError, TypeError):
        return None
    return (load, count) if isinstance(load, int) and isinstance(count, int) else None


class BatteryMeter(Meter):
    """The rail ``system``.

    Args:
        run: runs `ioreg`.
        clock: seconds.

    Raises:
        Unavailable: no battery, or one without telemetry.
    """

    name = "battery"
    scope = "system"
    label = "whole system by the battery's telemetry (system)"
    rails = {"system": Rail(period=60.0, nonzero=True)}  # noqa: RUF012
    tick = "system"
    poll = 0.5

    def __init__(self, run: Run = run_command, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        first = run(COMMAND, 5.0)
        if parse(first.text) is None:
            raise Unavailable(f"no battery with power telemetry{f' (ioreg: {first.failed})' if first.failed else ''}")

    def read(self) -> Reading:
        """Watts x samples so far, and samples."""
        telemetry = parse(self._run(COMMAND, 5.0).text)
        now = self._clock()
        if telemetry is None:
            return Reading(now, {"system": None})
        load, count = telemetry
        return Reading(now, {"system": load / 1000}, covered=float(count))


def open_meter(source: str | None) -> BatteryMeter:  # noqa: ARG001
    """The battery of this Mac."""
    return BatteryMeter()
