"""No meter: latency is measured, energy stays unknown, and the result says why."""

import time
from collections.abc import Callable, Mapping

from duo_mlx.bench.meters import Meter, Rail, Reading


class NoMeter(Meter):
    """A meter without rails, so that whoever measures needs no special case.

    Args:
        reasons: by name, why each meter cannot measure here; empty if none was wanted.
        clock: seconds.
    """

    name = "none"
    scope = ""
    label = "no meter"
    rails: Mapping[str, Rail] = {}

    def __init__(self, reasons: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self.why = "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "no meter was asked for"
        self._clock = clock

    def read(self) -> Reading:
        """The time, and no energy."""
        return Reading(self._clock(), {})
