"""GGUF's names for the llama architecture; it has none for a second FFN."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from duo_mlx.convert.keymaps.base import Names, renamed
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = Names("blk.", MODEL, LAYER)


@dataclass(frozen=True)
class GGUF:
    """GGUF's names; `duo_mlx.convert.keymaps.rope` takes care of its interleaved RoPE."""

    name: str = "gguf"

    def to_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        return renamed(tensors, NAMES.canonical)

    def from_canonical(self, tensors: Tensors, config: Mapping[str, Any]) -> dict[str, Tensor]:  # noqa: ARG002
        for name in tensors:
            if any(f".mlp.{module}." in name for module in ("big", "small", "router")):
                raise DuoError(f"{name}: GGUF has no name for it; a Duo can be written as canonical, llama or fused")
        return renamed(tensors, NAMES.theirs)
