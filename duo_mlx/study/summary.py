"""What an oracle's sequences come to: mean losses by budget, baselines from the same passes, and intervals.

Beside each budget's oracle stand fixed patterns (one for all tokens, chosen on the very sequences that it is scored on,
as Duo-LLM does (arXiv 2410.10846, stage 2), and chosen on one half and scored on the other) and the best of 100 random
patterns, by average loss and token by token.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import interval
from duo_mlx.routes import Route, format_pattern
from duo_mlx.study.controls import NAMES
from duo_mlx.study.limits import Limit
from duo_mlx.study.oracle import Space

LEFT = ("peak_bytes", "table")  # what is not put together
Arrays = dict[str, NDArray[Any]]
Price = Callable[[NDArray[np.uint8]], NDArray[Any]]


def summarise(found: list[Arrays], space: Space | None, limits: list[Limit], price: Price) -> dict[str, Any]:
    """Mean losses in nats a token, by budget, with baselines, controls and 95 % intervals over sequences.

    Args:
        found: arrays by name, of each sequence.
        space: the patterns that were searched; None where not all were.
        limits: the budgets, by place.
        price: weight bytes ``[n]`` that patterns ``[n, layers]`` read for a token.
    """
    every = {name: np.stack([each[name] for each in found]) for name in found[0] if name not in LEFT}
    uniform = {route.name.lower(): every[f"loss_{route.name.lower()}"] for route in Route}
    all_big = float(price(np.full((1, every["oracle_routes_0"].shape[-1]), Route.BIG, np.uint8))[0])
    budgets: dict[str, dict[str, Any]] = {}
    for place, limit in enumerate(limits):
        losses = every[f"oracle_loss_{place}"]
        big = (every[f"oracle_routes_{place}"] == Route.BIG).sum(axis=-1)
        budgets[limit.name] = {
            "oracle": float(losses.mean()),
            "oracle_interval": _interval(losses),
            "oracle_by_sequence": losses.mean(axis=1).tolist(),
            "difficulty": float((uniform["small"] - losses).mean()),
            "patterns_seen": float(every[f"seen_{place}"].mean()),
            "big_layers": float(big.mean()),
            "bytes": float(price(every[f"oracle_routes_{place}"]).mean()) / all_big,  # weights', over all big's
            "controls": _controls(every, place),
        } | _baselines(every, limit, place, space)
    return {
        "uniform": {name: float(losses.mean()) for name, losses in uniform.items()},
        "uniform_by_sequence": {name: losses.mean(axis=1).tolist() for name, losses in uniform.items()},
        "budgets": budgets,
        "patterns": len(space.patterns) if space else None,
        "work_a_sequence": dict(zip(("attention", "ffn", "head"), every["work"].mean(axis=0).tolist(), strict=True)),
        "peak_bytes": int(max(each["peak_bytes"] for each in found)),
    }


def _interval(losses: NDArray[np.float32]) -> list[float] | None:
    """Of the mean of ``[sequences, tokens]``, by resampling sequences; null where no token has one."""
    kept = losses[:, ~np.isnan(losses).all(axis=0)]
    if not kept.size:
        return None
    found = interval(kept.mean(axis=1).tolist(), np.mean)
    return [found.low, found.high]


def _controls(every: Arrays, place: int) -> dict[str, dict[str, Any]] | None:
    """Means and intervals of a budget's controls; null where there were none."""
    named = {name: every.get(f"{name}_{place}") for name in NAMES}
    return {
        name: {"mean": float(np.nanmean(losses)), "interval": _interval(losses)}
        for name, losses in named.items()
        if losses is not None and not np.isnan(losses).all()
    } or None


def _baselines(every: Arrays, limit: Limit, place: int, space: Space | None) -> dict[str, Any]:
    """One pattern for all tokens, and the best of random ones; null where there is none."""
    return _fixed(every, limit, space) | _random(every, place)


def _fixed(every: Arrays, limit: Limit, space: Space | None) -> dict[str, Any]:
    names = ("fixed", "fixed_pattern", "fixed_split", "fixed_split_by_sequence")
    if limit.scheduled:
        return dict.fromkeys(names) | {"why_no_fixed": "a schedule has no pattern for all tokens"}
    if space is None or "means" not in every:
        return dict.fromkeys(names) | {"why_no_fixed": "only an exhaustive shared search passes over all patterns"}
    within = np.flatnonzero(limit.at(space.patterns, 0, 1))
    means = every["means"].astype(np.float64)[:, within]
    chosen = means.mean(axis=0).argmin()
    split = np.full(len(means), np.nan)
    for own in (slice(0, None, 2), slice(1, None, 2)):
        other = slice(1 - own.start, None, 2)
        if len(means) > 1:
            split[other] = means[other, means[own].mean(axis=0).argmin()]
    both = (float(split.mean()), split.tolist()) if len(means) > 1 else (None, None)
    values = (float(means[:, chosen].mean()), format_pattern(space.patterns[within[chosen]]), *both)
    return dict(zip(names, values, strict=True))


def _random(every: Arrays, place: int) -> dict[str, Any]:
    if f"drawn_{place}" not in every:
        return dict.fromkeys(("random", "random_by_sequence", "random_by_token"))
    means = every[f"drawn_{place}"].astype(np.float64)
    best = means[:, means.mean(axis=0).argmin()]
    return {
        "random": float(best.mean()),
        "random_by_sequence": best.tolist(),
        "random_by_token": float(every[f"random_{place}"].mean()),
    }
