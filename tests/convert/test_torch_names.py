"""mlx-lm's models against transformers' on the same checkpoints, and mlx-lm's names and layouts undone."""

import re

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm import utils as mlx_lm_utils

from duo_mlx.convert import torch_names
from duo_mlx.convert.tensors import Tensor, to_mlx, to_torch
from duo_mlx.convert.torch_names import plain, to_transformers
from duo_mlx.convert.torch_reference import AS_MLX_LM, dense_model
from duo_mlx.errors import DuoError
from tests.convert.torch_kinds import BOTH, CONFIGS, HOSTED, TOKENS, dense, logits, small_weights


def canonical(kind):
    """mlx-lm's model of a checkpoint and its weights by mlx-lm's names."""
    model, arguments = mlx_lm_utils._get_classes(CONFIGS[kind])
    made = model(arguments.from_dict(CONFIGS[kind]))
    given = {name: to_mlx(value) for name, value in dense(kind).items()}
    if kind == "gpt2":  # checkpoints are written without a head
        given = {name.removeprefix("transformer."): value for name, value in given.items()}
    if kind == "gpt_oss":  # as published: outputs first
        split = re.compile(r"(gate_up|down)_proj$")
        given = {
            f"{name}.weight" if split.search(name) else name: value.swapaxes(1, 2) if split.search(name) else value
            for name, value in given.items()
        }
    weights = made.sanitize(given) if hasattr(made, "sanitize") else given
    made.load_weights(list(weights.items()))
    return made, weights


def hosted(weights):
    """A Duo's names of a base's weights."""
    return {
        re.sub(r"(\.\d+\.(?:mlp|block_sparse_moe|feed_forward|ffn|mlp_block))\.", r"\1.big.", name): value
        for name, value in weights.items()
    }


@pytest.mark.parametrize("kind", BOTH)
def test_mlx_lm_computes_what_the_reference_does(kind):
    theirs = logits(dense_model(CONFIGS[kind], dense(kind))).numpy()
    assert np.abs(np.array(canonical(kind)[0](mx.array(TOKENS.numpy()))) - theirs).max() < 1e-4


@pytest.mark.parametrize("kind", AS_MLX_LM)
def test_what_follows_mlx_lm_would_not_be_the_same_otherwise(kind, monkeypatch):
    ours = np.array(canonical(kind)[0](mx.array(TOKENS.numpy())))
    monkeypatch.delitem(AS_MLX_LM, kind)
    theirs = logits(dense_model(CONFIGS[kind], dense(kind))).numpy()
    assert 1e-4 < np.abs(ours - theirs).max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", sorted(HOSTED))
def test_canonical_names_and_layouts_are_undone(kind, dtype):
    weights = {name: Tensor.of(value).astype(dtype) for name, value in hosted(canonical(kind)[1]).items()}
    parts = {name: Tensor.of(to_mlx(value)) for name, value in small_weights().items()}
    assert sum(".big." in name for name in weights) >= 3
    found = to_transformers(CONFIGS[kind], weights | parts)
    expected = {**dense(kind), **small_weights()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        loaded = to_torch(tensor.load())
        assert tensor.shape == loaded.shape and tensor.dtype == str(loaded.dtype).removeprefix("torch."), name
        assert torch.equal(loaded, expected[name].to(loaded.dtype)), name


class Renaming:
    """A base that mlx-lm lacks."""

    def sanitize(self, weights):
        return {re.sub(r"\.(fc[12])\.", r".mlp.\1.", name): value for name, value in weights.items()}


def test_a_base_of_ones_own_is_undone_too():
    weights = Renaming().sanitize({name: Tensor.of(to_mlx(value)) for name, value in dense("opt").items()})
    assert any(".mlp.big.fc1." in name for name in hosted(weights))
    assert to_transformers(CONFIGS["opt"], hosted(weights), Renaming).keys() == dense("opt").keys()


def test_a_change_of_values_is_refused():
    class Adding(Renaming):
        def sanitize(self, weights):
            return {name: value + 1 if "norm" in name else value for name, value in weights.items()}

    weights = {name: Tensor.of(to_mlx(value)) for name, value in dense("llama").items()}
    with pytest.raises(DuoError, match="cannot be undone"):
        to_transformers(CONFIGS["llama"], weights, Adding)
    with pytest.raises(DuoError, match="weights of a llama cannot be undone for transformers: more.weight is missing"):
        to_transformers(CONFIGS["llama"], {**weights, "more.weight": weights["model.norm.weight"]})


def test_experts_routers_and_a_duos_cannot_be_told_apart_in_one_file():
    weights = {name: Tensor.of(value) for name, value in hosted(canonical("gpt_oss")[1]).items()}
    parts = {name: Tensor.of(to_mlx(value)) for name, value in small_weights(router=2).items()}
    assert "model.layers.0.mlp.big.router.weight" in weights
    with pytest.raises(DuoError, match="model.layers.0.mlp.router.weight is a weight of the Duo and"):
        to_transformers(CONFIGS["gpt_oss"] | {"router_choices": "sB"}, weights | parts)


def test_only_the_name_of_a_big_ffn_is_made_plain():
    assert plain("model.layers.0.mlp.big.router.weight") == "model.layers.0.mlp.router.weight"
    assert plain("model.big.weight") == "model.big.weight"


def test_whether_the_head_is_tied_is_said_by_the_weights_where_the_config_does_not():
    config = {key: value for key, value in CONFIGS["llama"].items() if key != "tie_word_embeddings"}
    tied = {name: value for name, value in dense("llama").items() if name != "lm_head.weight"}
    assert dense_model(config, tied).config.tie_word_embeddings
    assert not dense_model(config, dense("llama")).config.tie_word_embeddings
    assert "lm_head.weight" not in torch_names.checkpoint_shapes(config, tied)
