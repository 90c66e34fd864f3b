"""What a figure was measured on: the computer, its software, and its condition before and after.

Commands are called by absolute path and time-limited; what does not answer is None. Fields are taken out one by one,
so that no user name, host name or serial number gets into a file that people share. The commands of macOS were not
run on a Mac by this project.
"""

import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from duo_mlx._blas import preload

PACKAGES = ("duo-mlx", "mlx", "mlx-lm", "numpy", "zeus-apple-silicon")
SWITCHES = ("OPENBLAS_", "OMP_", "VECLIB_", "MLX_", "DUO_MLX_")  # prefixes of what the environment may change
THERMAL = "com.apple.system.thermalpressurelevel"
SYSCTL = (
    "machdep.cpu.brand_string", "hw.model", "hw.memsize", "hw.physicalcpu", "hw.logicalcpu",
    "hw.perflevel0.physicalcpu", "hw.perflevel1.physicalcpu",
)  # fmt: skip
UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Output:
    """What a command printed; ``failed`` says what went wrong, "" if nothing."""

    text: str = ""
    failed: str = ""


Run = Callable[[Sequence[str], float], Output]


def run_command(command: Sequence[str], limit: float = 5.0) -> Output:
    """Run a command in the C locale for at most ``limit`` seconds; whatever happens is in the answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit,
            env={**os.environ, "LC_ALL": "C"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Output(failed=f"no answer in {limit:g} s")
    except OSError as error:
        return Output(failed=error.strerror or type(error).__name__)
    text = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        return Output(text, f"killed by signal {-done.returncode}")
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return Output(text, last or f"exit code {done.returncode}")
    return Output(text)


def _fields(text: str) -> dict[str, str]:
    """``key: value`` lines."""
    return {
        key.strip(): value.strip() for key, found, value in (line.partition(":") for line in text.splitlines()) if found
    }


def _number(text: str | None) -> int | None:
    found = re.match(r"\d+", text or "")
    return int(found.group()) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _memory(root: Path) -> dict[str, int]:
    """Linux's meminfo in bytes."""
    fields = _fields(_read(root / "proc/meminfo"))
    return {key: 1024 * int(value.split()[0]) for key, value in fields.items() if value.endswith("kB")}


def _mac(run: Run) -> dict[str, Any]:
    # names with values, not -n: a key that a machine lacks would shift the values
    fields = _fields(run(["/usr/sbin/sysctl", *SYSCTL], 5.0).text)
    product = _fields(run(["/usr/bin/sw_vers"], 5.0).text)
    cores = {
        "physical": "hw.physicalcpu",
        "logical": "hw.logicalcpu",
        "performance": "hw.perflevel0.physicalcpu",
        "efficiency": "hw.perflevel1.physicalcpu",
    }
    return {
        "chip": fields.get("machdep.cpu.brand_string"),
        "model": fields.get("hw.model"),
        "memory_bytes": _number(fields.get("hw.memsize")),
        "cores": {kind: _number(fields.get(key)) for kind, key in cores.items()},
        "os": {
            "name": product.get("ProductName"),
            "version": product.get("ProductVersion"),
            "build": product.get("BuildVersion"),
        },
    }


def _linux(root: Path) -> dict[str, Any]:
    text = _read(root / "proc/cpuinfo")
    release = dict(line.partition("=")[::2] for line in _read(root / "etc/os-release").splitlines())
    physical = {
        tuple(re.findall(r"^(?:physical id|core id)\s*:\s*(\d+)", block, re.MULTILINE)) for block in text.split("\n\n")
    }
    return {
        "chip": _fields(text).get("model name"),
        "model": None,
        "memory_bytes": _memory(root).get("MemTotal"),
        "cores": {"physical": len(physical - {()}) or None, "logical": os.cpu_count()},
        "os": {
            "name": release.get("ID", "").strip('"') or None,
            "version": release.get("VERSION_ID", "").strip('"') or None,
            "build": _kernel(),
        },
    }


def _kernel() -> str:
    """The kernel's version without what its builder appended."""
    found = re.match(r"[\d.]+\d", platform.release())
    return found.group() if found else ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    """Switches that change speed. A value that is no number or plain switch may hold a path: only that it is set."""
    return {
        name: value if re.fullmatch(r"[\d.,]{1,20}|true|false|on|off", value, re.IGNORECASE) else "(set)"
        for name, value in sorted(os.environ.items())
        if name.startswith(SWITCHES)
    }


