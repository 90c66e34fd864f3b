"""The patterns of one token after tokens whose patterns are settled.

So an oracle can go from left to right, keep each token's pattern and search the next: the reading *committed* of
Duo-LLM's oracle (arXiv 2410.10846, stage 2; the paper does not say which one it used). Earlier keys and values are
those of the patterns that were chosen, and what is found can be replayed as one sequence. The nodes of a level of the
tree are queries of one attention, each of which sees the cache and itself.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import Routes
from duo_mlx.study.losses import Losses, token_losses
from duo_mlx.study.tree import Branches, Options, Walk


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

    axis = 1

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
        if "sliding_attention" in model.args.layer_types:
            raise DuoError("the committed reading is for models whose attention does not slide")
        super().__init__(model, options, rows, wanted)
        self._cache, self._token, self._target = cache, token, np.array([target])
        self._offset = int(cache[0].offset)

    def root(self) -> mx.array:
        return self.model.model.embed_tokens(mx.array([[self._token]]))

    def branches(self, depth: int, h: mx.array) -> Branches:
        count = h.shape[1]
        mask = mx.concatenate([mx.ones((count, self._offset), mx.bool_), mx.eye(count, dtype=mx.bool_)], axis=1)
        return Branches(self.model.layers[depth], h, mask, self._rotate, _Peek(self._cache[depth]))

    def leaves(self, h: mx.array) -> Losses:
        logits = self.model.head(self.model.model.norm(h))[0]
        return token_losses(logits[:, None], self._target)

    def _rotate(self, x: mx.array) -> mx.array:
        """Queries or keys ``[1, heads, candidates, head_dim]``, all at one position."""
        rope = self.model.layers[0].self_attn.rope
        return rope(x.transpose(2, 1, 0, 3), offset=self._offset).transpose(2, 1, 0, 3)


class _Peek:
    """What stands in for a layer's cache: candidates' keys and values come after those that it holds."""

    def __init__(self, cache: Any):
        self._cache = cache

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if not self._cache.offset:
            return keys, values
        held = (each[..., : self._cache.offset, :] for each in self._cache.state[:2])
        keys, values = (mx.concatenate([*pair], axis=2) for pair in zip(held, (keys, values), strict=True))
        return keys, values
