"""What a token may spend: which patterns an oracle may choose from.

==================  ===============================================================
``none``            anything
``4``               exactly 4 big layers (Duo-LLM's budgets)
``at-most:4``       no more than 4 big layers
``bytes:0.6``       at most 0.6 of the weight bytes that all big reads for a token
``flops:0.6``       at most 0.6 of all big's FLOPs
``6..2``            exactly so many big layers, from 6 at the first token to 2 at the last
==================  ===============================================================
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.errors import DuoError
from duo_mlx.flops import flops
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes

FORMS = "none, a number of big layers, at-most:K, bytes:SHARE, flops:SHARE, or FROM..TO"
SLACK = 1e-9  # relative, of shares


@dataclass(frozen=True)
class Limit:
    """One limit.

    Args:
        name: its SPEC.
        price: the cost ``[n]`` of patterns ``[n, layers]``: big layers, bytes or FLOPs.
        bounds: the least and the most that a token may spend, by its place in the text from 0 to 1.
        scheduled: whether the place matters.
    """

    name: str
    price: Callable[[Routes], NDArray[np.float64]]
    bounds: Callable[[float], tuple[float, float]]
    scheduled: bool = False

    def allows(self, patterns: Routes, tokens: int) -> NDArray[np.bool_]:
        """Which patterns ``[n, layers]`` each token may have: ``[n, tokens]``, or ``[n, 1]`` if all may the same."""
        each = range(tokens) if self.scheduled else (0,)
        return np.stack([self.at(patterns, token, tokens) for token in each], axis=1)

    def at(self, patterns: Routes, token: int, tokens: int) -> NDArray[np.bool_]:
        """Which patterns ``[n, layers]`` one token of so many may have."""
        least, most = self.bounds(token / max(1, tokens - 1))
        prices = self.price(patterns)
        return (least <= prices) & (prices <= most)

    def reaches(self, beginnings: Routes, layers: int, token: int, tokens: int) -> NDArray[np.bool_]:
        """Which beginnings ``[n, depth]`` of patterns of so many layers can become one that a token may have.

        Only big layers are counted ahead; of other prices every beginning is kept until it is whole.
        """
        depth = beginnings.shape[1]
        if depth == layers:
            return self.at(beginnings, token, tokens)
        if self.price is not bigs:
            return np.ones(len(beginnings), bool)
        least, most = self.bounds(token / max(1, tokens - 1))
        spent = bigs(beginnings)
        return (spent <= most) & (least <= spent + layers - depth)


def bigs(patterns: Routes) -> NDArray[np.float64]:
    """Big layers of patterns ``[n, layers]``."""
    return (patterns == Route.BIG).sum(axis=-1).astype(np.float64)


def parse_limit(spec: str, model: Model, context: int) -> Limit:
    """The limit that ``spec`` names.

    Args:
        spec: see above.
        model: whose layers, weights as they are stored.
        context: positions that a token attends to, for its FLOPs.

    Raises:
        DuoError: what is wrong with ``spec``, in one line.
    """
    layers = model.config.num_hidden_layers
    if spec == "none":
        return Limit(spec, bigs, lambda _: (0, layers))
    if found := re.fullmatch(r"(at-most:)?(\d{1,6})", spec):
        count = _count(spec, found[2], layers)
        least = 0 if found[1] else count
        return Limit(spec, bigs, lambda _: (least, count))
    if found := re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", spec):
        first, last = (_count(spec, number, layers) for number in found.groups())
        return Limit(spec, bigs, lambda place: (round(first + (last - first) * place),) * 2, scheduled=True)
    if found := re.fullmatch(r"(bytes|flops):([0-9.]{1,12})", spec):
        share = _share(spec, found[2])
        table = cost.weight_bytes(model) if found[1] == "bytes" else flops(model)(context)
        most = share * float(table.of(np.full(layers, Route.BIG, np.uint8))) * (1 + SLACK)
        return Limit(spec, lambda patterns: table.of(patterns).astype(np.float64), lambda _: (0, most))
    raise DuoError(f"--budget {spec!r}: give {FORMS}")


def _count(spec: str, text: str, layers: int) -> int:
    if int(text) > layers:
        raise DuoError(f"--budget {spec!r}: the model has {layers} layers, so no token can have {text} big ones")
    return int(text)


def _share(spec: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise DuoError(f"--budget {spec!r}: a share lies between 0 and 1, such as {spec.partition(':')[0]}:0.6")
    return share
