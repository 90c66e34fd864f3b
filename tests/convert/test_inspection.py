"""Inspecting: what is said of each kind of checkpoint, that nothing is loaded, and what is said of bad ones."""

import json
import re
from dataclasses import asdict

import mlx.core as mx
import pytest
import torch
from click.testing import CliRunner

from duo_mlx import checkpoint, shards
from duo_mlx.cli import main
from duo_mlx.convert import readers
from duo_mlx.convert.export import export
from duo_mlx.convert.inspection import describe
from duo_mlx.convert.quantise import quantise
from duo_mlx.convert.readers import gguf
from duo_mlx.errors import DuoError

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


def inspect(*args):
    return CliRunner().invoke(main, ["convert", "inspect", *map(str, args)], prog_name="duo-mlx")


@pytest.fixture
def dense(saved, llama_twin, write_tokenizer, tiny_config, tmp_path):
    """``dense(**changes)``: a Hugging Face directory of a small llama in several shards."""

    def make(**changes):
        directory = tmp_path / "dense"
        directory.mkdir()
        config = tiny_config(**({"model_type": "llama", "small_intermediate_size": None} | changes))
        (directory / "config.json").write_text(json.dumps(config))
        weights = checkpoint.parameters(llama_twin(saved()[1]))
        shards.write(directory, shards.held(weights), limit=8000)
        write_tokenizer(directory)
        return directory

    return make


def said(found):
    """The fields of an inspection that say something."""
    return {name: value for name, value in asdict(found).items() if value not in (None, False, ())}


def test_a_model_directory(saved, monkeypatch):
    directory, model = saved()
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("a tensor was loaded"))
    weights = checkpoint.parameters(model)
    assert said(describe(directory)) == {
        "source": str(directory),
        "kind": "Duo",
        "architecture": "duo",
        "format": "safetensors",
        "files": ("model.safetensors",),
        "bytes": (directory / "model.safetensors").stat().st_size,
        "tensors": len(weights),
        "parameters": sum(value.size for value in weights.values()),
        "dtypes": {"float32": len(weights)},
        "key_map": "canonical",
        "layers": 4,
        "small_layers": 4,
        "hidden_size": 16,
        "attention_heads": 4,
        "key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 24,
        "small_intermediate_size": 8,
        "vocab_size": 32,
        "tied_head": True,
        "tokenizer": "tokenizer.json, WordLevel, 32 entries",
        "commands": (
            f"duo-mlx generate --model {directory} PROMPT",
            f"duo-mlx convert {directory} DST --to torch",
            f"duo-mlx convert {directory} DST --bits 4",
        ),
    }


