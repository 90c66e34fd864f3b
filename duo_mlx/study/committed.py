"""The patterns of one token after tokens whose patterns are settled.

So an oracle can go from left to right, keep each token's pattern and search the next: the reading *committed* of
Duo-LLM's oracle (arXiv 2410.10846, stage 2; the paper does not say which one it used). Earlier keys and values are
those of the patterns that were chosen, and what is found can be replayed as one sequence. The nodes of a level of the
tree are the rows of one batch, each of which sees the cache and itself.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers
from duo_mlx.routes import Routes
from duo_mlx.study.losses import Losses, token_losses
from duo_mlx.study.tree import Options, Walk


class Token(Walk):
    """The patterns of the next token after what a cache holds, to which nothing is written.

    Args:
        model, options, rows, wanted: see `Walk`.
        cache: of the tokens before, one entry a layer.
        token: its id.
        target: the true next token.

    Raises:
        DuoError: attention slides, so that not all that the cache holds is seen.
    """

    def __init__(
        self,
        model: Model,
        cache: list[Any],
        token: int,
        target: int,
        options: Options,
        rows: int = 1024,
        wanted: Callable[[Routes], NDArray[np.bool_]] | None = None,
    ):
        if any(type(layer) is not KVCache for layer in cache):
            raise DuoError("the committed reading is for models whose attention sees all positions before it")
        super().__init__(model, options, rows, wanted)
        self._cache, self._token, self._target = cache, token, np.array([target])

    def layers(self) -> OpenLayers:
        return OpenLayers(self.model, mx.array([[self._token]]), [_Peek(layer) for layer in self._cache])

    def leaves(self, logits: mx.array) -> Losses:
        return token_losses(logits, self._target)


class _Peek:
    """What stands in for a layer's cache: a candidate's keys and values come after those that it holds."""

    def __init__(self, cache: KVCache):
        self._cache = cache
        self.offset: int = cache.offset

    def make_mask(self, *args: Any, **named: Any) -> mx.array | str | None:
        mask: mx.array | str | None = self._cache.make_mask(*args, **named)
        return mask

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self.offset:
            return keys, values
        held = (mx.broadcast_to(each, (len(keys), *each.shape[1:])) for each in self._cache.keys_and_values())
        keys, values = (mx.concatenate([*pair], axis=2) for pair in zip(held, (keys, values), strict=True))
        return keys, values
