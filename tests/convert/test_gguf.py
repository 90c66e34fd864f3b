"""GGUF: every type against MLX's own reader, the settings, and headers that lie."""

import re
import struct

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.convert.readers import gguf, gguf_header, open_checkpoint
from duo_mlx.convert.tensors import dtype_name
from duo_mlx.errors import DuoError

BITS = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4}


@pytest.fixture
def opened(request, tmp_path):
    """``opened(...)``: the checkpoint of a GGUF file that is written as the fixture ``gguf`` says."""

    written = request.getfixturevalue("gguf")

    def make(*args, config=None, **options):
        file = tmp_path / "tiny.gguf"
        file.write_bytes(written(*args, **options))
        return open_checkpoint(file, config=config)

    return make


MODULES = {new: old for old, new in (gguf.MODEL | gguf.LAYER).items()}


def theirs_of(name):
    """GGUF's name of a tensor."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    return f"blk.{layer[1]}.{MODULES[layer[2]]}.{kind}" if layer else f"{MODULES[module]}.{kind}"


def half(name, array):
    """Rows of q and k in Hugging Face's order, for heads of 16 channels."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    return array.reshape(-1, 8, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_tensors_are_those_that_mlx_reads(opened, kind):
    checkpoint = opened(kind)
    theirs = mx.load(str(checkpoint.files[0]))
    assert checkpoint.format == "GGUF"
    for name, tensor in checkpoint.tensors.items():
        ours = tensor.load()
        assert ours.shape == tensor.shape and dtype_name(ours.dtype) == tensor.dtype
        stem = theirs_of(name).removesuffix(".weight")
        expected = theirs[f"{stem}.weight"]
        if f"{stem}.scales" in theirs:
            assert tensor.stored == kind and tensor.dtype == "float32"
            scales, biases = (theirs[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            expected = mx.dequantize(expected, scales, biases, group_size=32, bits=BITS[kind])
            expected = half(name, np.array(expected))
            np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=2e-5)
        else:
            assert tensor.stored == "" and ours.dtype == expected.dtype
            np.testing.assert_array_equal(np.array(ours), half(name, np.array(expected)))


def test_bfloat16_is_kept_bit_for_bit(opened, gguf_raw):
    tensor = opened("BF16").tensors["model.layers.0.self_attn.v_proj.weight"]
    assert tensor.dtype == "bfloat16" and tensor.shape == (32, 64)
    found = np.array(tensor.load().view(mx.uint16))
    np.testing.assert_array_equal(found.reshape(-1), np.frombuffer(gguf_raw("BF16", (32, 64), 4), np.uint16))


def test_a_file_that_mlx_writes_is_read(tmp_path):
    weights = {"token_embd.weight": mx.arange(64 * 8).reshape(8, 64) / 7, "blk.0.attn_norm.weight": mx.ones(64)}
    weights["blk.0.x.weight"] = mx.arange(24).reshape(2, 3, 4).astype(mx.float16)
    metadata = {"general.architecture": "llama"} | {
        f"llama.{key}": mx.array(value, mx.uint32)
        for key, value in {
            "block_count": 1,
            "embedding_length": 64,
            "feed_forward_length": 96,
            "attention.head_count": 4,
            "context_length": 32,
        }.items()
    }
    metadata["llama.attention.layer_norm_rms_epsilon"] = mx.array(1e-5)
    mx.save_gguf(str(tmp_path / "a.gguf"), weights, metadata)
    checkpoint = open_checkpoint(tmp_path / "a.gguf")
    names = ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "blk.0.x.weight"]
    assert checkpoint.tensors.keys() == set(names) and checkpoint.config["num_key_value_heads"] == 4
    for name, value in zip(names, weights.values(), strict=True):
        loaded = checkpoint.tensors[name].load()
        assert loaded.dtype == value.dtype and mx.array_equal(loaded, value).item()


def test_the_settings_are_those_of_a_llama(opened):
    ids = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5}
    config = opened(metadata={"llama.rope.freq_base": 100000.0, **ids}).config
    assert config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 32,
        "rope_theta": 100000.0,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
    }


