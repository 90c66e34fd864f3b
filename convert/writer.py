"""Writing weights that are what they say: the promised shapes and types, and numbers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx import shards
from duo_mlx.convert.tensors import Tensors
from duo_mlx.errors import DuoError
from duo_mlx.files import write_text

# the bits of plus infinity; NaNs lie above it, and what is negative above the sign bit in the same order
INFINITY = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}
SIGN = {"float32": 1 << 31, "float16": 1 << 15, "bfloat16": 1 << 15}


def write_weights(
    directory: Path,
    tensors: Tensors,
    *,
    limit: int = shards.LIMIT,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    allow_nonfinite: bool = False,
    progress: shards.Progress | None = None,
) -> None:
    """Write weights into a directory as `duo_mlx.shards.write` does, one tensor in memory at a time.

    Args:
        directory: exists.
        tensors: by name, in the order in which they are read; a mapping in the order of the source's files reads each
            of those once.
        limit: bytes of a shard, unless a single tensor has more.
        metadata: of the headers; None: ``{"format": "mlx"}``.
        stem: what the files' names begin with.
        allow_nonfinite: write NaN and infinity, too.
        progress: is called after each tensor with the bytes that are written and that are to be.

    Raises:
        DuoError: a tensor holds NaN or infinity, cannot be read or is not what it said; or a file cannot be written.
    """
    check = None if allow_nonfinite else refuse_nonfinite
    shards.write(directory, tensors, limit=limit, metadata=metadata, stem=stem, check=check, progress=progress)


def write_more(directory: Path, tensors: Tensors, stem: str) -> None:
    """Write weights beside those of a model directory that is there already, and name them in its index.

    Raises:
        DuoError: as `write_weights`.
    """
    write_weights(directory, tensors, stem=stem)
    index, more = (directory / f"{name}.safetensors.index.json" for name in ("model", stem))
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in (index, more))
    size = old["metadata"]["total_size"] + new["metadata"]["total_size"]
    names = dict(sorted((old["weight_map"] | new["weight_map"]).items()))
    write_text(index, json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=2) + "\n")
    more.unlink()


def refuse_nonfinite(name: str, bits: NDArray[Any], dtype: str) -> None:
    """Refuse a tensor, given as unsigned integers, that holds NaN or infinity.

    Raises:
        DuoError: with the tensor's name and how many there are.
    """
    if dtype not in INFINITY or not bits.size:
        return
    # Two maxima, one of signed and one of unsigned integers, read at memory speed and make no array: the greatest
    # positive number and the greatest negative one in magnitude are where a NaN or an infinity would be.
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    if signed.max() < INFINITY[dtype] and bits.max() < INFINITY[dtype] + SIGN[dtype]:
        return
    magnitude = bits & bits.dtype.type(SIGN[dtype] - 1)
    infinite = int(np.count_nonzero(magnitude == INFINITY[dtype]))
    nan = int(np.count_nonzero(magnitude > INFINITY[dtype]))
    raise DuoError(f"{name}: holds {nan} NaN and {infinite} infinite values; --allow-nonfinite takes them as they are")
