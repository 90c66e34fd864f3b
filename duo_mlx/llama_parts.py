"""Llama's norm, attention and FFN as a Duo layer needs them; what they compute is mlx-lm's.

A pass that decodes, over a few tokens ``[batch, tokens, hidden]`` or one of each sequence, ``[batch, hidden]``, takes a
shorter way through each of them: fewer additions and products, and fewer of everything on the CPU.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import scaled_dot_product_attention

from duo_mlx.arguments import ModelArgs
from duo_mlx.products import few, join, on_cpu, onto, through
from duo_mlx.routes import FEW


def decodes(x: mx.array) -> bool:
    """Whether a pass over ``x`` takes the shorter way."""
    return x.ndim == 2 or few(x)


@mx.compile
def _norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    return mx.fast.rms_norm(x, weight, eps)


class RMSNorm(nn.RMSNorm):
    """MLX's own; compiled where that makes 3 primitives of 11."""

    def __call__(self, x: mx.array) -> mx.array:
        if decodes(x) and on_cpu():
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
        if decodes(x) and self._qkv is not None:
            rotated = self.n_heads + self.n_kv_heads
            together = self._heads(through(self._qkv, x))
            both = rotate(together[:, :rotated])
            queries, keys, values = both[:, : self.n_heads], both[:, self.n_heads :], together[:, rotated:]
            if cache is not None:
                keys, values = cache.update_and_fetch(keys, values)
        else:
            queries = rotate(self._heads(self.q_proj(x)))
            keys, values = self.remember(x, cache, rotate)
        batch, heads, tokens, _ = queries.shape
        grouped = decodes(x) and on_cpu() and not isinstance(mask, str)
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
        if tokens <= FEW and on_cpu() and isinstance(offset, int):
            # mx.fast.rope would be 29 primitives twice a layer. At one position a rotation is one matrix for all
            # layers: what it makes of the unit vectors.
            units = mx.broadcast_to(mx.eye(self.head_dim)[None, :, None], (1, self.head_dim, tokens, self.head_dim))
            matrices = self.rope(units, offset=offset)[0].swapaxes(0, 1)  # [tokens, head_dim, head_dim]
            if tokens == 1:
                return lambda x: x @ matrices[0].astype(x.dtype)
            return lambda x: (x.swapaxes(1, 2) @ matrices.astype(x.dtype)).swapaxes(1, 2)
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
        if not decodes(x):
            out: mx.array = super().__call__(x)
            return out if residual is None else residual + out
        if self._gate_up is None:
            inner = swiglu(through(self.gate_proj, x), through(self.up_proj, x))
        else:
            inner = swiglu(*mx.split(through(self._gate_up, x), 2, axis=-1))
        return onto(residual, self.down_proj, inner)

    def fuse(self) -> None:
        """Decode with one product for gate and up, where they are stored alike."""
        self._gate_up = join([self.gate_proj, self.up_proj])
