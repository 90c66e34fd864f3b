"""Skipping a whole layer (``skip_scope: layer``): attention too, but for the keys and values of later tokens.

It needs the parts of a block, so it is offered for those whose parts are known: pre-norm blocks with the attention of
mlx-lm's llama, qwen2 and qwen3, and Gemma 3n's, which hand on several streams of hidden states.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3n, llama, qwen2, qwen3

from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes

KNOWN = (llama.Attention, qwen2.Attention, qwen3.Attention)


class Skippable:
    """A block of which a token may need no more than its keys and values.

    Args:
        block: a decoder layer.
        ffn: its `DuoFFN`.
    """

    def __init__(self, block: Any, ffn: Any):
        self.ffn = ffn
        self._block = block

    def tokens(self, h: mx.array) -> mx.array:
        """Return one vector a token ``[..., hidden]`` of a block's input, whatever it holds."""
        return h

    def seen(self, h: mx.array) -> mx.array:
        """Return what attention sees of a block's input, from which a router decides."""
        out: mx.array = self._block.input_layernorm(h)
        return out

    def skipped_bytes(self) -> int:
        """Bytes of the weights that a skipped token reads."""
        return sum(map(nbytes, self._read_by_skips()))

    def _read_by_skips(self) -> list[nn.Module]:
        attention = self._block.self_attn
        return [self._block.input_layernorm, attention.k_proj, attention.v_proj]

    def write_only(self, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> mx.array:
        """Return ``h``, after its keys and values were written to the cache among a block's arguments."""
        cache = next((each for each in (*args, *named.values()) if hasattr(each, "update_and_fetch")), None)
        if cache is None:
            return h
        written = self.remember(self.seen(h), cache)
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
        values = attention.v_norm(values) if "v_norm" in attention else values
        keys = attention.rope(keys, offset=cache.offset)
        written: tuple[mx.array, mx.array] = cache.update_and_fetch(keys, values.transpose(0, 2, 1, 3))
        return written


class SkippableStreams(Skippable):
    """A block of Gemma 3n, whose input is ``[streams, batch, tokens, hidden]``; a skip leaves all streams as they are.

    Its last layers read another layer's keys and values. A skip of these writes nothing.
    """

    @property
    def _active(self) -> int:
        stream: int = self._block.config.altup_active_idx
        return stream

    def tokens(self, h: mx.array) -> mx.array:
        return h[self._active]

    def seen(self, h: mx.array) -> mx.array:
        out: mx.array = self._block.input_layernorm(self._block.altup.predict(h)[self._active])
        return out

    def _read_by_skips(self) -> list[nn.Module]:
        if self._block.self_attn.is_kv_shared_layer:
            return []
        altup = self._block.altup
        return [*super()._read_by_skips(), altup.prediction_coefs, altup.modality_router, altup.router_norm]

    def write_only(self, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> mx.array:
        return h if self._block.self_attn.is_kv_shared_layer else super().write_only(h, args, named)


def skippable(block: Any, ffn: Any, kind: str) -> Skippable:
    """Return what skips a block.

    Args:
        block, ffn: see `Skippable`.
        kind: the base's name, for the refusal.

    Raises:
        DuoError: the block's parts are not known.
    """
    attention = block.get("self_attn")
    if isinstance(attention, gemma3n.Gemma3nAttention):
        return SkippableStreams(block, ffn)
    if isinstance(attention, KNOWN) and "input_layernorm" in block:
        return Skippable(block, ffn)
    raise DuoError(
        f"config.json: skip_scope 'layer' is not known for a {kind}; it is for llama, qwen2, qwen3 and gemma3n. "
        "Use skip_scope 'ffn'"
    )
