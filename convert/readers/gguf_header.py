"""Read the header of a GGUF file: metadata, and where the tensors lie.

Every count, length and offset is compared with the bytes that are left before anything is made of it, so a lying header
costs neither memory nor time. ``gguf.GGUFReader`` and ``mx.load`` trust these numbers. The reader also makes an array
of each entry: Gemma's vocabulary takes it 34 s, and half a second here.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from duo_mlx.convert.readers.text import shown
from duo_mlx.errors import DuoError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of tensors, unless the metadata says another
MAX_ALIGNMENT = 1 << 20
MAX_AXES = 4  # ggml's own
MAX_DEPTH = 2  # of arrays in arrays
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    name: str
    shape: tuple[int, ...]  # in NumPy's order, the reverse of GGUF's
    kind: GGMLQuantizationType
    start: int  # bytes from the beginning of the file
    size: int  # bytes


@dataclass(frozen=True)
class Header:
    metadata: dict[str, Any]
    entries: tuple[Entry, ...]


def read(file: Path) -> Header:
    """The header of ``file``.

    Raises:
        DuoError: the file is no GGUF of a known version, its header is damaged or lies, or a tensor is of a type that
            cannot be read.
    """
    try:
        with file.open("rb") as opened:
            return _Cursor(opened, file.stat().st_size).header()
    except OSError as error:
        raise DuoError(f"{file}: cannot be read ({error.strerror})") from None
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None


def _damaged(what: str) -> DuoError:
    return DuoError(f"is damaged or no GGUF file ({what})")


class _Cursor:
    """Reads on through the header, and knows how much the file has left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.left = file, size, size

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise _damaged("its header goes beyond its end")
        content = self.file.read(count)
        if len(content) != count:
            raise _damaged("it was cut short while it was read")
        self.left -= count
        return content

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def count(self, code: str, smallest: int, what: str) -> int:
        """How many of something follow that takes at least ``smallest`` bytes each."""
        number: int = self.number(code)
        if number * smallest > self.left:
            raise _damaged(f"{number} {what} are more than it has bytes for")
        return number

    def text(self) -> str:
        try:
            return self.take(self.count("Q", 1, "bytes of text")).decode()
        except UnicodeDecodeError:
            raise _damaged("a text in its header is no UTF-8") from None

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self.numbers(kind, 1)[0]
        if kind == STRING:
            return self.text()
        if kind != ARRAY or depth > MAX_DEPTH:
            raise _damaged(f"metadata of type {kind}" if kind != ARRAY else "arrays in arrays in arrays")
        inner = self.number("I")
        if inner in NUMBERS:
            return self.numbers(inner, self.count("Q", np.dtype(NUMBERS[inner]).itemsize, "numbers"))
        # a text starts with its length, an array with its type and length
        return [self.value(inner, depth + 1) for _ in range(self.count("Q", 8 if inner == STRING else 12, "values"))]

    def numbers(self, kind: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[kind])
        raw = np.frombuffer(self.take(count * dtype.itemsize), np.uint8 if kind == 7 else dtype)
        found: list[Any] = (raw != 0).tolist() if kind == 7 else raw.tolist()
        return found

    def header(self) -> Header:
        if self.left < len(MAGIC) or self.take(len(MAGIC)) != MAGIC:
            raise DuoError("is no GGUF file, it does not begin with GGUF")
        if (version := self.number("I")) not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = f"big-endian GGUF {swapped}" if swapped in VERSIONS else f"GGUF version {version}"
            raise DuoError(f"is {what}; known are versions {' and '.join(map(str, VERSIONS))}, little-endian")
        tensors = self.count("Q", 24, "tensors")
        metadata: dict[str, Any] = {}
        for _ in range(self.count("Q", 13, "metadata")):
            key = self.text()
            if key in metadata:
                raise DuoError(f"has the metadata {shown(key)} twice")
            metadata[key] = self.value(self.number("I"))
        found = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _damaged(f"an alignment of {shown(alignment)}")
        start = -(-(self.size - self.left) // alignment) * alignment
        return Header(metadata, tuple(_placed(found, start, alignment, self.size)))

    def tensor(self) -> Entry:
        """A tensor's entry, with a start that counts from the first tensor."""
        name = self.text()
        axes = self.number("I")
        if not 0 < axes <= MAX_AXES:
            raise _damaged(f"{shown(name)} has {axes} axes")
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        kind = _known(shown(name), self.number("I"))
        block, size = GGML_QUANT_SIZES[kind]
        if 0 in shape or shape[-1] % block:
            raise _damaged(f"{shown(name)} is {list(shape)}, but {kind.name} has rows of {block} numbers")
        return Entry(name, shape, kind, self.number("Q"), prod(shape) // block * size)


def _known(tensor: str, number: int) -> GGMLQuantizationType:
    """The type that has this number.

    Raises:
        DuoError: the package gguf does not know it, or cannot dequantise it.
    """
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise DuoError(f"{tensor} is of type {number}, which the package gguf does not know; update it") from None
    if not _can_dequantise(kind):
        raise DuoError(
            f"{tensor} is {kind.name}, which the package gguf cannot dequantise; take a file of another type"
        )
    return kind


@cache
def _can_dequantise(kind: GGMLQuantizationType) -> bool:
    try:
        with np.errstate(all="ignore"):
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _placed(entries: list[Entry], start: int, alignment: int, size: int) -> list[Entry]:
    """The entries with starts that count from the file's beginning, checked to lie in it and apart from each other."""
    names: set[str] = set()
    placed = []
    for entry in entries:
        if entry.name in names:
            raise DuoError(f"holds {shown(entry.name)} twice")
        names.add(entry.name)
        at = start + entry.start
        if at % alignment:
            raise _damaged(f"{shown(entry.name)} lies at {at}, no multiple of {alignment}")
        if at + entry.size > size:
            raise _damaged(f"{shown(entry.name)} goes beyond its end")
        placed.append(replace(entry, start=at))
    in_order = sorted(placed, key=lambda entry: entry.start)
    for entry, following in pairwise(in_order):
        if entry.start + entry.size > following.start:
            raise _damaged(f"{shown(entry.name)} and {shown(following.name)} overlap")
    return placed