def system_record(run: Run = run_command, root: Path = Path("/")) -> dict[str, Any]:
    """The computer and its software, for a result's JSON; None where something is not known.

    Args:
        run: runs a command (macOS).
        root: where ``proc`` and ``etc`` are (Linux).
    """
    import mlx.core as mx

    return {
        **(_mac(run) if platform.system() == "Darwin" else _linux(root)),
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "platform": f"{platform.system()}-{_kernel()}-{platform.machine()}",
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "cpus": os.cpu_count(),
        "blas": str(loaded) if (loaded := preload()) else None,
        "environment": _environment(),
        **asdict(conditions(run, root)),
    }


@dataclass(frozen=True)
class Conditions:
    """What may change while something is measured; None where it is not known."""

    thermal_level: int | None  # macOS: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping
    power_source: str | None  # "AC Power", "Battery Power", "UPS Power"
    power_mode: dict[str, int]  # macOS: lowpowermode and powermode (0 automatic, 1 low, 2 high), those that there are
    load_average: tuple[float, float, float]  # processes over 1, 5 and 15 minutes
    swap_used_bytes: int | None


def conditions(
    run: Run = run_command, root: Path = Path("/"), load: Callable[[], tuple[float, float, float]] = os.getloadavg
) -> Conditions:
    """The computer's condition now."""
    if platform.system() != "Darwin":
        memory = _memory(root)
        swap = memory["SwapTotal"] - memory["SwapFree"] if {"SwapTotal", "SwapFree"} <= set(memory) else None
        return Conditions(None, _linux_power(root), {}, load(), swap)
    thermal = re.search(rf"{re.escape(THERMAL)}\s+(\d+)", run(["/usr/bin/notifyutil", "-g", THERMAL], 5.0).text)
    source = re.search(r"drawing from '(AC|Battery|UPS) Power'", run(["/usr/bin/pmset", "-g", "batt"], 5.0).text)
    modes = re.findall(r"^\s*(lowpowermode|powermode)\s+(\d+)", run(["/usr/bin/pmset", "-g"], 5.0).text, re.MULTILINE)
    swap_text = run(["/usr/sbin/sysctl", "-n", "vm.swapusage"], 5.0).text
    used = re.search(r"used\s*=\s*(\d+(?:\.\d+)?)([KMG])", swap_text)
    return Conditions(
        int(thermal.group(1)) if thermal else None,
        f"{source.group(1)} Power" if source else None,
        {mode: int(value) for mode, value in modes},
        load(),
        math.floor(float(used.group(1)) * UNITS[used.group(2)]) if used else None,
    )


def _linux_power(root: Path) -> str | None:
    supplies = sorted((root / "sys/class/power_supply").glob("*"))
    if any(_read(supply / "type") == "Mains" and _read(supply / "online") == "1" for supply in supplies):
        return "AC Power"
    return "Battery Power" if any(_read(supply / "status") == "Discharging" for supply in supplies) else None


def changes(before: Conditions, after: Conditions) -> list[str]:
    """Why what was measured in between is invalid; nothing if it is not.

    Load is not compared, as a benchmark is a load itself, and neither is what is unknown before or after.
    """
    pairs = {
        "thermal pressure": (before.thermal_level, after.thermal_level),
        "power source": (before.power_source, after.power_source),
        "power mode": (before.power_mode or None, after.power_mode or None),
    }
    return [
        f"the {what} changed from {old} to {new}"
        for what, (old, new) in pairs.items()
        if old is not None and new is not None and old != new
    ]


def cautions(now: Conditions, cpus: int | None = None) -> list[str]:
    """What speaks against measuring now."""
    cpus = cpus or os.cpu_count() or 1
    found = {
        f"thermal pressure is at level {now.thermal_level}, not 0: let it cool down": bool(now.thermal_level),
        f"it runs on {now.power_source}, not on mains": now.power_source not in (None, "AC Power"),
        "low power mode is on": now.power_mode.get("lowpowermode") == 1 or now.power_mode.get("powermode") == 1,
        f"load average {now.load_average[0]:.1f}: other programs are busy": now.load_average[0] > cpus / 4 + 0.5,
    }
    return [text for text, true in found.items() if true]
