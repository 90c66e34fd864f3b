"""Skipping a whole layer (``skip_scope: layer``): attention too, but for the keys and values of later tokens.

It needs the parts of a block, so it is offered for those whose parts are known: pre-norm blocks with the attention of
mlx-lm's llama, qwen2 and qwen3.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama, qwen2, qwen3

from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes

KNOWN = (llama.Attention, qwen2.Attention, qwen3.Attention)


class Skippable:
    """A block of which a token may need no more than its keys and values.

    Args:
        block: a decoder layer.
        ffn: its `DuoFFN`.
        kind: the base's name, for the refusal.

    Raises:
        DuoError: the block's parts are not known.
    """

    def __init__(self, block: Any, ffn: Any, kind: str):
        if not (isinstance(block.get("self_attn"), KNOWN) and "input_layernorm" in block):
            raise DuoError(
                f"config.json: skip_scope 'layer' is not known for a {kind}; it is for llama, qwen2 and qwen3. "
                "Use skip_scope 'ffn'"
            )
        self.ffn = ffn
        self._block = block

    @property
    def norm(self) -> nn.Module:
        """The norm before attention, from which a router decides."""
        norm: nn.Module = self._block.input_layernorm
        return norm

    def skipped_bytes(self) -> int:
        """Bytes of the weights that a skipped token reads."""
        attention = self._block.self_attn
        return sum(map(nbytes, (self._block.input_layernorm, attention.k_proj, attention.v_proj)))

    def write_only(self, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> mx.array:
        """Return ``h``, after its keys and values were written to the cache among a block's arguments."""
        cache = next((each for each in (*args, *named.values()) if hasattr(each, "update_and_fetch")), None)
        if cache is None:
            return h
        written = self.remember(self._block.input_layernorm(h), cache)
        # without this nobody would ask for the write, and step after step it would stay an unevaluated graph
        after: list[mx.array] = mx.depends([h], list(written))
        return after[0]

    def remember(self, x: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
        """Write keys and values of ``x [batch, tokens, hidden]`` to the cache, as attention does."""
        attention = self._block.self_attn
        if hasattr(attention, "remember"):  # `duo_mlx.cpu`
            found: tuple[mx.array, mx.array] = attention.remember(x, cache)
            return found
        heads = x.shape[0], x.shape[1], attention.n_kv_heads, -1
        keys, values = attention.k_proj(x).reshape(heads), attention.v_proj(x).reshape(heads)
        keys = (attention.k_norm(keys) if "k_norm" in attention else keys).transpose(0, 2, 1, 3)
        keys = attention.rope(keys, offset=cache.offset)
        written: tuple[mx.array, mx.array] = cache.update_and_fetch(keys, values.transpose(0, 2, 1, 3))
        return written
