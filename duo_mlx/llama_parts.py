"""Llama's norm, attention and FFN as a Duo layer needs them; what they compute is mlx-lm's.

A pass over many tokens is ``[batch, tokens, hidden]``. A single token of each sequence, ``[batch, hidden]``, takes a
shorter way through each of them: fewer reshapes, additions and products, the more so on the CPU.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention

from duo_mlx.arguments import ModelArgs
from duo_mlx.products import join, on_cpu, onto


@mx.compile
def _norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


class RMSNorm(nn.RMSNorm):
    """MLX's own; compiled where that makes 3 primitives of 11."""

    def __call__(self, x: mx.array) -> mx.array:
        if x.ndim == 2 and on_cpu():
            return _norm(x, self.weight, self.eps)
        normed: mx.array = super().__call__(x)
        return normed


Rotation = Callable[[mx.array], mx.array]  # of queries or keys [batch, heads, tokens, head_dim] at a pass's positions


class Attention(llama.Attention):
    """Llama's attention in two halves, of which a skipped token needs the first: its keys and values."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self._qkv: nn.Module | None = None  # see `Model.fuse`

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any,
        rotate: Rotation,
        residual: mx.array | None = None,
    ) -> mx.array:
        """What attention gives ``x [batch, tokens, hidden]`` or ``[batch, hidden]``, added to a ``residual``."""
        single = x.ndim == 2
        if single and self._qkv is not None:
            rotated = self.n_heads + self.n_kv_heads
            heads = self._heads(self._qkv(x))
            both = rotate(heads[:, :rotated])
            queries, keys, values = both[:, : self.n_heads], both[:, self.n_heads :], heads[:, rotated:]
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
        else:
            queries = rotate(self._heads(self.q_proj(x)))
            keys, values = self.remember(x, cache, rotate)
        if single and on_cpu():  # heads that share keys as positions that do, or each would get a copy of them
            queries = queries.reshape(len(x), self.n_kv_heads, -1, self.head_dim)
        mixed = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        if single:
            return onto(residual, self.o_proj, mixed.reshape(len(x), -1))
        out: mx.array = self.o_proj(mixed.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1))
        return out if residual is None else residual + out

    def remember(self, x: mx.array, cache: Any, rotate: Rotation) -> tuple[mx.array, mx.array]:
        """Keys and values of ``x``, written to the cache if there is one; all that it holds."""
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
        if tokens == 1 and on_cpu() and isinstance(offset, int):
            # mx.fast.rope would be 29 primitives twice a layer. At one position a rotation is one matrix for all
            # layers: what it makes of the unit vectors.
            units = mx.eye(self.head_dim)[None, :, None]
            matrix = self.rope(units, offset=offset)[0, :, 0]
            return lambda x: x @ matrix.astype(x.dtype)
        return lambda x: self.rope(x, offset=offset)

    def _heads(self, x: mx.array) -> mx.array:
        """``[batch, tokens, heads * head_dim]``, or without ``tokens``, as ``[batch, heads, tokens, head_dim]``."""
        if x.ndim == 2:
            return x.reshape(len(x), -1, 1, self.head_dim)
        return x.reshape(*x.shape[:2], -1, self.head_dim).transpose(0, 2, 1, 3)


class MLP(llama.MLP):
    """Llama's FFN, SwiGLU."""

    def __init__(self, args: ModelArgs):
        super().__init__(args)
        self._gate_up: nn.Module | None = None  # see `Model.fuse`

    def __call__(self, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """What it gives ``x [..., hidden]``, added to the ``residual`` if there is one."""
        if x.ndim > 2:
            out: mx.array = super().__call__(x)
            return out if residual is None else residual + out
        if self._gate_up is None:
            inner = swiglu(self.gate_proj(x), self.up_proj(x))
        else:
            inner = swiglu(*mx.split(self._gate_up(x), 2, axis=-1))
        return onto(residual, self.down_proj, inner)

    def fuse(self) -> None:
        """Decode with one product for gate and up, where they are stored alike."""
        self._gate_up = join([self.gate_proj, self.up_proj])
