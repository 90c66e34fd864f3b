"""The comparison of grafts: its own rough method is the obvious one, and each method changes what it says."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from duo_mlx.bench import graft as bench
from duo_mlx.convert.dense import host
from duo_mlx.convert.graft import Grafted
from duo_mlx.convert.graft.solve import Copyable, Moments
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError


@pytest.fixture
def dense(tiny_model, llama_twin, tiny_config):
    """A dense model's tensors, configuration and mlx-lm's llama of the same weights."""
    twin = llama_twin(tiny_model(intermediate_size=160))
    tensors = {name: Tensor.of(value) for name, value in tree_flatten(twin.parameters())}
    return tensors, tiny_config(intermediate_size=160, small_intermediate_size=None) | {"model_type": "llama"}, twin


def test_the_rough_method_takes_the_loudest_neurons_and_regresses():
    random = np.random.default_rng(0)
    x, neurons = random.standard_normal((500, 3)), random.standard_normal((500, 8)) * np.arange(1, 9)
    down = np.ones((2, 8))
    target = neurons @ down.T
    features = np.concatenate([x, np.ones((500, 1)), neurons], axis=1)
    moments = Moments(features.T @ features, features.T @ target, 3, 500)
    gate = random.standard_normal((8, 3)).astype(np.float32)
    big = Copyable(gate, np.zeros(8, np.float32), gate, np.zeros(8, np.float32))
    small = bench.rough(moments, big, np.eye(2), 3, 1, "silu")
    assert sorted(small.gate.tolist()) == sorted(gate[5:].tolist())  # all count alike, so the loudest three
    picked = [int(np.flatnonzero((gate == row).all(axis=1))[0]) for row in small.gate]
    gram = neurons[:, picked].T @ neurons[:, picked]
    ridge = bench.RIDGE * np.trace(gram) / 3 * np.eye(3)
    np.testing.assert_allclose(small.down, np.linalg.solve(gram + ridge, neurons[:, picked].T @ target).T, rtol=1e-4)


def test_losses_are_those_of_the_whole_model(dense):
    tensors, config, twin = dense
    model = host(
        {name.replace(".mlp.", ".mlp.big."): tensor for name, tensor in tensors.items()},
        config | {"model_type": "duo", "small_layers": []},
    )
    windows = np.random.default_rng(0).integers(0, 32, (2, 33)).astype(np.int32)
    width = 5
    random = np.random.default_rng(1)
    shapes = {"gate_proj": (width, 16), "up_proj": (width, 16), "down_proj": (16, width)}
    smalls = {}
    for layer in range(4):
        for name, shape in shapes.items():
            prefix = f"model.layers.{layer}.mlp.small.{name}"
            smalls[f"{prefix}.weight"] = Tensor.of(mx.array(random.standard_normal(shape).astype(np.float32)))
            smalls[f"{prefix}.bias"] = Tensor.of(mx.array(random.standard_normal(shape[0]).astype(np.float32)))
    extra = {"small_intermediate_size": width, "small_bias": True}
    found = bench.losses(model, Grafted(smalls, extra, {}), windows)
    assert found.keys() == bench.patterns(4).keys()

    def expected(pattern):
        h = twin.model.embed_tokens(mx.array(windows[:, :-1]))
        for index, (layer, route) in enumerate(zip(twin.model.layers, pattern, strict=True)):
            h = h + layer.self_attn(layer.input_layernorm(h), "causal", None)
            x = layer.post_attention_layernorm(h)
            h = h + (layer.mlp(x) if route == "B" else small_of(smalls, index, x))
        logits = np.array(twin.model.embed_tokens.as_linear(twin.model.norm(h))).astype(np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logits, windows[:, 1:, None], -1).mean()

    for name, pattern in bench.patterns(4).items():
        assert found[name] == pytest.approx(expected(pattern), rel=1e-5)


def small_of(smalls, index, x):
    """What a layer's small FFN gives, by its definition."""
    parts = {
        f"{part}{kind}": smalls[f"model.layers.{index}.mlp.small.{part}_proj.{kind}"].load()
        for part in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }
    gate, up = (x @ parts[f"{name}weight"].T + parts[f"{name}bias"] for name in ("gate", "up"))
    return (nn.silu(gate) * up) @ parts["downweight"].T + parts["downbias"]


def test_patterns_of_thirty_layers():
    assert bench.patterns(30) == {
        "all big": "B" * 30,
        "all small": "s" * 30,
        "first and last big": "B" + "s" * 28 + "B",
        "alternating": "Bs" * 15,
        "first and last 5 big, alternating between": "BBBBB" + "sB" * 10 + "BBBBB",
    }


def test_the_command_compares_methods_on_held_out_text(dense, write_tokenizer, tmp_path):
    tensors, config, _ = dense
    (tmp_path / "dense").mkdir()
    mx.save_safetensors(str(tmp_path / "dense/model.safetensors"), {k: v.load() for k, v in tensors.items()})
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    write_tokenizer(tmp_path / "dense")
    walk = np.cumsum(np.random.default_rng(0).choice([1, 2, 5], 12000)) % 30
    for name in ("a", "b"):
        (tmp_path / name).write_text(" ".join(f"w{word}" for word in walk))
    options = [tmp_path / "dense", tmp_path / "a", tmp_path / "b", "--tokens", "4096", "--held-out", "512"]
    for method in bench.METHODS:
        options += ["--method", method]
    done = CliRunner().invoke(bench.command, [*map(str, options), "--out", str(tmp_path / "out.json")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out.json").read_text())
    found = record["nats_per_token"]
    assert found.keys() == bench.METHODS.keys()
    assert len({row["all big"] for row in found.values()}) == 1
    assert len({row["all small"] for row in found.values()}) == len(found)  # no two methods are the same


def test_a_text_whose_end_is_too_short_is_one_line(tmp_path):
    with pytest.raises(DuoError, match="its last 5% has 5 tokens"):
        bench.held_out_windows([tmp_path / "a"], [np.zeros(100, np.int32)], 512)
