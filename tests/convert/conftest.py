"""GGUF files that the tests of the readers share, and dense models that become Duos without a graft."""

import struct
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from duo_mlx.convert.calibration import Calibration
from duo_mlx.convert.directory import convert
from tests.convert import dense_kinds

GGUF_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}
LLAMA = {
    "general.architecture": "llama",
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
    "llama.context_length": 128,
}


def text(value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def typed(value: Any) -> bytes:
    """A value of metadata with its type before it."""
    match value:
        case bool():
            return struct.pack("<IB", 7, value)
        case int():
            return struct.pack("<II", 4, value) if value >= 0 else struct.pack("<Ii", 5, value)
        case np.float32() | float():
            return struct.pack("<If", 6, value)
        case str() | bytes():
            return struct.pack("<I", 8) + text(value)
        case list():
            parts = [typed(part) for part in value]
            kind = parts[0][:4] if parts else struct.pack("<I", 8)
            return struct.pack("<I", 9) + kind + struct.pack("<Q", len(parts)) + b"".join(part[4:] for part in parts)
    raise TypeError(type(value))


def raw(kind: str, shape: tuple[int, ...], seed: int = 0) -> bytes:
    """Random content of a tensor, with scales that are ordinary numbers."""
    random = np.random.default_rng([seed, GGUF_TYPES[kind]])
    count = int(np.prod(shape))
    values = random.standard_normal(count).astype(np.float32)
    if kind == "F32":
        return values.tobytes()
    if kind == "F16":
        return values.astype(np.float16).tobytes()
    if kind == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    halves, rest = {"Q4_0": (1, 16), "Q4_1": (2, 16), "Q8_0": (1, 32)}[kind]
    heads = random.standard_normal((count // 32, halves)).astype(np.float16).view(np.uint8)
    return np.concatenate([heads, random.integers(0, 256, (count // 32, rest), np.uint8)], axis=1).tobytes()


def gguf_bytes(
    metadata: dict[str, Any],
    tensors: list[tuple[str, str | int, tuple[int, ...], bytes]],
    version: int = 3,
    alignment: int = 32,
    offsets: dict[str, int] | None = None,
) -> bytes:
    """A GGUF file. Tensors are name, type, shape in NumPy's order and content; ``offsets`` overrides where they lie."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(key) + typed(value) for key, value in metadata.items())
    data = b""
    for name, kind, shape, content in tensors:
        offset = (offsets or {}).get(name, len(data))
        number = GGUF_TYPES[kind] if isinstance(kind, str) else kind
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", number, offset)
        data += content + bytes(-len(content) % alignment)
    return head + bytes(-len(head) % alignment) + data


def llama_tensors(kind: str = "F32", vocab_size: int = 32) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """The tensors of a llama of one layer that fit `LLAMA`; its matrices are of type ``kind``."""
    shapes = {
        "token_embd.weight": (vocab_size, 64),
        "blk.0.attn_norm.weight": (64,),
        "blk.0.attn_q.weight": (64, 64),
        "blk.0.attn_k.weight": (32, 64),
        "blk.0.attn_v.weight": (32, 64),
        "blk.0.attn_output.weight": (64, 64),
        "blk.0.ffn_norm.weight": (64,),
        "blk.0.ffn_gate.weight": (96, 64),
        "blk.0.ffn_up.weight": (96, 64),
        "blk.0.ffn_down.weight": (64, 96),
        "output_norm.weight": (64,),
    }
    kinds = {name: kind if len(shape) > 1 else "F32" for name, shape in shapes.items()}
    return [
        (name, kinds[name], shape, raw(kinds[name], shape, seed)) for seed, (name, shape) in enumerate(shapes.items())
    ]


@pytest.fixture(scope="session")
def gguf() -> Callable[..., bytes]:
    """``gguf(kind="F32", metadata={}, tensors=None, **options)``: a llama's GGUF file.

    ``metadata`` comes on top of `LLAMA` (None: without that key); ``tensors`` replaces those of `llama_tensors`, or
    changes them if it is a function.
    """

    def make(kind: str = "F32", metadata: dict[str, Any] | None = None, tensors: Any = None, **options: Any) -> bytes:
        values = {key: value for key, value in (LLAMA | (metadata or {})).items() if value is not None}
        made = llama_tensors(kind)
        chosen = made if tensors is None else tensors(made) if callable(tensors) else tensors
        return gguf_bytes(values, chosen, **options)

    return make


@pytest.fixture(scope="session")
def gguf_raw() -> Callable[..., bytes]:
    """``gguf_raw(kind, shape, seed=0)``: the content of a tensor."""
    return raw


@pytest.fixture
def grafted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """``grafted(source, **options)``: the Duo that `convert` makes of a dense directory, with random small FFNs."""

    def make(source: Path, **options: Any) -> Path:
        (tmp_path / "text.txt").write_text(" ".join(f"w{number % 29}" for number in range(300)))
        solver: Any = types.ModuleType("duo_mlx.convert.graft")
        solver.graft = dense_kinds.small_ffns
        monkeypatch.setitem(sys.modules, solver.__name__, solver)
        texts = Calibration((tmp_path / "text.txt",), 0)
        graft: Any = dense_kinds.Graft()
        convert(source, tmp_path / "duo", graft=graft, calibrate=texts, **options)
        return tmp_path / "duo"

    return make


@pytest.fixture
def source(write_tokenizer: Callable[[Path], None], tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """``source(kind)``: a directory that transformers wrote, and its model."""

    def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Path, Any]:
        model = dense_kinds.save(tmp_path / "dense", kind, dtype, **changes)
        write_tokenizer(tmp_path / "dense")
        return tmp_path / "dense", model

    return make
