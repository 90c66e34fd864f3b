"""GGUF files of six architectures, written as llama.cpp's converter does, and their twins in transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}
Kind = gguf.GGMLQuantizationType


def write(
    file: Path,
    model: Any,
    kind: Kind = Kind.F32,
    more: dict[str, np.ndarray] | None = None,
    add: Callable[[gguf.GGUFWriter], None] | None = None,
    **options: Any,
) -> None:
    """Write ``model``; its matrices are of type ``kind``.

    Args:
        file: its name.
        model: a transformers model for causal language modelling.
        kind: a type that ``gguf.quants.quantize`` makes.
        more: tensors besides the model's.
        add: puts further metadata in.
        options: of ``gguf.GGUFWriter``.
    """
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture], **options)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if config.model_type != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if add is not None:
        add(writer)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _theirs(name, tensor.float(), config, head).numpy()
        module, _, suffix = name.rpartition(".")
        new = f"{names.get_name(module)}.{suffix}"
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(new, values)
        else:
            writer.add_tensor(new, gguf.quants.quantize(values, kind), raw_dtype=kind)
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _theirs(name: str, tensor: torch.Tensor, config: Any, head: int) -> torch.Tensor:
    """Return the weights as llama.cpp wants them."""
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config.model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor.reshape(-1, 2, head // 2, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
    return tensor


def llama3_factors(theta: float, head: int, factor: float, high: float, trained: int) -> np.ndarray:
    """Return ``rope_freqs.weight`` as llama.cpp's converter computes it, with a low factor of 1."""
    found = []
    for frequency in 1.0 / (theta ** (np.arange(0, head, 2) / head)):
        wave = 2 * np.pi / frequency
        if wave < trained / high:
            found.append(1.0)
        elif wave > trained:
            found.append(factor)
        else:
            smooth = (trained / wave - 1) / (high - 1)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "num_hidden_layers": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(4.0)
    writer.add_rope_scaling_orig_ctx_len(32)


def linear(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)


def rotary(count: int) -> Callable[[gguf.GGUFWriter], None]:
    return lambda writer: writer.add_rope_dimension_count(count)


def capped(writer: gguf.GGUFWriter) -> None:
    writer.add_attn_logit_softcapping(20.0)
    writer.add_final_logit_softcapping(10.0)


def periodic(writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window_pattern(2)
    writer.add_rope_freq_base_swa(500.0)


LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}, {}),
    "llama 3": (
        "Llama",
        {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 32},
        {"more": lambda: {"rope_freqs.weight": llama3_factors(10000.0, 32, 8.0, 4.0, 64)}},
    ),
    "llama with factors of one": ("Llama", {}, {"more": lambda: {"rope_freqs.weight": np.ones(8, np.float32)}}),
    "llama with linear scaling": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"add": linear},
    ),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}, {}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN}, {"add": yarn}),
    "qwen3": ("Qwen3", {"head_dim": 32}, {}),
    "gemma2": (
        "Gemma2",
        {**GEMMA, "sliding_window": 64, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0},
        {"add": capped},
    ),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7, "sliding_window": 8}, {}),
    "gemma3 with a period of its own": (
        "Gemma3Text",
        {
            **GEMMA,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": LOCAL | {"rope_theta": 1e6},
                "sliding_attention": LOCAL | {"rope_theta": 500.0},
            },
        },
        {"add": periodic},
    ),
    "phi3": ("Phi3", {"sliding_window": None}, {"add": rotary(16)}),
    "phi3 with partial rotation": (
        "Phi3",
        {"rope_parameters": LOCAL | {"partial_rotary_factor": 0.5}, "tie_word_embeddings": True},
        {"add": rotary(8)},
    ),
}


def made(name: str, changes: dict[str, Any]) -> Any:
    """Return a transformers model with random weights, norms and biases included."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    config._attn_implementation = "eager"
    kind = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model
