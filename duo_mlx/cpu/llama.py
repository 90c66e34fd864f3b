"""Llama's modules as a CPU computes them fastest; what they compute is mlx-lm's.

A pass that decodes, over a few tokens ``[batch, tokens, hidden]`` or one of each sequence, ``[batch, hidden]``, takes a
shorter way through each of them: fewer additions and products, and fewer of everything else.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from duo_mlx.cpu.products import few, join, onto, through, times
from duo_mlx.ffn import GatedFFN
from duo_mlx.hosting import current, replace_class
from duo_mlx.routes import FEW

BASE = llama.Model
LOG2_E = 1.4426950408889634

Rotation = Callable[[mx.array], mx.array]  # of queries or keys [batch, heads, tokens, head_dim] at a pass's positions


def decodes(x: mx.array) -> bool:
    """Whether a pass over ``x`` takes the shorter way."""
    return x.ndim == 2 or few(x)


def quicken(model: Any) -> None:
    """Replace the classes of a hosted Llama's modules."""
    replace_class(model.trunk, Decoder)
    for block in model.layers:
        replace_class(block, Block)
        replace_class(block.self_attn, Attention)
        block.self_attn._qkv = None
        modules = block.mlp.big, block.mlp.small
        for module in modules:
            if type(module) is llama.MLP or (type(module) is GatedFFN and module.activation == "silu"):
                replace_class(module, MLP)
                module._gate_up = None
        block._adds = all(isinstance(module, MLP) for module in modules)
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            replace_class(module, RMSNorm)
    table = model.table
    if type(table) in TABLES:
        replace_class(table, TABLES[type(table)])


def fuse(model: Any) -> None:
    """Decode with fewer and larger products; from then on the weights must not be changed."""
    for block in model.layers:
        block.self_attn.fuse()
        for module in {id(module): module for module in (block.mlp.big, block.mlp.small)}.values():
            if isinstance(module, MLP):
                module.fuse()


@mx.compile
def _norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


class RMSNorm(nn.RMSNorm):
    """MLX's own; compiled, which makes 3 primitives of 11."""

    replaces = nn.RMSNorm

    def __call__(self, x: mx.array) -> mx.array:
        if decodes(x):
            return _norm(x, self.weight, self.eps)
        normed: mx.array = super().__call__(x)
        return normed


class Embedding(nn.Embedding):
    """A table that is also the head."""

    replaces = nn.Embedding

    def as_linear(self, x: mx.array) -> mx.array:
        return times(x, self.weight) if few(x) else super().as_linear(x)


class Linear(nn.Linear):
    """A head."""

    replaces = nn.Linear

    def __call__(self, x: mx.array) -> mx.array:
        return times(x, self.weight) if few(x) and "bias" not in self else super().__call__(x)


TABLES: dict[type, type] = {nn.Embedding: Embedding, nn.Linear: Linear}


class Decoder(llama.LlamaModel):
    """Embedding, layers and the last norm. A single token of each sequence passes as ``[batch, hidden]``."""

    replaces = llama.LlamaModel

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches = cache or [None] * len(self.layers)
        masks = {
            sliding: create_attention_mask(
                h, caches[index], window_size=self.sliding_window if sliding else None, return_array=few(h)
            )
            for sliding, index in ((False, self.fa_idx), (True, self.swa_idx))
            if index is not None
        }
        single = h.shape[1] == 1
        h = h[:, 0] if single else h
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, masks[layer.use_sliding], layer_cache)
        h = self.norm(h)
        return h[:, None] if single else h


class Block(llama.TransformerBlock):
    """A layer whose branches add themselves to the residual within their last product."""

    replaces = llama.TransformerBlock

    _adds: bool  # whether FFNs do

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        h = self.self_attn(self.input_layernorm(x), mask, cache, residual=x)
        normed, made = self.post_attention_layernorm(h), current()
        if made is not None and self._adds:
            out: mx.array = made.ffn(self.mlp, normed, h)
        else:
            out = h + self.mlp(normed)
        return out


