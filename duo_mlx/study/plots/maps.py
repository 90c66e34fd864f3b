"""Heat maps of where an oracle puts big, small and skip: by layer and budget, by position, and by route."""

from itertools import pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import Interval
from duo_mlx.routes import Route, Routes
from duo_mlx.study.controls import WORST
from duo_mlx.study.plots.style import (
    DIFFERENCES,
    INK,
    SHARES,
    LackingError,
    Plot,
    canvas,
    heat,
    over_sequences,
    stated,
    symmetric,
    thirds,
)
from duo_mlx.study.results import Arrays, Found

BINS = 16  # of positions
ACROSS = 6  # panels beside one another
LAYER = "layer (0 is the first)"
Shares = NDArray[np.float64]


def shares(routes: Routes, route: Route = Route.BIG) -> Shares:
    """The share of tokens that have a route, ``[layers]``, of routes ``[sequences, length, layers]``."""
    return np.mean(routes == route, axis=(0, 1), dtype=np.float64)


def later_half(routes: Routes, route: Route = Route.BIG) -> Interval:
    """What share of all of a route stands in the later half of the layers, over sequences that have it.

    A layer in the middle counts half to either half.
    """
    each = (routes == route).sum(axis=1)  # [sequences, layers]
    layers = routes.shape[2]
    weights = np.clip(np.arange(layers) - layers / 2 + 1, 0, 1)
    having = each[each.any(axis=1)]
    return over_sequences(having @ weights / having.sum(axis=1))


def position_bins(length: int) -> list[int]:
    """Edges of about equal bins of positions, from 0 to ``length``."""
    return np.unique(np.linspace(0, length, min(BINS, length) + 1).round().astype(int)).tolist()


def shares_by_position(routes: Routes, edges: list[int]) -> Shares:
    """The share of tokens with big, ``[layers, bins]``."""
    parts = [shares(routes[:, start:stop]) for start, stop in pairwise(edges)]
    return np.stack(parts, axis=1)


def layers(found: Found) -> Plot:
    """Share of tokens with big by layer and budget, as it is and less what chance gives; so for the worst patterns.

    Raises:
        LackingError: there is no budget of exactly k big layers.
    """
    if not (exact := found.exact):
        raise LackingError("the oracle has no budget of exactly k big layers; --budget 4 is one")
    chance = np.array([k / found.layers for k in exact])
    oracles = np.stack([shares(table["oracle_routes"]) for table in exact.values()], axis=1)
    rows = {"the oracle": oracles}
    if all(WORST in table for table in exact.values()):
        rows["the worst pattern"] = np.stack([shares(table[WORST]) for table in exact.values()], axis=1)
    figure = canvas(11, 0.9 + 3.6 * len(rows))
    panels = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    ends = symmetric(*(each - chance for each in rows.values()))
    for (left, right), (name, each) in zip(panels, rows.items(), strict=True):
        of_share = heat(left, each, SHARES, (0, 1))
        of_excess = heat(right, each - chance, DIFFERENCES, ends)
        left.set(title=f"big in {name}", ylabel=LAYER)
        right.set_title(f"big in {name}, less chance (k / {found.layers})")
        figure.colorbar(of_share, ax=left, label="share of tokens")
        figure.colorbar(of_excess, ax=right, label="share less chance")
    for axes in panels[-1]:
        axes.set_xlabel(f"k, big layers of {found.layers}")
        step = 1 + len(exact) // 16
        axes.set_xticks(range(0, len(exact), step), [str(k) for k in list(exact)[::step]])
    return Plot(figure, _layers_caption(found, rows, chance))


def _layers_caption(found: Found, rows: dict[str, Shares], chance: Shares) -> str:
    exact, total = found.exact, found.layers
    said = [
        f"Share of tokens whose oracle has big in a layer, by budget k of {total} layers (left), and less k / {total}, "
        "what a random pattern has (right)."
    ]
    for column, (k, table) in enumerate(exact.items()):
        if k in thirds(total) and 0 < k < total:
            excess = rows["the oracle"][:, column] - chance[column]
            said.append(
                f"k = {k}: {stated(later_half(table['oracle_routes']))} of the big layers stand in the later half "
                f"(chance 0.5); most above chance is layer {excess.argmax()} ({excess.max():+.3f}), most below layer "
                f"{excess.argmin()} ({excess.min():+.3f})."
            )
    inner = (chance > 0) & (chance < 1)
    if len(rows) > 1 and inner.any():
        best, worst = (np.ravel((each - chance)[:, inner]) for each in rows.values())
        if best.std() and worst.std():
            said.append(
                "The lower row is of the patterns of the highest loss. Over layers and budgets, what they and the "
                f"oracle have above chance correlates with r = {np.corrcoef(best, worst)[0, 1]:+.2f}: near 1 if "
                "these are layers that matter for better or worse, near -1 if big helps there."
            )
    return " ".join(said)


