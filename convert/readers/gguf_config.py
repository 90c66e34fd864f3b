"""Make a config.json of a GGUF file's metadata, with all keys that mlx-lm and transformers need.

Where llama.cpp's own code holds a number that the file does not state, such as Gemma's window pattern, it stands here.
"""

import re
from collections.abc import Mapping
from typing import Any

from duo_mlx.convert.readers import gguf_rope
from duo_mlx.convert.readers.gguf_metadata import Metadata, token_ids
from duo_mlx.convert.readers.text import shown
from duo_mlx.errors import DuoError

# llama.cpp's name of an architecture, and config.json's words for it
MODELS = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
}
# models that multiply by these, and the values that change nothing
NEUTRAL: dict[str, tuple[float, ...]] = {
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "embedding_scale": (0, 1),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
}
OWN = {  # what an architecture has of these
    "gemma2": ("attention.scale", "attn_logit_softcapping", "final_logit_softcapping"),
    "gemma3": ("attention.scale",),
}
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of Gemma's 27B models, whose attention has another scale
PATTERN = {"gemma2": 2, "gemma3": 6}  # every n-th layer looks at the whole text


def check_architecture(metadata: Mapping[str, Any]) -> str:
    """Return the architecture's name.

    Raises:
        DuoError: it is not in `MODELS`.
    """
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in MODELS:
        named = repr(shown(architecture)) if architecture is not None else "not named"
        raise DuoError(f"its architecture is {named}; supported are {', '.join(MODELS)}")
    return architecture


