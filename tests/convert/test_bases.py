"""Dense models of many architectures as sources: transformers' own directories, and what mlx-lm quantised."""

import json
import sys
import types

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model, quantize_model, save_model
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import duo_mlx
from duo_mlx import checkpoint, guard, hosting
from duo_mlx.config import Config
from duo_mlx.convert import dense, stored
from duo_mlx.convert import directory as converting
from duo_mlx.convert import guard as conversion_guard
from duo_mlx.convert.calibration import Calibration
from duo_mlx.convert.directory import Bits, convert
from duo_mlx.convert.source import open_source
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
BASES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 32},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "glm4": {},
    "granite": {},
    "mixtral": {"num_local_experts": 4},
    "smollm3": {},
}
GPT2 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


class Graft:
    """Stands in for the solving of small FFNs, which has tests of its own: theirs are random."""

    small_layers = None
    tokens = 256


def small_ffns(model, *_):
    random = np.random.default_rng(0)
    hidden = model.config.hidden_size
    shapes = {"gate_proj": (32, hidden), "up_proj": (32, hidden), "down_proj": (hidden, 32)}
    smalls = {
        f"{path}.small.{name}.weight": Tensor.of(mx.array(random.normal(0, 0.1, shape).astype(np.float32)))
        for path in model.ffn_paths
        for name, shape in shapes.items()
    }
    return types.SimpleNamespace(tensors=smalls, config={"small_intermediate_size": 32}, orders={})


@pytest.fixture
def grafted(monkeypatch, tmp_path):
    """``grafted(source, **options)``: the Duo that `convert` makes of a dense directory."""

    def make(source, **options):
        (tmp_path / "text.txt").write_text(" ".join(f"w{number % 29}" for number in range(300)))
        solver = types.ModuleType("duo_mlx.convert.graft")
        solver.graft = small_ffns
        monkeypatch.setitem(sys.modules, solver.__name__, solver)
        texts = Calibration((tmp_path / "text.txt",), 0)
        convert(source, tmp_path / "duo", graft=Graft(), calibrate=texts, **options)
        return tmp_path / "duo"

    return make


@pytest.fixture
def source(write_tokenizer, tmp_path):
    """``source(kind)``: a directory that transformers wrote, and its model."""

    def make(kind, dtype=torch.float32):
        torch.manual_seed(0)
        sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key not in GPT2}
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | BASES[kind])).eval()
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.add_(torch.randn_like(value) * (0.2 if value.ndim > 1 else 0.02) * ("embed" not in name))
        model.to(dtype).save_pretrained(tmp_path / "dense")
        write_tokenizer(tmp_path / "dense")
        return tmp_path / "dense", model

    return make


def weights_of(directory):
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found


