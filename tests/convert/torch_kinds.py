"""Tiny checkpoints of architectures that transformers and mlx-lm both have, by ``model_type``."""

from functools import cache

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from duo_mlx.convert.torch_reference import quiet
from tests.architectures import ARCHITECTURES

BOTH = {kind: row.config for kind, row in ARCHITECTURES.items() if row.both and kind != "opt"}  # in mlx-lm, too
HOSTED = {kind for kind in BOTH if ARCHITECTURES[kind].hosts}  # whose FFNs can be replaced in both
OPT = ARCHITECTURES["opt"].config
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
