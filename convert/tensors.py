"""A checkpoint's tensors: name, shape and type are known before any of them is read.

Readers give `Tensor` objects, key maps rename and reshape them, writers load them one after the other. So a checkpoint
of any size passes through a memory that holds a shard of it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")  # of weights; a tensor of any other type is refused by name
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor that is read when it is asked for, and anew each time, so that nobody keeps it in memory."""

    shape: tuple[int, ...]
    dtype: str  # one of DTYPES; of what can only be left out another name
    load: Callable[[], mx.array] = field(compare=False, repr=False)
    stored: str = ""  # how the file stores it where that is not ``dtype``, such as Q4_1
    # the same bits as unsigned integers, in pieces that are good until the next one; None where they must be computed
    pieces: Callable[[], Iterator[NDArray[Any]]] | None = field(default=None, compare=False, repr=False)
    name: str = field(default="", compare=False)  # in the source, see `duo_mlx.convert.plan.mapped`; "a + b": of two

    @classmethod
    def of(cls, array: mx.array) -> Self:
        """A tensor that is in memory already."""
        return cls(array.shape, dtype_name(array.dtype), lambda: array)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * SIZES[self.dtype]

    def apply(self, function: Callable[[mx.array], mx.array], shape: tuple[int, ...] | None = None) -> "Tensor":
        """``function`` of the tensor, which gives ``shape`` (None: the same), when it is loaded."""
        load = self.load
        shape = self.shape if shape is None else shape
        return replace(self, shape=shape, load=lambda: function(load()), pieces=None)

    def astype(self, dtype: str) -> "Tensor":
        """The tensor in another type."""
        if dtype == self.dtype:
            return self
        return replace(self.apply(lambda array: array.astype(getattr(mx, dtype))), dtype=dtype)


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """What a reader found: nothing in it has been loaded yet."""

    source: Path  # the file or directory that the user named (of a hub id: its local copy)
    format: str  # "safetensors", "PyTorch" or "GGUF"
    files: tuple[Path, ...]  # the weights files
    tensors: dict[str, Tensor]  # by the names in the files, less the prefixes of DDP and torch.compile
    config: dict[str, Any]  # config.json, or the same keys from GGUF's metadata or Meta's params.json
    notes: tuple[str, ...] = ()  # what is worth a line


def dtype_name(dtype: mx.Dtype) -> str:
    """MLX's own name of a type, such as ``bfloat16``."""
    return str(dtype).rpartition(".")[2]


def to_mlx(tensor: "torch.Tensor") -> mx.array:
    """A PyTorch tensor as an MLX array, bit for bit."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        return mx.array(tensor.view(torch.int16).numpy().view(np.uint16)).view(mx.bfloat16)
    return mx.array(tensor.numpy())


def to_torch(array: mx.array) -> "torch.Tensor":
    """An MLX array as a PyTorch tensor, bit for bit."""
    import torch

    if array.dtype == mx.bfloat16:
        return torch.from_numpy(np.array(array.view(mx.uint16)).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
