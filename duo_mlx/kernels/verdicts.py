"""What self-checks and measurements found on this machine, kept in the user's cache.

The file holds one entry for each chip, macOS version, mlx version and state of the kernels' source; what was found
under another is not used. A file that cannot be read counts as none.
"""

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx.errors import DuoError
from duo_mlx.files import output_file

CACHE = "DUO_MLX_CACHE"  # environment variable: a directory in place of the user's cache


@dataclass(frozen=True)
class Verdict:
    """What a self-check found of a strategy for one kind of FFNs; ``slowdown`` is its time over ``planned``'s."""

    passed: bool
    reason: str = ""
    slowdown: float | None = None

    def __post_init__(self) -> None:
        if type(self.passed) is not bool or not (self.slowdown is None or 0 < self.slowdown < math.inf):
            raise ValueError(f"{self} is no verdict")


@dataclass(frozen=True)
class Figures:
    """What decides between strategies on this machine, as measured by ``duo-mlx bench doctor``."""

    bandwidth_bytes_s: float  # reachable by a matrix-vector product
    dispatch_s: float  # one more kernel in a chain
    read_back_s: float  # the host waits for one route
    crossing_s: float  # an operation moves from the GPU's stream to the CPU's and back
    fast_crossing_s: float | None = None  # the same with MLX_METAL_FAST_SYNCH=1

    def __post_init__(self) -> None:
        values = asdict(self)
        if values["fast_crossing_s"] is None:
            del values["fast_crossing_s"]
        if not all(0 < value < math.inf for value in values.values()):
            raise ValueError(f"{self} are no figures")


def cache_file() -> Path:
    """Where verdicts are kept; it need not exist."""
    if given := os.environ.get(CACHE):
        return Path(given) / "verdicts.json"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "duo-mlx" / "verdicts.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duo-mlx" / "verdicts.json"


@cache
def machine() -> str:
    """What verdicts depend on: chip, system, mlx, and the kernels as they are."""
    source = hashlib.sha256()
    here = Path(__file__).parent
    for file in (*sorted(here.iterdir()), here.parent / "masked.py", here.parent / "forms.py"):
        if file.suffix in (".metal", ".py"):
            source.update(file.read_bytes())
    chip = mx.device_info().get("device_name", platform.machine())
    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    return f"{chip}, {system}, mlx {version('mlx')}, kernels {source.hexdigest()[:12]}"


class Record:
    """The entry of one machine: verdicts by key, and figures where the doctor took them."""

    def __init__(self, file: Path | None = None, of: str | None = None):
        self.file = file or cache_file()
        self.machine = of or machine()
        self.verdicts: dict[str, Verdict] = {}
        self.figures: Figures | None = None
        self.version = 0  # changes with what is stored, so that who chose by it can tell
        self._read()

    def _read(self) -> None:
        """Take what the file says over what is known."""
        entry = self._entries().get(self.machine, {})
        try:
            self.verdicts |= {key: Verdict(**found) for key, found in entry.get("verdicts", {}).items()}
            self.figures = Figures(**entry["figures"]) if entry.get("figures") else self.figures
        except (TypeError, AttributeError, ValueError):  # written by another version, or by hand
            pass

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return entries if isinstance(entries, dict) else {}

    def store(self, verdicts: Mapping[str, Verdict] | None = None, figures: Figures | None = None) -> bool:
        """Add what was found and write the file; whether that worked (a cache that cannot be written is no error).

        What another process wrote since this one read the file is kept.
        """
        self._read()
        self.version += 1
        self.verdicts.update(verdicts or {})
        self.figures = figures or self.figures
        entry = {
            "verdicts": {key: asdict(found) for key, found in sorted(self.verdicts.items())},
            "figures": asdict(self.figures) if self.figures else None,
        }
        entries = self._entries() | {self.machine: entry}
        try:
            with output_file(self.file, force=True) as temporary:
                temporary.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
        except (OSError, DuoError):
            return False
        return True


@cache
def record() -> Record:
    """This machine's entry, read once a process."""
    return Record()


def figures() -> Figures | None:
    """What the doctor measured on this machine; None if it never did."""
    return record().figures
