"""Read a GGUF file as a Hugging Face model: its tensors by their names there, and a config.json.

The package gguf dequantises. What llama.cpp's converter did to the weights is undone: Llama's rows of q and k return to
the order that Hugging Face has, Gemma's norms lose the 1 that was added to them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from duo_mlx.convert.keymaps.rope import interleaved_to_half
from duo_mlx.convert.readers import gguf_config, gguf_header, gguf_rope
from duo_mlx.convert.readers.gguf_header import Entry
from duo_mlx.convert.readers.gguf_metadata import Metadata
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

Kind = GGMLQuantizationType
FLOATS = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}  # kept bit for bit
MOST_FACTORS = 1 << 16
CHUNK = 4 << 20  # bytes that are dequantised at once

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OTHERS = {"gemma2": GEMMA, "gemma3": GEMMA, "phi3": {"ffn_up": "mlp.gate_up_proj"}}
DROPPED = re.compile(r"blk\.\d+\.attn_rot_embd\..*")  # tables of old files
PICTURES = "mmproj"
PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUF:
    """A model that a GGUF file holds; nothing of its weights is loaded yet."""

    files: tuple[Path, ...]  # one, or all parts of a split model
    config: dict[str, Any]  # config.json's keys
    tensors: dict[str, Tensor]  # by Hugging Face's names
    metadata: dict[str, Any]  # as the file has it
    notes: tuple[str, ...]  # what is worth a line

    def write_tokenizer(self, destination: Path) -> None:
        """Write tokenizer files into ``destination``; see `duo_mlx.convert.tokenizer.write_tokenizer`."""
        from duo_mlx.convert import gguf_tokenizer, tokenizer

        if gguf_tokenizer.is_beside(self.files[0]):
            tokenizer.write(self.files[0].parent, destination, self.config["vocab_size"])
        else:
            gguf_tokenizer.write(self.files[0], destination, self.config["vocab_size"])


def read(file: Path, given: dict[str, Any] | None = None) -> GGUF:
    """Read the model in ``file``, or in all parts of a split model that ``file`` is one of.

    Args:
        file: a ``.gguf`` file.
        given: a configuration in place of the one that the metadata makes.

    Raises:
        DuoError: the file is damaged, a part is missing, its architecture or one of its types is not supported, or its
            metadata says what a config.json cannot.
    """
    files, metadata, entries = _entries(file)
    try:
        architecture = gguf_config.check_architecture(metadata)
        say = Metadata(metadata)
        factors = {name: _factors(*entries[name]) for name in gguf_rope.TENSORS if name in entries and given is None}
        shapes = {name: entry.shape for name, (_, entry) in entries.items()}
        made = gguf_config.config(metadata, shapes, factors) if given is None else given
        undo = _undo(say, made)
        names = LAYER | OTHERS.get(architecture, {})
        tensors: dict[str, Tensor] = {}
        for name, (part, entry) in entries.items():
            if name in gguf_rope.TENSORS or DROPPED.fullmatch(name):
                continue
            if (new := _renamed(name, names)) in tensors:
                raise DuoError(f"holds {shown(new)} under two names")
            tensors[new] = undo(new, _tensor(part, entry))
    except DuoError as error:
        raise DuoError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from None
    return GGUF(files, made, tensors, metadata, _notes(entries, made))


def _entries(file: Path) -> tuple[tuple[Path, ...], dict[str, Any], dict[str, tuple[Path, Entry]]]:
    """Return the files, the metadata, and where each tensor lies."""
    files = parts(file)
    headers = [gguf_header.read(part) for part in files]
    entries: dict[str, tuple[Path, Entry]] = {}
    for number, (part, header) in enumerate(zip(files, headers, strict=True)):
        count = header.metadata.get("split.count", 0) or 1
        if count != len(files) or header.metadata.get("split.no", 0) != number:
            raise DuoError(
                f"{part}: is part {shown(header.metadata.get('split.no', 0))} of {shown(count)} by its metadata; name "
                "the parts NAME-00001-of-00003.gguf and so on, or join them with llama-gguf-split --merge"
            )
        for entry in header.entries:
            if entry.name in entries:
                raise DuoError(f"{part}: holds {shown(entry.name)}, as {entries[entry.name][0].name} does")
            entries[entry.name] = part, entry
    said = headers[0].metadata.get("split.tensors.count", len(entries))
    if said != len(entries):
        raise DuoError(f"{file}: the parts hold {len(entries)} tensors, not {shown(said)}")
    return files, headers[0].metadata, entries


def parts(file: Path) -> tuple[Path, ...]:
    """Return all parts of the split model that ``file`` is one of, by its name; else ``file`` alone.

    Raises:
        DuoError: a part is missing.
    """
    match = PART.fullmatch(file.name)
    if match is None:
        return (file,)
    count = int(match["count"])
    beside = {other.name for other in file.parent.iterdir()}
    found: list[Path] = []
    for number in range(1, count + 1):
        name = f"{match['stem']}-{number:05}-of-{match['count']}.gguf"
        if name not in beside:
            raise DuoError(f"{file}: is one of {count} parts, and {name} is missing beside it")
        found.append(file.with_name(name))
    return tuple(found) or (file,)


def models(files: list[Path]) -> list[Path]:
    """Return ``files`` without GGUF files that are no model: all parts but the first, and what reads pictures."""

    def is_model(file: Path) -> bool:
        part = PART.fullmatch(file.name)
        return not (file.name.startswith(PICTURES) or (part and int(part["number"]) != 1))

    return [file for file in files if file.suffix != ".gguf" or is_model(file)]


def _renamed(name: str, layer: dict[str, str]) -> str:
    """Return Hugging Face's name of a tensor; an unknown one stays, so that it is found left over."""
    module, _, kind = name.rpartition(".")
    if module in MODEL:
        return f"{MODEL[module]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    return f"model.layers.{match[1]}.{layer[match[2]]}.{kind}" if match and match[2] in layer else name


