"""Routers that look ahead: a token's routes in all layers, decided before its pass begins.

A layer's router sees two things that are there by then: the token's embedding, and what the last norm made of the token
before it, from which this one was predicted; each normalised to a mean square of 1. So the routes are read once a
token, and the pass is planned like any whose routes the host knows. It has a price: nothing of the token's own pass can
be seen, and tokens must come one by one. A prompt's tokens need not be predicted; while they are read in one pass, they
take the model's ``default_route`` (`duo_mlx.routed`).
"""

from collections.abc import Sequence

import mlx.core as mx

from duo_mlx import conditional
from duo_mlx.routes import Routes


class LookAhead:
    """One linear map a layer, whose largest logit names the route.

    Args:
        weights: ``[choices, 2 * hidden]`` a layer.
        choices: the routes that the rows of the weights stand for.
        eps: of the norms.
        offsets: added to the logits of every layer, ``[choices]``.
        biases: added to a layer's logits, ``[choices]`` a layer.
    """

    length = None  # every position of a sequence has routes

    def __init__(
        self,
        weights: Sequence[mx.array],
        choices: Sequence[int],
        eps: float,
        offsets: mx.array | None = None,
        biases: Sequence[mx.array] | None = None,
    ):
        self.choices = tuple(int(choice) for choice in choices)
        self._columns = mx.concatenate(list(weights)).T  # [2 * hidden, layers * choices]
        self._eps = eps
        moved = mx.zeros(len(self.choices)) if offsets is None else offsets.astype(mx.float32)
        self._offsets = moved + mx.stack(list(biases)) if biases else moved
        self._choices = mx.array(self.choices, mx.uint32)

    def logits(self, embedded: mx.array, before: mx.array) -> mx.array:
        """``[..., layers, choices]`` in float32 of tokens' embeddings and the final states before, ``[..., hidden]``.

        Where there is no token before, its state is zeros.
        """
        seen = mx.concatenate([mx.fast.rms_norm(each, None, self._eps) for each in (embedded, before)], axis=-1)
        logits = (seen @ self._columns).astype(mx.float32)
        return logits.reshape(*seen.shape[:-1], -1, len(self.choices)) + self._offsets

    def routes(self, embedded: mx.array, before: mx.array) -> mx.array:
        """Routes ``[..., layers]``."""
        return self._choices[mx.argmax(self.logits(embedded, before), axis=-1)]

    def read(self, embedded: mx.array, before: mx.array) -> Routes:
        """`routes`, read by the host."""
        return conditional.read(self.routes(embedded, before)).astype("uint8")
