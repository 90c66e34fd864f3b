"""GGUF's types of tensors: those that this package reads, and the names of those that it does not."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError

Bytes = NDArray[np.uint8]
BLOCK = 32  # numbers that share a scale


@dataclass(frozen=True)
class Kind:
    """How numbers are stored: ``block`` of them in ``bytes`` bytes."""

    name: str
    block: int
    bytes: int
    dtype: str  # of what `decode` gives
    decode: Callable[[Bytes], mx.array]  # all bytes of a tensor as a flat array


def _float(code: str) -> Callable[[Bytes], mx.array]:
    return lambda raw: mx.array(raw.view(code))


def _bfloat16(raw: Bytes) -> mx.array:
    return mx.array(raw.view("<u2")).view(mx.bfloat16)


def _blocks(raw: Bytes, size: int, halves: int) -> tuple[list[NDArray[np.float32]], Bytes, NDArray[np.float32]]:
    """The float16 numbers that each block begins with, as columns; the rest of the blocks; room for the result."""
    blocks = raw.reshape(-1, size)
    heads = blocks[:, : 2 * halves].copy().view("<f2").astype(np.float32)
    room = np.empty((len(blocks), BLOCK), np.float32)
    return [heads[:, column, None] for column in range(halves)], blocks[:, 2 * halves :], room


def _q8_0(raw: Bytes) -> mx.array:
    (scale,), numbers, room = _blocks(raw, 34, 1)
    with np.errstate(all="ignore"):  # a scale that is no number is found where all weights are checked
        np.multiply(numbers.view(np.int8), scale, out=room)
    return mx.array(room.reshape(-1))


def _nibbles(numbers: Bytes, scale: NDArray[np.float32], room: NDArray[np.float32]) -> None:
    """Each byte holds a number of the block's first half, and one of its second half in the upper four bits."""
    np.multiply(numbers & 15, scale, out=room[:, : BLOCK // 2])
    np.multiply(numbers >> 4, scale, out=room[:, BLOCK // 2 :])


def _q4_0(raw: Bytes) -> mx.array:
    (scale,), numbers, room = _blocks(raw, 18, 1)
    with np.errstate(all="ignore"):
        _nibbles(numbers, scale, room)
        room -= 8 * scale
    return mx.array(room.reshape(-1))


def _q4_1(raw: Bytes) -> mx.array:
    (scale, least), numbers, room = _blocks(raw, 20, 2)
    with np.errstate(all="ignore"):
        _nibbles(numbers, scale, room)
        room += least
    return mx.array(room.reshape(-1))


TYPES = {
    0: Kind("F32", 1, 4, "float32", _float("<f4")),
    1: Kind("F16", 1, 2, "float16", _float("<f2")),
    2: Kind("Q4_0", BLOCK, 18, "float32", _q4_0),
    3: Kind("Q4_1", BLOCK, 20, "float32", _q4_1),
    8: Kind("Q8_0", BLOCK, 34, "float32", _q8_0),
    30: Kind("BF16", 1, 2, "bfloat16", _bfloat16),
}

# ggml's other types, for the message that refuses them
_NUMBERS = (6, 7, *range(9, 30), 34, 35, 39, 40, 41)
_NAMES = (
    "Q5_0 Q5_1 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS "
    "I8 I16 I32 I64 F64 IQ1_M TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0"
)
OTHERS = dict(zip(_NUMBERS, _NAMES.split(), strict=True))


def refuse(tensor: str, number: int) -> DuoError:
    """The refusal of ``tensor``, whose type is none of `TYPES`."""
    kind = OTHERS.get(number, f"type {number}")
    return DuoError(f"{tensor} is {kind}; known are {', '.join(kind.name for kind in TYPES.values())}")
