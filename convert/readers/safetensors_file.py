"""A safetensors file: the safetensors library vouches for its header and length, MLX reads the tensors."""

import struct
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from duo_mlx.convert.readers.text import one_line, parse_object, shown
from duo_mlx.convert.tensors import DTYPES, Tensor
from duo_mlx.errors import DuoError

NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' and everyone else's


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the order in which they stand in it.

    Raises:
        DuoError: the file is damaged, names a tensor twice, or holds one of another type than `DTYPES`.
    """
    try:
        with safe_open(file, framework="numpy") as opened:  # checks what MLX takes on trust
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
        _check_unique(file)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise DuoError(f"{file}: is damaged or no safetensors file ({one_line(error)})") from None
    tensors = {}
    for name, (shape, kind) in found.items():
        if kind not in NAMES:
            raise unknown_type(file, name, kind)
        tensors[name] = Tensor(shape, NAMES[kind], partial(_load, file, name))
    return tensors


def unknown_type(file: Path, name: object, kind: str) -> DuoError:
    """The refusal of a tensor that MLX would change or misread."""
    return DuoError(f"{file}: {shown(name)} is {kind}; weights must be {', '.join(DTYPES)}")


def _check_unique(file: Path) -> None:
    """The library takes the last of two tensors of one name without a word."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        parse_object(opened.read(length))


def _load(file: Path, name: str) -> mx.array:
    """The tensor alone: MLX reads the header anew, and of the data what is evaluated."""
    try:
        arrays: Any = mx.load(str(file), format="safetensors")
        array = arrays[name]
        mx.eval(array)
    except (RuntimeError, ValueError, KeyError) as error:
        raise DuoError(f"{file}: {shown(name)} cannot be read ({one_line(error)})") from None
    return array
