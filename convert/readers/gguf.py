"""A GGUF file of the llama architecture: tensors under GGUF's own names, and config.json's keys from its metadata.

The rows of q and k stay in the order that GGUF has them in, for interleaved RoPE; `duo_mlx.convert.keymaps` knows.
"""

import re
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx.convert.readers import gguf_header
from duo_mlx.convert.readers.gguf_header import Entry, Header
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

ARCHITECTURE = "llama"
ROPE_FREQUENCIES = "rope_freqs.weight"  # Llama 3's scaling, already worked out
# llamas that multiply by these, and what changes nothing
NEUTRAL = {"attention.scale": (0,), "embedding_scale": (0, 1), "logit_scale": (0, 1), "residual_scale": (0, 1)}


def read(file: Path, configured: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``file`` by GGUF's names, and the configuration; none if the caller is ``configured`` already.

    Raises:
        DuoError: the file is damaged, of another architecture, or needs what a configuration made from its metadata
            cannot say.
    """
    header = gguf_header.read(file)
    try:
        _check_architecture(header.metadata)
        entries = [entry for entry in header.entries if entry.name != ROPE_FREQUENCIES or not configured]
        settings = {} if configured else config(header)
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None
    return {entry.name: _tensor(file, entry) for entry in entries}, settings


def _tensor(file: Path, entry: Entry) -> Tensor:
    stored = "" if entry.kind.block == 1 else entry.kind.name
    return Tensor(entry.shape, entry.kind.dtype, partial(_load, file, entry), stored)


def _load(file: Path, entry: Entry) -> mx.array:
    try:
        raw = np.fromfile(file, np.uint8, entry.size, offset=entry.start)
    except OSError as error:
        raise DuoError(f"{file}: {shown(entry.name)} cannot be read ({error.strerror})") from None
    if len(raw) != entry.size:
        raise DuoError(f"{file}: was cut short while it was read")
    return entry.kind.decode(raw).reshape(entry.shape)


def _check_architecture(metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        named = repr(shown(architecture)) if architecture is not None else "not named"
        raise DuoError(f"its architecture is {named}; supported is {ARCHITECTURE}")
    if metadata.get("split.count", 0) not in (0, 1):
        raise DuoError("is one part of several; join them with llama-gguf-split --merge")


def config(header: Header) -> dict[str, Any]:
    """config.json's keys of a llama from GGUF's metadata.

    Raises:
        DuoError: the metadata lacks something, does not fit the tensors, or asks for what these keys cannot say.
    """
    say = _Metadata(header.metadata)
    shapes = {entry.name: entry.shape for entry in header.entries}
    if ROPE_FREQUENCIES in shapes:
        raise DuoError(
            f"{ROPE_FREQUENCIES} scales its rotary frequencies, which its metadata does not explain; "
            "give the original model's config.json with --config FILE"
        )
    _check_plain(say)
    hidden, heads = say.integer("embedding_length"), say.integer("attention.head_count")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2 or embedding[1] != hidden:
        raise DuoError(f"token_embd.weight is {list(embedding)}, but the metadata says an embedding of {hidden}")
    layers = say.integer("block_count")
    found = {match[1] for name in shapes if (match := re.match(r"blk\.(\d+)\.", name))}
    if len(found) != layers:
        raise DuoError(f"the metadata says {layers} layers, but there are tensors of {len(found)}")
    settings = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": say.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": say.integer("attention.head_count_kv", heads),
        "rms_norm_eps": say.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding[0],
        "rope_theta": say.real("rope.freq_base", 10000.0),
        "max_position_embeddings": say.integer("context_length"),
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_scaling": _rope_scaling(say),
    }
    head = say.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := say.integer(key, head)) != head:
            raise DuoError(f"{say.full(key)} is {other}, not the {head} of a head; only whole heads are supported")
    if head * heads != hidden:
        settings["head_dim"] = head
    return settings | token_ids(header.metadata, embedding[0])


def token_ids(metadata: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """``bos_token_id``, ``eos_token_id`` and ``pad_token_id``, as far as said; several that end a text are a list."""
    say = _Metadata(metadata, "tokenizer.ggml.")
    found = {
        role: say.integer(f"{key}_token_id", least=0)
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "eot": "eot", "eom": "eom"}.items()
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    for role, number in found.items():
        if number >= vocab_size:
            raise DuoError(f"its {role} token is {number}, beyond its vocabulary of {vocab_size}")
    ends = list(dict.fromkeys(found[role] for role in ("eos", "eot", "eom") if role in found))
    ids: dict[str, Any] = {f"{role}_token_id": found[role] for role in ("bos", "pad") if role in found}
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


class _Metadata:
    """Metadata of the right type, or a message with the key's full name."""

    def __init__(self, values: dict[str, Any], prefix: str = f"{ARCHITECTURE}.") -> None:
        self.values, self.prefix = values, prefix

    def full(self, key: str) -> str:
        return self.prefix + key

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(self.full(key), default)
        if value is None:
            raise DuoError(f"its metadata has no {self.full(key)}")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:  # one for each layer
            value = value[0]
        if type(value) is not int or not least <= value < 1 << 31:
            raise DuoError(f"{self.full(key)} is {shown(value)}, not one whole number from {least} on")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (float, int) or not isfinite(value) or value <= 0:
            raise DuoError(f"{self.full(key)} is {shown(value)}, not a number above 0")
        return _shortest(value)


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-05 for the float32 next to it."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _check_plain(say: _Metadata) -> None:
    if say.values.get(say.full("expert_count"), 0) != 0:
        raise DuoError("is a mixture of experts; supported are llamas with one FFN a layer")
    for key, neutral in NEUTRAL.items():
        if say.values.get(say.full(key), 0) not in neutral:
            raise DuoError(f"{say.full(key)} is {shown(say.values[say.full(key)])}; only plain llamas are supported")


def _rope_scaling(say: _Metadata) -> dict[str, Any] | None:
    kind = say.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise DuoError(
            f"its rotary scaling is {shown(kind)}; known are none and linear, give others with --config FILE"
        )
    key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if say.values.get(say.full(key))), None)
    if kind == "none" or key is None:
        return None
    return {"type": "linear", "rope_type": "linear", "factor": say.real(key)}
