"""Budgets: the best known fixed pattern of a model that spends no more than is asked.

A model whose patterns were measured (`duo_mlx.study.patterns`) has ``best_patterns`` in config.json, each with its
loss. ``budget:12`` is the best of those with at most twelve big layers, ``budget:0.6`` the best of those that read at
most 0.6 of the weight bytes that all-big reads for a token.
"""

import numpy as np

from duo_mlx import cost
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes, parse_pattern

PREFIX = "budget:"


def best_pattern(model: Model, spec: str) -> Routes:
    """The pattern ``[layers]`` that ``budget:K`` names.

    Args:
        model: a model, as its weights are stored (quantised weights are fewer bytes).
        spec: ``budget:`` and a whole number (of big layers) or a fraction (of all-big's bytes).

    Raises:
        DuoError: no such number, the model has no measured patterns, or none is within the budget.
    """
    layers = model.config.num_hidden_layers
    if not model.config.best_patterns:
        raise DuoError(
            f"route {spec!r}: this model's config.json has no best_patterns; "
            "measure them with duo-mlx convert MODEL DST --calibrate TEXT"
        )
    known = [parse_pattern(known["pattern"], layers) for known in model.config.best_patterns]
    patterns = model.config.realised(np.stack(known))
    losses = np.array([known["loss"] for known in model.config.best_patterns])
    text = spec.removeprefix(PREFIX)
    if text.isascii() and text.isdigit():
        bigs = (patterns == Route.BIG).sum(axis=1)
        within = bigs <= float(text)  # int() refuses thousands of digits
        least = f"{bigs.min()} big layer{'s' if bigs.min() != 1 else ''}"
    else:
        shares = shares_of_bytes(model, patterns)
        within = shares <= _share(spec, text) + 1e-9
        # rounded up, so that the pattern is within what is said here
        least = f"{np.ceil(shares.min() * 100 - 1e-7) / 100:.2f} of the bytes"
    if not within.any():
        raise DuoError(f"route {spec!r}: the cheapest known pattern of this model has {least}")
    best: Routes = patterns[within][losses[within].argmin()]
    return best


def shares_of_bytes(model: Model, patterns: Routes) -> np.ndarray:
    """Weight bytes that a token reads under each of ``patterns [..., layers]``, over those of all big."""
    table = cost.weight_bytes(model)
    everything = table.of(np.full(model.config.num_hidden_layers, Route.BIG, np.uint8))
    return np.asarray(table.of(patterns) / everything)


def _share(spec: str, text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise DuoError(
            f"route {spec!r}: after budget: comes a number of big layers such as 12, or a share of bytes such as 0.6"
        )
    return share
