"""Dense models of many architectures as transformers writes them, and small FFNs for them without a graft."""

import types

import mlx.core as mx
import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from duo_mlx.convert.tensors import Tensor

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}  # mlx-lm rounds the range of gpt-oss' YaRN
BASES = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    "qwen3_moe": EXPERTS | {"moe_intermediate_size": 32},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "glm4": {},
    "granite": {},
    "mixtral": {"num_local_experts": 4},
    "smollm3": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": PLAIN},
}
GPT2 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


class Graft:
    """Stands in for the solving of small FFNs, which has tests of its own: theirs are random."""

    small_layers = None
    tokens = 256


def small_ffns(model, *_):
    random = np.random.default_rng(0)
    hidden = model.config.hidden_size
    shapes = {"gate_proj": (32, hidden), "up_proj": (32, hidden), "down_proj": (hidden, 32)}
    smalls = {
        f"{path}.small.{name}.weight": Tensor.of(mx.array(random.normal(0, 0.1, shape).astype(np.float32)))
        for path in model.ffn_paths
        for name, shape in shapes.items()
    }
    return types.SimpleNamespace(tensors=smalls, config={"small_intermediate_size": 32}, orders={})


def save(directory, kind, dtype=torch.float32, **changes):
    """Write a model with random weights as transformers does, and return it."""
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if kind != "gpt2" or key not in GPT2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | BASES[kind] | changes)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_(torch.randn_like(value) * (0.2 if value.ndim > 1 else 0.02) * ("embed" not in name))
    model.to(dtype).save_pretrained(directory)
    return model


def weights_of(directory):
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= mx.load(str(file))
    return found
