"""A table of the architectures that mlx-lm ships, with a tiny configuration for each.

Tests of hosting run over it, and ``.ci/architectures.py`` writes docs/architectures.md from it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm import models

COMMON: dict[str, Any] = {
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
FOUR = {**COMMON, "num_hidden_layers": 4}
WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
ROUTED = {**EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1, "num_shared_experts": 1, "first_k_dense_replace": 1}
ROUTED |= {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 2, "topk_group": 1}
ROTATED = {"head_dim": 8}  # transformers takes it for the width of the rotated part
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_ctx": 128, "vocab_size": 96}
SCALES = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25}
PLAIN = {"attention_bias": False, "mlp_bias": False}
YARN = {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 4096}
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
DEEP = {"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **YARN}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
LINEAR |= {"linear_conv_kernel_dim": 3, "partial_rotary_factor": 0.5, "full_attention_interval": 2}
MAMBA = {"mamba_d_conv": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_n_heads": 8, "mamba_d_head": 16}
GEMMA3N = {
    **COMMON,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 96,
    "rope_local_base_freq": 1.0,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5] * 4,
    "hidden_size_per_layer_input": 32,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "model_type": "gemma3n",
}


VERY = {**ROUTED, **LATENT}
KIMI_TEXT = {**COMMON, **VERY, "num_key_value_heads": 4}
VL = {"num_hidden_layers": 3, "vocab_size": 96, "hidden_size": 64}
KDA = {"num_heads": 4, "head_dim": 16, "kda_layers": [1, 3], "full_attn_layers": [2, 4], "short_conv_kernel_size": 4}
GEMMA4 = {
    **TIED,
    "num_hidden_layers": 4,
    "global_head_dim": 32,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_key_value_heads": 1,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        "sliding_attention": {"rope_theta": 10000.0},
    },
}
BLOCK = {
    "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
    "ffn": {"ffn_mult": 1.3125, "no_op": False, "replace_with_linear": False},
}
ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
LFM2 = {
    **FOUR,
    "tie_word_embeddings": True,
    "tie_embedding": True,
    "layer_types": ["full_attention", "conv"] * 2,
    "norm_eps": 1e-5,
    "full_attn_idxs": [0, 2],
    "block_dim": 64,
    "block_ffn_dim_multiplier": 1.5,
    "block_auto_adjust_ff_dim": True,
    "block_ff_dim": 96,
    "block_multiple_of": 32,
    "conv_bias": True,
    "conv_L_cache": 3,
}


@dataclass(frozen=True)
class Architecture:
    """One ``model_type``.

    Args:
        config: a tiny config.json.
        known: models that people know, for the docs.
        both: whether transformers has it and gives the same numbers.
        hosts: whether ``--verify`` can replace the FFNs of transformers' model; otherwise it compares with mlx-lm's.
        opens: whether its layers run one by one, which oracle, pattern search and graft need.
        quantises: whether mlx-lm can quantise it.
        caches: whether its passes with a cache give what a pass without one gives.
        refused: why no Duo can be hosted in it; empty: it can.
        raises: what `duo_mlx.model.Model` says of a refused one that mlx-lm itself can make here.
    """

    config: dict[str, Any]
    known: str = ""
    both: bool = False
    hosts: bool = True
    opens: bool = True
    caches: bool = True
    quantises: bool = True
    refused: str = ""
    raises: str = ""


def _both(config: dict[str, Any], known: str, **others: Any) -> Architecture:
    return Architecture(config, known, both=True, **others)


NO_FFN = "its layers have no FFN"
UNKNOWN = "a layer has no FFN that this package knows"
METAL = "mlx-lm runs it on Apple GPUs only"
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _both(
        {**COMMON, "rope_scaling": {"rope_type": "llama3", **SCALED}}, "Llama 1 to 3.3, SmolLM2, Yi, Vicuna"
    ),
    "mistral": _both({**COMMON, "sliding_window": None}, "Mistral 7B, Nemo"),
    "ministral3": _both(
        {
            **COMMON,
            "rope_parameters": {"rope_theta": 1e4, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32},
        },
        "Ministral 3",
    ),
    "mistral3": Architecture({**COMMON, "text_config": {**COMMON, "model_type": "mistral"}}, "Mistral Small 3 (text)"),
    "qwen2": _both(COMMON, "Qwen2, Qwen2.5, R1-Distill-Qwen"),
    "qwen3": _both(COMMON, "Qwen3 0.6B to 32B"),
    "gemma": _both(TIED, "Gemma 1"),
    "gemma2": _both({**TIED, "query_pre_attn_scalar": 16, "sliding_window": 64}, "Gemma 2"),
    "gemma3_text": _both(
        {**TIED, "query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 3}, "Gemma 3 270M, 1B"
    ),
    "gemma3": _both(
        {
            **COMMON,
            "text_config": {
                **TIED,
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 16,
                "sliding_window": 8,
                "sliding_window_pattern": 3,
            },
        },
        "Gemma 3 4B to 27B (text)",
        hosts=False,
    ),
    "gemma3n": Architecture(
        {**COMMON, "num_hidden_layers": 4, "text_config": GEMMA3N}, "Gemma 3n", opens=False, caches=False
    ),
    "phi": _both({**COMMON, "partial_rotary_factor": 0.5, "num_key_value_heads": 4}, "Phi-1, Phi-2"),
    "phi3": _both({**COMMON, "original_max_position_embeddings": 128}, "Phi-3, Phi-4"),
    "gpt2": _both({**GPT2, "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 2}, "GPT-2"),
    "gpt_bigcode": _both(
        {**GPT2, "layer_norm_epsilon": 1e-5, "n_inner": 256, "attention_softmax_in_fp32": True}, "StarCoder"
    ),
    "gpt_neox": _both({**COMMON, "intermediate_size": 256, "rotary_pct": 0.25, "rotary_emb_base": 10000}, "Pythia"),
    "qwen2_moe": _both({**COMMON, **EXPERTS, "shared_expert_intermediate_size": 64}, "Qwen1.5-MoE"),
    "qwen3_moe": _both(
        {**COMMON, **EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [1], "norm_topk_prob": True}, "Qwen3 30B-A3B"
    ),
    "mixtral": _both({**COMMON, **EXPERTS}, "Mixtral 8x7B"),
    "olmoe": _both({**COMMON, **EXPERTS, "norm_topk_prob": False}, "OLMoE"),
    "granitemoe": _both(
        {**COMMON, "intermediate_size": 128, **EXPERTS, **SCALES, "attention_bias": False}, "Granite 3 MoE"
    ),
    "gpt_oss": _both(
        {
            **COMMON,
            **EXPERTS,
            **WINDOWS,
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "yarn", "truncate": False, **YARN},
        },
        "gpt-oss 20B, 120B",
    ),
    "olmo2": _both(COMMON, "OLMo 2"),
    "olmo3": _both({**COMMON, **WINDOWS, "rope_theta": 500000.0}, "OLMo 3"),
    "cohere": _both(TIED | {"logit_scale": 0.25}, "Command R"),
    "cohere2": _both(
        {**TIED, "sliding_window": 8, "sliding_window_pattern": 3, "logit_scale": 0.25}, "Command R7B, Command A"
    ),
    "granite": _both({**COMMON, "intermediate_size": 128, **SCALES, **PLAIN}, "Granite 3"),
    "starcoder2": _both({**COMMON, "norm_epsilon": 1e-5, "sliding_window": None}, "StarCoder2"),
    "stablelm": _both({**COMMON, "partial_rotary_factor": 0.25, "use_qkv_bias": True}, "StableLM"),
    "glm4": _both({**COMMON, "attention_bias": True, "partial_rotary_factor": 0.5}, "GLM-4 9B, 32B"),
    "exaone4": _both({**COMMON, **WINDOWS, "sliding_window_pattern": "LLG", "rope_scaling": None}, "EXAONE 4"),
    "smollm3": _both({**COMMON, "no_rope_layer_interval": 2}, "SmolLM3"),
    "internlm3": _both(COMMON, "InternLM3"),
    "seed_oss": _both({**COMMON, **PLAIN, "attention_out_bias": False}, "Seed-OSS"),
    "helium": _both({**COMMON, **PLAIN}, "Helium"),
    "nemotron": _both(
        {**COMMON, "hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5}, "Nemotron-4, Minitron"
    ),
    "ernie4_5": _both({**TIED, "use_bias": False}, "ERNIE 4.5 0.3B"),
    "hunyuan_v1_dense": _both({**COMMON, "attention_bias": False, "use_qk_norm": True}, "Hunyuan dense"),
    "opt": _both(
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "vocab_size": 96,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
            "tie_word_embeddings": True,
        },
        "OPT 125M to 66B",
    ),
    "minicpm": Architecture({**COMMON, "dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}, "MiniCPM 1, 2"),
    "minicpm3": Architecture(
        {
            **COMMON,
            **LATENT,
            "dim_model_base": 32,
            "scale_depth": 1.4,
            "scale_emb": 2.0,
            "attention_bias": False,
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": 64,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0] * 4,
            },
        },
        "MiniCPM3",
    ),
    "internlm2": Architecture({**COMMON, "bias": False}, "InternLM2"),
    "glm": _both({**COMMON, "attention_bias": True, "partial_rotary_factor": 1.0}, "GLM edge"),
    "apertus": _both(
        {
            **COMMON,
            **PLAIN,
            "post_norm": True,
            "qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "Apertus",
    ),
    "baichuan_m1": Architecture(
        {**FOUR, "sliding_window": 8, "sliding_window_layers": [0, 2], "conv_window": 2}, "Baichuan M1"
    ),
    "exaone": _both({**COMMON, "num_layers": 3, "layer_norm_epsilon": 1e-5}, "EXAONE 3"),
    "hunyuan": Architecture(
        {
            **COMMON,
            "attention_bias": False,
            "moe_topk": 2,
            "num_experts": 4,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": False,
            "cla_share_factor": 2,
            "moe_intermediate_size": 64,
            "rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"},
        },
        "Hunyuan Large",
        opens=False,
    ),
    "mimo": Architecture({**COMMON, "num_nextn_predict_layers": 1}, "MiMo 7B"),
    "plamo": Architecture({**COMMON, "n_shared_head": 2}, "PLaMo", opens=False),
    "qwen": Architecture({**COMMON, "layer_norm_epsilon": 1e-5, "kv_channels": 16}, "Qwen 1"),
    "telechat3": Architecture(COMMON, "TeleChat3"),
    "youtu_llm": Architecture({**COMMON, **LATENT}, "Youtu-LLM"),
    "gptj": _both({**GPT2, "n_inner": 256, "rotary_dim": 8, "layer_norm_epsilon": 1e-5}, "GPT-J"),
    "nanochat": Architecture({**COMMON, "num_key_value_heads": 2}, "nanochat"),
    "openelm": Architecture(
        {
            "model_dim": 64,
            "num_transformer_layers": 3,
            "head_dim": 16,
            "vocab_size": 96,
            "ffn_dim_divisor": 32,
            "ffn_multipliers": [1.0, 1.5, 2.0],
            "num_query_heads": [4] * 3,
            "num_kv_heads": [2] * 3,
            "ffn_with_glu": True,
            "normalize_qk_projections": True,
            "share_input_output_layers": True,
            "rms_norm_eps": 1e-5,
            "rope_freq_constant": 10000,
        },
        "OpenELM",
    ),
    "lille-130m": Architecture(
        {**GPT2, "block_size": 128, "n_kv_heads": 2, "rope_theta": 1e4, "layer_norm_eps": 1e-5}, "Lille"
    ),
    "deepseek": Architecture({**COMMON, **ROUTED}, "DeepSeek-MoE 16B"),
    "deepseek_v2": _both(
        {
            **COMMON,
            **ROUTED,
            **LATENT,
            "topk_method": "group_limited_greedy",
            "num_key_value_heads": 4,
            "rope_scaling": DEEP,
        },
        "DeepSeek-V2",
    ),
    "deepseek_v3": _both(
        {**COMMON, **ROUTED, **LATENT, **ROTATED, "topk_method": "noaux_tc", "num_key_value_heads": 4},
        "DeepSeek-V3, R1",
    ),
    "dots1": _both({**COMMON, **ROUTED, "attention_bias": False, "rope_scaling": None}, "dots.llm1"),
    "ernie4_5_moe": Architecture(
        {**COMMON, "use_bias": False, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}, "ERNIE 4.5 MoE"
    ),
    "bailing_moe": Architecture({**COMMON, **ROUTED, "use_bias": False, "use_qkv_bias": False}, "Ling, Ring"),
    "glm4_moe": _both(
        {
            **COMMON,
            **ROUTED,
            "use_qk_norm": True,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
            "rope_scaling": None,
        },
        "GLM-4.5, 4.6",
    ),
    "glm4_moe_lite": _both(
        {
            **COMMON,
            **ROUTED,
            **LATENT,
            **ROTATED,
            "num_key_value_heads": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "rope_scaling": None,
            "attention_bias": False,
            "partial_rotary_factor": 1.0,
            "num_nextn_predict_layers": 1,
        },
        "GLM-4.7 Flash",
    ),
    "Klear": Architecture(
        {**COMMON, **ROUTED, "attention_bias": False, "mlp_only_layers": [0], "decoder_sparse_step": 1}, "Klear"
    ),
    "afmoe": Architecture({**COMMON, **EXPERTS, **WINDOWS, "num_dense_layers": 1, "num_shared_experts": 1}, "Trinity"),
    "exaone_moe": _both(
        {
            **COMMON,
            **ROUTED,
            **WINDOWS,
            "num_shared_experts": 1,
            "is_moe_layer": [False, True, True],
        },
        "K-EXAONE",
    ),
    "dbrx": _both(
        {
            "d_model": 64,
            "n_layers": 3,
            "n_heads": 4,
            "vocab_size": 96,
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
        "DBRX",
    ),
    "phimoe": _both(
        {
            **COMMON,
            **EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_scaling": {
                "long_factor": [1.0] * 8,
                "short_factor": [1.0] * 8,
                "long_mscale": 1.0,
                "short_mscale": 1.0,
                "original_max_position_embeddings": 64,
                "type": "longrope",
            },
        },
        "Phi-3.5-MoE",
    ),
    "minimax": Architecture(
        {**COMMON, **EXPERTS, "shared_intermediate_size": 64, "rotary_dim": 8, "num_key_value_heads": 4}, "MiniMax M2"
    ),
    "lfm2": _both(
        LFM2,
        "LFM2",
    ),
    "lfm2_moe": _both(
        {
            **FOUR,
            **EXPERTS,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "conv"] * 2,
            "norm_eps": 1e-5,
            "full_attn_idxs": [0, 2],
            "conv_bias": True,
            "conv_L_cache": 3,
            "num_dense_layers": 2,
            "norm_topk_prob": True,
            "use_expert_bias": True,
        },
        "LFM2 8B-A1B",
    ),
    "llama4_text": Architecture(
        {**FOUR, "intermediate_size_mlp": 96, "no_rope_layers": [0, 0, 1, 1], "use_qk_norm": True}, "MobileLLM"
    ),
    "qwen3_next": _both(
        {
            **FOUR,
            **EXPERTS,
            **LINEAR,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 64,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
        },
        "Qwen3-Next",
        hosts=False,
    ),
    "qwen3_5": Architecture({**FOUR, **LINEAR}, "Qwen3.5 (text)"),
    "recurrent_gemma": _both(
        {
            **TIED,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "conv1d_width": 4,
            "logits_soft_cap": 30.0,
            "attention_window_size": 16,
            "block_types": ["recurrent", "recurrent", "attention"],
            "embeddings_scale_by_sqrt_dim": True,
        },
        "RecurrentGemma",
    ),
    "falcon_h1": Architecture({**COMMON, **MAMBA, "mamba_d_ssm": 128, "projectors_bias": False}, "Falcon-H1"),
    "granitemoehybrid": _both(
        {
            **FOUR,
            **EXPERTS,
            **SCALES,
            **MAMBA,
            "attention_bias": False,
            "position_embedding_type": "rope",
            "time_step_limit": [0.001, 100.0],
            "shared_intermediate_size": 64,
            "mamba_proj_bias": False,
            "mamba_conv_bias": False,
            "layer_types": ["mamba", "attention"] * 2,
        },
        "Granite 4",
        hosts=False,
    ),
    "jamba": Architecture(
        {
            **FOUR,
            **EXPERTS,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 1,
            "expert_layer_period": 2,
            "mamba_d_conv": 4,
            "mamba_d_state": 16,
            "mamba_expand": 2,
        },
        "Jamba",
    ),
    "bailing_moe_linear": Architecture(
        {
            **FOUR,
            **EXPERTS,
            "norm_topk_prob": True,
            "num_shared_experts": 1,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 0,
            "layer_group_size": 2,
            "group_norm_size": 1,
        },
        "Ring-linear",
    ),
    "bailing_hybrid": Architecture(
        {
            **FOUR,
            **EXPERTS,
            **LATENT,
            "num_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "layer_group_size": 2,
            "group_norm_size": 1,
            "routed_scaling_factor": 1.0,
            "num_key_value_heads": 4,
        },
        "Ling 2.5, Ring 2.5",
    ),
    "bailing_moe_v3": Architecture(
        {
            **FOUR,
            **EXPERTS,
            **LATENT,
            "num_shared_experts": 1,
            "moe_shared_expert_intermediate_size": 64,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "layer_group_size": 2,
        },
        "Ling 3",
    ),
    "deepseek_v32": Architecture(
        {**COMMON, **VERY, "rope_scaling": DEEP, "index_n_heads": 4, "index_head_dim": 16, "index_topk": 4},
        "DeepSeek-V3.2",
    ),
    "glm_moe_dsa": Architecture(
        {
            **COMMON,
            **VERY,
            "num_key_value_heads": 4,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "attention_bias": False,
        },
        "GLM-5",
    ),
    "deepseek_v41": Architecture(
        {
            **COMMON,
            **VERY,
            "head_dim": 16,
            "qk_rope_head_dim": 8,
            "o_groups": 2,
            "o_lora_rank": 16,
            "compress_ratios": [0, 0, 0],
            "sliding_window": 8,
        },
        "DeepSeek-V4.1",
        opens=False,
    ),
    "kimi_vl": Architecture({**VL, "text_config": KIMI_TEXT}, "Kimi-VL (text)"),
    "kimi_k25": Architecture({**VL, "text_config": KIMI_TEXT}, "Kimi K2.5 (text)"),
    "kimi_linear": Architecture(
        {
            **FOUR,
            **EXPERTS,
            **LATENT,
            "linear_attn_config": KDA,
            "model_max_length": 128,
            "num_experts_per_token": 2,
            "num_key_value_heads": 4,
        },
        "Kimi Linear",
    ),
    "kimi_k3": Architecture(
        {
            **FOUR,
            "text_config": {
                **FOUR,
                **EXPERTS,
                **LATENT,
                "num_key_value_heads": 4,
                "linear_attn_config": KDA,
                "num_experts_per_token": 2,
                "num_shared_experts": 1,
            },
        },
        "Kimi K3 (text)",
        opens=False,
    ),
    "mimo_v2_flash": Architecture(
        {
            **FOUR,
            **ROUTED,
            "hybrid_layer_pattern": [0, 1, 0, 1],
            "moe_layer_freq": [0, 1, 0, 1],
            "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False,
            "sliding_window_size": 8,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "layernorm_epsilon": 1e-05,
            "swa_rope_theta": 10000.0,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "v_head_dim": 16,
            "swa_head_dim": 16,
            "swa_v_head_dim": 16,
            "partial_rotary_factor": 0.5,
        },
        "MiMo-V2-Flash",
    ),
    "nemotron-nas": Architecture({**COMMON, "block_configs": [BLOCK] * 3}, "Llama-Nemotron Super, Ultra"),
    "pixtral": Architecture({**VL, "text_config": {**COMMON, "model_type": "llama"}}, "Pixtral 12B (text)"),
    "qwen2_vl": Architecture({**VL, "text_config": {**COMMON, "model_type": "qwen2"}}, "Qwen2-VL (text)"),
    "qwen3_vl": Architecture({**VL, "text_config": {**COMMON, "model_type": "qwen3"}}, "Qwen3-VL (text)"),
    "qwen3_vl_moe": Architecture(
        {
            **VL,
            "text_config": {
                **COMMON,
                **EXPERTS,
                "model_type": "qwen3_moe",
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "norm_topk_prob": True,
            },
        },
        "Qwen3-VL MoE (text)",
    ),
    "qwen3_5_moe": Architecture(
        {**FOUR, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 64}, "Qwen3.5 MoE (text)"
    ),
    "step3p5": Architecture(
        {
            **FOUR,
            "num_attention_groups": 2,
            "rope_theta": [10000.0] * 4,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "partial_rotary_factors": [0.5, 1.0] * 2,
            "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
            "use_head_wise_attn_gate": True,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_intermediate_size": 64,
            "share_expert_dim": 64,
            "moe_layers_enum": "1,2,3",
        },
        "Step 3.5 Flash",
    ),
    "gemma4_text": _both(GEMMA4, "Gemma 4 (text)", opens=False),
    "gemma4": Architecture(
        {**VL, "num_hidden_layers": 4, "text_config": {**GEMMA4, "model_type": "gemma4_text"}},
        "Gemma 4 (text)",
        opens=False,
    ),
    "iquestloopcoder": Architecture({**COMMON, "loop_num": 2, "loop_window_size": 8}, "IQuest-Coder Loop", opens=False),
    "plamo2": Architecture(
        {
            **FOUR,
            "hidden_size_per_head": 16,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_num_heads": 4,
            "mamba_step": 2,
            "attention_window_size": 32,
            "mamba_enabled": True,
        },
        "PLaMo 2",
        opens=False,
    ),
    "plamo3": Architecture({**FOUR, "sliding_window_pattern": 2, "window_size": 32}, "PLaMo 3", opens=False),
    "laguna": Architecture(
        {
            **COMMON,
            **EXPERTS,
            **WINDOWS,
            "partial_rotary_factor": 0.5,
            "shared_expert_intermediate_size": 64,
            "moe_routed_scaling_factor": 2.5,
            "moe_router_score_func": "sqrtsoftplus",
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_attention_heads_per_layer": [4] * 3,
            "rope_parameters": ROPES,
        },
        "Laguna",
    ),
    "lfm2-vl": Architecture(
        {**VL, "num_hidden_layers": 4, "text_config": {**LFM2, "model_type": "lfm2"}}, "LFM2-VL (text)"
    ),
    "llama4": Architecture(
        {
            **VL,
            "num_hidden_layers": 4,
            "text_config": {
                **FOUR,
                **EXPERTS,
                "num_experts_per_tok": 1,
                "model_type": "llama4",
                "attention_bias": False,
                "attention_chunk_size": 8,
                "interleave_moe_layer_step": 2,
                "intermediate_size_mlp": 96,
                "rope_scaling": None,
                "use_qk_norm": True,
            },
        },
        "Llama 4 Scout, Maverick (text)",
    ),
    "longcat_flash": Architecture(
        {
            **COMMON,
            **LATENT,
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "ffn_hidden_size": 96,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "num_layers": 3,
            "routed_scaling_factor": 1.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
        },
        "LongCat-Flash",
    ),
    "longcat_flash_ngram": Architecture(
        {
            **COMMON,
            **LATENT,
            "attention_method": "MLA",
            "zero_expert_type": "identity",
            "ffn_hidden_size": 96,
            "moe_topk": 2,
            "expert_ffn_hidden_size": 64,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "num_layers": 3,
            "routed_scaling_factor": 1.0,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
        },
        "LongCat-Flash-Lite",
    ),
    "phi3small": Architecture(
        {
            **COMMON,
            "dense_attention_every_n_layers": 2,
            "ff_intermediate_size": 96,
            "gegelu_limit": 1.0,
            "layer_norm_epsilon": 1e-05,
            "vocab_size": 100352,
            "rope_embedding_base": 10000.0,
        },
        "Phi-3-small",
        caches=False,
    ),
    "afm7": Architecture(
        {
            "vocab_size": 96,
            "hidden_dim": 64,
            "num_layers": 4,
            "num_kv_reuse_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        "Apple Foundation Model 7",
        opens=False,
        quantises=False,
    ),
    "mellum": _both({**COMMON, **EXPERTS, **WINDOWS, "norm_topk_prob": True, "rope_parameters": ROPES}, "Mellum"),
    "mistral4": Architecture(
        {
            **COMMON,
            **VERY,
            "num_key_value_heads": 4,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "default",
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 32,
            },
        },
        "Mistral Small 4",
    ),
    "minimax_m3_vl": Architecture(
        {
            **VL,
            "text_config": {
                **COMMON,
                **EXPERTS,
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 64,
                "rotary_dim": 8,
            },
        },
        "MiniMax M3 (text)",
    ),
    "muse_glimmer": Architecture({**COMMON, **WINDOWS}, "Muse Glimmer"),
    "nanbeige": Architecture(COMMON, "Nanbeige"),
    "olmo_hybrid": Architecture(
        {
            **FOUR,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "linear_allow_neg_eigval": True,
            "attention_bias": False,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        "OLMo Hybrid",
    ),
    "phixtral": Architecture(
        {
            "num_vocab": 96,
            "vocab_size": 96,
            "model_dim": 64,
            "num_heads": 4,
            "num_layers": 3,
            "rotary_dim": 8,
            "num_experts_per_tok": 2,
            "num_local_experts": 4,
        },
        "Phixtral",
        opens=False,
    ),
    "solar_open": _both({**COMMON, **ROUTED, "first_k_dense_replace": 0, "partial_rotary_factor": 1.0}, "Solar Open"),
    "spark2_5": Architecture({**TIED, **WINDOWS, "rope_parameters": ROPES}, "Spark 2.5"),
    "talkie": Architecture({**COMMON, "num_key_value_heads": 4}, "Talkie"),
    "gear": Architecture(
        {
            **TIED,
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "layer_types": ["conv_mixer", "sliding_attention", "conv_mixer", "full_attention"],
            "query_pre_attn_scalar": 16,
        },
        "Gear",
    ),
    "mamba": Architecture(
        {**COMMON, "use_bias": False, "use_conv_bias": True, "conv_kernel": 4, "state_size": 16, "time_step_rank": 4},
        "Mamba, Falcon Mamba",
        refused=NO_FFN,
        raises=UNKNOWN,
    ),
    "mamba2": Architecture(
        {
            **COMMON,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 32,
            "layer_norm_epsilon": 1e-4,
            "conv_kernel": 3,
            "n_groups": 4,
            "use_bias": False,
            "use_conv_bias": False,
            "time_step_limit": [0.01, 10],
            "time_step_rank": "auto",
        },
        "Mamba-2, Codestral Mamba",
        refused=NO_FFN,
        raises=UNKNOWN,
    ),
    "nemotron_h": Architecture(
        {
            **FOUR,
            "attention_bias": False,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "mamba_proj_bias": False,
            "ssm_state_size": 16,
            "conv_kernel": 3,
            "n_groups": 4,
            "time_step_limit": [1.0, 2.0],
            "mlp_bias": False,
            "layer_norm_epsilon": 1e-4,
            "use_bias": True,
            "use_conv_bias": True,
            "hybrid_override_pattern": ["*", "M", "-", "M"],
        },
        "Nemotron-H, Nemotron 3",
        refused="each layer has one mixer: attention, Mamba or an FFN",
        raises=UNKNOWN,
    ),
    "rwkv7": Architecture(
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 96,
            "norm_eps": 1e-05,
            "head_dim": 16,
            "num_hidden_layers": 3,
            "a_low_rank_dim": 16,
            "v_low_rank_dim": 16,
            "gate_low_rank_dim": 16,
            "decay_low_rank_dim": 16,
        },
        "RWKV-7",
        refused="its FFN keeps a state between tokens",
        raises="a layer's FFN takes more than hidden states",
    ),
    "bitnet": Architecture({**COMMON}, "BitNet b1.58", refused=METAL),
    "muse_spark": Architecture({}, "Muse Spark", refused=METAL),
    "prism_hadamard_qwen35": Architecture(
        {}, "Qwen3.5 in Hadamard packs", refused="its weights are rotated and stored in 2 bits"
    ),
    "olmo": Architecture({}, "OLMo 1", refused="mlx-lm needs the package ai2-olmo for it"),
}

# Modules of mlx_lm/models that are parts of architectures.
INSIDE = {
    "activations",
    "base",
    "bitlinear_layers",
    "cache",
    "gated_delta",
    "mla",
    "pipeline",
    "rope_utils",
    "ssm",
    "switch_layers",
}


def modules() -> set[str]:
    """Return the names of all modules in the installed mlx_lm/models."""
    return {each.stem for each in Path(models.__path__[0]).glob("*.py")} - {"__init__"}
