"""Tiny checkpoints of architectures that transformers and mlx-lm both have, by ``model_type``."""

from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from duo_mlx.convert.torch_reference import quiet

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = {**COMMON, "tie_word_embeddings": True}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_ctx": 128, "vocab_size": 96}
SCALES = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25}
PLAIN = {"attention_bias": False, "mlp_bias": False}
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}

BOTH: dict[str, dict[str, Any]] = {
    "llama": {**COMMON, "rope_scaling": {"rope_type": "llama3", **SCALED}},
    "mistral": {**COMMON, "sliding_window": None},
    "qwen2": COMMON,
    "qwen3": COMMON,
    "gemma": TIED,
    "gemma2": {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 64},  # mlx-lm's has no windows
    "gemma3_text": {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 3},
    "phi": {**COMMON, "partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "phi3": {**COMMON, "original_max_position_embeddings": 128},
    "gpt2": {**GPT2, "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_bigcode": {**GPT2, "layer_norm_epsilon": 1e-5, "n_inner": 256, "attention_softmax_in_fp32": True},
    "gpt_neox": {**COMMON, "intermediate_size": 256, "rotary_pct": 0.25, "rotary_emb_base": 10000},
    "qwen2_moe": {**COMMON, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**COMMON, **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True},
    "mixtral": {**COMMON, **EXPERTS},
    "olmoe": {**COMMON, **EXPERTS, "norm_topk_prob": False},
    "granitemoe": {**COMMON, **EXPERTS, **SCALES, "attention_bias": False},
    "gpt_oss": {
        **COMMON,
        **EXPERTS,
        **WINDOWS,
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN},
    },
    "olmo2": COMMON,
    "olmo3": {**COMMON, **WINDOWS, "rope_theta": 500000.0},
    "cohere": TIED | {"logit_scale": 0.25},
    "cohere2": {**TIED, "sliding_window": 8, "sliding_window_pattern": 3, "logit_scale": 0.25},
    "granite": {**COMMON, **SCALES, **PLAIN},
    "starcoder2": {**COMMON, "norm_epsilon": 1e-5, "sliding_window": None},
    "stablelm": {**COMMON, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "glm4": {**COMMON, "attention_bias": True, "partial_rotary_factor": 0.5},
    "exaone4": {**COMMON, **WINDOWS, "sliding_window_pattern": "LLG", "rope_scaling": None},
    "smollm3": {**COMMON, "no_rope_layer_interval": 2},
    "internlm3": COMMON,
    "seed_oss": {**COMMON, **PLAIN, "attention_out_bias": False},
    "helium": {**COMMON, **PLAIN},
    "nemotron": {**COMMON, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "ernie4_5": {**TIED, "use_bias": False},
    "hunyuan_v1_dense": {**COMMON, "attention_bias": False, "use_qk_norm": True},
}
OPT = {
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "word_embed_proj_dim": 64,
    "tie_word_embeddings": True,
}
POST_NORM = {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32}  # as the variant with 350 M parameters
TOKENS = torch.arange(3, 35).reshape(2, 16)
CONFIGS = {**{kind: {"model_type": kind, **keys} for kind, keys in BOTH.items()}, "opt": {"model_type": "opt", **OPT}}
CONFIGS["post-norm opt"] = {"model_type": "opt", **POST_NORM}


@cache
def dense(kind):
    """The names and values of a checkpoint of random weights: those that transformers writes."""
    config = dict(CONFIGS[kind])
    torch.manual_seed(0)
    with quiet():
        made = AutoConfig.for_model(config.pop("model_type"), **config)
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            drawn = torch.randn_like(value)
            value.copy_(value + drawn / 5 if value.ndim == 1 else drawn / value.shape[-1] ** 0.5)
    tied = set(model.all_tied_weights_keys or ())
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in tied}
    return revert_weight_conversion(model, state)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def small_weights(layers=(0, 1, 2), width=24, bias=False, router=0, inputs=64):
    random = torch.Generator().manual_seed(1)
    shapes = {"small.gate_proj": (width, 64), "small.up_proj": (width, 64), "small.down_proj": (64, width)}
    shapes |= {"router": (router, inputs)} if router else {}
    weights = {}
    for layer in layers:
        for name, shape in shapes.items():
            path = f"model.layers.{layer}.mlp.{name}"
            weights[f"{path}.weight"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
            if bias:
                weights[f"{path}.bias"] = torch.randn(shape[0], generator=random)
    return weights
