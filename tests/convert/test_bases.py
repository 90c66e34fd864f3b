"""Dense models of many architectures as sources: transformers' own directories."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from safetensors.torch import load_file

import duo_mlx
from duo_mlx import checkpoint, guard, hosting
from duo_mlx.config import Config
from duo_mlx.convert import dense, stored
from duo_mlx.convert import directory as converting
from duo_mlx.convert import guard as conversion_guard
from duo_mlx.convert.directory import convert
from duo_mlx.convert.source import open_source
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from tests.convert.dense_kinds import BASES


@pytest.mark.parametrize("kind", BASES)
def test_every_base_becomes_a_duo_that_is_itself_by_all_big(source, grafted, kind):
    directory, theirs = source(kind)
    duo = grafted(directory)
    config = checkpoint.read_config(duo)
    assert (config["model_type"], config["base_model_type"], config["duo_version"]) == ("duo", kind, 2)
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
    monkeypatch.setattr(guard, "all_big", lambda model, tokens, **_: model(tokens, routes=[2, 2, 1, 2]) + 1)
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
        ({"base_config": []}, r"base_config is \[\]; it must be an object"),
        ({"duo_version": 3}, "the Duo is of version 3 and this package reads 2; a newer one may read it"),
        ({"base_model_type": "gone"}, "the installed mlx-lm has no architecture 'gone'"),
    ],
)
def test_a_directory_that_cannot_be_read_is_one_line(saved, tmp_path, changes, line):
    directory, model = saved()
    config = json.loads((directory / "config.json").read_text())
    checkpoint.save(tmp_path, config, checkpoint.parameters(model))
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DuoError, match=line) as error:
        checkpoint.read_model(tmp_path)
    assert "\n" not in str(error.value)


def test_the_guard_of_a_directory_reads_what_was_written(saved, monkeypatch):
    directory, _ = saved()
    conversion_guard.check(directory)
    monkeypatch.setattr(guard, "compare_graphs", lambda _: None)
    monkeypatch.setattr(guard, "all_big", lambda model, tokens, **_: model(tokens, routes=[2, 2, 1, 2]))
    with pytest.raises(DuoError, match="no Duo can be hosted in a llama"):
        conversion_guard.check(directory)


@pytest.mark.parametrize("layer", [1, 3])
def test_the_guard_of_a_deep_duo_looks_at_its_first_layers(saved, monkeypatch, layer):
    directory, _ = saved()
    monkeypatch.setattr(conversion_guard, "LAYERS", 2)
    monkeypatch.setattr(guard, "compare_graphs", lambda _: None)
    routes = [1 if index == layer else 2 for index in range(4)]
    monkeypatch.setattr(guard, "all_big", lambda model, tokens, **hooks: model(tokens, routes=routes, **hooks))
    if layer == 1:
        with pytest.raises(DuoError, match="no Duo can be hosted in a llama"):
            conversion_guard.check(directory)
    else:
        conversion_guard.check(directory)


def test_hosting_reads_a_dense_directory_lazily(source, grafted):
    directory, _ = source("qwen3")
    found = open_source(directory, graft=True)
    model = dense.host(found.tensors, found.config)
    assert model.config.small_layers == () and model.kind == "qwen3"
    duo = grafted(directory)
    assert stored.headers(duo / "model.safetensors").keys() == found.tensors.keys()
