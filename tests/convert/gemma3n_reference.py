"""Gemma 3n in PyTorch for the tests: a tiny checkpoint in the hub's layout, its slices, and routes token by token."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import DynamicCache, Gemma3nForCausalLM, Gemma3nTextConfig
from transformers.models.gemma3n.modeling_gemma3n import apply_rotary_pos_emb

INNER = 128
LOCAL, GLOBAL = "sliding_attention", "full_attention"
TEXT: dict[str, Any] = {
    "model_type": "gemma3n_text",
    "vocab_size": 112,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "intermediate_size": [INNER] * 10,
    "num_hidden_layers": 10,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "sliding_window": 4,
    "layer_types": [LOCAL, LOCAL, LOCAL, LOCAL, GLOBAL] * 2,
    "num_kv_shared_layers": 4,  # layers 4 and 5 feed layers 6 to 9
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 7,
    "hidden_size_per_layer_input": 32,
    "altup_num_inputs": 4,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
    "tie_word_embeddings": True,
}
State = dict[str, torch.Tensor]


def text_config(**changes: Any) -> Gemma3nTextConfig:
    """transformers' configuration of the hub's ``text_config``."""
    keys = TEXT | changes
    local, whole = keys["rope_local_base_freq"], keys["rope_theta"]
    rope = {LOCAL: local, GLOBAL: whole}
    keys["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in rope.items()}
    keys = {key: value for key, value in keys.items() if not key.startswith("rope_") or key == "rope_parameters"}
    return Gemma3nTextConfig(**{key: value for key, value in keys.items() if key != "model_type"})


def loaded(config: Gemma3nTextConfig, state: State) -> Gemma3nForCausalLM:
    """transformers' model of a text checkpoint."""
    config._attn_implementation = "eager"
    model = Gemma3nForCausalLM(config)
    missing, _ = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # what is tied
    return model.eval()


def random_state(seed: int = 0) -> State:
    """Weights by transformers' names; all layers have projections to keys and values, as on the hub."""
    random = torch.Generator().manual_seed(seed)
    shapes = {name: value.shape for name, value in Gemma3nForCausalLM(text_config()).state_dict().items()}
    first = TEXT["num_hidden_layers"] - TEXT["num_kv_shared_layers"]
    for layer in range(first, TEXT["num_hidden_layers"]):
        for part in ("k_proj", "v_proj", "k_norm"):
            name = f"model.layers.{{}}.self_attn.{part}.weight"
            shapes[name.format(layer)] = shapes[name.format(0)]
    state = {}
    for name, shape in shapes.items():
        if name != "lm_head.weight":
            scale = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
            state[name] = torch.randn(shape, generator=random) * scale + (len(shape) == 1)
    return state