def test_a_head_of_its_own_width_scaling_and_an_untied_head(opened, gguf_raw):
    metadata = {f"llama.attention.{part}_length": 32 for part in ("key", "value")}
    metadata |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.attention.head_count": 8}

    def more(tensors):
        head = ("output.weight", "F32", (32, 64), gguf_raw("F32", (32, 64)))
        return [*tensors, head, ("blk.0.attn_q.bias", "F32", (64,), gguf_raw("F32", (64,)))]

    config = opened(metadata=metadata, tensors=more).config
    assert config["head_dim"] == 32 and not config["tie_word_embeddings"] and config["attention_bias"]
    assert config["rope_scaling"] == {"type": "linear", "rope_type": "linear", "factor": 4.0}


def test_rotary_frequencies_of_no_known_rule_need_the_original_configuration(opened, gguf_raw, tmp_path):
    def more(tensors):
        return [*tensors, ("rope_freqs.weight", "F32", (8,), gguf_raw("F32", (8,)))]

    with pytest.raises(DuoError, match=r"rope_freqs.weight holds factors that are no numbers above 0"):
        opened(tensors=more)
    (tmp_path / "own.json").write_text('{"model_type": "llama", "rope_theta": 5}')
    checkpoint = opened(tensors=more, config=tmp_path / "own.json")
    assert checkpoint.config == {"model_type": "llama", "rope_theta": 5}
    assert "rope_freqs.weight" not in checkpoint.tensors and len(checkpoint.tensors) == 11


REFUSED = {
    "qwen": (
        {"general.architecture": "qwen2moe"},
        "its architecture is 'qwen2moe'; supported are llama, qwen2, qwen3, gemma2",
    ),
    "nameless": ({"general.architecture": None}, "its architecture is not named"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "scaled logits": ({"llama.logit_scale": 8.0}, "llama.logit_scale is 8.0"),
    "yarn": (
        {"llama.rope.scaling.type": "yarn"},
        "rotary scaling is yarn without a factor; known are none, linear, yarn",
    ),
    "no factor": (
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -1.0},
        "is -1.0, not a number above",
    ),
    "partial rotary": ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count is 8, not the 16 of a head"),
    "no layers": ({"llama.block_count": None}, "has no llama.block_count"),
    "a text": ({"llama.block_count": "1"}, "llama.block_count is 1, not one whole number"),
    "many layers": ({"llama.block_count": 4_000_000_000}, "llama.block_count is 4000000000"),
    "more layers": ({"llama.block_count": 2}, "says 2 layers, but there are tensors of 1"),
    "widths by layer": ({"llama.feed_forward_length": [96, 48]}, "not one whole number"),
    "another width": ({"llama.embedding_length": 32}, "the metadata says an embedding of 32"),
    "a token beyond": ({"tokenizer.ggml.eos_token_id": 32}, "its eos token is 32, beyond its vocabulary of 32"),
    "a part": ({"split.count": 3}, "llama-gguf-split --merge"),
    "alignment": ({"general.alignment": 48}, "an alignment of 48"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_metadata_may_not_say(opened, case):
    metadata, line = REFUSED[case]
    with pytest.raises(DuoError, match="tiny.gguf: ") as error:
        opened(metadata=metadata)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (9, "is Q8_1, which the package gguf cannot dequantise"),
        (26, "is I32, which the package gguf cannot dequantise"),
        (777, "is of type 777, which the package gguf does not know"),
    ],
)
def test_other_types_are_refused_by_tensor_and_name(opened, number, line):
    tensors = [("token_embd.weight", number, (32, 64), bytes(4096))]
    with pytest.raises(DuoError, match=f"token_embd.weight {line}"):
        opened(tensors=tensors)


