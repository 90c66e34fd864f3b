"""Original Llama's names, as Meta's code and its descendants have them.

A Duo's two FFNs are ``feed_forward.big`` and ``feed_forward.small``. What others wrote is read, too: big as the plain
``feed_forward`` with ``feed_forward_small`` or ``small_feed_forward`` beside it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo_mlx.convert.keymaps import routers
from duo_mlx.convert.keymaps.base import Names, renamed
from duo_mlx.convert.tensors import Tensor, Tensors

MODEL = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
FFN = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.router": "mlp.router",
    **{f"feed_forward.{w}": f"mlp.{projection}" for w, projection in FFN.items()},
    **{f"feed_forward.{m}.{w}": f"mlp.{m}.{projection}" for m in ("big", "small") for w, projection in FFN.items()},
}
NAMES = Names("layers.", MODEL, LAYER)

ROTARY = "rope.freqs"  # a table that the model computes itself
SMALL = re.compile(r"(layers\.\d+\.)(?:feed_forward\.small|feed_forward_small|small_feed_forward)\.(w[123]\.\w+)")
PLAIN = re.compile(r"(layers\.\d+\.feed_forward\.)(w[123]\.\w+)")


@dataclass(frozen=True)
class Llama:
    """Original Llama's names; `duo_mlx.convert.keymaps.rope` takes care of its interleaved RoPE."""

    name: str = "llama"

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        two = any(SMALL.fullmatch(name) for name in tensors)
        router = routers.canonical(tensors)

        def canonical(name: str) -> str:
            name = SMALL.sub(r"\1feed_forward.small.\2", router(name))
            return NAMES.canonical(PLAIN.sub(r"\1big.\2", name) if two else name)

        return renamed({name: tensor for name, tensor in tensors.items() if name != ROTARY}, canonical)

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        return renamed(tensors, NAMES.theirs)
