"""OPT against transformers' own, and what mlx-lm does with its models: caches, batches, quantising, training."""

import itertools
import json
from types import SimpleNamespace

import duo_mlx  # noqa: F401  (before mlx, so that it loads OpenBLAS first)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import BatchKVCache, BatchRotatingKVCache, KVCache, RotatingKVCache, make_prompt_cache
from mlx_lm.utils import load_model, quantize_model
from transformers import OPTConfig, OPTForCausalLM

from duo_mlx.bases import opt

TOLERANCE = 1e-4  # maximum absolute difference of fp32 logits, which have a standard deviation of about 1
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
}
VARIANTS = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "gelu": {"activation_function": "gelu"},
    "no bias": {"enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
    "no final norm": {"_remove_final_layer_norm": True},
    "untied": {"tie_word_embeddings": False},
    "untied projections": {"tie_word_embeddings": False, "word_embed_proj_dim": 16},
}
TOKENS = np.random.default_rng(0).integers(0, TINY["vocab_size"], (2, 17))
PROMPTS = [[5, 9, 2, 40, 7, 11, 60], [3], [8, 8, 31, 2]]
TOKENIZER = SimpleNamespace(eos_token_ids=[], decode=str)


def classes(**_):
    return opt.Model, opt.ModelArgs


def build(**changes):
    """Return transformers' model with random weights, its config.json and its weights for MLX."""
    config = OPTConfig(**TINY | changes)
    torch.manual_seed(0)
    theirs = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if name.endswith("norm.weight"):
                weight.copy_(1 + torch.randn_like(weight) / 5)
            elif weight.ndim == 1:
                weight.copy_(torch.randn_like(weight) / 5)
            else:
                weight.copy_(torch.randn_like(weight) / weight.shape[-1] ** 0.5)
    weights = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    return theirs, json.loads(config.to_json_string(use_diff=False)), weights


def ours_of(config, weights):
    model = opt.Model(opt.ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(weights).items()), strict=True)
    mx.eval(model.parameters())
    return model


def pair(variant):
    theirs, config, weights = build(**VARIANTS[variant])
    return theirs, ours_of(config, weights)


def torch_logits(model, tokens, **options):
    with torch.no_grad():
        return model(torch.tensor(tokens), **options).logits.numpy()


def greedy(model, prompt, count):
    tokens = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in tokens]