@pytest.mark.parametrize("version", [2, 3])
def test_versions_and_alignments(opened, version):
    checkpoint = opened("Q8_0", metadata={"general.alignment": 128}, version=version, alignment=128)
    theirs = mx.load(str(checkpoint.files[0])) if version == 3 else None
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        loaded = checkpoint.tensors[name].load()
        assert theirs is None or mx.array_equal(loaded, theirs[theirs_of(name)]).item()
        assert 0.5 < mx.std(loaded).item() < 1.5


def header(version=3, tensors=0, metadata=0, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, metadata) + rest


def key(name=b"a", kind=4, value=b""):
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


LIES = {
    "nothing": (b"", "does not begin with GGUF"),
    "another file": (b"PK\3\4 and so on", "does not begin with GGUF"),
    "only its magic": (b"GGUF", "goes beyond its end"),
    "version 1": (header(version=1), "GGUF version 1; known are versions 2 and 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian GGUF 3"),
    "many tensors": (header(tensors=1 << 60), "are more than it has bytes for"),
    "much metadata": (header(metadata=1 << 60), "are more than it has bytes for"),
    "a long key": (header(metadata=1, rest=struct.pack("<Q", 1 << 62) + b"abcdefgh"), "more than it has bytes for"),
    "a long array": (header(metadata=1, rest=key(kind=9, value=struct.pack("<IQ", 10, 1 << 61))), "more than it has"),
    "many texts": (header(metadata=1, rest=key(kind=9, value=struct.pack("<IQ", 8, 1 << 61))), "more than it has"),
    "deep arrays": (
        header(metadata=1, rest=key(kind=9, value=struct.pack("<IQ", 9, 1) * 400)),
        "arrays in arrays in arrays",
    ),
    "an unknown type": (header(metadata=1, rest=key(kind=99, value=bytes(8))), "metadata of type 99"),
    "no UTF-8": (header(metadata=1, rest=key(name=b"\xff\xfe", value=bytes(4))), "no UTF-8"),
    "a key twice": (header(metadata=2, rest=key(value=bytes(4)) * 2), "has the metadata a twice"),
    "no axes": (header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<IIQQ", 0, 0, 0, 0)), "has 0 axes"),
    "many axes": (header(tensors=1, rest=struct.pack("<Q", 1) + b"a" + struct.pack("<I", 1 << 31) + bytes(99)), "axes"),
}


@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie(tmp_path, case):
    content, line = LIES[case]
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(DuoError, match=r"a\.gguf: ") as error:
        gguf_header.read(tmp_path / "a.gguf")
    assert line in str(error.value)


PLACES = {
    "twice": ([("a", "F32", (8,), bytes(32))] * 2, {}, "holds a twice"),
    "beyond the end": ([("a", "F32", (8,), bytes(32))], {"a": 1 << 62}, "a goes beyond its end"),
    "larger than the file": ([("a", "F32", (1 << 40, 1 << 20), bytes(32))], {}, "a goes beyond its end"),
    "between": ([("a", "F32", (8,), bytes(64))], {"a": 4}, "no multiple of 32"),
    "over each other": (
        [("a", "F32", (16,), bytes(64)), ("b", "F32", (16,), bytes(64))],
        {"b": 32},
        "a and b overlap",
    ),
    "empty": ([("a", "F32", (0, 8), b"")], {}, "is [0, 8], but F32"),
    "a broken block": ([("a", "Q8_0", (48,), bytes(51))], {}, "is [48], but Q8_0 has rows of 32"),
}


@pytest.mark.parametrize("case", PLACES)
def test_tensors_that_lie_elsewhere(opened, case):
    tensors, offsets, line = PLACES[case]
    with pytest.raises(DuoError, match=r"tiny\.gguf: ") as error:
        opened(tensors=tensors, offsets=offsets)
    assert line in str(error.value)


def test_a_file_that_is_cut_short_later_is_refused_then(opened):
    checkpoint = opened()
    file = checkpoint.files[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DuoError, match="cut short while it was read"):
        checkpoint.tensors["model.norm.weight"].load()
    file.unlink()
    with pytest.raises(DuoError, match=r"output_norm\.weight cannot be read"):
        checkpoint.tensors["model.norm.weight"].load()
