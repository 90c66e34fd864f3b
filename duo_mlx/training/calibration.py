"""How much of big a router takes by its threshold, measured on text: `duo_mlx.threshold` reads what is found here.

One pass is made for each of some offsets, with the routes that the router takes at that offset, and gives one pair of
share and offset. Where the next offset is to be, so that shares lie evenly, is told by the margins of the pass before:
big's logit less the largest other one, of which the wanted share must be above the threshold.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Model
from duo_mlx.router import LinearRouter, Router
from duo_mlx.routes import Route
from duo_mlx.training.job import Settle
from duo_mlx.training.optimizer import Arrays

SHARES = np.linspace(0.05, 0.95, 19)

Curve = list[tuple[float, float]]  # share of big, offset


class Margins(Router):
    """A linear router with an offset for big, that keeps how far big's logit is above the others without it."""

    def __init__(self, router: LinearRouter, offset: float):
        self.router, self.choices = router, mx.array(router.choices)
        self.moved = offset * (self.choices == Route.BIG)
        self.margins: list[mx.array] = []  # [...] a layer

    def routes(self, layer: int, x: mx.array) -> mx.array:
        logits = self.router.logits(layer, x).astype(mx.float32)
        big = self.choices == Route.BIG
        best, others = (mx.where(each, logits, -mx.inf).max(axis=-1) for each in (big, ~big))
        self.margins.append(best - others)
        return self.choices[mx.argmax(logits + self.moved, axis=-1)]


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
    every, big = [], []
    for window in windows:
        router = Margins(model.router(), offset)
        mx.eval(model(mx.array(window[None]), routes=router))
        margins = np.stack([np.array(each).ravel() for each in router.margins])
        every.append(margins.ravel())
        big.append(float((margins + offset > 0).mean()))
    return np.concatenate(every), float(np.mean(big))


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