def _undo(say: Metadata, config: dict[str, Any]) -> Callable[[str, Tensor], Tensor]:
    """Return what gives a tensor, by Hugging Face's name, the values that it has there."""

    def unchanged(name: str, tensor: Tensor) -> Tensor:  # noqa: ARG001
        return tensor

    def lowered(name: str, tensor: Tensor) -> Tensor:
        if not name.endswith("norm.weight"):
            return tensor
        return tensor.astype("float32").apply(lambda array: array - 1)

    if say.architecture in ("gemma2", "gemma3"):
        return lowered
    if say.architecture != "llama" or config.get("rope_traditional"):  # which runs llama.cpp's order itself
        return unchanged
    heads, (width, _) = say.integer("attention.head_count"), gguf_config.head_sizes(say)
    rows = {"q": heads, "k": say.integer("attention.head_count_kv", heads)}

    def reordered(name: str, tensor: Tensor) -> Tensor:
        match = re.fullmatch(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)", name)
        # one of another shape stays as it is: the plan says that it does not fit, beside all others
        if match is None or tensor.shape[:1] != (rows[match[1]] * width,):
            return tensor
        return tensor.apply(interleaved_to_half(rows[match[1]], width))

    return reordered


def _notes(entries: dict[str, tuple[Path, Entry]], config: dict[str, Any]) -> tuple[str, ...]:
    kinds = sorted({entry.kind.name for _, entry in entries.values() if entry.kind not in FLOATS})
    notes = [f"{', '.join(kinds)} become float32; --bits quantises again"] if kinds else []
    if gguf_rope.LLAMA3 in entries and (scaling := config.get("rope_scaling")):
        kind = scaling.get("rope_type", scaling.get("type"))
        notes.append(f"{gguf_rope.LLAMA3} is RoPE scaling of type {kind} by {scaling.get('factor')}")
    return tuple(notes)


def _factors(file: Path, entry: Entry) -> gguf_rope.Factors:
    if prod(entry.shape) > MOST_FACTORS:
        raise DuoError(f"{shown(entry.name)} is {list(entry.shape)}; no head has that many channels")
    return np.array(_load(file, entry).astype(mx.float32)).astype(np.float64)


def _tensor(file: Path, entry: Entry) -> Tensor:
    dtype = FLOATS.get(entry.kind, "float32")
    return Tensor(entry.shape, dtype, partial(_load, file, entry), "" if entry.kind in FLOATS else entry.kind.name)


def _load(file: Path, entry: Entry) -> mx.array:
    try:
        with file.open("rb") as opened:
            opened.seek(entry.start)
            if entry.kind in FLOATS:
                return _float(np.fromfile(opened, np.uint8, entry.size), entry)
            return _dequantised(opened, entry)
    except OSError as error:
        raise DuoError(f"{file}: {shown(entry.name)} cannot be read ({error.strerror})") from None
    except EOFError:
        raise DuoError(f"{file}: was cut short while it was read") from None


def _float(raw: Any, entry: Entry) -> mx.array:
    if len(raw) != entry.size:
        raise EOFError
    if entry.kind == Kind.BF16:
        return mx.array(raw.view("<u2")).view(mx.bfloat16).reshape(entry.shape)
    return mx.array(raw.view("<f4" if entry.kind == Kind.F32 else "<f2").reshape(entry.shape))


def _dequantised(opened: Any, entry: Entry) -> mx.array:
    """Dequantise some rows at a time: gguf needs several times the memory of what it makes."""
    block, size = GGML_QUANT_SIZES[entry.kind]
    width = entry.shape[-1]
    rows, row = prod(entry.shape[:-1]), width // block * size
    made = np.empty((rows, width), np.float32)
    step = max(1, CHUNK // row)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        raw = np.fromfile(opened, np.uint8, count * row)
        if len(raw) != count * row:
            raise EOFError
        with np.errstate(all="ignore"):  # a scale that is no number is found where all weights are checked
            made[start : start + count] = dequantize(raw.reshape(count, row), entry.kind)
    return mx.array(made.reshape(entry.shape))
