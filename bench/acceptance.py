"""How much of a text a draft gets right: with which probability its first token is accepted after every prefix.

What it costs is a pass over the text (`duo_mlx.beside`), whatever its length.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from duo_mlx import beside, conditional
from duo_mlx.drafting import LONGEST, Floats
from duo_mlx.model import Model
from duo_mlx.routes import Routes
from duo_mlx.sampling import Sampling

STRATEGY = "planned"


class Acceptance:
    """With which probability drafted tokens are accepted on windows of a text.

    Args:
        model: a Duo.
        verify: the verifying routes ``[layers]``.
        tokens: ids ``[windows, tokens]``; every window is a text of its own.
        samplings: ways to draft and to verify.
    """

    def __init__(self, model: Model, verify: Routes, tokens: NDArray[np.integer], samplings: tuple[Sampling, ...]):
        self._model, self._samplings, self._draft_head = model, samplings, model.draft_head()
        self._rows = [mx.array(row[None]) for row in tokens]
        self._verified = []  # by window: what the last norm gave, and the caches
        for row in self._rows:
            caches = beside.verifying(len(model.layers))
            self._verified.append((self._pass(row, verify, caches), caches))

    def of(self, pattern: Routes) -> NDArray[np.float32]:
        """Of the token that ``pattern [layers]`` drafts after each position, ``[samplings, windows, tokens]``."""
        found = []
        for row, (verified, caches) in zip(self._rows, self._verified, strict=True):
            drafted = self._pass(row, pattern, beside.drafting(caches))
            p, q = self._model.head(verified)[0], self._draft_head(drafted)[0]
            accepted = mx.stack([sampling.acceptance(q, p) for sampling in self._samplings])
            found.append(np.array(accepted.astype(mx.float32)))
        return np.stack(found, axis=1)

    def _pass(self, row: mx.array, pattern: Routes, caches: list[Any]) -> mx.array:
        routes = conditional.plan(pattern, 1, row.shape[1], len(self._model.layers), STRATEGY)
        out = self._model.states(row, caches, list(routes), STRATEGY)
        mx.eval(out, [cache.state for cache in caches if isinstance(cache, KVCache)])
        return out


def by_position(accepted: NDArray[np.floating], longest: int = LONGEST) -> Floats:
    """Of a round's first, second ... drafted token, where all before it were accepted, ``[longest]``.

    A round is ``longest`` tokens in a row, of which each is accepted as the first drafted one would be there. That
    tokens which are easy to draft stand together is in it; that later drafts read keys and values of drafts is not.

    Args:
        accepted: of first drafted tokens, ``[windows, tokens]``, with at least ``longest`` tokens.
        longest: drafted tokens of a round.
    """
    rounds = np.lib.stride_tricks.sliding_window_view(accepted.astype(np.float64), longest, axis=1)
    stood = np.cumprod(rounds, axis=-1).mean(axis=(0, 1))
    before = np.concatenate([[1.0], stood[:-1]])
    return np.divide(stood, before, out=np.zeros(longest), where=before > 0)
