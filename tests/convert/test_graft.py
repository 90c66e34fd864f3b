"""Grafting: small FFNs that do what they are for, resuming, what is refused, and a metric of the true gradient."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx.convert.graft import LEAST, WINDOW, Graft, cut, graft, importance
from duo_mlx.convert.graft.layers import Dense
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs

CONFIG = {"num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": 32, "bos_token_id": 1}
SETTINGS = Graft(small_ratio=8, tokens=LEAST)


@pytest.fixture(scope="module")
def ids():
    """A text with some order in it: each token is likely followed by the next."""
    random = np.random.default_rng(0)
    return np.cumsum(random.choice([1, 1, 1, 2, 7], LEAST)).astype(np.int32) % 30 + 2


@pytest.fixture(scope="module")
def dense(tiny_model, tiny_config, llama_twin):
    """``dense(**changes)``: a dense model's tensors, its config, and mlx-lm's llama with the same weights."""

    def make(**changes):
        changes = CONFIG | changes
        bos = changes.pop("bos_token_id")
        twin = llama_twin(tiny_model(**changes))
        tensors = {name: Tensor.of(value) for name, value in tree_flatten(twin.parameters())}
        config = tiny_config(**changes, small_intermediate_size=None) | {"model_type": "llama", "bos_token_id": bos}
        return tensors, config, twin

    return make


def duo(tensors, config, smalls, extra):
    """The model that convert would write."""
    model = Model(ModelArgs.from_dict(config | extra | {"model_type": "duo"}))
    weights = {name.replace(".mlp.", ".mlp.big."): tensor for name, tensor in tensors.items()} | smalls
    model.load_weights([(name, tensor.load()) for name, tensor in weights.items()])
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False, "num_key_value_heads": 1},
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"], "sliding_window": 24, "bos_token_id": None},
    ],
)
def test_all_big_is_the_dense_model_and_small_is_nearer_to_it_than_skip(dense, ids, tmp_path, changes):
    tensors, config, twin = dense(**changes)
    smalls, extra = graft(tensors, config, SETTINGS, ids, tmp_path / "state")
    assert extra == {"small_intermediate_size": 6, "small_bias": True}
    model = duo(tensors, config, smalls, extra)
    windows = ids[: 8 * 128].reshape(8, 128)
    ours, theirs = model(mx.array(windows), routes=[2, 2, 2]), twin(mx.array(windows))
    np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)
    assert mx.array_equal(ours.argmax(-1), theirs.argmax(-1)).item()

    def distance(route):
        return mx.square(model(mx.array(windows), routes=[route] * 3) - theirs).mean().item()

    assert distance(1) < 0.6 * distance(0)


def test_every_tensor_fits_the_configuration(dense, ids, tmp_path):
    tensors, config, _ = dense()
    smalls, extra = graft(tensors, config, SETTINGS, ids, tmp_path / "state")
    model = duo(tensors, config, smalls, extra)
    expected = {name: value for name, value in tree_flatten(model.parameters()) if ".small." in name}
    assert {name: tensor.shape for name, tensor in smalls.items()} == {n: v.shape for n, v in expected.items()}
    assert all(tensor.load().dtype == mx.float32 and tensor.dtype == "float32" for tensor in smalls.values())


def test_layers_that_are_left_big_only(dense, ids, tmp_path):
    tensors, config, _ = dense()
    settings = Graft(small_ratio=8, tokens=LEAST, small_layers=(2, 0))
    smalls, extra = graft(tensors, config, settings, ids, tmp_path / "state")
    assert extra["small_layers"] == [0, 2]
    assert {name.split(".")[2] for name in smalls} == {"0", "2"}
    duo(tensors, config, smalls, extra)


class StopError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 6, 7, 8])
def test_an_interrupted_graft_goes_on_where_it_was(dense, ids, tmp_path, after):
    tensors, config, _ = dense()
    whole, _ = graft(tensors, config, SETTINGS, ids, tmp_path / "whole")

    def stop(done, total):
        assert total == 9
        if done == after:
            raise StopError

    with pytest.raises(StopError):
        graft(tensors, config, SETTINGS, ids, tmp_path / "state", stop)
    steps, notes = [], []
    again, _ = graft(
        tensors, config, SETTINGS, ids, tmp_path / "state", lambda done, _: steps.append(done), notes.append
    )
    assert steps == list(range(after + 1 if after >= 6 else 1, 10))
    assert len(notes) == (after > 6) and all("resuming the graft" in note for note in notes)
    for name, tensor in whole.items():
        assert mx.array_equal(tensor.load(), again[name].load()).item(), name


def test_another_graft_does_not_go_on_from_this_ones_state(dense, ids, tmp_path):
    tensors, config, _ = dense()
    graft(tensors, config, SETTINGS, ids, tmp_path / "state")
    name = "model.layers.1.input_layernorm.weight"
    other = tensors | {name: Tensor.of(tensors[name].load() + 1)}
    text = np.roll(ids, 1)
    for changed in (
        (tensors, config, Graft(small_ratio=8, tokens=LEAST, seed=1), ids),
        (tensors, config | {"rope_theta": 5.0}, SETTINGS, ids),
        (tensors, config, SETTINGS, text),
        (other, config, SETTINGS, ids),
    ):
        with pytest.raises(DuoError, match="another model, text or setting"):
            graft(*changed, tmp_path / "state")
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").mkdir()
    with pytest.raises(DuoError, match="is in the way"):
        graft(tensors, config, SETTINGS, ids, tmp_path / "state")


def test_a_seed_gives_the_same_graft_and_another_seed_another(dense, ids, tmp_path):
    tensors, config, _ = dense()
    results = []
    for number, seed in enumerate((3, 3, 4)):
        settings = Graft(small_ratio=8, tokens=LEAST, seed=seed)
        smalls, _ = graft(tensors, config, settings, ids, tmp_path / str(number))
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
def test_what_cannot_be_grafted_is_one_line(dense, ids, tmp_path, changes, count, line):
    tensors, config, _ = dense()
    with pytest.raises(DuoError, match=line) as refused:
        settings = Graft(**{"small_ratio": 8, "tokens": LEAST} | changes)
        graft(tensors, config, settings, ids[:count], tmp_path / "state")
    assert "\n" not in str(refused.value) and not (tmp_path / "state").exists()


def test_every_other_window_begins_as_a_chat_does(ids):
    windows = cut(ids, {"bos_token_id": 1})
    assert windows.shape == (16, WINDOW) and (windows[::2, 0] == 1).all() and (windows[1::2, 0] != 1).all()
    np.testing.assert_array_equal(windows[:, 1:], cut(ids, {})[:, 1:])
    np.testing.assert_array_equal(cut(ids, {"bos_token_id": None}).ravel(), ids)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4, "head_dim": 8}])
def test_received_attention_is_what_softmax_gives(dense, ids, changes):
    tensors, config, _ = dense(**changes)
    model = Dense(tensors, config)
    layer, h = model.layer(1), mx.array(model.embed(ids[:40].reshape(2, 20)))
    visible = model.visible(layer, 20)
    found = np.array(importance.received_attention(layer, h, visible))
    np.testing.assert_allclose(found.sum(axis=1), 20, rtol=1e-5)  # every token gives one away
    # told by the attention itself: values that say one for a token and nothing for the others
    attention = layer.self_attn
    heads, width = attention.n_kv_heads, attention.v_proj.weight.shape[0]
    for token in (0, 7, 19):
        mark = mx.zeros((2, 20, width))
        mark[:, token] = 1
        attention.v_proj = lambda _, mark=mark: mark
        attention.o_proj = lambda out: out
        rotate = attention.rotation(20, None)
        out = attention(layer.input_layernorm(h), visible, None, rotate).reshape(2, 20, attention.n_heads, -1)
        np.testing.assert_allclose(found[:, token], np.array(out[..., 0].mean(-1).sum(-1)), rtol=1e-4)
    assert heads == changes.get("num_key_value_heads", 2)


def test_the_metric_is_of_the_gradient_through_the_whole_model(dense, ids, tmp_path, monkeypatch):
    tensors, config, twin = dense()
    monkeypatch.setattr(importance, "_root", lambda gradient: gradient)
    windows = cut(ids, config)
    state = State(tmp_path / "state", {})
    steps = []
    importance.measure_metrics(Dense(tensors, config), windows, state, lambda: steps.append(1))
    assert len(steps) == 6

    def said(nudges, row, tokens):
        h = twin.model.embed_tokens(row)
        for layer, nudge in zip(twin.model.layers, nudges, strict=True):
            h = layer(h, "causal", None) + nudge
        logits = twin.model.embed_tokens.as_linear(twin.model.norm(h))
        return -nn.losses.cross_entropy(logits, tokens, reduction="sum")

    for number in (0, 5):
        row = mx.array(windows[number : number + 1])
        tokens = mx.random.categorical(twin(row)[0], key=mx.random.key(number))[None]
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
