"""Meta's own checkpoints: ``consolidated.NN.pth``, each with a part of every matrix, and params.json for a config.json.

Mistral writes a params.json with the same keys beside consolidated.safetensors.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx.convert.readers.text import read_object, shown
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.\d\d\.pth")

KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_seq_len": "max_position_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
}
IMPLIED = ("multiple_of", "ffn_dim_multiplier", "max_batch_size", "model_parallel_size")  # by the shapes of tensors
COLUMNS = re.compile(
    r".*\.(attention\.wo|feed_forward\.w2)\.weight"
)  # parts stand side by side, not one below the other
SIZES = {"tok_embeddings.weight": "vocab_size", "layers.0.feed_forward.w1.weight": "intermediate_size"}


def config(params: Path, tensors: Tensors) -> dict[str, Any]:
    """The config.json of a llama or mistral that params.json and the ``tensors`` stand for.

    Raises:
        DuoError: the file is no JSON object, or has a key whose meaning is not known.
    """
    given = {key: value for key, value in read_object(params).items() if value is not None}
    if given.pop("use_scaled_rope", False):
        raise DuoError(
            f"{params}: says use_scaled_rope, but not by which factor; give the model's config.json with --config"
        )
    unknown = sorted(key for key in given if key not in KEYS and key not in IMPLIED)
    if unknown:
        raise DuoError(f"{params}: has the unknown key {shown(unknown[0])}; give a config.json with --config")
    made = {KEYS[key]: value for key, value in given.items() if key in KEYS}
    for name, key in SIZES.items():  # llama 2 says a vocabulary of -1, and no width of its FFNs
        if name in tensors and tensors[name].shape:
            made[key] = tensors[name].shape[0]
    made = {"num_key_value_heads": made.get("num_attention_heads"), "rope_theta": 10000.0} | made
    return made | {"model_type": "mistral" if "sliding_window" in made else "llama"}


def read(file: Path, read_file: Callable[[Path], dict[str, Tensor]]) -> tuple[list[Path], dict[str, Tensor]]:
    """The shards ``consolidated.00.pth`` and so on beside ``file``, and the whole tensors.

    Raises:
        DuoError: a shard is missing, or shards hold different tensors.
    """
    files = sorted(other for other in file.parent.iterdir() if SHARD.fullmatch(other.name))
    for number, shard in enumerate(files):
        if shard.name != f"consolidated.{number:02}.pth":
            raise DuoError(f"{file.parent}: has {shard.name}, but no consolidated.{number:02}.pth")
    parts = [read_file(shard) for shard in files]
    for shard, part in zip(files, parts, strict=True):
        if part.keys() != parts[0].keys():
            name = min(part.keys() ^ parts[0].keys())
            raise DuoError(f"{shard}: only one of it and {files[0].name} holds {shown(name)}")
    if len(files) == 1:
        return files, parts[0]
    return files, {name: _whole(name, [part[name] for part in parts], parts[0]) for name in parts[0]}


def _whole(name: str, parts: list[Tensor], first: Mapping[str, Tensor]) -> Tensor:
    """One tensor of its ``parts`` in all shards; norms and tables are the same in each."""
    shape = parts[0].shape
    if len(shape) != 2:
        return parts[0]
    if any(part.shape != shape or part.dtype != parts[0].dtype for part in parts):
        raise DuoError(f"{shown(name)} has different shapes or types in different shards")
    axis = int(COLUMNS.fullmatch(name) is not None)
    if name == "tok_embeddings.weight":  # by columns before llama 3, which a norm's width tells
        norm = first.get("norm.weight")
        axis = int(norm is not None and norm.shape != shape[1:])
    whole = tuple(size * len(parts) if place == axis else size for place, size in enumerate(shape))
    loads = [part.load for part in parts]
    return Tensor(whole, parts[0].dtype, lambda: mx.concatenate([load() for load in loads], axis=axis))