def close(got, expected):
    np.testing.assert_allclose(np.array(got), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_pass(variant):
    theirs, ours = pair(variant)
    expected = torch_logits(theirs, TOKENS)
    assert expected.std() > 0.1
    close(ours(mx.array(TOKENS)), expected)


@pytest.mark.parametrize("cuts", [[1] * 17, [5, 5, 5, 1, 1], [16, 1]], ids=["token by token", "chunks", "prompt"])
@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(64)], ids=["cache", "rotating"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached(variant, make, cuts):
    theirs, ours = pair(variant)
    cache = [make() for _ in ours.layers]
    starts = np.cumsum([0, *cuts])
    parts = [ours(mx.array(TOKENS[:, a:b]), cache=cache) for a, b in itertools.pairwise(starts)]
    close(mx.concatenate(parts, axis=1), torch_logits(theirs, TOKENS))


def test_default_cache():
    _, ours = pair("125m")
    cache = make_prompt_cache(ours)
    assert [type(c) for c in cache] == [KVCache] * TINY["num_hidden_layers"]


@pytest.mark.parametrize("make", [BatchKVCache, lambda padding: BatchRotatingKVCache(64, padding)])
@pytest.mark.parametrize("variant", ["125m", "350m", "no bias"])
def test_left_padding(variant, make):
    theirs, ours = pair(variant)
    padding = [0, 6]
    mask = np.array([[int(place >= pad) for place in range(17)] for pad in padding])
    expected = torch_logits(theirs, TOKENS, attention_mask=torch.tensor(mask))
    cache = [make(padding) for _ in ours.layers]
    parts = [ours(mx.array(TOKENS[:, a:b]), cache=cache) for a, b in [(0, 9), (9, 16), (16, 17)]]
    got = np.array(mx.concatenate(parts, axis=1))
    assert np.isfinite(got).all()
    for row, pad in enumerate(padding):
        close(got[row, pad:], expected[row, pad:])
        close(got[row, pad:], torch_logits(theirs, TOKENS[row : row + 1, pad:])[0])


@pytest.mark.parametrize("options", [{}, {"prefill_step_size": 2}, {"max_kv_size": 64}, {"completion_batch_size": 2}])
@pytest.mark.parametrize("variant", ["125m", "350m"])
def test_batch_generate(variant, options):
    theirs, ours = pair(variant)
    batch = mlx_lm.batch_generate(
        ours, TOKENIZER, PROMPTS, max_tokens=[6, 12, 9], return_token_ids=True, prefill_batch_size=2, **options
    )
    for prompt, count, got in zip(PROMPTS, [6, 12, 9], batch.token_ids, strict=True):
        assert got == greedy(ours, prompt, count)
        text = prompt + got
        likeliest = torch_logits(theirs, [text]).argmax(-1)[0]
        assert got == likeliest[len(prompt) - 1 : -1].tolist()


def test_input_embeddings_take_the_place_of_tokens():
    theirs, ours = pair("350m")
    embeddings = np.random.default_rng(1).standard_normal((2, 9, 16)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=torch.tensor(embeddings)).logits.numpy()
    close(ours(mx.array(TOKENS[:, :9]), input_embeddings=mx.array(embeddings)), expected)


# positions


def test_the_last_position_works_and_one_more_is_refused():
    theirs, ours = pair("125m")
    tokens = np.random.default_rng(2).integers(0, 96, (1, 25))
    close(ours(mx.array(tokens[:, :24])), torch_logits(theirs, tokens[:, :24]))
    with pytest.raises(ValueError, match="25 tokens exceeds max_position_embeddings, 24"):
        ours(mx.array(tokens))
    for cache in (make_prompt_cache(ours), make_prompt_cache(ours, max_kv_size=8)):
        ours(mx.array(tokens[:, :20]), cache=cache)
        ours(mx.array(tokens[:, 20:24]), cache=cache)
        with pytest.raises(ValueError, match="25 tokens exceeds max_position_embeddings, 24"):
            ours(mx.array(tokens[:, 24:]), cache=cache)


def test_generation_up_to_the_last_position():
    _, ours = pair("125m")
    assert len(greedy(ours, PROMPTS[0], 24 - len(PROMPTS[0]))) == 17
    with pytest.raises(ValueError, match="max_position_embeddings, 24"):
        greedy(ours, PROMPTS[0], 30)


@pytest.mark.parametrize("make", [BatchKVCache, lambda padding: BatchRotatingKVCache(64, padding)])
def test_a_batch_at_the_limit(make):
    theirs, ours = pair("125m")
    tokens = np.random.default_rng(2).integers(0, 96, (2, 26))
    cache = [make([4, 2]) for _ in ours.layers]
    got = [ours(mx.array(tokens[:, a:b]), cache=cache) for a, b in [(0, 23), (23, 26)]]  # 22 and 24 positions
    close(mx.concatenate(got, axis=1)[1, 2:], torch_logits(theirs, tokens[1:, 2:])[0])
    with pytest.raises(ValueError, match="25 tokens exceeds max_position_embeddings, 24"):
        ours(mx.array(tokens[:, :1]), cache=cache)


@pytest.mark.parametrize("make", [BatchKVCache, lambda padding: BatchRotatingKVCache(64, padding)])
def test_padding_on_the_right_has_no_positions(make):
    """A row with a long past next to a row with a long prompt: together they pass the limit, neither does alone."""
    theirs, ours = pair("125m")
    tokens = np.random.default_rng(2).integers(0, 96, (2, 40))
    cache = [make([0, 15]) for _ in ours.layers]
    ours(mx.array(tokens[:, :20]), cache=cache)
    for c in cache:
        c.prepare(lengths=[4, 19], right_padding=[15, 0])
    got = np.array(ours(mx.array(tokens[:, 20:39]), cache=cache))
    close(got[0, :4], torch_logits(theirs, tokens[:1, :24])[0, 20:])
    close(got[1], torch_logits(theirs, tokens[1:, 15:39])[0, 5:])
    for c in cache:
        c.finalize()
    with pytest.raises(ValueError, match="25 tokens exceeds max_position_embeddings, 24"):
        ours(mx.array(tokens[:, 39:]), cache=cache)


def test_a_batch_far_from_the_limit_reads_nothing_back(monkeypatch):
    _, ours = pair("125m")
    cache = [BatchKVCache([3, 0]) for _ in ours.layers]
    monkeypatch.setattr(opt, "_ends", lambda *_: pytest.fail("offsets are read back"))
    for start in range(0, 24, 8):
        assert ours(mx.array(TOKENS[:, :8]), cache=cache).shape == (2, 8, 96), start


# weights


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_directory_that_transformers_wrote(variant, tmp_path):
    theirs, _, _ = build(**VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours, _ = load_model(tmp_path, get_model_classes=classes)
    close(ours(mx.array(TOKENS)), torch_logits(theirs, TOKENS))


def test_half_precision_stays():
    _, ours = pair("350m")
    ours.set_dtype(mx.float16)
    cache = make_prompt_cache(ours)
    assert ours(mx.array(TOKENS), cache=cache).dtype == cache[0].keys.dtype == mx.float16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cut", ["", "model."], ids=["whole", "without head"])
def test_sanitize(variant, cut):
    _, config, weights = build(**VARIANTS[variant])
    ours = opt.Model(opt.ModelArgs.from_dict(config))
    stored = {name.removeprefix(cut): value for name, value in weights.items()}
    own = ours.sanitize(stored | {"decoder.version": mx.array([3.0])})
    assert own.keys() == dict(tree_flatten(ours.parameters())).keys()
    again = ours.sanitize(own)
    assert again.keys() == own.keys() and all(again[name] is own[name] for name in own)
    assert ("lm_head.weight" in own) == (not config["tie_word_embeddings"])


def test_the_ffn_can_be_replaced():
    """What a host of the model does: the block's FFN under the name ``mlp``, and its weights one level deeper."""

    class Host(nn.Module):
        def __init__(self, big):
            super().__init__()
            self.big = big

        def __call__(self, x):
            return self.big(x)

    _, config, weights = build()
    plain, hosted = ours_of(config, weights), ours_of(config, weights)
    for block in hosted.layers:
        block.mlp = Host(block.mlp)
    names = dict(tree_flatten(hosted.parameters()))
    assert "model.layers.0.mlp.big.fc1.weight" in names
    assert hosted.sanitize(names).keys() == names.keys()
    assert mx.array_equal(hosted(mx.array(TOKENS)), plain(mx.array(TOKENS)))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("variant", ["125m", "350m", "no bias", "untied"])
def test_quantised(variant, bits, tmp_path):
    theirs, config, weights = build(
        **VARIANTS[variant] | {"hidden_size": 64, "word_embed_proj_dim": 32 if variant == "350m" else None}
    )
    model, config = quantize_model(ours_of(config, weights), config, group_size=32, bits=bits)
    assert isinstance(model.layers[0].mlp.fc1, nn.QuantizedLinear)
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    got, expected = np.array(model(mx.array(TOKENS))), torch_logits(theirs, TOKENS)
    error = np.sqrt(((got - expected) ** 2).mean()) / expected.std()
    assert error < {4: 0.5, 8: 0.03}[bits]

    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    loaded, _ = load_model(tmp_path, get_model_classes=classes)
    assert mx.array_equal(loaded(mx.array(TOKENS)), mx.array(got))
    cache = make_prompt_cache(loaded)
    steps = [loaded(mx.array(TOKENS[:, place : place + 1]), cache=cache) for place in range(17)]
    close(mx.concatenate(steps, axis=1), got)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    theirs, ours = pair(variant)
    tokens = torch.tensor(TOKENS)
    torch.nn.functional.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name: mx.array(p.grad.numpy()) for name, p in theirs.named_parameters()}
    _, grads = nn.value_and_grad(
        ours,
        lambda tokens: nn.losses.cross_entropy(ours(tokens[:, :-1]), tokens[:, 1:], reduction="mean"),
    )(mx.array(TOKENS))
    grads, expected = dict(tree_flatten(grads)), ours.sanitize(expected)
    assert grads.keys() == expected.keys()
    for name in grads:
        got, want = np.array(grads[name]), np.array(expected[name])
        if name == "model.embed_tokens.weight":  # PyTorch gives the padding token, 1, no gradient as an input
            got, want = np.delete(got, 1, axis=0), np.delete(want, 1, axis=0)
        assert np.abs(want).max() > 0
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5, err_msg=name)


