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
from duo_mlx.files import foreign_content

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and everyone else's
OTHERS = {"F64": "float64", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{word}{bits}" for letter, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
PIECE = 4 << 20  # bytes


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order in which they stand in it.

    One of another type than `DTYPES` cannot be loaded. One that was left out as another's twin is that other one.

    Raises:
        DuoError: the file is damaged, or names a tensor twice.
    """
    try:
        with safe_open(file, framework="numpy") as opened:  # checks what MLX takes on trust
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
            metadata = opened.metadata() or {}
        start, entries = _header(file)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        what = foreign_content(file) or f"is damaged or no safetensors file ({one_line(error)})"
        raise DuoError(f"{file}: {what}") from None
    pieces = _Pieces(file)
    tensors = {}
    for name, (shape, kind) in found.items():
        if kind not in NAMES:
            tensors[name] = unwritable(file, name, shape, OTHERS.get(kind, kind))
            continue
        first, end = (start + offset for offset in entries[name]["data_offsets"])
        copy = partial(pieces.read, name, first, end, SIZES[NAMES[kind]])
        tensors[name] = Tensor(shape, NAMES[kind], partial(_load, file, name), pieces=copy)
    # safetensors.torch.save_model leaves out all but one of tensors that share memory, and says so in the metadata
    return tensors | {name: tensors[twin] for name, twin in metadata.items() if twin in tensors and name not in tensors}


def unwritable(file: Path, name: object, shape: tuple[int, ...], kind: str) -> Tensor:
    """A tensor that MLX would change or misread: it may be left out, but not loaded."""

    def load() -> mx.array:
        raise unknown_type(file, name, kind)

    return Tensor(shape, kind, load)


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
