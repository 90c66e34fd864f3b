"""The stream of a `powermetrics` that the user started with sudo, followed as it grows.

It tells mean milliwatts over intervals; joules are those times the interval that each sample says it lasted
(``elapsed_ns``), never the one that was asked for. A plist stream joins its documents by NUL and may break off
anywhere, as may the text; a damaged sample is left out and shows as a gap. In the text a sample's first ``GPU Power``
counts: it is printed twice.
"""

import math
import plistlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from duo_mlx.bench.meters import Meter, Rail, Reading, Unavailable

COMMAND = "sudo powermetrics --samplers cpu_power,gpu_power -f plist -i 1000 > FILE"
RAILS = ("cpu", "gpu", "ane", "dram")
NEEDED = ("cpu", "gpu")  # without these there is no total
TAIL = 1 << 20  # bytes at the end of a file in which its last sample is looked for
STALE = 10.0  # s without a change after which nobody writes the file any more
HEADER = re.compile(rb"^\*\*\* Sampled system activity .*\(([\d.]+)ms elapsed\) \*\*\*", re.MULTILINE)
POWER = re.compile(rb"^(CPU|GPU|ANE|DRAM) Power: +([\d.]+) *(mW|W)\b", re.MULTILINE)
COMBINED = re.compile(rb"^Combined Power .*\n", re.MULTILINE)  # the last line of a sample's powers


@dataclass(frozen=True)
class Sample:
    """One interval of the stream."""

    seconds: float
    watts: dict[str, float]  # by rail, those that it has
    gpu_mhz: float | None = None  # in plists


class Parser:
    """Samples out of bytes that come in any pieces, in either format."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[Sample]:
        """The samples that ``data`` completes."""
        self._rest += data
        return self._plists() if b"<plist" in self._rest or b"<?xml" in self._rest else self._texts()

    def _plists(self) -> list[Sample]:
        *pieces, self._rest = self._rest.split(b"</plist>")
        samples = []
        for piece in pieces:
            start = piece.rfind(b"<plist")  # an earlier one was cut
            sample = _from_plist(piece[start:] + b"</plist>") if start >= 0 else None
            samples += [sample] if sample else []
        return samples

    def _texts(self) -> list[Sample]:
        samples: list[Sample] = []
        starts = [header.start() for header in HEADER.finditer(self._rest)]
        for start, end in pairwise([*starts, len(self._rest)]):
            block = self._rest[start:end]
            whole = COMBINED.search(block)
            if whole is None and end == len(self._rest):  # not all there yet
                self._rest = block
                return samples
            samples.append(_from_text(block[: whole.end()] if whole else block))
        self._rest = self._rest.rpartition(b"\n")[2]  # perhaps the beginning of a header
        return samples


def _from_plist(document: bytes) -> Sample | None:
    try:
        data: Any = plistlib.loads(document)
        processor, frequency = data.get("processor", {}), data.get("gpu", {}).get("freq_hz")
        watts = {rail: processor[f"{rail}_power"] / 1000 for rail in RAILS if f"{rail}_power" in processor}
        seconds = data["elapsed_ns"] / 1e9
        if not all(math.isfinite(value) and value >= 0 for value in (seconds, *watts.values())):
            return None
        return Sample(seconds, watts, None if frequency is None else float(frequency))
    except Exception:  # noqa: BLE001  (a damaged document fails in as many ways as XML has)
        return None


def _from_text(block: bytes) -> Sample:
    header = HEADER.match(block)
    assert header is not None
    watts: dict[str, float] = {}
    for rail, value, unit in POWER.findall(block):
        watts.setdefault(rail.decode().lower(), float(value) / (1000 if unit == b"mW" else 1))
    return Sample(float(header.group(1)) / 1000, watts)


class PowermetricsMeter(Meter):
    """The rails of a stream.

    Args:
        path: the file that `powermetrics` writes, in either format.
        clock: seconds.
        wall: seconds of the day, as the file's own time of change is.

    Raises:
        Unavailable: no such file, nothing in it, or nobody writes it any more.
    """

    name = "powermetrics"
    scope = "soc"
    tick = "cpu"
    poll = 0.05
    covers_seconds = True
    notes = ("its manual says not to compare devices by it",)

    def __init__(
        self, path: Path, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._path, self._clock, self._parser = path, clock, Parser()
        try:
            status = path.stat()
            self._position = max(0, status.st_size - TAIL)
            samples = self._parser.feed(self._written())
        except OSError as error:
            raise Unavailable(f"{path}: cannot be read: {error.strerror}; start one: {COMMAND}") from error
        if not samples or wall() - status.st_mtime > STALE:
            what = "nobody has written to it for a while" if samples else "has no whole sample of powermetrics"
            raise Unavailable(f"{path}: {what}; start one: {COMMAND}")
        self.latest = samples[-1]
        period = self.latest.seconds
        found = [rail for rail in RAILS if rail in self.latest.watts]
        self.rails = {rail: Rail(period, nonzero=rail == "cpu") for rail in RAILS if rail in found or rail in NEEDED}
        self.label = f"SoC estimate by powermetrics ({', '.join(found)})"
        self._joules = dict.fromkeys(self.rails, 0.0)
        self._covered, self._epoch = 0.0, 0

    def _written(self) -> bytes:
        """What was written since the last time."""
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
            self._position = file.tell()
        return data

    def read(self) -> Reading:
        """Joules of the samples so far, and the seconds that they last."""
        try:
            if self._path.stat().st_size < self._position:
                self._position, self._parser, self._epoch = 0, Parser(), self._epoch + 1
            samples = self._parser.feed(self._written())
        except OSError:
            samples = []  # a gap, if it lasts
        missing: set[str] = set()
        for sample in samples:
            self.latest = sample
            self._covered += sample.seconds
            for rail in self.rails:
                self._joules[rail] += sample.watts.get(rail, 0.0) * sample.seconds
            missing |= self.rails.keys() - sample.watts.keys()
        joules = {rail: None if rail in missing else value for rail, value in self._joules.items()}
        return Reading(self._clock(), joules, self._covered, self._epoch)


def open_meter(source: str | None) -> PowermetricsMeter:
    """The stream in the file ``source``.

    Raises:
        Unavailable: none was named, or nothing comes from it.
    """
    if source is None:
        raise Unavailable(f"no stream: start {COMMAND}, then give --meter powermetrics:FILE")
    return PowermetricsMeter(Path(source))
