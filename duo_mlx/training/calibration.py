"""How much of big a router takes by its threshold, measured on text: `duo_mlx.threshold` reads what is found here.

One pass is made for each of some offsets, with the routes that the router takes at that offset, and gives one pair of
share and offset. Where the next offset is to be, so that shares lie evenly, is told by the margins of the pass before:
big's logit less the largest other one, of which the wanted share must be above the threshold.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.lookahead import LookAhead
from duo_mlx.model import Model
from duo_mlx.routed import RoutedModel
from duo_mlx.router import LinearRouter, Router
from duo_mlx.routes import Route
from duo_mlx.training.job import Settle
from duo_mlx.training.optimizer import Arrays

SHARES = np.linspace(0.05, 0.95, 19)

Curve = list[tuple[float, float]]  # share of big, offset


class Margins:
    """How far big's logit is above the largest other one, kept for all that a router was asked.

    Args:
        choices: the router's.
        offset: for big, when it comes to routes.
    """

    def __init__(self, choices: Sequence[int], offset: float):
        self.choices, self.kept = mx.array(list(choices)), [mx.zeros(0)]
        self.moved = offset * (self.choices == Route.BIG)

    def routes(self, logits: mx.array) -> mx.array:
        """Routes ``[...]`` by ``logits [..., choices]``."""
        logits, big = logits.astype(mx.float32), self.choices == Route.BIG
        best, others = (mx.where(each, logits, -mx.inf).max(axis=-1) for each in (big, ~big))
        self.kept.append((best - others).reshape(-1))
        return self.choices[mx.argmax(logits + self.moved, axis=-1)]


class LayerMargins(Router):
    """A router that is asked layer by layer, and its margins."""

    def __init__(self, router: LinearRouter, margins: Margins):
        self.router, self.margins = router, margins

    def routes(self, layer: int, x: mx.array) -> mx.array:
        return self.margins.routes(self.router.logits(layer, x))


class AheadMargins(LookAhead):
    """A router that looks ahead, and its margins."""

    def __init__(self, router: LookAhead, margins: Margins):
        self.router, self.margins = router, margins

    def routes(self, embedded: mx.array, before: mx.array) -> mx.array:
        return self.margins.routes(self.router.logits(embedded, before))


def curve(model: Model, windows: NDArray[np.integer], shares: NDArray[np.float64] = SHARES) -> Curve:
    """Shares of big and offsets, both increasing, of the model's router on ``windows [windows, length]``."""
    margins, _ = _passed(model, windows, 0.0)
    found: Curve = []
    for share in shares:
        offset = -float(np.quantile(margins, 1 - share))
        margins, realised = _passed(model, windows, offset)
        if not found or (realised > found[-1][0] and offset > found[-1][1]):
            found.append((realised, offset))
    return found


def offset_for(found: Curve, share: float) -> float:
    """The offset at which a router takes that share of big, by `curve`."""
    return float(np.interp(share, *np.array(found).T))


def _passed(model: Model, windows: NDArray[np.integer], offset: float) -> tuple[NDArray[np.float32], float]:
    """All margins of a pass at that offset, and the share of big in it."""
    router = model.router()
    margins = Margins(router.choices, offset)
    asked = AheadMargins(router, margins) if isinstance(router, LookAhead) else LayerMargins(router, margins)
    # one by one their memory is less; side by side a router that looks ahead steps through all of them at once
    for each in [windows] if isinstance(router, LookAhead) else windows[:, None]:
        mx.eval(RoutedModel(model, asked)(mx.array(each)))
    found = np.concatenate([np.array(each) for each in margins.kept])
    return found, float((found + offset > 0).mean())


def settle(choices: tuple[int, ...], budget: float | None) -> Settle:
    """What ends a router's training: its curve, and with a budget biases with which it takes that share of big."""

    def end(model: Model, learned: Arrays, windows: NDArray[np.int32]) -> tuple[Arrays, dict[str, Any]]:
        found, offset = curve(model, windows), 0.0
        if budget is not None:
            offset = offset_for(found, budget)
            big = offset * (mx.array(choices) == Route.BIG)
            learned = {name: each + big if name.endswith(".bias") else each for name, each in learned.items()}
        return learned, {"router_offsets": [[share, moved - offset] for share, moved in found]}

    return end
