"""Fewer bits for the weights of a Duo: big and small each with their own, through mlx-lm's ``quantize_model``."""

import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import utils as mlx_lm_utils

from duo_mlx import checkpoint, shards
from duo_mlx.convert.packing import is_quantised
from duo_mlx.errors import DuoError
from duo_mlx.files import writing
from duo_mlx.model import Model

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
FLOAT = 16  # bits that mean: leave it in floating point
CARRIED = (".json", ".jinja", ".txt")  # what stands beside the weights and stays true of them


@dataclass(frozen=True)
class Quantised:
    """What `quantise` did."""

    bits_per_weight: float  # of the whole model, scales included
    kept: tuple[str, ...]  # modules that were to be quantised and whose width the group size does not divide
    group_size: int

    def __str__(self) -> str:
        line = f"{self.bits_per_weight:.2f} bits per weight"
        if not self.kept:
            return line
        fits = "; --group-size 32 may fit them" if self.group_size > 32 else ""
        return (
            f"{line}; {len(self.kept)} modules such as {self.kept[0]} stay in float, as their width is no multiple of "
            f"the group size {self.group_size}{fits}"
        )


def quantise(
    directory_in: Path,
    directory_out: Path,
    *,
    bits: int | None = None,
    small_bits: int | None = None,
    group_size: int = 64,
    limit: int = shards.LIMIT,
    progress: shards.Progress | None = None,
) -> Quantised:
    """Write a quantised copy of a model directory; norms and routers stay in float.

    Args:
        directory_in: a model directory in float.
        directory_out: exists and is empty, see `duo_mlx.files.output_directory`.
        bits: of attention, embedding, head and big, one of `BITS`; None or 16: they stay in float.
        small_bits: of the small FFNs; None: as ``bits``; 16: they stay in float.
        group_size: how many weights share a scale, one of `GROUP_SIZES`.
        limit: bytes of a shard.
        progress: is called after each tensor with the bytes that are written and that are to be.

    Raises:
        DuoError: the model is quantised already, is no model, or cannot be quantised like that.
    """
    big = _checked("--bits", bits)
    small = big if small_bits is None else _checked("--small-bits", small_bits)
    if group_size not in GROUP_SIZES:
        raise DuoError(f"--group-size {group_size}: it must be {_one_of(GROUP_SIZES)}")
    if big is None and small is None:
        raise DuoError(f"nothing is to be quantised; give --bits or --small-bits ({_one_of(BITS)})")
    config = checkpoint.read_config(directory_in)
    if is_quantised(config) and big is not None:
        raise DuoError(
            f"{directory_in}: is quantised already; quantise the model that it was made of, or with --small-bits alone "
            "its small FFNs"
        )
    model = checkpoint.read_model(directory_in)
    default = small if big is None else big
    choose = _predicate(model, big, small, default, group_size)
    kept = sorted(
        path
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and choose(path, module) and module.weight.shape[-1] % group_size
    )
    with redirect_stdout(StringIO()):  # it prints the bits per weight
        model, config = mlx_lm_utils.quantize_model(model, config, group_size, default, quant_predicate=choose)
    if not any("scales" in module for module in model.modules()):
        raise DuoError(
            f"{directory_in}: no width of it is a multiple of the group size {group_size}, so nothing can be quantised"
        )
    result = Quantised(mlx_lm_utils.compute_bits_per_weight(model), tuple(kept), group_size)
    checkpoint.save_config(directory_out, config)
    carry(directory_in, directory_out)
    weights = checkpoint.parameters(model)
    del model  # so that each weight goes when it has been written
    shards.write(directory_out, shards.held(weights, donate=True), limit=limit, progress=progress)
    return result


def carry(directory_in: Path, directory_out: Path) -> None:
    """Copy what stands beside the weights: tokenizer, chat template and the like."""
    for file in sorted(directory_in.iterdir()):
        written = file.name == "config.json" or file.name.endswith(".index.json")
        if file.suffix in CARRIED and file.is_file() and not written:
            with writing(directory_out / file.name):
                shutil.copyfile(file, directory_out / file.name)


def _predicate(
    model: Model, big: int | None, small: int | None, default: int | None, group_size: int
) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """mlx-lm's quant_predicate: True is for the default bits, which config.json then need not say for each module.

    What the base's own predicate keeps in float, or wants otherwise, is as it says.
    """
    smalls = tuple(f"{path}.small." for path in model.ffn_paths)
    of_base: Callable[[str, nn.Module], bool | dict[str, Any]] | None = getattr(model, "quant_predicate", None)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        is_small = path.startswith(smalls)
        bits = small if is_small else big
        if bits is None or not hasattr(module, "to_quantized"):
            return False
        said = True if is_small or of_base is None else of_base(path, module)
        if isinstance(said, dict):
            return said if module.weight.shape[-1] % said.get("group_size", group_size) == 0 else False
        if not said or bits == default:
            return said
        return {"group_size": group_size, "bits": bits, "mode": "affine"}

    return choose


def _checked(option: str, bits: int | None) -> int | None:
    if bits is None or bits == FLOAT:
        return None
    if bits not in BITS:
        raise DuoError(f"{option} {bits}: it must be {_one_of(BITS)}, or {FLOAT} for float")
    return bits


def _one_of(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