@pytest.mark.parametrize("kind", BASES)
def test_every_base_becomes_a_duo_that_is_itself_by_all_big(source, grafted, kind):
    directory, theirs = source(kind)
    duo = grafted(directory)
    config = json.loads((duo / "config.json").read_text())
    assert (config["model_type"], config["base_model_type"], config["duo_version"]) == ("duo", kind, 1)
    said = json.loads((directory / "config.json").read_text())
    assert all(
        config[key] == value for key, value in said.items() if key not in ("model_type", "_name_or_path") and value
    )
    model, _ = duo_mlx.load(duo)
    tokens = np.random.default_rng(1).integers(0, 32, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = np.array(guard.all_big(model, mx.array(tokens)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    stored_model = checkpoint.read_model(duo)
    assert mx.array_equal(
        guard.all_big(stored_model, mx.array(tokens)), hosting.without(stored_model)(mx.array(tokens))
    ).item()
    small = np.array(model(mx.array(tokens), routes=[1, 2, 1, 2]))
    assert np.isfinite(small).all() and not np.allclose(small, logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_stock_mlx_lm_loads_and_generates(source, grafted, kind):
    directory, _ = source(kind)
    duo = grafted(directory)
    model, tokenizer = mlx_lm.load(str(duo), trust_remote_code=True)
    said = mlx_lm.generate(model, tokenizer, "w1 w2 w3", max_tokens=4)
    ours = duo_mlx.generate(*duo_mlx.load(duo), "w1 w2 w3", max_tokens=4)
    assert said == ours


RECIPES = {
    "4 bits": {"bits": 4, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mixed": {"bits": 4, "group_size": 32},
}


def mixed(path, module):
    if "down_proj" in path or "lm_head" in path:
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    return hasattr(module, "to_quantized") and "v_proj" not in path


@pytest.fixture
def quantised(source, write_tokenizer, tmp_path):
    """``quantised(kind, recipe)``: a directory in which mlx-lm quantised a model."""

    def make(kind, recipe):
        directory, _ = source(kind)
        said = open_source(directory, graft=True).config
        model, config = load_model(directory, model_config={"rope_theta": said["rope_theta"]})
        predicate = mixed if recipe == "mixed" else None
        model, config = quantize_model(model, config, **RECIPES[recipe], quant_predicate=predicate)
        made = tmp_path / "quantised"
        made.mkdir()
        save_model(made, model)
        (made / "config.json").write_text(json.dumps(config))
        write_tokenizer(made)
        return made

    return make


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("small_bits", [None, 8])
def test_big_stays_byte_for_byte_what_mlx_lm_quantised(quantised, grafted, recipe, small_bits):
    directory = quantised("qwen2", recipe)
    duo = grafted(directory, bits=Bits(None, small_bits, 32) if small_bits else None)
    theirs, ours = weights_of(directory), weights_of(duo)
    for name, value in theirs.items():
        found = ours[name.replace(".mlp.", ".mlp.big.")]
        assert found.dtype == value.dtype and mx.array_equal(found, value).item(), name
    assert {ours[name].dtype for name in ours if ".small." in name} <= {mx.float32, mx.uint32}
    assert ("model.layers.0.mlp.small.up_proj.scales" in ours) is (small_bits is not None)
    assert sum(".small." not in name for name in ours) == len(theirs)
    model, tokens = checkpoint.read_model(duo), mx.array([[3, 9, 4, 20]])
    assert mx.array_equal(guard.all_big(model, tokens), load_model(directory)[0](tokens)).item()
    assert mx.array_equal(mlx_lm.load(str(duo), trust_remote_code=True)[0](tokens), guard.all_big(model, tokens)).item()


def test_a_quantised_source_takes_neither_bits_nor_a_type(quantised, grafted, tmp_path):
    directory = quantised("llama", "4 bits")
    with pytest.raises(DuoError, match="--bits: .* is quantised, and big stays as it is stored"):
        grafted(directory, bits=Bits(4, None, 32))
    with pytest.raises(DuoError, match="--dtype float16: .* is quantised"):
        grafted(directory, dtype="float16")
    assert not (tmp_path / "duo").exists()


@pytest.mark.parametrize("kind", ["gpt2", "qwen3_moe"])
def test_what_sanitize_computes_is_computed_when_it_is_loaded(source, kind):
    directory, _ = source(kind)
    found = open_source(directory, graft=True)
    made = [tensor for tensor in found.tensors.values() if tensor.pieces is None]
    assert made and len(made) < len(found.tensors)
    for tensor in found.tensors.values():
        value = tensor.load()
        assert value.shape == tensor.shape and value.dtype == getattr(mx, tensor.dtype)
    if kind == "gpt2":
        name = "h.1.mlp.c_fc.weight"
        theirs = load_file(directory / "model.safetensors")[f"transformer.{name}"]
        np.testing.assert_array_equal(
            np.array(found.tensors[f"model.{name}".replace("mlp", "mlp.big")].load()), theirs.T
        )
    else:
        config = Config.from_dict(found.config).base
        expected = checkpoint.parameters(load_model(directory, model_config=config)[0])
        for name, tensor in found.tensors.items():
            assert mx.array_equal(tensor.load(), expected[name.replace(".mlp.big.", ".mlp.")]).item()
        assert "mlp.experts.0.up_proj.weight + ... +" in found.table()


def test_a_duo_of_another_base_from_pytorch(source, write_tokenizer, tmp_path):
    directory, theirs = source("gpt2")
    state = {name.replace(".mlp.", ".mlp.big."): value for name, value in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    for layer in range(4):
        prefix = f"transformer.h.{layer}.mlp"
        for name, shape in {"gate_proj": (8, 32), "up_proj": (8, 32), "down_proj": (32, 8)}.items():
            state[f"{prefix}.small.{name}.weight"] = torch.randn(shape) / 8
        state[f"{prefix}.router.weight"] = torch.randn(2, 32)
    trained = tmp_path / "trained"
    trained.mkdir()
    torch.save(state, trained / "pytorch_model.bin")
    config = json.loads((directory / "config.json").read_text()) | {
        "small_intermediate_size": 8,
        "router_choices": "sB",
    }
    (trained / "config.json").write_text(json.dumps(config))
    write_tokenizer(trained)
    convert(trained, tmp_path / "duo")
    model, _ = duo_mlx.load(tmp_path / "duo")
    weights = checkpoint.parameters(model)
    for part in ("small.up_proj.weight", "router.weight"):
        ours, given = weights[f"model.h.2.mlp.{part}"], state[f"transformer.h.2.mlp.{part}"]
        np.testing.assert_array_equal(np.array(ours), given.numpy())
    tokens = np.random.default_rng(1).integers(0, 32, (1, 20))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.array(guard.all_big(model, mx.array(tokens))), expected, atol=1e-4)


def test_a_base_that_is_not_itself_is_refused_and_leaves_nothing(source, grafted, monkeypatch, tmp_path):
    directory, _ = source("qwen3")
    monkeypatch.setattr(guard, "all_big", lambda model, tokens: model(tokens, routes=[2, 2, 1, 2]) + 1)
    with pytest.raises(DuoError, match="no Duo can be hosted in a qwen3: with all routes big") as error:
        grafted(directory)
    assert "\n" not in str(error.value) and not (tmp_path / "duo").exists()


def test_numbers_are_held_against_mlx_lms_own_model(source, grafted, monkeypatch):
    directory, _ = source("llama")
    write = converting.write_weights

    def spoil(target, tensors, **options):
        name = "model.layers.1.mlp.big.up_proj.weight"
        write(target, {**tensors, name: Tensor.of(tensors[name].load() + 0.01)}, **options)

    monkeypatch.setattr(converting, "write_weights", spoil)
    with pytest.raises(DuoError, match="no Duo can be hosted in a llama"):
        grafted(directory)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"duo_version": 2}, "the Duo is of version 2 and this package reads 1; a newer one may read it"),
        ({"base_model_type": "gone"}, "the installed mlx-lm has no architecture 'gone'"),
    ],
)
def test_a_directory_that_cannot_be_read_is_one_line(saved, tmp_path, changes, line):
    directory, model = saved()
    config = json.loads((directory / "config.json").read_text()) | changes
    checkpoint.save(tmp_path, config, checkpoint.parameters(model))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DuoError, match=line) as error:
        checkpoint.read_model(tmp_path)
    assert "\n" not in str(error.value)


def test_the_guard_of_a_directory_reads_what_was_written(saved, monkeypatch):
    directory, _ = saved()
    conversion_guard.check(directory)
    monkeypatch.setattr(guard, "compare_graphs", lambda _: None)
    monkeypatch.setattr(guard, "all_big", lambda model, tokens: model(tokens, routes=[2, 2, 1, 2]))
    with pytest.raises(DuoError, match="no Duo can be hosted in a llama"):
        conversion_guard.check(directory)


def test_hosting_reads_a_dense_directory_lazily(source, grafted):
    directory, _ = source("qwen3")
    found = open_source(directory, graft=True)
    model = dense.host(found.tensors, found.config)
    assert model.config.small_layers == () and model.kind == "qwen3"
    duo = grafted(directory)
    assert stored.headers(duo / "model.safetensors").keys() == found.tensors.keys()
