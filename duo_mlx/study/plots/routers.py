"""Trained routers beside an oracle: what they lose at the share of big that they take, and where they put it.

A router keeps its budget on average only, and only nearly, so it stands at the share that it really took, and is
compared with what baselines lose there, on straight lines between their budgets.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.routes import Route
from duo_mlx.study.controls import SIZES
from duo_mlx.study.plots.losses import BASELINES
from duo_mlx.study.plots.maps import LAYER, later_half, position_bins, shares, shares_by_position
from duo_mlx.study.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    SHARES,
    SKY,
    LackingError,
    Plot,
    canvas,
    heat,
    over_sequences,
    stated,
)
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVES = {"oracle": "the oracle", "fixed_split": "the best fixed pattern", "random": "the best random one"}
COLOURS, MARKS, DASHES = (GREEN, SKY, INK), ("D", "P", "*", "h"), ("-", "--")  # of routers, in turn
LACKING = "needs trained routers; give --routers what duo-mlx oracle routers wrote"
Values = NDArray[np.float64]


def curve(found: Found, name: str) -> tuple[Values, Values]:
    """A baseline's shares of big ``[budgets]``, and its losses there by sequence ``[budgets, sequences]``.

    Where routes are big and small, all small and all big are its ends, whatever it is.
    """
    of_budgets = {k: of.get(f"{name}_by_sequence") for k, of in _exact(found).items()}
    losses = {k: np.array(of, np.float64) for k, of in of_budgets.items() if of is not None}
    if found.summary["choices"] == "sB":
        ends = {0: "loss_small", found.layers: "loss_big"}
        losses |= {k: found.any[loss].mean(axis=1, dtype=np.float64) for k, loss in ends.items()}
    ks = sorted(losses)
    return np.array(ks) / found.layers, np.array([losses[k] for k in ks])


def _exact(found: Found) -> dict[int, Mapping[str, Any]]:
    """What the summary says of budgets of exactly k big layers, from the lowest; their tables may be missing."""
    budgets = found.summary["budgets"]
    return {int(name): budgets[name] for name in sorted((n for n in budgets if n.isdecimal()), key=int)}


def at_share(found: Found, name: str, share: float) -> Values | None:
    """A baseline's losses by sequence at a share of big; None where it has no budgets to both sides."""
    at, losses = curve(found, name)
    if not len(at) or not at[0] <= share <= at[-1]:
        return None
    return np.array([np.interp(share, at, each) for each in losses.T])


def middle(routed: Routed, layers: int) -> int:
    """The place of the budget that is nearest to half of the layers, the lower one of two."""
    return min(range(len(routed.ks)), key=lambda place: (abs(routed.ks[place] - layers / 2), routed.ks[place]))