def test_the_lines_and_the_json_object(saved):
    directory, model = saved(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    result = inspect(directory)
    assert (result.exit_code, result.stderr) == (0, "")
    rows = [line.split(None, 1) for line in result.stdout.splitlines()]
    assert dict(rows[:-3]) == {
        "is": "Duo, duo",
        "format": f"safetensors, {(directory / 'model.safetensors').stat().st_size / 1e6:.1f} MB",
        "files": "model.safetensors",
        "tensors": f"{len(checkpoint.parameters(model))}, 0.0 million parameters",
        "stored": f"as   float32 ({len(checkpoint.parameters(model))})",
        "names": "canonical",
        "layers": "4",
        "hidden": "16",
        "heads": "4, 2 of keys and values, 4 wide",
        "FFN": "big 24 wide, small 8 wide",
        "biases": "attention and FFN",
        "vocabulary": "32",
        "head": "its own",
        "tokenizer": "tokenizer.json, WordLevel, 32 entries",
    }
    assert [row[0] for row in rows[-3:]] == ["command"] * 3
    result = inspect(directory, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(asdict(describe(directory))))
    assert result.stdout.count("\n") == 1


def test_a_quantised_directory(saved, tmp_path, monkeypatch):
    directory, model = saved(**WIDE)
    quantise(directory, tmp_path, bits=4, small_bits=8, group_size=32)
    monkeypatch.setattr(mx, "load", lambda *_, **__: pytest.fail("a tensor was loaded"))
    found = describe(tmp_path)
    assert found.kind == "Duo" and not found.problems
    assert found.quantised == "by MLX, 4 bits in groups of 32, 12 modules in 8 bits"
    assert found.parameters == sum(value.size for value in checkpoint.parameters(model).values())
    assert found.dtypes.keys() == {"float32", "uint32"}
    assert (found.hidden_size, found.intermediate_size, found.small_intermediate_size) == (64, 128, 32)
    assert (found.head_dim, found.vocab_size) == (16, 32)
    assert found.commands[1] == f"duo-mlx convert {tmp_path} DST --to torch --dequantise"


def test_a_dense_model_in_shards(dense):
    directory = dense()
    found = describe(directory)
    assert (found.kind, found.architecture, found.key_map) == ("dense", "llama", "canonical")
    assert len(found.files) > 2 and found.bytes == sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    assert (found.intermediate_size, found.small_intermediate_size, found.small_layers) == (24, None, None)
    assert found.problems == () and found.commands == (f"duo-mlx convert {directory} DST --graft --calibrate TEXT",)
    assert f"{found.files[0]} ... {found.files[-1]}, {len(found.files)} in all" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "bert"}, "the installed mlx-lm has no architecture 'bert'"),
        ({"hidden_act": "gelu"}, "config.json says hidden_act 'gelu'"),
        ({"num_hidden_layers": 5}, "9 tensors do not fit config.json (missing"),
        ({"num_hidden_layers": None}, "config.json lacks num_hidden_layers"),
    ],
)
def test_what_stands_in_the_way_is_said(dense, changes, problem):
    directory = dense(**changes)
    found = describe(directory)
    assert len(found.problems) == 1 and problem in found.problems[0] and found.commands == ()
    result = inspect(directory)
    assert result.exit_code == 0
    assert [line for line in result.stdout.splitlines() if line.startswith("problem")]


def test_what_convert_would_refuse_is_found(dense):
    directory = dense()
    (directory / "tokenizer.json").unlink()
    assert "holds neither a tokenizer.json nor" in describe(directory).problems[0]
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    found = describe(directory)
    assert found.quantised == "awq" and "its weights are quantised (awq)" in found.problems[0]


@pytest.mark.parametrize("names", ["llama", "fused"])
def test_a_state_dict_in_other_names(saved, write_tokenizer, tmp_path, names):
    directory, model = saved(mlp_bias=True)
    write_tokenizer(tmp_path)
    export(directory, tmp_path / "duo.pt", names=names)
    alone = describe(tmp_path / "duo.pt")
    assert (alone.kind, alone.format, alone.key_map, alone.architecture) == ("Duo", "PyTorch", names, None)
    found = describe(tmp_path / "duo.pt", config=directory / "config.json")
    assert found.key_map == names and found.problems == () and found.mlp_bias
    assert (found.intermediate_size, found.small_intermediate_size, found.layers) == (24, 8, 4)
    assert found.parameters == sum(value.size for value in checkpoint.parameters(model).values())


def test_without_a_configuration_the_tensors_speak(saved, tmp_path):
    directory, _ = saved()
    export(directory, tmp_path / "a duo.pt")
    found = describe(tmp_path / "a duo.pt")
    assert (found.layers, found.small_layers, found.hidden_size, found.vocab_size) == (4, 4, 16, 32)
    assert (found.attention_heads, found.head_dim, found.tied_head) == (None, None, True)
    assert found.problems == ("there is no config.json; give one with --config FILE",)
    assert found.commands == (f"duo-mlx convert '{tmp_path}/a duo.pt' DST --verify --config FILE",)


