"""A PyTorch checkpoint: a pickle, read with ``weights_only=True`` so that nothing in it is run."""

import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from duo_mlx.convert.readers.safetensors_file import unknown_type, unwritable
from duo_mlx.convert.readers.text import one_line, shown
from duo_mlx.convert.tensors import DTYPES, Tensor, to_mlx
from duo_mlx.errors import DuoError
from duo_mlx.files import foreign_content

if TYPE_CHECKING:
    import torch

NESTS = ("model", "state_dict", "module", "model_state_dict")  # where trainers put the state dict
DEPTH = 2  # Lightning inside DeepSpeed, and the like


class Reader:
    """Reads the shards of one checkpoint and keeps none open but the last.

    PyTorch maps a file's tensors into memory together, and the pages that were touched stay until the file is closed.
    """

    def __init__(self) -> None:
        self._last: tuple[Path, dict[str, torch.Tensor]] | None = None

    def read(self, file: Path) -> dict[str, Tensor]:
        """The tensors of ``file`` in the order of its state dict.

        Raises:
            DuoError: PyTorch is not installed; the file is damaged, holds no state dict, or would run code.
        """
        return {name: self._tensor(file, name, value) for name, value in self._state(file).items()}

    def _tensor(self, file: Path, name: str, value: "torch.Tensor") -> Tensor:
        shape, kind = tuple(value.shape), _dtype(value)
        if kind not in DTYPES:
            return unwritable(file, name, shape, kind)
        return Tensor(shape, kind, partial(self._load, file, name))

    def _state(self, file: Path) -> dict[str, "torch.Tensor"]:
        if self._last is None or self._last[0] != file:
            self._last = None  # before the next is opened
            self._last = file, _state_dict(file, _unpickle(file))
        return self._last[1]

    def _load(self, file: Path, name: str) -> mx.array:
        try:
            return to_mlx(self._state(file)[name])
        except DuoError:
            raise
        except Exception as error:  # a tensor's own view of its storage may be anything
            raise DuoError(f"{file}: {shown(name)} cannot be read ({one_line(error)})") from error


def _unpickle(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise DuoError(f"{file}: reading it needs PyTorch: pip install 'duo-mlx[torch]'") from None
    try:
        is_zip = _is_zip(file)
        if is_zip:
            _check_archive(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        if what := _foreign(file):
            raise DuoError(f"{file}: {what}") from None
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise DuoError(f"{file}: holds more than tensors; it is not loaded, as that could run code") from error
        raise DuoError(f"{file}: is damaged or no PyTorch checkpoint ({type(error).__name__})") from error


def _state_dict(file: Path, value: Any) -> dict[str, "torch.Tensor"]:
    """The state dict in what was unpickled; what stands beside a nested one (steps, optimizers) is not looked at."""
    import torch

    for _ in range(DEPTH):
        nests = [key for key in NESTS if isinstance(value, Mapping) and isinstance(value.get(key), Mapping)]
        if len(nests) > 1:
            raise DuoError(f"{file}: holds several state dicts ({', '.join(nests)}); save one of them")
        if nests:
            value = value[nests[0]]
    if not isinstance(value, Mapping):
        raise DuoError(f"{file}: is no state dict, a dict from name to tensor")
    size = file.stat().st_size
    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            kind = type(tensor if isinstance(name, str) else name).__name__
            raise DuoError(f"{file}: is no state dict, a dict from name to tensor: {shown(name)} is of type {kind}")
        if tensor.is_nested:
            raise unknown_type(file, name, "nested")  # it has no shape
        if tensor.layout != torch.strided:
            continue
        if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() > size:
            raise DuoError(f"{file}: {shown(name)} is {list(tensor.shape)}, more than the file holds")
    return dict(value)


def _foreign(file: Path) -> str | None:
    """What a file is that cannot be a pickle; None: it may be one."""
    if what := foreign_content(file):
        return what
    with file.open("rb") as opened:
        head = opened.read(2)
    return None if head == b"PK" or head[:1] == b"\x80" else "is damaged or no PyTorch checkpoint"


def _dtype(tensor: "torch.Tensor") -> str:
    import torch

    if tensor.layout != torch.strided:
        return "sparse"
    return str(tensor.dtype).removeprefix("torch.")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


def _check_archive(file: Path) -> None:
    """PyTorch compresses nothing; an archive that unpacks to more than it is was made to fill the memory."""
    with zipfile.ZipFile(file) as archive:
        if sum(member.file_size for member in archive.infolist()) > file.stat().st_size:
            raise zipfile.BadZipFile
