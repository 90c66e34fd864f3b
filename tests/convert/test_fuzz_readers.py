"""Valid files of every format with bytes turned, cut, inserted or lying: read, or refused in one line.

50 files in an ordinary run, always the same; thousands, new each time, with ``--hypothesis-profile nightly``.
"""

import contextlib
import io
import json
import resource
import struct
import sys
import warnings
from datetime import timedelta

import mlx.core as mx
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import save

from duo_mlx.convert import gguf_tokenizer
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.errors import DuoError

NIGHT = settings.default.max_examples > 100
EXAMPLES = settings.default.max_examples // 2  # 50 of hypothesis' own 100
MEMORY = 512 << 20  # bytes that lies may not cost

# counts, lengths and offsets that somebody may believe
LIES = st.sampled_from([0, 1, 2, 8, 31, 0x7F, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 62, (1 << 64) - 1])


def tensors():
    return {"a": torch.ones(4, 3), "b.weight": torch.zeros(5).half(), "c": torch.ones(2, 2).bfloat16()}


def pickled(value, zipped):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def tokenizer(kind):
    """A tokenizer of a few tokens, as GGUF's metadata."""
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581", "\u2581a"]
    extra = {"merges": ["a b"]} if kind == "gpt2" else {"scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]}
    values = {
        "model": kind,
        "tokens": tokens,
        "token_type": [2, 3, 3, 1, 1, 1, 1, 1],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (values | extra).items()}


LLAMA = {
    "llama.block_count": 1,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 0.5,
    "llama.context_length": 128,
}


@pytest.fixture(scope="module")
def valid(gguf):
    """What to spoil: by name, the file's name and its content."""
    one = [("token_embd.weight", "Q4_0", (4, 64), bytes(144)), ("blk.0.x", "F32", (3,), bytes(12))]
    quants = [("token_embd.weight", 14, (2, 256), bytes(420)), ("blk.0.attn_norm.weight", "F32", (3,), bytes(12))]
    gemma = {
        "general.architecture": "gemma3",
        **{f"gemma3.{key.partition('.')[2]}": value for key, value in LLAMA.items()},
    }
    gemma |= {"gemma3.embedding_length": 256, "gemma3.attention.sliding_window": 4, "gemma3.rope.freq_base_swa": 1e4}
    factors = ("rope_freqs.weight", "F32", (8,), struct.pack("<8f", *[1.0] * 8))
    weight_map = {"a": "1.safetensors", "b.weight": "2.safetensors", "c": "2.safetensors"}
    index = json.dumps({"metadata": {"total_size": 66}, "weight_map": weight_map}).encode()
    return {
        "safetensors": ("x.safetensors", save(tensors(), metadata={"format": "pt"})),
        "index": ("model.safetensors.index.json", index),
        "zip": ("x.pt", pickled({"model": tensors(), "step": 3}, True)),
        "old pickle": ("x.pth", pickled(tensors(), False)),
        "gguf": ("x.gguf", gguf(tensors=one)),
        "gguf of Gemma": ("x.gguf", gguf(tensors=quants, metadata=gemma)),
        "gguf with factors": ("x.gguf", gguf(tensors=[*one, factors])),
        "gguf in parts": ("x-00001-of-00001.gguf", gguf(tensors=one, metadata={"split.count": 1, "split.no": 0})),
        "gguf with BPE": ("x.gguf", gguf(tensors=one, metadata=tokenizer("gpt2"))),
        "gguf with sentencepiece": ("x.gguf", gguf(tensors=one, metadata=tokenizer("llama"))),
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz")
    (directory / "config.json").write_text("{}")
    parts = tensors()
    (directory / "1.safetensors").write_bytes(save({"a": parts.pop("a")}))
    (directory / "2.safetensors").write_bytes(save(parts))
    return directory


@st.composite
def spoilt(draw, content):
    """``content`` after one to four accidents; most happen in its first kilobyte, where headers are."""
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        end = max(len(made) - 1, 0)
        at = draw(st.integers(0, end) | st.integers(0, min(end, 1024)))
        match draw(st.sampled_from(["flip", "cut", "insert", "drop", "lie", "copy", "byte"])):
            case "flip" if made:
                made[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if made:
                made[at] = draw(st.integers(0, 255))
            case "cut":
                del made[at:]
            case "insert":
                made[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "drop":
                del made[at : at + draw(st.integers(1, 16))]
            case "lie":
                width = draw(st.sampled_from([4, 8]))
                at -= at % draw(st.sampled_from([1, 4, 8]))
                made[at : at + width] = struct.pack("<Q", draw(LIES))[:width]
            case "copy":
                to = draw(st.integers(0, end))
                piece = made[at : at + draw(st.integers(1, 64))]
                made[to : to + len(piece)] = piece
    return bytes(made)


def peak():
    """The most memory that this process has had, in bytes."""
    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


def read_all(file, out):
    """What a converter does with a source; says whether it was read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of what it then refuses
        checkpoint = open_checkpoint(file)
        for tensor in checkpoint.tensors.values():
            array = tensor.load()
            assert array.shape == tensor.shape and array.dtype == getattr(mx, tensor.dtype)
            mx.eval(array)
        if checkpoint.format == "GGUF":
            gguf_tokenizer.write(file, out, 1 << 20)


@settings(
    max_examples=EXAMPLES,
    derandomize=not NIGHT,
    deadline=timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(st.data())
def test_spoilt_files_are_read_or_refused(valid, place, data):
    name, content = valid[data.draw(st.sampled_from(sorted(valid)))]
    made = data.draw(spoilt(content))
    note(f"{name}: {made!r}")
    before = peak()
    (place / name).write_bytes(made)
    try:
        read_all(place / name, place)
    except DuoError as error:
        message = str(error)
        assert str(place) in message and message.isprintable() and len(message) < 1000
    finally:
        (place / name).unlink()
    assert peak() - before < MEMORY


@pytest.mark.parametrize(
    "kind",
    [
        "safetensors",
        "index",
        "zip",
        "old pickle",
        "gguf",
        "gguf of Gemma",
        "gguf with factors",
        "gguf in parts",
        "gguf with BPE",
        "gguf with sentencepiece",
    ],
)
def test_the_files_are_valid_before(valid, place, kind):
    name, content = valid[kind]
    (place / name).write_bytes(content)
    with contextlib.ExitStack() as stack:
        stack.callback((place / name).unlink)
        if kind in ("gguf", "gguf of Gemma", "gguf with factors", "gguf in parts"):
            stack.enter_context(pytest.raises(DuoError, match="has no tokenizer"))
        read_all(place / name, place)