def config(
    metadata: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: dict[str, gguf_rope.Factors]
) -> dict[str, Any]:
    """Return config.json's keys.

    Args:
        metadata: the file's.
        shapes: of its tensors, by GGUF's names.
        factors: the tensors of `gguf_rope.TENSORS` that it has.

    Raises:
        DuoError: the metadata lacks something, does not fit the tensors, or asks for what these keys cannot say.
    """
    say = Metadata(metadata)
    name = check_architecture(metadata)
    _check_plain(say)
    hidden, heads = say.integer("embedding_length"), say.integer("attention.head_count")
    embedding = shapes.get("token_embd.weight", ())
    if len(embedding) != 2 or embedding[1] != hidden:
        raise DuoError(f"token_embd.weight is {list(embedding)}, but the metadata says an embedding of {hidden}")
    layers = say.integer("block_count")
    found = {match[1] for tensor in shapes if (match := re.match(r"blk\.(\d+)\.", tensor))}
    if len(found) != layers:
        raise DuoError(f"the metadata says {layers} layers, but there are tensors of {len(found)}")
    head, rotated = head_sizes(say)
    theta = say.real("rope.freq_base", 10000.0)
    model_type, architecture = MODELS[name]
    made = {
        "model_type": model_type,
        "architectures": [architecture],
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": say.integer("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": say.integer("attention.head_count_kv", heads),
        "rms_norm_eps": say.real("attention.layer_norm_rms_epsilon"),
        "vocab_size": embedding[0],
        "rope_theta": theta,
        "max_position_embeddings": say.integer("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in shapes,
        "rope_scaling": gguf_rope.scaling(say, factors, theta, rotated),
    }
    if name in ("qwen3", "gemma2", "gemma3") or head * heads != hidden:
        made["head_dim"] = head
    if name == "llama":
        made |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_gate.bias" in shapes}
    elif name == "qwen3":
        made |= {"attention_bias": False}
    elif name == "phi3":
        made |= _phi3(say, made, rotated / head)
    elif name in PATTERN:
        made |= _gemma(say, made)
        del made["hidden_act"]  # transformers' key for Gemma is hidden_activation
    return made | token_ids(metadata, embedding[0])


def head_sizes(say: Metadata) -> tuple[int, int]:
    """Return a head's channels, and how many of them are rotated.

    Raises:
        DuoError: the architecture does not allow these numbers.
    """
    hidden, heads = say.integer("embedding_length"), say.integer("attention.head_count")
    head = say.integer("attention.key_length", max(hidden // heads, 1))
    rotated = say.integer("rope.dimension_count", head)
    fixed = {"attention.value_length": say.integer("attention.value_length", head)}
    if say.architecture != "phi3":
        fixed["rope.dimension_count"] = rotated
    for key, other in fixed.items():
        if other != head:
            raise DuoError(f"{say.full(key)} is {other}, not the {head} of a head; only whole heads are supported")
    if rotated > head or rotated % 2:
        raise DuoError(f"{say.full('rope.dimension_count')} is {rotated}, no even part of a head's {head} channels")
    if say.architecture in ("qwen2", "phi3") and head * heads != hidden:
        raise DuoError(f"{say.full('attention.key_length')} is {head}, but {heads} heads share {hidden} channels")
    return head, rotated


def _check_plain(say: Metadata) -> None:
    if say.has("expert_count"):
        raise DuoError("is a mixture of experts; supported are models with one FFN a layer")
    for key, neutral in NEUTRAL.items():
        value = say.values.get(say.full(key), 0)
        if value not in neutral and key not in OWN.get(say.architecture, ()):
            raise DuoError(f"{say.full(key)} is {shown(value)}; config.json cannot say that of {say.architecture}")


def _gemma(say: Metadata, made: dict[str, Any]) -> dict[str, Any]:
    """Return Gemma 2's and 3's own keys."""
    layers, head, name = made["num_hidden_layers"], made["head_dim"], say.architecture
    scaled = made["hidden_size"] // made["num_attention_heads"] if layers == LARGEST[name] else head
    if say.has("attention.scale"):
        scaled = round(say.real("attention.scale") ** -2)
    keys: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": scaled,
    }
    if name == "gemma2":
        keys |= {
            "attn_logit_softcapping": say.real("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": say.real("final_logit_softcapping", 30.0),
        }
        window = say.integer("attention.sliding_window", 4096)
    else:
        keys["rope_local_base_freq"] = say.real("rope.freq_base_swa", 10000.0)
        window = say.integer("attention.sliding_window", made["max_position_embeddings"])
    whole = 1 if name == "gemma3" and not say.has("attention.sliding_window") else PATTERN[name]
    whole = _pattern(say, whole, layers)
    if name == "gemma2" and whole != PATTERN[name]:
        raise DuoError(f"{say.full('attention.sliding_window_pattern')} is {whole}; Gemma 2's is {PATTERN[name]}")
    if name == "gemma3":
        keys["sliding_window_pattern"] = whole
    kinds = ["full_attention" if (layer + 1) % whole == 0 else "sliding_attention" for layer in range(layers)]
    return keys | {"sliding_window": window, "layer_types": kinds}


def _pattern(say: Metadata, default: int, layers: int) -> int:
    """Return n where every n-th layer looks at the whole text; the file says n, or for each layer if it does not."""
    said = say.get("attention.sliding_window_pattern", default)
    if not isinstance(said, list):
        return say.integer("attention.sliding_window_pattern", default)
    slides = [bool(value) for value in said]
    period = slides.index(False) + 1 if False in slides else layers + 1
    if slides != [bool((layer + 1) % period) for layer in range(layers)]:
        raise DuoError(f"{say.full('attention.sliding_window_pattern')} repeats in no fixed number of layers")
    return period


def _phi3(say: Metadata, made: dict[str, Any], part: float) -> dict[str, Any]:
    """Return Phi 3's own keys."""
    trained = say.integer("rope.scaling.original_context_length", made["max_position_embeddings"])
    keys: dict[str, Any] = {"partial_rotary_factor": part, "original_max_position_embeddings": trained}
    if say.has("attention.sliding_window"):
        keys["sliding_window"] = say.integer("attention.sliding_window")
    return keys
