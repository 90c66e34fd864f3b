"""Settings of dense sources against transformers: the same weights must give the same logits in llama's words."""

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

from duo_mlx.convert import settings as source_settings
from duo_mlx.convert.plan import expected_shapes, kept, misfits
from duo_mlx.convert.settings import settle_head, with_output_biases
from duo_mlx.convert.tensors import Tensor, to_mlx
from duo_mlx.errors import DuoError
from duo_mlx.model import Model

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
    return source_settings.settings(config, SOURCE)


def assert_logits_agree(family, tokens=24, **changes):
    """Run the family in transformers, and its settings and weights as a Duo's big FFNs."""
    kind, architecture = FAMILIES[family]
    torch.manual_seed(0)
    theirs = architecture(kind(**SIZES | changes, initializer_range=0.3, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    config = theirs.config.to_dict()
    found = source_settings.settings(config, SOURCE)
    tensors = {name: Tensor.of(to_mlx(value)) for name, value in theirs.state_dict().items()}
    tensors = with_output_biases(config, SOURCE, tensors)
    found = settle_head(found, tensors, SOURCE)
    assert found["model_type"] == "llama" and found["tie_word_embeddings"] is changes.get("tie_word_embeddings", False)
    args = source_settings.dense_args(found)
    tensors = kept(tensors, args.tie_word_embeddings)
    assert misfits(tensors, expected_shapes(args, dense=True)) == []
    model = Model(args)
    model.load_weights([(n.replace(".mlp.", ".mlp.big."), t.load()) for n, t in tensors.items()], strict=False)
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
def test_rope_scalings_are_those_of_transformers(case):
    parameters = {"rope_type": case.split()[0], "rope_theta": 500.0} | ROPE[case]
    found = assert_logits_agree("llama", rope_parameters=parameters)
    assert found["rope_theta"] == 500 and "rope_parameters" not in found
    assert ("rope_scaling" in found) == (case != "default")


def test_every_rope_scaling_that_is_accepted_is_compared():
    assert {case.split()[0] for case in ROPE} == set(source_settings.ROPE_TYPES)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": None, "head_dim": 8}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": 5}),
    ],
)
def test_families_give_their_logits(family, changes):
    found = assert_logits_agree(family, **changes)
    slides = [kind == "sliding_attention" for kind in found.get("layer_types", ["full_attention"] * 3)]
    expected = {("mistral", 5): [True] * 3, ("qwen2", 5): [False, True, True]}
    window = None if changes.get("use_sliding_window") is False else changes.get("sliding_window")
    assert slides == expected.get((family, window), [False] * 3)


def test_keys_of_older_transformers_mean_the_same():
    new = settings(**SIZES, model_type="llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7})
    old = settings(**SIZES, model_type="llama", rope_scaling={"type": "linear", "factor": 2.0}, rope_theta=7)
    assert (
        new
        == old
        == SIZES
        | {
            "model_type": "llama",
            "rope_theta": 7,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        }
    )


@pytest.mark.parametrize(
    ("given", "kind", "duo"),
    [
        ({}, "llama", False),
        ({"architectures": ["MistralForCausalLM"]}, "llama", False),
        ({"model_type": "qwen2"}, "llama", False),
        ({"model_type": "duo"}, "duo", True),
        ({"small_intermediate_size": 2}, "duo", True),
        ({"model_type": "qwen2", "small_intermediate_size": 2}, "duo", True),
    ],
)
def test_duo_or_dense(given, kind, duo):
    assert settings(**SIZES | given)["model_type"] == kind
    assert source_settings.is_duo(given) is duo


def test_a_duo_keeps_its_settings(tiny_config):
    scaling = {"rope_type": "llama3", "factor": 2.0}  # of no original length: mlx-lm's and the reference's own default
    config = tiny_config(rope_scaling=scaling, skip_scope="layer", sliding_window=3, eos_token_id=1, rope_theta=5.0)
    assert settings(**config) == config


def test_a_mistral_that_leaves_out_its_class_defaults():
    found = settings(**{key: value for key, value in SIZES.items() if "key_value" not in key}, model_type="mistral")
    assert (found["sliding_window"], found["num_key_value_heads"]) == (MistralConfig().sliding_window, 8)


def test_types_are_named_alike():
    found = settings(torch_dtype="torch.bfloat16", dtype="float16")
    assert (found["torch_dtype"], found["dtype"]) == ("bfloat16", "float16")
    assert source_settings.with_dtype(found, "float32") == found | {"torch_dtype": "float32", "dtype": "float32"}
    assert source_settings.with_dtype({"a": 1}, "float32") == {"a": 1}


def test_quantised_by_mlx_is_recognised():
    config = {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"bits": 4, "group_size": 64}}
    assert source_settings.is_quantised(settings(**config)) and not source_settings.is_quantised({})


REFUSED = {
    "architecture": ({"model_type": "qwen3"}, "the architecture 'qwen3' is not supported; known are duo, llama, mist"),
    "class": ({"architectures": ["GemmaForCausalLM"]}, "the architecture 'GemmaForCausalLM' is not supported"),
    "activation": ({"hidden_act": "gelu"}, "config.json says hidden_act 'gelu'; silu is supported"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5; RoPE turns whole heads"),
    "partial 5": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor; RoPE turns whole"),
    "norms": ({"use_qk_norm": True}, "use_qk_norm True; there are no norms on q and k"),
    "experts": ({"num_local_experts": 8}, "num_local_experts 8; a mixture of experts"),
    "a Duo's activation": ({"model_type": "duo", "hidden_act": "relu"}, "hidden_act 'relu'"),
    "rope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "type 'longrope'; supported are default, linear"),
    "rope text": ({"rope_scaling": "linear"}, "rope_scaling 'linear'; it must be an object or null"),
    "rope twice": ({"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "two types, linear and yarn"),
    "rope of two": (
        {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "yarn"}},
        "rope_scaling and rope_parameters of different types",
    ),
    "rope by layer": ({"rope_parameters": {"full_attention": {"rope_theta": 5}}}, "rope_parameters for full_attention"),
    "rope factor": ({"rope_scaling": {"type": "linear"}}, "RoPE of type linear needs a factor"),
    "rope length": ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn needs original_max_position_embeddings"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic needs max_position_embeddings"),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}, "max_position_embeddings": 8},
        "attention_factor for RoPE of type yarn, which is not supported",
    ),
    "rope type": ({"rope_scaling": {"type": 5}}, "RoPE of type '5'; supported are"),
    "window": ({"model_type": "mistral", "sliding_window": "5", "num_hidden_layers": 2}, "sliding_window '5'; it must"),
    "layers": ({"model_type": "mistral"}, "num_hidden_layers None; it must be a positive integer"),
    "windows": (
        {"model_type": "qwen2", "use_sliding_window": True, "num_hidden_layers": 2, "max_window_layers": None},
        "max_window_layers None; it must be a positive integer",
    ),
    "classes": ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
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


def test_only_qwen2_gets_output_biases():
    weight = "model.layers.0.self_attn.o_proj.weight"
    given = {weight: Tensor.of(mx.ones((3, 6), mx.bfloat16)), "lm_head.weight": Tensor.of(mx.ones(1))}
    assert with_output_biases({"model_type": "llama"}, SOURCE, given) == given
    found = with_output_biases({"model_type": "qwen2"}, SOURCE, given)
    bias = found.pop(weight.replace("weight", "bias"))
    assert found == given and (bias.shape, bias.dtype) == ((3,), "bfloat16")
    assert bias.load().dtype == mx.bfloat16 and bias.load().tolist() == [0, 0, 0]
