"""Drafts after every prefix of a text at once, teacher forced.

A draft reads keys and values that the verifying routes left for all tokens before, and its own for itself. So one pass
over a text is a first draft after each of its prefixes: its caches hand out the verifying pass's keys and values beside
its own, and a position may look at the former before itself and at the latter at itself.
"""

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache


class Beside:
    """A layer's cache in a pass of drafts: positions that were verified, and then the same positions drafted.

    Args:
        keys, values: of the verifying pass, ``[batch, heads, tokens, head_dim]``.
    """

    offset = 0  # drafts are rotated as their positions are

    def __init__(self, keys: mx.array, values: mx.array):
        self._keys, self._values = keys, values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return mx.concatenate([self._keys, keys], axis=2), mx.concatenate([self._values, values], axis=2)

    def make_mask(self, tokens: int, window_size: int | None = None, **_: Any) -> mx.array:
        own = mx.eye(tokens, dtype=mx.bool_)
        return mx.concatenate([create_causal_mask(tokens, window_size=window_size) & ~own, own], axis=1)


def verifying(layers: int) -> list[KVCache]:
    """Caches for the verifying pass; of whole texts, where attention slides too."""
    return [KVCache() for _ in range(layers)]


def drafting(verified: list[KVCache]) -> list[Beside]:
    """Caches for a pass of drafts after what the verifying pass left."""
    return [Beside(*cache.keys_and_values()) for cache in verified]