def routers(found: Found, routed: Sequence[Routed]) -> Plot:
    """Loss by share of big of the oracle, baselines, noisy passes where there are any, and routers.

    Raises:
        LackingError: there are no routers.
    """
    if not routed:
        raise LackingError(LACKING)
    figure = canvas(8, 6.4)
    axes = figure.subplots()
    _baselines(axes, found)
    for place, each in enumerate(routed):
        axes.plot(
            each.share,
            each.loss.mean(axis=(1, 2), dtype=np.float64),
            color=COLOURS[place % len(COLOURS)],
            marker=MARKS[place % len(MARKS)],
            linestyle=DASHES[place // len(COLOURS) % len(DASHES)],
            label=each.name,
            zorder=4,
        )
    axes.set(xlabel="share of big in all layers and tokens", ylabel="loss (nats a token)", xlim=(-0.02, 1.02))
    axes.grid(visible=True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    said = [
        "Loss by the share of big that was really taken, from all small to all big. Oracle, fixed and random patterns "
        "take k layers of each token, routers so many on average; fixed is scored on the half of the sequences that it "
        "was not chosen on. What routers are compared with is taken at their share, between two budgets on a straight "
        "line."
    ]
    if noise := _noise(found):
        best = min(noise, key=lambda k: noise[k])
        said.append(
            f"The best of {SIZES[-1]} all-big passes with noise to the mean loss of a budget's patterns, which need no "
            f"routes, is lowest at k = {best} with {noise[best]:.3f}."
        )
    return Plot(figure, "\n- ".join([" ".join(said), *(_said(found, each) for each in routed)]))


def _baselines(axes: "Axes", found: Found) -> None:
    """The oracle with its band, what it is beside, and the ends."""
    at, losses = curve(found, "oracle")
    if len(at):
        means, lows, highs = zip(*map(over_sequences, losses), strict=True)
        axes.fill_between(at, lows, highs, color=BLUE, alpha=0.18, linewidth=0)
        axes.plot(at, means, color=BLUE, marker="o", label="oracle, 95 % band", zorder=3)
    for name in ("fixed_split", "random"):
        at, losses = curve(found, name)
        if len(at):
            label, look = BASELINES[name]
            axes.plot(at, losses.mean(axis=1), label=label, markersize=5, **look)
    if noise := _noise(found):
        axes.plot(
            np.array(list(noise)) / found.layers, list(noise.values()), color=MUTED, marker=".", linestyle=":",
            label=f"noise, best of {SIZES[-1]} (control)",
        )  # fmt: skip
    for route, dash in (("small", "--"), ("big", "-")):
        level = float(found.any[f"loss_{route}"].mean(dtype=np.float64))
        axes.axhline(level, color=MUTED, linewidth=1, linestyle=dash, label=f"all {route}")


def _noise(found: Found) -> dict[int, float]:
    """What the best of so many noisy passes loses, by budget, where there are controls."""
    name, controls = f"noise_{SIZES[-1]}", {k: of.get("controls") or {} for k, of in _exact(found).items()}
    return {k: of[name]["mean"] for k, of in controls.items() if name in of}


def _said(found: Found, each: Routed) -> str:
    """A router's loss at its middle budget, and how far it is from the baselines."""
    place = middle(each, found.layers)
    share, losses = float(each.share[place]), each.loss[place].mean(axis=1, dtype=np.float64)
    apart = {of: at_share(found, name, share) for name, of in CURVES.items()}
    told = [f"{stated(over_sequences(losses - at), '+')} from {of}" for of, at in apart.items() if at is not None]
    taken = f"{each.name}: at k = {each.ks[place]} of {found.layers} it takes {share:.3f} of big and loses"
    return f"{', '.join([f'{taken} {stated(over_sequences(losses))}', *told])}."


def router_layers(found: Found, routed: Sequence[Routed]) -> Plot:
    """Share of tokens with big, layer by position, of each router at its middle budget, and by layer beside it.

    Raises:
        LackingError: there are no routers.
    """
    if not routed:
        raise LackingError(LACKING)
    edges = position_bins(found.any["targets"].shape[1])
    figure = canvas(10, 0.8 + 3.1 * len(routed))
    panels = figure.subplots(len(routed), 2, squeeze=False, sharex="col", sharey=True, width_ratios=(2, 1))
    said = [
        f"Share of tokens that a router sends to big, layer by position ({len(edges) - 1} bins), and by layer beside "
        "it, at the budget nearest to half of the layers; the line is the oracle's share."
    ]
    oracles: list[Any] = []
    for (left, right), each in zip(panels, routed, strict=True):
        place = middle(each, found.layers)
        k, routes = each.ks[place], each.routes[place]
        mesh = heat(left, shares_by_position(routes, edges), SHARES, (0, 1), edges)
        left.set(title=f"{each.name}, k = {k} of {found.layers}, took {each.share[place]:.3f}", ylabel=LAYER)
        right.barh(range(found.layers), shares(routes), color=GREEN, alpha=0.6, height=0.8)
        if k in found.exact:
            of_oracle = shares(found.exact[k]["oracle_routes"])
            look = {"color": BLUE, "marker": "o", "markersize": 4, "label": "the oracle"}
            oracles += right.plot(of_oracle, range(found.layers), **look)
        right.set_xlim(0, 1)
        right.grid(visible=True, axis="x")
        said.append(_where_said(found, each, place))
    panels[-1, 0].set_xlabel("position in the sequence (tokens)")
    panels[-1, 1].set_xlabel("share of tokens")
    figure.colorbar(mesh, ax=panels[:, 0].tolist(), label="share with big")
    if oracles:
        figure.legend(handles=oracles[:1], loc="outside lower right")
    return Plot(figure, "\n- ".join(said))


def _where_said(found: Found, each: Routed, place: int) -> str:
    """In which layers and at which positions a router has big."""
    k, routes = each.ks[place], each.routes[place]
    said = f"{each.name}, k = {k}:"
    if not (routes == Route.BIG).any():
        return f"{said} it takes no big."
    of_layer, by_token = shares(routes), (routes == Route.BIG).mean(axis=2)
    said += (
        f" {stated(later_half(routes))} of its big stand in the later half of the layers (chance 0.5), most in layer "
        f"{of_layer.argmax()} ({of_layer.max():.3f}), fewest in layer {of_layer.argmin()} ({of_layer.min():.3f});"
    )
    if first := by_token.shape[1] // 4:
        more = over_sequences(by_token[:, :first].mean(axis=1) - by_token[:, first:].mean(axis=1))
        said += f" the first quarter of a sequence takes {stated(more, '+')} more than the rest;"
    if k not in found.exact:
        return f"{said} the oracle's table of this budget is missing."
    oracle = found.exact[k]["oracle_routes"]
    return (
        f"{said} of the oracle's big {stated(later_half(oracle))} stand in the later half, and over layers the shares "
        f"of the two differ by {np.abs(of_layer - shares(oracle)).mean():.3f} on average."
    )