# config.json


def test_a_config_of_the_hub():
    """facebook/opt-350m's config.json, which leaves out the keys that came later."""
    config = {
        "_name_or_path": "opt-350m",
        "_remove_final_layer_norm": False,
        "activation_dropout": 0.0,
        "activation_function": "relu",
        "architectures": ["OPTForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "do_layer_norm_before": False,
        "dropout": 0.1,
        "eos_token_id": 2,
        "ffn_dim": 4096,
        "hidden_size": 1024,
        "init_std": 0.02,
        "layerdrop": 0.0,
        "max_position_embeddings": 2048,
        "model_type": "opt",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 1,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": 50272,
        "word_embed_proj_dim": 512,
    }
    args = opt.ModelArgs.from_dict(config)
    assert (args.embedding_size, args.enable_bias, args.tie_word_embeddings) == (512, True, True)
    model = opt.Model(args)  # lazy: no weight is made
    assert model.model.embed_positions.weight.shape == (2050, 1024)
    assert sum(value.size for _, value in tree_flatten(model.parameters())) == 331_196_416
    assert opt.ModelArgs.from_dict(config | {"word_embed_proj_dim": None}).embedding_size == 1024


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "silu"),
        ("activation_function", None),
        ("activation_function", ["relu"]),
        ("do_layer_norm_before", "yes"),
        ("do_layer_norm_before", None),
        ("_remove_final_layer_norm", 1),
        ("enable_bias", "false"),
        ("layer_norm_elementwise_affine", 0),
        ("tie_word_embeddings", None),
        ("word_embed_proj_dim", 0),
        ("word_embed_proj_dim", "512"),
        ("hidden_size", True),
        ("max_position_embeddings", -1),
        ("num_attention_heads", 5),
    ],
)
def test_values_that_opt_does_not_know(key, value):
    with pytest.raises(ValueError, match=rf"^{key} is {value!r}; ".replace("[", r"\[")):
        opt.ModelArgs.from_dict(TINY | {"model_type": "opt", key: value})
