"""Settings of dense sources against transformers: the same weights must give the same logits in mlx-lm's models."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from duo_mlx.config import Config
from duo_mlx.convert import dense
from duo_mlx.convert import settings as source_settings
from duo_mlx.convert.packing import quantization
from duo_mlx.convert.rope_settings import ROPE_TYPES
from duo_mlx.convert.settings import settle_head
from duo_mlx.convert.source import open_source
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError

SOURCE = Path("source")
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


def settings(**config):
    return source_settings.settings(SIZES | config, SOURCE)


def assert_logits_agree(directory, family, tokens=24, **changes):
    """Run the family in transformers, and what its directory is opened as; return the configuration."""
    kind, architecture = FAMILIES[family]
    torch.manual_seed(0)
    theirs = architecture(kind(**SIZES | changes, initializer_range=0.3, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    theirs.save_pretrained(directory)
    found = open_source(directory, graft=True)
    found.check()
    assert found.config["tie_word_embeddings"] is changes.get("tie_word_embeddings", False)
    model = dense.host(found.tensors, found.config)
    inputs = np.random.default_rng(0).integers(0, 32, (2, tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(inputs)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(inputs))), expected, atol=1e-4)
    return found


ROPE = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "llama3 with the model's length": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0, "beta_slow": 1.0},
    "yarn with the model's length": {"factor": 4.0},
    "yarn with scales": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn with one scale": {"factor": 4.0, "mscale": 0.5},
}


@pytest.mark.parametrize("case", ROPE)
def test_rope_scalings_are_those_of_transformers(tmp_path, case):
    parameters = {"rope_type": case.split()[0], "rope_theta": 500.0} | ROPE[case]
    found = assert_logits_agree(tmp_path, "llama", rope_parameters=parameters).config
    assert found["rope_theta"] == 500 and ("rope_scaling" in found) == (case != "default")


def test_every_rope_scaling_that_is_accepted_is_compared():
    assert {case.split()[0] for case in ROPE} == set(ROPE_TYPES)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": None, "head_dim": 8}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 5}),
    ],
)
def test_families_give_their_logits(tmp_path, family, changes):
    found = assert_logits_agree(tmp_path, family, **changes)
    slides = [kind == "sliding_attention" for kind in Config.from_dict(found.config).layer_types]
    assert slides == [family == "mistral" and changes["sliding_window"] is not None] * 3 and found.notes == ()


def test_a_window_that_mlx_lm_does_not_see_is_said(tmp_path):
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    found = assert_logits_agree(tmp_path, "qwen2", tokens=5, **changes)
    assert found.notes == (
        "mlx-lm's qwen2 sees whole texts, so beyond 5 tokens it differs from transformers', which slides",
    )


def test_keys_of_older_transformers_mean_the_same():
    new = settings(model_type="llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7})
    old = settings(model_type="llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=7)
    for found in (new, old):
        assert (found["rope_theta"], found["rope_scaling"]) == (7, {"rope_type": "linear", "factor": 2.0})


@pytest.mark.parametrize(
    ("given", "base", "duo"),
    [
        ({}, "llama", False),
        ({"architectures": ["MistralForCausalLM"]}, "mistral", False),
        ({"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}, "qwen3_moe", False),
        ({"model_type": "qwen2"}, "qwen2", False),
        ({"model_type": "duo"}, "llama", True),
        ({"model_type": "duo", "base_model_type": "gemma2"}, "gemma2", True),
        ({"small_intermediate_size": 2}, "llama", True),
        ({"model_type": "qwen2", "small_intermediate_size": 2}, "qwen2", True),
    ],
)
def test_duo_or_dense(given, base, duo):
    found = settings(**given)
    assert (found["model_type"], found["base_model_type"]) == ("duo", base)
    assert source_settings.is_duo(given) is duo and ("small_layers" in found) is not duo


def test_a_duo_keeps_its_settings(tiny_config):
    scaling = {"rope_type": "llama3", "factor": 2.0}  # of no original length: mlx-lm's and the reference's own default
    config = tiny_config(rope_scaling=scaling, skip_scope="layer", sliding_window=3, eos_token_id=1, rope_theta=5.0)
    assert source_settings.settings(config, SOURCE) == config | {"base_model_type": "llama"}


def test_a_mistral_that_leaves_out_its_class_defaults():
    found = source_settings.settings(
        {key: value for key, value in SIZES.items() if "key_value" not in key} | {"model_type": "mistral"}, SOURCE
    )
    assert (found["sliding_window"], found["num_key_value_heads"]) == (MistralConfig().sliding_window, 8)


def test_types_are_named_alike():
    found = settings(torch_dtype="torch.bfloat16", dtype="float16")
    assert (found["torch_dtype"], found["dtype"]) == ("bfloat16", "float16")
    assert source_settings.with_dtype(found, "float32") == found | {"torch_dtype": "float32", "dtype": "float32"}
    assert source_settings.with_dtype({"a": 1}, "float32") == {"a": 1}


def test_quantised_by_mlx_is_recognised():
    said = {"bits": 4, "group_size": 64}
    assert settings(quantization=said, quantization_config=said)["quantization"] == said
    assert quantization({}) is None
    packed = settings(quantization_config={"quant_method": "mxfp4"})
    assert packed["quantization"] == {"bits": 4, "group_size": 32, "mode": "mxfp4"}


REFUSED = {
    "architecture": ({"model_type": "bert"}, "the installed mlx-lm has no architecture 'bert'"),
    "class": ({"architectures": ["OtherForCausalLM"]}, "the installed mlx-lm has no architecture 'other'"),
    "code": ({"model_type": "llama", "model_file": "own.py"}, "config.json has a model_file, which is code of its own"),
    "activation": ({"hidden_act": "gelu"}, "config.json says hidden_act 'gelu'; mlx-lm's llama does not read"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; mlx-lm's llama does not read"),
    "partial 5": (
        {"rope_parameters": {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor; RoPE of mlx-lm's llama turns whole heads",
    ),
    "norms": ({"use_qk_norm": True}, "use_qk_norm True; mlx-lm's llama does not read"),
    "experts": ({"num_local_experts": 8}, "num_local_experts; mlx-lm's llama has no experts"),
    "a Duo's activation": (
        {"model_type": "duo", "hidden_act": "relu"},
        "hidden_act 'relu'; mlx-lm's llama does not read",
    ),
    "caps": ({"model_type": "llama", "final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0; mlx-lm"),
    "rope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type 'longrope'; supported are default, linear"),
    "rope text": ({"rope_scaling": "linear"}, "rope_scaling 'linear'; it must be an object or null"),
    "rope twice": ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "two types, linear and yarn"),
    "rope of two": (
        {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "yarn"}},
        "rope_scaling and rope_parameters of different types",
    ),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 5}}}, "rope_parameters for full_attention"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "RoPE of type linear needs a factor"),
    "rope length": (
        {"rope_scaling": {"type": "yarn", "factor": 2}, "max_position_embeddings": None},
        "yarn needs original_max_position_embeddings",
    ),
    "dynamic": (
        {"rope_scaling": {"type": "dynamic", "factor": 2}, "max_position_embeddings": None},
        "dynamic needs max_position_embeddings",
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}, "max_position_embeddings": 8},
        "attention_factor for RoPE of type yarn, which is not supported",
    ),
    "rope type": ({"rope_scaling": {"type": 5}}, "RoPE of type '5'; supported are"),
    "window": ({"model_type": "mistral", "sliding_window": "5", "num_hidden_layers": 2}, "sliding_window '5'; it must"),
    "layers": ({"model_type": "mistral", "num_hidden_layers": None}, "num_hidden_layers None; it must be a positive"),
    "classes": ({"architectures": [["LlamaForCausalLM"]]}, "architectures must be a list of names"),
    "gptq": ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantised .gptq.; convert the model"),
    "awq": ({"model_type": "duo", "quantization_config": {"quant_method": "awq"}}, "quantised .awq."),
    "quantised": ({"quantization_config": 4}, "quantised .by an unknown method."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_one_line(case):
    config, line = REFUSED[case]
    with pytest.raises(DuoError, match=f"^source: .*{line}") as error:
        settings(**config)
    assert "\n" not in str(error.value)


EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("said", "head", "tied"),
    [
        (None, None, True),
        (None, "twin", True),
        (None, "other", False),
        (True, None, True),
        (True, "twin", True),
        (True, "other", "is not model.embed_tokens.weight, so config.json must say .*false"),
        (True, "wide", "is not model.embed_tokens.weight"),
        (False, "twin", False),
        (False, "other", False),
        (False, None, "has no lm_head.weight, so config.json must say .*true"),
        ("yes", None, "tie_word_embeddings 'yes'; it must be true or false"),
    ],
)
def test_the_head(said, head, tied):
    heads = {"twin": mx.arange(6.0).reshape(2, 3), "other": mx.ones((2, 3)), "wide": mx.ones((2, 4))}
    tensors = {EMBEDDING: Tensor.of(mx.arange(6.0).reshape(2, 3))}
    if head:
        tensors["lm_head.weight"] = Tensor.of(heads[head])
    config = {"hidden_size": 3} if said is None else {"hidden_size": 3, "tie_word_embeddings": said}
    if isinstance(tied, str):
        with pytest.raises(DuoError, match=f"^source: .*{tied}"):
            settle_head(config, tensors, SOURCE)
    else:
        assert settle_head(config, tensors, SOURCE) == {"hidden_size": 3, "tie_word_embeddings": tied}


def test_heads_of_different_shape_or_said_untied_are_not_loaded():
    def refuse():
        raise AssertionError("was loaded")

    tensors = {EMBEDDING: Tensor((2, 3), "float32", refuse), "lm_head.weight": Tensor((2, 4), "float32", refuse)}
    assert settle_head({}, tensors, SOURCE)["tie_word_embeddings"] is False
    tensors["lm_head.weight"] = tensors[EMBEDDING]
    assert settle_head({"tie_word_embeddings": False}, tensors, SOURCE)["tie_word_embeddings"] is False
