"""A safetensors file: the safetensors library vouches for its header and length, MLX reads the tensors.

Whoever only copies a tensor gets its bits from the file itself, in pieces that stay in the processor's cache.
"""

import os
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from duo_mlx.convert.readers.text import one_line, parse_object, shown
from duo_mlx.convert.tensors import DTYPES, SIZES, Tensor
from duo_mlx.errors import DuoError

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and everyone else's
PIECE = 4 << 20  # bytes


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order in which they stand in it.

    Raises:
        DuoError: the file is damaged, names a tensor twice, or holds one of another type than `DTYPES`.
    """
    try:
        with safe_open(file, framework="numpy") as opened:  # checks what MLX takes on trust
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        start, entries = _header(file)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise DuoError(f"{file}: is damaged or no safetensors file ({one_line(error)})") from None
    pieces = _Pieces(file)
    tensors = {}
    for name, (shape, kind) in found.items():
        if kind not in NAMES:
            raise unknown_type(file, name, kind)
        first, end = (start + offset for offset in entries[name]["data_offsets"])
        copy = partial(pieces.read, name, first, end, SIZES[NAMES[kind]])
        tensors[name] = Tensor(shape, NAMES[kind], partial(_load, file, name), pieces=copy)
    return tensors


def unknown_type(file: Path, name: object, kind: str) -> DuoError:
    """The refusal of a tensor that MLX would change or misread."""
    return DuoError(f"{file}: {shown(name)} is {kind}; weights must be {', '.join(DTYPES)}")


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the header, in which no name stands twice: the library takes the last of two tensors
    without a word."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        return 8 + length, parse_object(opened.read(length))


class _Pieces:
    """Reads parts of a file through a small buffer, as long as it is the file that its header was read from."""

    def __init__(self, file: Path):
        self.file = file
        self._state = _state(file.stat())

    def read(self, name: str, start: int, end: int, width: int) -> Iterator[NDArray[Any]]:
        """The bytes from ``start`` to ``end`` as unsigned integers of ``width`` bytes; a piece is good until the next.

        Raises:
            DuoError: the file is another one by now, or cannot be read.
        """
        buffer = bytearray(min(PIECE, end - start))
        view = memoryview(buffer)
        try:
            with self.file.open("rb", buffering=0) as opened:
                changed = _state(os.fstat(opened.fileno())) != self._state
                opened.seek(start)
                while start < end and not changed:
                    count = min(PIECE, end - start)
                    read = 0
                    while read < count and (more := opened.readinto(view[read:count])):
                        read += more
                    changed = read < count
                    if not changed:
                        yield np.frombuffer(buffer, np.dtype(f"u{width}"), count // width)
                    start += count
        except OSError as error:
            raise DuoError(f"{self.file}: {shown(name)} cannot be read ({one_line(error)})") from None
        if changed:
            raise DuoError(f"{self.file}: {shown(name)} cannot be read (the file has changed since it was opened)")


def _state(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _load(file: Path, name: str) -> mx.array:
    """The tensor alone: MLX reads the header anew, and of the data what is evaluated."""
    try:
        arrays: Any = mx.load(str(file), format="safetensors")
        array = arrays[name]
        mx.eval(array)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DuoError(f"{file}: {shown(name)} cannot be read ({one_line(error)})") from None
    return array