class Attention(llama.Attention):
    """Llama's attention in two halves, of which a skipped token needs the first: its keys and values."""

    replaces = llama.Attention

    _qkv: nn.Module | None

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any,
        residual: mx.array | None = None,
    ) -> mx.array:
        """What attention gives ``x [batch, tokens, hidden]`` or ``[batch, hidden]``, added to a ``residual``."""
        rotate = self.rotation(1 if x.ndim == 2 else x.shape[1], cache)
        if decodes(x) and self._qkv is not None:
            rotated = self.n_heads + self.n_kv_heads
            together = self._heads(through(self._qkv, x))
            both = rotate(together[:, :rotated])
            queries, keys, values = both[:, : self.n_heads], both[:, self.n_heads :], together[:, rotated:]
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
        else:
            queries = rotate(self._heads(self.q_proj(x)))
            keys, values = self.remember(x, cache)
        batch, heads, tokens, _ = queries.shape
        grouped = decodes(x) and not isinstance(mask, str)
        if grouped:  # heads that share keys as positions that do, or each would get a copy of them
            queries = queries.reshape(batch, self.n_kv_heads, -1, self.head_dim)
            if tokens > 1 and isinstance(mask, mx.array):
                mask = mx.concatenate([mask] * (heads // self.n_kv_heads), axis=-2)
        mixed = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        if tokens > 1:
            mixed = mixed.reshape(batch, heads, tokens, -1) if grouped else mixed
            mixed = mixed.transpose(0, 2, 1, 3)
        mixed = mixed.reshape(*x.shape[:-1], -1)
        if decodes(x):
            return onto(residual, self.o_proj, mixed)
        out: mx.array = self.o_proj(mixed)
        return out if residual is None else residual + out

    def remember(self, x: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
        """Keys and values of ``x``, written to the cache if there is one; all that it holds."""
        rotate = self.rotation(1 if x.ndim == 2 else x.shape[1], cache)
        keys = rotate(self._heads(self.k_proj(x)))
        values = self._heads(self.v_proj(x))
        if cache is None:
            return keys, values
        fetched: tuple[mx.array, mx.array] = cache.update_and_fetch(keys, values)
        return fetched

    def fuse(self) -> None:
        """Decode with one product for queries, keys and values, where they are stored alike."""
        self._qkv = join([self.q_proj, self.k_proj, self.v_proj])

    def rotation(self, tokens: int, cache: Any) -> Rotation:
        """How a pass over ``tokens`` after what the cache holds rotates the queries and keys of every layer."""
        offset = 0 if cache is None else cache.offset
        made = current()
        if tokens > FEW or not isinstance(offset, int):
            return lambda x: self.rope(x, offset=offset)
        if made is None:
            return self._rotation(tokens, offset)
        key = "rotation", tokens, offset
        if key not in made.memo:
            made.memo[key] = self._rotation(tokens, offset)
        found: Rotation = made.memo[key]
        return found

    def _rotation(self, tokens: int, offset: int) -> Rotation:
        # mx.fast.rope would be 29 primitives twice a layer. At one position a rotation is one matrix for all layers:
        # what it makes of the unit vectors.
        units = mx.broadcast_to(mx.eye(self.head_dim)[None, :, None], (1, self.head_dim, tokens, self.head_dim))
        matrices = self.rope(units, offset=offset)[0].swapaxes(0, 1)  # [tokens, head_dim, head_dim]
        if tokens == 1:
            return lambda x: x @ matrices[0].astype(x.dtype)
        return lambda x: (x.swapaxes(1, 2) @ matrices.astype(x.dtype)).swapaxes(1, 2)

    def _heads(self, x: mx.array) -> mx.array:
        """``[batch, tokens, heads * head_dim]``, or without ``tokens``, as ``[batch, heads, tokens, head_dim]``."""
        if x.ndim == 2:
            return x.reshape(len(x), -1, 1, self.head_dim)
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


@mx.compile
def gated(gate: mx.array, up: mx.array) -> mx.array:
    """SwiGLU's ``silu(gate) * up`` by powers of two, for which MLX takes a third of the exponential's time on a CPU."""
    return gate * up / (1 + mx.power(2.0, -LOG2_E * gate))


class MLP(llama.MLP):
    """SwiGLU, of big or of small."""

    replaces = llama.MLP

    _gate_up: nn.Module | None

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """What it gives ``x [..., hidden]``, added to the ``residual`` if there is one."""
        if not decodes(x):
            out: mx.array = super().__call__(x)
            return out if residual is None else residual + out
        if self._gate_up is None:
            inner = swiglu(through(self.gate_proj, x), through(self.up_proj, x))
        else:
            inner = swiglu(*mx.split(through(self._gate_up, x), 2, axis=-1))
        return onto(residual, self.down_proj, inner)

    def by_powers(self, x: mx.array) -> mx.array:
        """The same as a call, faster for many tokens; other in the last bits."""
        out: mx.array = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out

    def fuse(self) -> None:
        """Decode with one product for gate and up, where they are stored alike."""
        self._gate_up = join([self.gate_proj, self.up_proj])