def positions(found: Found) -> Plot:
    """Share of tokens with big, layer by position in the sequence, and less each layer's share at all positions."""
    budgets = position_budgets(found)
    edges = position_bins(found.any["targets"].shape[1])
    maps = {name: shares_by_position(found.tables[name]["oracle_routes"], edges) for name in budgets}
    widths = np.diff(edges)
    anywhere = {name: (each @ widths / widths.sum())[:, None] for name, each in maps.items()}
    off = {name: each - anywhere[name] for name, each in maps.items()}
    figure = canvas(1.5 + 3.6 * len(maps), 6.6)
    panels = figure.subplots(2, len(maps), squeeze=False, sharex=True, sharey=True)
    ends = symmetric(*off.values())
    for column, name in enumerate(maps):
        above = heat(panels[0, column], maps[name], SHARES, (0, 1), edges)
        below = heat(panels[1, column], off[name], DIFFERENCES, ends, edges)
        panels[0, column].set_title(_budget_title(name, found.layers))
        panels[1, column].set_xlabel("position in the sequence (tokens)")
    for row, (mesh, label) in enumerate(((above, "share with big"), (below, "less the layer's share"))):
        panels[row, 0].set_ylabel(LAYER)
        figure.colorbar(mesh, ax=panels[row].tolist(), label=label)
    sequences = len(found.any["targets"])
    said = [
        f"Share of tokens whose oracle has big in a layer, by position ({len(widths)} bins); below it less the layer's "
        "share at all positions."
    ]
    for name in maps:
        share = anywhere[name]
        by_chance = np.sqrt(np.mean(share * (1 - share) * (1 / widths - 1 / widths.sum()) / sequences))
        layer, at = np.unravel_index(np.abs(off[name]).argmax(), off[name].shape)
        said.append(
            f"{_budget_title(name, found.layers)}: these differences have an RMS of {_rms(off[name]):.3f}, where "
            f"independent tokens of any position would give about {by_chance:.3f}; the largest is "
            f"{off[name][layer, at]:+.3f}, in layer {layer} at positions {edges[at]} to {edges[at + 1] - 1}."
        )
    return Plot(figure, " ".join(said))


def position_budgets(found: Found) -> list[str]:
    """A third, a half and two thirds of the layers as exact budgets, or if there are none the first three others."""
    close = [str(k) for k in thirds(found.layers) if str(k) in found.tables]
    fixed = {"0", str(found.layers)}
    return close or [name for name in found.tables if name not in fixed][:3] or list(found.tables)[:1]


def skips(found: Found) -> Plot:
    """Share of tokens with skip, small and big by layer, for each budget of an oracle that may skip.

    Raises:
        LackingError: it may not.
    """
    if "-" not in found.summary["choices"]:
        raise LackingError(
            f"{found.folder}: has no skip among its choices, {found.summary['choices']}; give --skips a folder that has"
        )
    count = len(found.tables)
    across = min(ACROSS, count)
    down = -(-count // across)
    figure = canvas(1.8 + 1.7 * across, 0.6 + 3.6 * down)
    panels = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes, (name, table) in zip(panels.flat, found.tables.items(), strict=False):
        of = np.stack([shares(table["oracle_routes"], route) for route in Route], axis=1)
        mesh = heat(axes, of, SHARES, (0, 1))
        for (layer, route), share in np.ndenumerate(of):
            dark = share < 0.6
            axes.text(route, layer, f"{share:.2f}", ha="center", va="center", size=8, color="white" if dark else INK)
        axes.set_title(_budget_title(name, found.layers))
        axes.set_xticks(range(len(Route)), [route.name.lower() for route in Route])
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    for row in panels:
        row[0].set_ylabel(LAYER)
    figure.colorbar(mesh, ax=panels.ravel().tolist(), label="share of tokens")
    said = (
        "Share of tokens whose oracle skips a layer or has its small or big FFN, by layer and budget. An early exit is "
        "a token that skips from some layer to the end and nowhere else; chance is what skips at any layers would give."
    )
    return Plot(figure, "\n- ".join([said, *map(_skips_said, found.tables, found.tables.values())]))


def early_exits(routes: Routes) -> tuple[float, float]:
    """Of the tokens that skip some layers, but not all: the share that skips a last stretch only, and by chance."""
    skipped = (routes == Route.SKIP).reshape(-1, routes.shape[2])
    some = skipped[skipped.any(axis=1) & ~skipped.all(axis=1)]
    if not len(some):
        return float("nan"), float("nan")
    chance = [1 / comb(routes.shape[2], int(skips)) for skips in some.sum(axis=1)]
    return float((some[:, 1:] >= some[:, :-1]).all(axis=1).mean()), float(np.mean(chance))


def _skips_said(name: str, table: Arrays) -> str:
    routes = table["oracle_routes"]
    if not (routes == Route.SKIP).any():
        return f"Budget {name}: nothing is skipped."
    found, chance = early_exits(routes)
    exits = f"; early exits are {found:.4f} of the tokens that skip some layers, by chance {chance:.4f}"
    return (
        f"Budget {name}: {np.mean(routes == Route.SKIP):.3f} of all layers are skipped, "
        f"{stated(later_half(routes, Route.SKIP))} of them in the later half{'' if np.isnan(found) else exits}."
    )


def _budget_title(name: str, layers: int) -> str:
    return f"k = {name} of {layers}" if name.isdecimal() else f"budget {name}"


def _rms(values: Shares) -> float:
    return float(np.sqrt(np.mean(values**2)))
