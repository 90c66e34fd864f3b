"""Token files: NumPy's .npy with one row of token ids, written piece by piece and mapped into memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, writing

SUFFIX = ".npy"
BLOCK = 1 << 24  # ids that are checked at once

Ids = NDArray[np.integer]


def type_for(vocabulary: int) -> type[np.uint16 | np.uint32]:
    """The narrowest type that holds the ids of a vocabulary."""
    return np.uint16 if vocabulary <= 1 << 16 else np.uint32


@contextmanager
def token_file(path: Path, vocabulary: int) -> Iterator[Callable[[list[int]], None]]:
    """A function that appends ids to a new token file; it is there when the block ends well, and not otherwise.

    Raises:
        DuoError: it cannot be written.
    """
    kind, count = type_for(vocabulary), 0

    def append(ids: list[int]) -> None:
        nonlocal count
        count += len(ids)
        with writing(path):
            out.write(np.array(ids, kind).tobytes())

    with output_file(path, force=True) as new, writing(path), new.open("wb") as out:
        start = _head(out, kind, 0)
        yield append
        out.seek(0)
        assert _head(out, kind, count) == start  # NumPy leaves room for the length


def _head(out: BufferedWriter, kind: type[np.generic], count: int) -> int:
    """Write the header of a file of ``count`` ids; where the ids begin."""
    described = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(out, described)
    return out.tell()


def read(path: Path, vocabulary: int, progress: Callable[[float, float], object] = lambda *_: None) -> Ids:
    """The ids of a token file, mapped into memory.

    Raises:
        DuoError: it is no token file, or has an id beyond the vocabulary.
    """
    try:
        ids: Ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise DuoError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError):
        raise DuoError(f"{path}: is no token file, which is a {SUFFIX} file of token ids") from None
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "ui":
        raise DuoError(f"{path}: must hold one row of integers, the token ids")
    for start in range(0, ids.size, BLOCK):  # MLX reads an embedding that is not there without a word
        block = ids[start : start + BLOCK]
        if block.max() >= vocabulary or block.min() < 0:
            at = int(np.flatnonzero((block >= vocabulary) | (block < 0))[0])
            raise DuoError(
                f"{path}: token {start + at} is {block[at]}, but the vocabulary's ids are 0 to {vocabulary - 1}"
            )
        progress(start + block.size, ids.size)
    return ids
