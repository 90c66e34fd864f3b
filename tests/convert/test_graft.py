"""Grafting: small FFNs that do what they are for on any base, resuming, what is refused, and a metric that is true."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx.config import Config
from duo_mlx.convert.graft import LEAST, WINDOW, Graft, cut, graft, importance
from duo_mlx.convert.graft.layers import Layers
from duo_mlx.convert.graft.state import State
from duo_mlx.errors import DuoError
from duo_mlx.model import Model

SETTINGS = Graft("own", small_ratio=8, tokens=LEAST)
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "rms_norm_eps": 1e-5}
CONTEXT = {"max_position_embeddings": 512, "rope_theta": 1e4}
BASES = {
    "llama": SIZES | HEADS | {"bos_token_id": 1},
    "qwen3": SIZES | HEADS | CONTEXT | {"tie_word_embeddings": True},
    "gemma2": SIZES | HEADS | {"query_pre_attn_scalar": 4.0},
    "phi": SIZES | CONTEXT | {"num_attention_heads": 4, "num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": SIZES | HEADS | CONTEXT | {"original_max_position_embeddings": 512, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 16, "n_head": 4, "n_layer": 3, "n_ctx": 512, "n_positions": 512, "vocab_size": 32}
    | {"layer_norm_epsilon": 1e-5, "num_key_value_heads": 4},
    "qwen3_moe": SIZES
    | HEADS
    | CONTEXT
    | {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    | {"moe_intermediate_size": 24, "tie_word_embeddings": True, "norm_topk_prob": True},
}
COPIED = ("llama", "qwen3", "gemma2", "phi", "phi3", "gpt2")  # whose neurons can be named


@pytest.fixture(scope="module")
def ids():
    """A text with some order in it: each token is likely followed by the next."""
    random = np.random.default_rng(0)
    return np.cumsum(random.choice([1, 1, 1, 2, 7], LEAST)).astype(np.int32) % 30 + 2


def dense(kind="llama", seed=0, **changes):
    """A dense model with random weights, hosted."""
    base = BASES[kind] | changes | {"model_type": "duo", "base_model_type": kind}
    model = Model(Config.from_dict(base | {"small_layers": [], "small_intermediate_size": 1}))
    random = np.random.default_rng(seed)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        drawn = random.standard_normal(value.shape)
        drawn = drawn / value.shape[-1] ** 0.5 if value.ndim > 1 else drawn / 5 + name.endswith("norm.weight")
        weights.append((name, mx.array(drawn.astype(np.float32))))
    model.load_weights(weights)
    return model


def duo(model, smalls, extra):
    """The model that convert would write."""
    keys = {key: value for key, value in model.config.to_dict().items() if not key.startswith("small_")}
    made = Model(Config.from_dict(keys | extra))
    weights = dict(tree_flatten(model.parameters())) | {name: tensor.load() for name, tensor in smalls.items()}
    made.load_weights(list(weights.items()))
    return made


def distances(model, ids, hidden):
    """How far the FFN outputs of small, and nothing, are from big's on what goes into them, of big's own size."""
    windows, errors = mx.array(ids[: 8 * 128].reshape(8, 128)), []

    def compare(ffn, x):
        big = ffn.big(x)
        errors.append((mx.square(ffn.small(x) - big).mean() / mx.square(big).mean()).item())
        return big

    model(windows, on_ffn=compare)
    assert len(errors) == 3 and hidden == 16
    return errors


@pytest.mark.parametrize("kind", BASES)
def test_small_is_nearer_to_big_than_nothing_and_copied_neurons_help(kind, ids, tmp_path):
    model = dense(kind)
    before = model(mx.array(ids[None, :64]))
    errors = {}
    for share in (0.5, 1.0):
        settings = Graft("own", small_ratio=4, tokens=LEAST, linear_share=share)
        smalls, extra, _ = graft(model, ids, settings, tmp_path / str(share))
        made = duo(model, smalls, extra)
        assert mx.allclose(made(mx.array(ids[None, :64])), before, atol=1e-4).item()
        errors[share] = np.mean(distances(made, ids, model.config.hidden_size))
    assert extra.get("small_activation", "silu") == ("gelu_tanh" if kind in ("gemma2", "phi", "gpt2") else "silu")
    assert errors[0.5] < 0.9 and errors[1.0] < 0.95
    rows = np.array(smalls[f"{model.ffn_paths[1]}.small.gate_proj.weight"].load())
    assert not rows.any()
    if kind not in COPIED:
        assert errors[0.5] == errors[1.0]  # all neurons are linear


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2"])
def test_copied_neurons_are_the_modules_own_also_of_a_quantised_one(kind, ids, tmp_path):
    model = dense(kind, **({"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 64}))
    if kind != "gpt2":
        nn.quantize(model, 32, 8, class_predicate=lambda path, _: ".big." in path)
    smalls, extra, _ = graft(model, ids, SETTINGS, tmp_path / "state")
    gates = np.array(smalls[f"{model.ffn_paths[0]}.small.gate_proj.weight"].load())
    copied = gates[extra["small_intermediate_size"] // 2 :]
    big = model.ffns[0].big
    part = big.c_fc if kind == "gpt2" else big.gate_up_proj if kind == "phi3" else big.gate_proj
    rows = part.weight
    if isinstance(part, nn.QuantizedLinear):
        rows = mx.dequantize(part.weight, part.scales, part.biases, part.group_size, part.bits)
    rows = np.array(rows)
    assert len(copied) >= 4 and all((np.abs(rows - row).max(axis=1) < 1e-6).any() for row in copied)


def test_a_base_that_does_not_open_is_refused_by_name(ids, tmp_path):
    model = dense()
    vars(model)["opens"] = False
    with pytest.raises(DuoError, match="the layers of a llama cannot be run one by one"):
        graft(model, ids, SETTINGS, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_every_tensor_fits_the_configuration_and_weights_stay(ids, tmp_path):
    model = dense()
    model.set_dtype(mx.bfloat16)
    smalls, extra, _ = graft(model, ids, SETTINGS, tmp_path / "state")
    assert extra == {"small_intermediate_size": 6, "small_bias": True}
    expected = {n: v.shape for n, v in tree_flatten(duo(model, smalls, extra).parameters()) if ".small." in n}
    assert {name: tensor.shape for name, tensor in smalls.items()} == expected
    assert all(tensor.load().dtype == mx.float32 and tensor.dtype == "float32" for tensor in smalls.values())
    assert {value.dtype for _, value in tree_flatten(model.parameters())} == {mx.bfloat16}


def test_layers_that_are_left_big_only(ids, tmp_path):
    model = dense()
    smalls, extra, _ = graft(
        model, ids, Graft("own", small_ratio=8, tokens=LEAST, small_layers=(2, 0)), tmp_path / "state"
    )
    assert extra["small_layers"] == [0, 2]
    assert {name.split(".")[2] for name in smalls} == {"0", "2"}
    duo(model, smalls, extra)


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 6, 7, 8])
def test_an_interrupted_graft_goes_on_where_it_was(ids, tmp_path, after):
    model = dense()
    whole, *_ = graft(model, ids, SETTINGS, tmp_path / "whole")

    def stop(done, total):
        assert total == 9
        if done == after:
            raise StopError

    with pytest.raises(StopError):
        graft(model, ids, SETTINGS, tmp_path / "state", stop)
    steps, notes = [], []
    again, *_ = graft(model, ids, SETTINGS, tmp_path / "state", lambda done, _: steps.append(done), notes.append)
    assert steps == list(range(after + 1 if after >= 6 else 1, 10))
    assert len(notes) == (after > 6) and all("resuming the graft" in note for note in notes)
    for name, tensor in whole.items():
        assert mx.array_equal(tensor.load(), again[name].load()).item(), name


def test_another_graft_does_not_go_on_from_this_ones_state(ids, tmp_path):
    model = dense()
    graft(model, ids, SETTINGS, tmp_path / "state")
    other = dense()
    other.layers[1].input_layernorm.weight = model.layers[1].input_layernorm.weight + 1
    for changed in (
        (model, ids, Graft("own", small_ratio=8, tokens=LEAST, seed=1)),
        (dense(rope_theta=5.0), ids, SETTINGS),
        (model, np.roll(ids, 1), SETTINGS),
        (other, ids, SETTINGS),
    ):
        with pytest.raises(DuoError, match="another model, text or setting"):
            graft(*changed, tmp_path / "state")
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").mkdir()
    with pytest.raises(DuoError, match="is in the way"):
        graft(model, ids, SETTINGS, tmp_path / "state")


def test_a_seed_gives_the_same_graft_and_another_seed_another(ids, tmp_path):
    model = dense()
    results = []
    for number, seed in enumerate((3, 3, 4)):
        settings = Graft("own", small_ratio=8, tokens=LEAST, seed=seed)
        smalls, *_ = graft(model, ids, settings, tmp_path / str(number))
        results.append(np.array(smalls["model.layers.2.mlp.small.down_proj.weight"].load()))
    np.testing.assert_array_equal(results[0], results[1])
    assert not np.allclose(results[0], results[2])


@pytest.mark.parametrize(
    ("changes", "count", "line"),
    [
        ({"small_ratio": 1}, LEAST, "--small-ratio is 1"),
        ({"small_ratio": 40}, LEAST, "leaves 1 of 48 neurons"),
        ({"tokens": 100}, LEAST, "--calibration-tokens is 100"),
        ({"small_layers": (1, 3)}, LEAST, "names layer 3, but the 3 layers are 0 to 2"),
        ({}, LEAST - 1, f"have {LEAST - 1} tokens for the graft; at least {LEAST}"),
    ],
)
def test_what_cannot_be_grafted_is_one_line(ids, tmp_path, changes, count, line):
    model = dense()
    with pytest.raises(DuoError, match=line) as refused:
        settings = Graft(**{"kind": "own", "small_ratio": 8, "tokens": LEAST} | changes)
        graft(model, ids[:count], settings, tmp_path / "state")
    assert "\n" not in str(refused.value) and not (tmp_path / "state").exists()


def test_every_other_window_begins_as_a_chat_does(ids):
    windows = cut(ids, {"bos_token_id": 1})
    assert windows.shape == (16, WINDOW) and (windows[::2, 0] == 1).all() and (windows[1::2, 0] != 1).all()
    np.testing.assert_array_equal(windows[:, 1:], cut(ids, {})[:, 1:])
    np.testing.assert_array_equal(cut(ids, {"bos_token_id": None}).ravel(), ids)


def test_a_position_is_heard_by_those_that_attend_to_it(ids):
    model = dense()
    layers = Layers(model, 20)
    h = mx.array(layers.embed(ids[:400].reshape(20, 20)))
    found = np.array(importance.heard(layers, 1, h))
    assert found.shape == (20, 1)
    assert (np.array(importance.heard(layers, 3, h)) == 1).all()  # nobody hears what the last layer says
    attention = model.layers[1].self_attn
    attention.o_proj.weight = mx.zeros_like(attention.o_proj.weight)
    np.testing.assert_allclose(np.array(importance.heard(layers, 1, h)), 1, rtol=1e-5)  # its own state alone
    assert found.min() > 0.5 and np.abs(found - 1).max() > 0.02


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_metric_is_of_the_gradient_by_what_the_ffns_say(kind, ids, tmp_path, monkeypatch):
    model = dense(kind)
    monkeypatch.setattr(importance, "_root", lambda gradient: gradient)
    windows = cut(ids, model.config.base)
    state, steps = State(tmp_path / "state", {}), []
    importance.measure_metrics(Layers(model, WINDOW), windows, state, lambda: steps.append(1))
    assert len(steps) == 6

    def said(nudges, row, tokens):
        logits = model(row, on_ffn=lambda ffn, x: ffn.big(x) + nudges[ffn.index])
        return -nn.losses.cross_entropy(logits, tokens, reduction="sum")

    for number in (0, 5):
        row = mx.array(windows[number : number + 1])
        tokens = mx.random.categorical(model(row)[0], key=mx.random.key(number))[None]
        gradients = mx.grad(said)([mx.zeros((1, WINDOW, 16))] * 3, row, tokens)
        for index, gradient in enumerate(gradients):
            np.testing.assert_allclose(state.load(f"metric-{index}")[number], np.array(gradient[0]), atol=2e-4)


def test_a_metric_is_symmetric_and_of_the_same_size_whatever_the_gradient():
    gradient = np.random.default_rng(0).standard_normal((4, 9, 6)).astype(np.float32) * np.arange(6, dtype=np.float32)
    root = importance._root(gradient * 1000)
    np.testing.assert_allclose(root, root.T, atol=1e-12)
    assert np.trace(root @ root) == pytest.approx(6)
    np.testing.assert_allclose(root, importance._root(gradient), rtol=1e-5, atol=1e-9)
    assert np.diff(np.diag(root)).min() > 0  # louder channels count more
    gradient[:, 0] = 1e6  # a window's first token is left out
    np.testing.assert_allclose(root, importance._root(gradient), rtol=1e-5, atol=1e-9)


def test_a_state_is_written_whole(tmp_path, monkeypatch):
    state = State(tmp_path / "state", {"seed": 1})
    state.save("a", np.arange(3))

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(np, "save", fail)
    with pytest.raises(OSError, match="no space"):
        state.save("a", np.zeros(3))
    assert state.load("a").tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "state" / "graft.json").read_text()) == {"seed": 1}