def write(directory: Path, state: State, **changes: Any) -> Path:
    """Write a checkpoint in the hub's layout, towers for pictures and sound included."""
    directory.mkdir(exist_ok=True)
    towers = (
        "vision_tower.conv.weight",
        "audio_tower.conv.weight",
        "embed_vision.norm.weight",
        "embed_audio.norm.weight",
    )
    weights = {f"model.{name}": torch.ones(3) for name in towers}
    weights |= {name.replace("model.", "model.language_model.", 1): value for name, value in state.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "text_config": TEXT | changes,
        "vision_config": {"model_type": "gemma3n_vision"},
        "audio_config": {"model_type": "gemma3n_audio"},
        "eos_token_id": [1],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def cut(state: State, widths: Sequence[int], skips: Sequence[int]) -> Gemma3nForCausalLM:
    """The model that Google's notebook cuts from a checkpoint; ``widths`` are those of the layers that stay."""
    layers = TEXT["num_hidden_layers"]
    stay = [layer for layer in range(layers) if layer not in skips]
    made: State = {}
    for name, value in state.items():
        if found := re.search(r"\.layers\.(\d+)\.", name):
            if (old := int(found[1])) in skips:
                continue
            new = stay.index(old)
            name = name.replace(f".layers.{old}.", f".layers.{new}.")
            if "mlp.gate_proj" in name or "mlp.up_proj" in name:
                value = value[: widths[new]]
            elif "mlp.down_proj" in name:
                value = value[:, : widths[new]]
        elif "per_layer_model_projection" in name:
            value = value.reshape(layers, -1, value.shape[1])[stay].flatten(0, 1)
        elif "embed_tokens_per_layer" in name:
            value = value.reshape(len(value), layers, -1)[:, stay].flatten(1)
        made[name] = value
    shared = layers - TEXT["num_kv_shared_layers"]
    changes = {
        "num_hidden_layers": len(stay),
        "num_kv_shared_layers": TEXT["num_kv_shared_layers"] - sum(layer >= shared for layer in skips),
        "intermediate_size": list(widths),
        "activation_sparsity_pattern": [TEXT["activation_sparsity_pattern"][layer] for layer in stay],
        "layer_types": [TEXT["layer_types"][layer] for layer in stay],
    }
    return loaded(text_config(**changes), made)


@torch.no_grad()
def cached(model: Gemma3nForCausalLM, tokens: np.ndarray, cuts: Sequence[int]) -> np.ndarray:
    """Logits ``[batch, tokens, vocab]`` of passes over ``cuts`` tokens each, with transformers' own cache."""
    cache, logits, start = DynamicCache(config=model.config), [], 0
    for count in cuts:
        given = torch.tensor(tokens[:, start : start + count])
        logits.append(model(input_ids=given, cache=cache, use_cache=True).logits)
        start += count
    return torch.cat(logits, 1).numpy()


@torch.no_grad()
def token_by_token(
    model: Gemma3nForCausalLM, tokens: np.ndarray, routes: np.ndarray, widths: Sequence[int], skips: Sequence[int]
) -> np.ndarray:
    """Logits ``[tokens, vocab]`` of one sequence: no masks, no batches, one vector after the other.

    Args:
        model: the whole one.
        tokens: ids ``[tokens]``.
        routes: 0 skip, 1 small, 2 big; ``[tokens, layers]``.
        widths: small's, one a layer; 0: small is big.
        skips: layers in which small is skip.
    """
    text, config = model.model, model.config
    own = config.num_hidden_layers - config.num_kv_shared_layers
    feeds = {kind: own - 1 - config.layer_types[:own][::-1].index(kind) for kind in set(config.layer_types)}
    kept: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(own)]
    logits = []
    for place, token in enumerate(tokens.tolist()):
        ids = torch.tensor([[token]])
        embedded = text.embed_tokens(ids)
        inputs = text.project_per_layer_inputs(embedded, text.get_per_layer_inputs(ids))
        size = embedded.square().mean(-1, keepdim=True).sqrt()
        streams = [embedded]
        for project in text.altup_projections:
            other = project(embedded)
            streams.append(other * size / other.square().mean(-1, keepdim=True).sqrt())
        h = torch.stack(streams)
        for index, layer in enumerate(text.layers):
            kind, route = config.layer_types[index], int(routes[place, index])
            turns = text.rotary_emb(h, torch.tensor([[place]]), kind)
            guess = layer.altup.predict(h)
            x = layer.input_layernorm(guess[0])
            attention = layer.self_attn
            if index < own:
                key = attention.k_norm(attention.k_proj(x).view(1, 1, -1, config.head_dim))
                value = attention.v_norm(attention.v_proj(x).view(1, 1, -1, config.head_dim))
                kept[index].append((apply_rotary_pos_emb(key, *turns, unsqueeze_dim=2)[0, 0], value[0, 0]))
            if route == 0 or (route == 1 and index in skips):
                continue
            seen = kept[index if index < own else feeds[kind]]
            seen = seen[-config.sliding_window :] if kind == LOCAL else seen
            keys, values = (torch.stack(each) for each in zip(*seen, strict=True))  # [tokens, heads, width]
            query = attention.q_norm(attention.q_proj(x).view(1, 1, -1, config.head_dim))
            query = apply_rotary_pos_emb(query, *turns, unsqueeze_dim=2)[0, 0]
            groups = config.num_attention_heads // config.num_key_value_heads
            heads = [
                (keys[:, head // groups] @ query[head]).softmax(0) @ values[:, head // groups]
                for head in range(config.num_attention_heads)
            ]
            attended = layer.post_attention_layernorm(attention.o_proj(torch.cat(heads).view(1, 1, -1)))
            middle = (guess[0] + attended + layer.laurel(x)) / math.sqrt(2)
            width = widths[index] if route == 1 and widths[index] else INNER
            normed = layer.pre_feedforward_layernorm(middle)
            gate = normed @ layer.mlp.gate_proj.weight[:width].T
            if sparse := config.activation_sparsity_pattern[index]:
                limit = torch.distributions.Normal(0, 1).icdf(torch.tensor(sparse))
                gate = (gate - gate.mean(-1) - gate.std(-1, unbiased=False) * limit).relu()
            inner = layer.mlp.act_fn(gate) * (normed @ layer.mlp.up_proj.weight[:width].T)
            out = layer.post_feedforward_layernorm(inner @ layer.mlp.down_proj.weight[:, :width].T)
            h = layer.altup.correct(guess, middle + out)
            first = layer.altup.scale_corrected_output(h[0])
            first = layer.act_fn(layer.per_layer_input_gate(first)) * inputs[:, :, index]
            h[1:] += layer.post_per_layer_input_norm(layer.per_layer_projection(first))
        size = h[0].square().mean(-1, keepdim=True).sqrt()
        ends = [h[0]]
        for project, stream in zip(text.altup_unembed_projections, h[1:], strict=True):
            other = project(stream)
            ends.append(other * size / other.square().mean(-1, keepdim=True).sqrt())
        final = model.lm_head(text.norm(torch.stack(ends).mean(0)))[0, 0]
        logits.append((final / 30).tanh() * 30)
    return torch.stack(logits).numpy()
