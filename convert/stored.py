"""The weights of a model directory as `Tensor`s, quantised ones as what they stand for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from duo_mlx import checkpoint, shards
from duo_mlx.convert import packing
from duo_mlx.convert.tensors import DTYPES, Checkpoint, Tensor, dtype_name
from duo_mlx.errors import DuoError

PARTS = ("weight", "scales", "biases")  # of a quantised module


def weights(directory: Path, *, dequantise: str | None = None) -> dict[str, Tensor]:
    """A Duo's weights by their canonical names, in the order of the files; each is read when it is loaded.

    Args:
        directory: a model directory.
        dequantise: what a quantised module becomes: the numbers that it stands for in ``"stored"``, the type of its
            scales, or in ``"float32"``, in which they are exact. None: a quantised module is an error.

    Raises:
        DuoError: it is no Duo model or damaged, or is quantised in a way that is not known or not asked for.
    """
    model = checkpoint.read_model(directory)
    arrays = checkpoint.parameters(model)
    quantised = {
        path: module for path, module in model.named_modules() if hasattr(module, "bits") and "scales" in module
    }
    if quantised and dequantise is None:
        raise DuoError(f"{directory}: is quantised; give --dequantise to take the numbers that its weights stand for")
    readers = {
        name: _reader(file, name)
        for file in sorted(directory.glob("model*.safetensors"))
        for name in _names(file)
        if name in arrays  # not a second copy of a tied head
    }
    found: dict[str, Tensor] = {}
    for name, load in readers.items():
        module, _, kind = name.rpartition(".")
        if module not in quantised or kind == "bias":
            found[name] = Tensor(arrays[name].shape, dtype_name(arrays[name].dtype), load)
        elif kind == "weight":
            parts = [readers[f"{module}.{part}"] for part in PARTS if part in quantised[module]]
            found[name] = _dequantised(quantised[module], parts, dequantise == "float32")
    return found


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="numpy") as opened:
        return list(opened.offset_keys())


def _reader(file: Path, name: str) -> Callable[[], mx.array]:
    def load() -> mx.array:
        tensors: Any = mx.load(str(file))
        array: mx.array = tensors[name]
        return array

    return load


def _dequantised(module: Any, parts: list[Callable[[], mx.array]], exact: bool) -> Tensor:
    bits, group_size, mode = module.bits, module.group_size, getattr(module, "mode", "affine")
    dtype = mx.float32 if exact else module.scales.dtype if mode == "affine" else mx.bfloat16

    def load() -> mx.array:
        weight, scales = parts[0](), parts[1]()
        biases = parts[2]().astype(dtype) if parts[2:] else None
        if mode == "affine":  # the scales of other modes are eight bits wide
            scales = scales.astype(dtype)
        whole: mx.array = mx.dequantize(weight, scales, biases, group_size, bits, mode)
        return whole.astype(dtype)

    *rows, width = module.weight.shape
    return Tensor((*rows, width * 32 // bits), dtype_name(dtype), load, stored=f"{bits} bits")


def packed(directory: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a directory of weights that MLX quantised, as they are stored.

    Raises:
        DuoError: there are none, or a file is damaged.
    """
    files = tuple(sorted(directory.glob("model*.safetensors")))
    if not files:
        raise DuoError(f"{directory}: holds no model*.safetensors, where quantised weights would be")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= headers(file)
    return Checkpoint(directory, "safetensors", files, tensors, config)


def translated(directory: Path, config: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a directory of weights that another tool quantised, as mlx-lm's loader packs them for MLX.

    Raises:
        DuoError: mlx-lm does not take them.
    """
    from mlx_lm import utils as mlx_lm_utils

    files = tuple(sorted(directory.glob("model*.safetensors")))
    for file in files:
        headers(file)  # MLX would read past the end of a damaged one
    try:
        model, made = mlx_lm_utils.load_model(directory, lazy=True)
    except Exception as error:  # noqa: BLE001 (mlx-lm raises whatever such files lead it to)
        method = packing.theirs(config)["quant_method"]
        raise DuoError(
            f"{directory}: its weights are quantised ({method}); convert the model that it was made of, with weights "
            f"in {', '.join(DTYPES)}, or one that MLX quantised (mlx-lm says: {' '.join(str(error).split())})"
        ) from None
    tensors = {name: Tensor.of(array) for name, array in checkpoint.parameters(model).items()}
    found = {key: value for key, value in config.items() if key != "quantization_config"}
    note = f"weights are packed for MLX as mlx-lm loads them ({packing.theirs(config)['quant_method']})"
    packed_as = {"quantization": made["quantization"]}
    return Checkpoint(directory, "safetensors", files, tensors, found | packed_as, (note,))


def headers(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of any types, packed ones included; as they are stored.

    Raises:
        DuoError: the file is damaged.
    """
    known = {short: name for name, (short, _) in shards.TYPES.items()}
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            kinds = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise DuoError(f"{file}: is damaged or no safetensors file ({' '.join(str(error).split())})") from None
    return {name: Tensor(shape, known.get(kind, kind), _reader(file, name)) for name, (shape, kind) in kinds.items()}
