"""OPT against transformers: both orders of norms, projections, and every way to pass tokens."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache
from mlx_lm.utils import quantize_model
from transformers import OPTConfig, OPTForCausalLM

from duo_mlx.bases.opt import Model, ModelArgs

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "word_embed_proj_dim": 64,
}
KINDS = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "gelu": {"activation_function": "gelu"},
    "no biases": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "no last norm": {"_remove_final_layer_norm": True},
    "own head": {"tie_word_embeddings": False},
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module", params=KINDS)
def pair(request):
    """transformers' model with random weights, and ours with the same."""
    torch.manual_seed(0)
    config = OPTConfig(**SHAPE | KINDS[request.param], attn_implementation="eager")
    theirs = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * (0.15 if weight.ndim > 1 else 0.3))
    ours = Model(ModelArgs.from_dict(config.to_dict()))
    given = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    ours.load_weights(list(ours.sanitize(given).items()))
    return theirs, ours


def logits(theirs, tokens, **more):
    with torch.no_grad():
        return theirs(torch.tensor(tokens), **more).logits.numpy()


def test_a_whole_pass(pair):
    theirs, ours = pair
    np.testing.assert_allclose(np.array(ours(mx.array(TOKENS))), logits(theirs, TOKENS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("cuts", [(1,) * 12, (5, 4, 2, 1)])
def test_tokens_in_parts(pair, cuts):
    theirs, ours = pair
    cache, parts, start = make_prompt_cache(ours), [], 0
    for cut in cuts:
        parts.append(ours(mx.array(TOKENS[:, start : start + cut]), cache))
        start += cut
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), logits(theirs, TOKENS), rtol=0, atol=1e-4)


def test_a_batch_with_padding_before_its_sequences(pair):
    theirs, ours = pair
    long, short = TOKENS[0], TOKENS[1, :7]
    cache = [BatchKVCache([0, 5]) for _ in ours.layers]
    rows = mx.array(np.stack([long, np.concatenate([np.zeros(5, int), short])]))
    parts = [ours(rows[:, :8], cache), ours(rows[:, 8:9], cache), ours(rows[:, 9:], cache)]
    found = np.array(mx.concatenate(parts, axis=1))
    np.testing.assert_allclose(found[0], logits(theirs, long[None])[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[1, 5:], logits(theirs, short[None])[0], rtol=0, atol=1e-4)


def test_names_that_are_right_stay(pair):
    _, ours = pair
    names = dict(tree_flatten(ours.parameters()))
    assert ours.sanitize(names).keys() == names.keys()


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(bits):
    model = Model(ModelArgs.from_dict(SHAPE | {"model_type": "opt"}))
    before = model(mx.array(TOKENS))
    quantised, _ = quantize_model(model, {}, group_size=32, bits=bits)
    error = mx.abs(quantised(mx.array(TOKENS)) - before).max() / mx.abs(before).max()
    assert error.item() < {4: 0.3, 8: 0.02}[bits]


def test_positions_end():
    model = Model(ModelArgs.from_dict(SHAPE | {"model_type": "opt"}))
    assert model(mx.zeros((1, 40), mx.uint32)).shape == (1, 40, 96)
    with pytest.raises(ValueError, match="41 positions: the model has max_position_embeddings 40"):
        model(mx.zeros((1, 41), mx.uint32))


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="activation_function 'swish': OPT has relu or gelu"):
        ModelArgs.from_dict(SHAPE | {"model_type": "opt", "activation_function": "swish"})
