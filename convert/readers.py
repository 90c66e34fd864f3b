"""Reading checkpoints: names and tensors from a file or a directory, whoever wrote it.

A pickle is read with ``weights_only=True`` and needs PyTorch; safetensors needs nothing but MLX. float32, float16 and
bfloat16 are kept bit for bit; a tensor of any other type is refused by name, as MLX would change or misread it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from duo_mlx.errors import DuoError

if TYPE_CHECKING:
    import torch

Weights = dict[str, mx.array]

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names and everyone else's
PICKLES = (".pt", ".pth", ".bin")
# what a directory may hold, the first that is there is read
NAMES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")


def read(source: Path) -> Weights:
    """All tensors of a checkpoint by name.

    Args:
        source: a ``.pt``, ``.pth``, ``.bin`` or ``.safetensors`` file, an ``.index.json`` of shards, or a directory
            with one of `NAMES` or a single weights file.

    Raises:
        DuoError: there are no weights, they are damaged or of another type, or reading them would run code.
    """
    if source.is_dir():
        source = _weights_file(source)
    return _read_shards(source) if source.name.endswith(".index.json") else _read_file(source)


def _read_file(file: Path) -> Weights:
    if not file.is_file():
        raise DuoError(f"{file}: there is no such file or directory")
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix in PICKLES:
        return _read_pickle(file)
    raise DuoError(f"{file}: is no weights file; known are .safetensors, {', '.join(PICKLES)} and *.index.json")


def _weights_file(directory: Path) -> Path:
    for name in NAMES:
        if (directory / name).is_file():
            return directory / name
    found = sorted(file for file in directory.iterdir() if file.suffix in (".safetensors", *PICKLES))
    found = [file for file in found if file.stem != "checkpoint"]  # a trainer's state, not a model
    if len(found) != 1:
        several = f"several weights files ({', '.join(file.name for file in found)})" if found else "no weights file"
        raise DuoError(f"{directory}: holds {several}; it must have one of {', '.join(NAMES)}")
    return found[0]


def _read_shards(index: Path) -> Weights:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) for shard in shards):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DuoError(f"{index}: is no index with a weight_map from tensor to file") from None
    weights: Weights = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise DuoError(f"{index}: names {shard!r}, which is not a file beside it")
        if not (index.parent / shard).is_file():
            raise DuoError(f"{index}: names {shard}, which is not there")
        tensors = _read_file(index.parent / shard)
        if twice := sorted(tensors.keys() & weights.keys()):
            raise DuoError(f"{index.parent / shard}: holds {twice[0]}, which another shard holds, too")
        weights |= tensors
    if absent := sorted(weight_map.keys() - weights.keys()):
        raise DuoError(f"{index}: names {absent[0]}, which {weight_map[absent[0]]} does not hold")
    return weights


def _read_safetensors(file: Path) -> Weights:
    try:
        with safe_open(file, framework="numpy") as opened:  # checks the header and the file's length, as MLX does not
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                if (kind := opened.get_slice(name).get_dtype()) not in DTYPES:
                    raise _unknown_type(file, name, kind)
            tensors: Any = mx.load(str(file))
            return dict(tensors)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise DuoError(f"{file}: is damaged or no safetensors file ({' '.join(str(error).split())})") from None


def _read_pickle(file: Path) -> Weights:
    try:
        import torch
    except ImportError:
        raise DuoError(f"{file}: reading it needs PyTorch: pip install 'duo-mlx[torch]'") from None
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
    except Exception as error:  # the unpickler raises whatever damaged bytes lead it to
        if "weights_only" in str(error).lower() or "Unsupported" in str(error):
            raise DuoError(f"{file}: holds more than tensors; it is not loaded, as that could run code") from error
        raise DuoError(f"{file}: is damaged or no PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise DuoError(f"{file}: is no state dict, a dict from name to tensor")
    for name, value in state.items():
        if (kind := str(value.dtype).removeprefix("torch.")) not in DTYPES.values() or value.layout != torch.strided:
            raise _unknown_type(file, name, kind if value.layout == torch.strided else "sparse")
    return {str(name): to_mlx(value) for name, value in state.items()}


def _unknown_type(file: Path, name: str, kind: str) -> DuoError:
    return DuoError(f"{file}: {name} is {kind}; weights must be {', '.join(DTYPES.values())}")


def _is_zip(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(2) == b"PK"


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


def read_config(source: Path, config: Path | None) -> dict[str, Any]:
    """The configuration that goes with ``source``: ``config``, or the config.json in or beside it.

    Raises:
        DuoError: there is none, or it is no JSON object.
    """
    if not source.exists():
        raise DuoError(f"{source}: there is no such file or directory")
    if config is None and source.is_file() and not (source.parent / "config.json").is_file():
        raise DuoError(f"{source}: has no config.json beside it; give one with --config FILE")
    file = config or (source if source.is_dir() else source.parent) / "config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DuoError(f"{file}: there is no such file; a Duo model needs its config.json") from None
    except (ValueError, OSError) as error:
        raise DuoError(f"{file}: is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise DuoError(f"{file}: must hold a JSON object")
    return value