def test_names_that_no_map_knows(tmp_path):
    torch.save({"encoder.0.w": torch.ones(3, 2), "encoder.1.w": torch.ones(2)}, tmp_path / "other.pt")
    found = describe(tmp_path / "other.pt")
    assert (found.kind, found.key_map, found.tensors, found.parameters) == ("unknown", None, 2, 8)
    assert len(found.problems) == 1 and "fit none of the key maps" in found.problems[0]
    assert found.commands == (f"duo-mlx convert {tmp_path}/other.pt DST --key-map FILE --dry-run",)


def test_a_router_and_layers_without_a_small_ffn_are_seen(saved, tmp_path):
    directory, model = saved()
    weights = checkpoint.parameters(model)
    weights = {name: value for name, value in weights.items() if "layers.0.mlp.small" not in name}
    shards.write(tmp_path, shards.held(weights | {"model.layers.1.mlp.router.weight": mx.zeros((3, 16))}))
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    found = describe(tmp_path)
    assert found.router and (found.layers, found.small_layers) == (4, 3)
    assert {"router      yes", "FFN         big 24 wide, small 8 wide in 3 layers"} <= set(found.lines())


def test_a_gguf_file(saved, llama_twin, tmp_path):
    theirs = {new: old for old, new in (*gguf.MODEL.items(), *gguf.LAYER.items())}
    pattern = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
    weights = {
        f"blk.{match[1]}.{theirs[match[2]]}.weight"
        if (match := pattern.fullmatch(name))
        else f"{theirs[name.removesuffix('.weight')]}.weight": value
        for name, value in checkpoint.parameters(llama_twin(saved()[1])).items()
    }
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": mx.array(4, mx.uint32),
        "llama.embedding_length": mx.array(16, mx.uint32),
        "llama.feed_forward_length": mx.array(24, mx.uint32),
        "llama.attention.head_count": mx.array(4, mx.uint32),
        "llama.attention.head_count_kv": mx.array(2, mx.uint32),
        "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
        "llama.context_length": mx.array(64, mx.uint32),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    mx.save_gguf(str(tmp_path / "dense.gguf"), weights, metadata)
    found = describe(tmp_path / "dense.gguf")
    assert (found.kind, found.format, found.key_map, found.architecture) == ("dense", "GGUF", "canonical", "llama")
    assert (found.layers, found.hidden_size, found.attention_heads, found.key_value_heads) == (4, 16, 4, 2)
    assert (found.intermediate_size, found.vocab_size, found.tied_head) == (24, 32, True)
    assert found.tokenizer == "in the GGUF file, gpt2, 3 entries, with a chat template"
    assert found.problems == () and found.commands[0].endswith("dense.gguf DST --graft --calibrate TEXT")


def test_tokenizers(dense):
    directory = dense()
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert describe(directory).tokenizer == "tokenizer.json, WordLevel, 32 entries, with a chat template"
    (directory / "tokenizer.json").write_text("[]")
    assert describe(directory).tokenizer == "tokenizer.json, which is damaged"
    (directory / "tokenizer.json").unlink()
    assert describe(directory).tokenizer is None
    (directory / "tokenizer.model").write_bytes(b"")
    assert describe(directory).tokenizer == "tokenizer.model, sentencepiece"


def test_what_is_damaged_or_absent_is_one_line(saved, tmp_path):
    directory, _ = saved(**WIDE)
    result = inspect(tmp_path / "absent")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert "there is no such file or directory" in result.stderr
    quantise(directory, tmp_path, bits=4, group_size=32)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DuoError, match="model.safetensors: is damaged or no safetensors file"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(DuoError, match="config.json: must hold a JSON object"):
        describe(tmp_path)


def test_a_hub_id_goes_to_the_reader_with_its_revision(saved, monkeypatch):
    from duo_mlx.convert import inspection

    asked = []

    def opened(source, **options):
        asked.append((source, options))
        return readers.open_checkpoint(saved()[0])

    monkeypatch.setattr(inspection, "open_checkpoint", opened)
    result = inspect("owner/name", "--revision", "v1", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["source"] == "owner/name"
    assert asked == [("owner/name", {"config": None, "revision": "v1", "bare": True})]
