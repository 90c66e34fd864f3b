"""Writing safetensors files, in shards and with an index, through a memory that holds two tensors.

A shard's header is known before any of its tensors is read, so each is loaded, written and forgotten, while the next is
loaded. What a file holds as it is to be written never becomes a tensor: it is copied piece by piece. MLX's own writer
wants a whole shard in memory, and its failures say nothing of why. The format: eight bytes with the length of a JSON
header, the header with each tensor's type, shape and place, then the tensors.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.files import settle, write_text, writing

LIMIT = 1 << 30  # bytes of a shard; a tensor that alone is larger has one to itself

# MLX's name of a type: safetensors' name of it and its bytes
TYPES = {
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "uint32": ("U32", 4),  # packed weights of a quantised module
    "uint8": ("U8", 1),
}
PACKED = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}

Check = Callable[[str, NDArray[Any], str], object]
Progress = Callable[[int, int], object]  # called with the bytes that are written, and that are to be


class Source(Protocol):
    """A tensor to write; `duo_mlx.convert.tensors.Tensor` is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """MLX's name of the type, one of `TYPES`."""

    @property
    def load(self) -> Callable[[], mx.array]:
        """Reads or computes it; called once."""

    @property
    def pieces(self) -> Callable[[], Iterator[NDArray[Any]]] | None:
        """Gives the same bits as unsigned integers in pieces, each good until the next; None: load it."""


@dataclass(frozen=True)
class Held:
    """A tensor as `mx.array`, evaluated or not."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], mx.array]
    pieces: None = None


def held(arrays: dict[str, mx.array], donate: bool = False) -> dict[str, Held]:
    """Sources of arrays; with ``donate`` each leaves ``arrays`` when it is loaded, so that its memory can go."""
    take: Callable[[str], mx.array] = arrays.pop if donate else arrays.__getitem__
    return {name: Held(array.shape, _name(array), partial(take, name)) for name, array in arrays.items()}


def write(
    directory: Path,
    tensors: Mapping[str, Source],
    *,
    limit: int = LIMIT,
    metadata: Mapping[str, str] | None = None,
    stem: str = "model",
    check: Check | None = None,
    progress: Progress | None = None,
) -> None:
    """Write ``STEM.safetensors``, or ``STEM-00001-of-0000N.safetensors`` and so on, and the index, into a directory.

    The tensors are loaded once each and in their order.

    Args:
        directory: exists.
        tensors: by name.
        limit: bytes of a shard.
        metadata: of the headers; None: ``{"format": "mlx"}``.
        stem: what the files' names begin with.
        check: is called with name, bits (unsigned integers) and type of each tensor before that is written; first with
            pieces of it where there are such, and with the whole when it raises for one.
        progress: is called after each tensor.

    Raises:
        DuoError: a tensor cannot be read, or is not what it said; or a file cannot be written.
    """
    sizes = {name: prod(tensor.shape) * _type(name, tensor)[1] for name, tensor in tensors.items()}
    total, done = sum(sizes.values()), 0
    shards = plan(sizes, limit)
    weight_map = {}
    with _Behind() as settler:
        for number, names in enumerate(shards, 1):
            many = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            file = directory / f"{stem}{many}.safetensors"
            head = _header({name: tensors[name] for name in names}, metadata or {"format": "mlx"})
            with writing(file):
                out = file.open("wb", buffering=0)
            with out, _Behind() as writer:
                writer.do(_put, out, file, memoryview(head))
                for name in names:
                    if tensors[name].pieces is not None:
                        writer.wait()
                        _copy(out, file, name, tensors[name], check)
                    else:
                        bits = _bits(name, tensors[name])
                        if check is not None:
                            check(name, bits, tensors[name].dtype)
                        writer.do(_put, out, file, _bytes(bits))
                        del bits
                        mx.clear_cache()
                    done += sizes[name]
                    if progress is not None:
                        progress(done, total)
            written, meant = file.stat().st_size, len(head) + sum(sizes[name] for name in names)
            if written != meant:
                raise DuoError(f"{file}: has {written} of {meant} bytes after writing; is the disk full?")
            weight_map.update(dict.fromkeys(names, file.name))
            settler.do(settle, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / f"{stem}.safetensors.index.json", json.dumps(index, indent=2) + "\n")


class _Behind:
    """A thread that writes while the next tensor is read; at most one thing at a time, in order.

    MLX stays in the caller's thread, which it is particular about.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def do(self, function: Callable[..., None], *args: Any) -> None:
        """Begin this as soon as the last thing is done; what that raised is raised here."""
        self.wait()
        self._last = self._pool.submit(function, *args)

    def wait(self) -> None:
        """Until the last thing is done; what that raised is raised here."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()


def plan(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of each shard's tensors, in order; a shard has at most ``limit`` bytes unless one tensor has more."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    if "__metadata__" in tensors:
        raise DuoError("a tensor is called __metadata__, which safetensors keeps for itself")
    start = 0
    for name, tensor in tensors.items():
        kind, width = _type(name, tensor)
        end = start + prod(tensor.shape) * width
        entries[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bits(name: str, tensor: Source) -> NDArray[Any]:
    """The tensor's values as unsigned integers of its width, in one piece."""
    try:
        array = tensor.load()
        if array.shape != tuple(tensor.shape) or _name(array) != tensor.dtype:
            raise DuoError(
                f"{name}: was to be {tensor.dtype} {list(tensor.shape)} and came as {_name(array)} {list(array.shape)}"
            )
        packed = array if array.size == 0 else array.view(PACKED[array.dtype.size])
        mx.eval(packed)
    except (RuntimeError, OSError) as error:
        raise DuoError(f"{name}: cannot be read: {' '.join(str(error).split())}") from error
    if array.size == 0:
        return np.zeros(array.shape, np.uint8)
    return np.ascontiguousarray(np.array(packed, copy=False))


def _copy(out: FileIO, file: Path, name: str, tensor: Source, check: Check | None) -> None:
    assert tensor.pieces is not None
    for bits in tensor.pieces():
        if check is not None:
            try:
                check(name, bits, tensor.dtype)
            except DuoError:
                check(name, _bits(name, tensor), tensor.dtype)  # which says it of the whole tensor
                raise
        _put(out, file, _bytes(bits))


def _bytes(bits: NDArray[Any]) -> memoryview:
    return bits.data.cast("B") if bits.size else memoryview(b"")


def _put(out: FileIO, file: Path, data: memoryview) -> None:
    with writing(file):
        while data:
            data = data[out.write(data) :]  # a full disk takes a part and refuses the rest


def _type(name: str, tensor: Source) -> tuple[str, int]:
    if tensor.dtype not in TYPES:
        raise DuoError(f"{name}: is {tensor.dtype}; what can be written is {', '.join(TYPES)}")
    return TYPES[tensor.dtype]


def _name(array: mx.array) -> str:
    return str(array.dtype).rpartition(".")[2]
