"""Linux RAPL: the energy counters of Intel's and AMD's processors under /sys/class/powercap.

Readable by root only (since CVE-2020-8694). A counter wraps at ``max_energy_range_uj``. The class directory lists zones
and their sub-zones side by side, and some zones twice (``intel-rapl-mmio``): only ``intel-rapl:*`` is read. ``core``
and ``uncore`` are parts of their package and ``psys`` holds the packages, so neither is in the total; DRAM is outside
its package and is.
"""

import time
from collections.abc import Callable
from pathlib import Path

from duo_mlx.bench.meters import Meter, Rail, Reading, Unavailable

ROOT = Path("/sys/class/powercap")
MOST_WATTS = 1000.0  # no zone draws more: a counter left unread for longer than it needs to wrap at this rate is lost


def _zones(root: Path) -> dict[str, Path]:
    """Directories of the counters by rail: ``package-0``, ``package-0/dram``, ``psys``."""
    names = {
        path.name: (path / "name").read_text().strip()
        for path in sorted(root.glob("intel-rapl:*"))
        if (path / "energy_uj").exists()
    }
    zones = {}
    for directory, name in names.items():
        parent = names.get(directory.rpartition(":")[0])
        zones[f"{parent}/{name}" if parent else name] = root / directory
    return zones


class RaplMeter(Meter):
    """RAPL's zones as rails.

    Args:
        root: where the zones are.
        clock: seconds.

    Raises:
        Unavailable: there are none, or this user may not read them.
    """

    name = "rapl"
    scope = "package"

    def __init__(self, root: Path = ROOT, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        try:
            self._zones = _zones(root)
            self._ranges = {rail: int((path / "max_energy_range_uj").read_text()) for rail, path in self._zones.items()}
            self._raw = self._counters()
        except PermissionError as error:
            raise Unavailable(
                f"{error.filename}: only root may read it; run as root, or let your group read it"
            ) from error
        except (OSError, ValueError) as error:
            raise Unavailable(f"{root}: its counters cannot be read: {error}") from error
        if not any(rail.startswith("package") for rail in self._zones):
            raise Unavailable(f"{root} has no intel-rapl package: not a processor with RAPL, or a virtual machine")
        self._time, self._epoch = clock(), 0
        self._joules = dict.fromkeys(self._zones, 0.0)
        self.rails = {
            rail: Rail(total=rail.startswith("package") and ("/" not in rail or rail.endswith("/dram")),
                       nonzero=rail.startswith("package") and "/" not in rail)
            for rail in self._zones
        }  # fmt: skip
        self.label = f"RAPL ({', '.join(rail for rail, known in self.rails.items() if known.total)})"

    def _counters(self) -> dict[str, int]:
        return {rail: int((path / "energy_uj").read_text()) for rail, path in self._zones.items()}

    def read(self) -> Reading:
        """Joules since the meter was made."""
        now = self._clock()
        try:
            raw = self._counters()
        except (OSError, ValueError):
            return Reading(now, dict.fromkeys(self._zones), epoch=self._epoch)
        if any(now - self._time > self._ranges[rail] / 1e6 / MOST_WATTS for rail in raw):
            self._epoch += 1  # it may have wrapped any number of times
        for rail, value in raw.items():
            gone = value - self._raw[rail]
            self._joules[rail] += (gone if gone >= 0 else gone + self._ranges[rail]) / 1e6
        self._raw, self._time = raw, now
        return Reading(now, dict(self._joules), epoch=self._epoch)


def open_meter(source: str | None) -> RaplMeter:  # noqa: ARG001
    """RAPL of this computer."""
    return RaplMeter()
