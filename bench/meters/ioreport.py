"""Apple's IOReport counters through ``zeus-apple-silicon``: the SoC's rails, without root.

CPU, DRAM and ANE are published in batches about 2 s apart, the GPU is stamped when it is read. The rails are the SoC's,
an estimate of its own, and far from what the wall says. The fields are the package's and are taken by name; none is
summed here but those of the label. "GPU SRAM" is a rail of its own, outside the total: nobody says whether the GPU's
figure holds it. Reading can crash where a virtual machine has no such counters, so another process tries first.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

from duo_mlx.bench.meters import Meter, Rail, Reading, Unavailable
from duo_mlx.bench.system import Run, run_command

FIELDS = {"cpu": "cpu_total_mj", "gpu": "gpu_mj", "dram": "dram_mj", "ane": "ane_mj", "gpu_sram": "gpu_sram_mj"}
BATCH = 2.2  # s
RAILS = {
    "cpu": Rail(BATCH, nonzero=True),
    "gpu": Rail(),
    "dram": Rail(BATCH, nonzero=True),
    "ane": Rail(BATCH),
    "gpu_sram": Rail(total=False),
}
NEEDED = ("cpu", "gpu")  # without these there is no total
PROBE = "from duo_mlx.bench.meters.ioreport import probe; probe()"
LIMIT = 30.0  # s for the other process


def _monitor() -> Any:
    return import_module("zeus_apple_silicon").AppleEnergyMonitor()


def _millijoules(monitor: Any) -> dict[str, int | None]:
    metrics = monitor.get_cumulative_energy()
    return {rail: getattr(metrics, field, None) for rail, field in FIELDS.items()}


def probe(seconds: float = 3 * BATCH) -> None:
    """Print as JSON which rails there are and whether the CPU's moves while this process keeps a core busy."""
    monitor = _monitor()
    first = now = _millijoules(monitor)
    end = time.monotonic() + seconds
    while first["cpu"] is not None and now["cpu"] == first["cpu"] and time.monotonic() < end:
        now = _millijoules(monitor)
    rails = [rail for rail, value in first.items() if value is not None]
    print(
        json.dumps({"rails": rails, "cpu_moves": now["cpu"] != first["cpu"], "version": version("zeus-apple-silicon")})
    )


class IOReportMeter(Meter):
    """IOReport's rails.

    Args:
        monitor: ``AppleEnergyMonitor``, or what behaves like one.
        present: rails that the probe found.
        cpu_moves: whether the CPU's counter moved under load.
        notes: what must be said beside every figure.
        clock: seconds.
    """

    name = "ioreport"
    scope = "soc"
    poll = 0.02

    def __init__(
        self,
        monitor: Any,
        present: list[str],
        cpu_moves: bool = True,
        notes: tuple[str, ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monitor, self._clock = monitor, clock
        self.rails = {rail: known for rail, known in RAILS.items() if rail in (*present, *NEEDED)}
        self.tick = "cpu" if cpu_moves else None
        self.notes = notes
        total = [rail for rail, known in self.rails.items() if known.total and rail in present]
        self.label = f"SoC estimate ({', '.join(total)})"

    def read(self) -> Reading:
        """Joules of the chip's own counters."""
        try:
            read = _millijoules(self._monitor)
        except RuntimeError:
            read = {}
        joules = {rail: None if (value := read.get(rail)) is None else value / 1000 for rail in self.rails}
        return Reading(self._clock(), joules)


def open_meter(source: str | None, run: Run = run_command, limit: float = LIMIT) -> IOReportMeter:  # noqa: ARG001
    """IOReport of this Mac.

    Raises:
        Unavailable: not a Mac with Apple silicon, or the probe came back with nothing.
    """
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        raise Unavailable("needs macOS on Apple silicon")
    tried = run([sys.executable, "-P", "-c", PROBE], limit)
    if "No module named 'zeus_apple_silicon'" in tried.failed:
        raise Unavailable("needs the package zeus-apple-silicon: pip install zeus-apple-silicon")
    if tried.failed:
        what = tried.failed.partition("/")[0]  # a path may hold the user's name, and this goes into results
        raise Unavailable(f"its counters cannot be read ({what}); a virtual machine may have none")
    try:
        answer = json.loads(tried.text.strip().rpartition("\n")[2])
    except ValueError as error:
        raise Unavailable("its counters cannot be read: the probe said nothing") from error
    if not {*answer["rails"]} & {*NEEDED}:
        raise Unavailable("this Mac reports neither CPU nor GPU energy; a virtual machine may have none")
    notes = []
    if "cpu" in answer["rails"] and not answer["cpu_moves"]:
        notes.append("cpu: its counter stood still under load, so it is not available; a newer macOS may need root")
    chip = run(["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"], 5.0).text.strip()
    if "Ultra" in chip:
        notes.append(
            f"cpu, gpu: of an Ultra's two dies, zeus-apple-silicon {answer['version']} may count one (1.1.0 does)"
        )
    return IOReportMeter(_monitor(), answer["rails"], answer["cpu_moves"], tuple(notes))
