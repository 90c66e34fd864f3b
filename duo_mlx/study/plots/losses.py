"""Loss by budget: the oracle's U, its baselines, and how much of it is the number of candidates."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.study.controls import SIZES
from duo_mlx.study.plots.style import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PURPLE,
    LackingError,
    Plot,
    canvas,
    over_sequences,
    stated,
    thirds,
)
from duo_mlx.study.results import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "fixed": ("best fixed pattern", {"color": ORANGE, "marker": "s"}),
    "fixed_split": ("best fixed pattern of the other half", {"color": ORANGE, "marker": "x", "linestyle": "--"}),
    "random": ("best random pattern", {"color": PURPLE, "marker": "^", "linestyle": "-."}),
    "random_by_token": ("best random patterns by token", {"color": PURPLE, "marker": "v", "linestyle": ":"}),
}  # of the summary
MARKS = ("o", "D")  # by number of candidates
Losses = NDArray[np.float64]


def by_sequence(found: Found, name: str) -> Losses:
    """Mean losses of the exact budgets by sequence, ``[budgets, sequences]``; NaN where a budget has none."""
    tables = found.exact.values()
    missing = np.full(found.any["inputs"].shape, np.nan)
    every = np.stack([table.get(name, missing) for table in tables]).astype(np.float64)
    return every.mean(axis=2)


def losses(found: Found) -> Plot:
    """Loss by number of big layers, beside baselines, and with controls what as many candidates or noise would gain.

    Raises:
        LackingError: there are fewer than two budgets of exactly k big layers.
    """
    if len(found.exact) < 2:
        raise LackingError("the oracle has fewer than two budgets of exactly k big layers to compare")
    controlled = any(np.isfinite(by_sequence(found, f"best_of_{size}")).any() for size in SIZES)
    figure = canvas(12 if controlled else 6.5, 6)
    panels = figure.subplots(1, 1 + controlled, squeeze=False, sharey=True)[0]
    _gains(panels[0], found)
    if controlled:
        _controls(panels[1], found)
    ks = list(found.exact)[:: 1 + len(found.exact) // 16]
    seen = [found.summary["budgets"][str(k)]["patterns_seen"] for k in ks]
    for axes in panels:
        axes.set_xlabel(f"k, big layers of {found.layers}")
        axes.set_xticks(ks)
        axes.grid(visible=True)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
        counts = axes.secondary_xaxis("top")
        counts.spines["top"].set_visible(False)
        counts.set_xticks(ks, [f"{each:.4g}" for each in seen], fontsize=8, color=MUTED)
        counts.set_xlabel("N, patterns that the oracle chooses from", fontsize=9, color=MUTED)
    panels[0].set_ylabel("loss (nats a token)")
    return Plot(figure, " ".join([*_gains_said(found), *(_controls_said(found) if controlled else ())]))


def _gains(axes: "Axes", found: Found) -> None:
    """The oracle with its band, baselines, and all big and all small."""
    ks = list(found.exact)
    each = [over_sequences(row) for row in by_sequence(found, "oracle_loss")]
    axes.set_title("oracle and baselines")
    axes.fill_between(ks, [of.low for of in each], [of.high for of in each], color=BLUE, alpha=0.18, linewidth=0)
    axes.plot(ks, [of.median for of in each], color=BLUE, marker="o", label="oracle, 95 % band", zorder=3)
    for name, (label, look) in BASELINES.items():
        values = [found.summary["budgets"][str(k)][name] for k in ks]
        if any(value is not None for value in values):
            drawn = [np.nan if value is None else value for value in values]
            axes.plot(ks, drawn, label=label, markersize=5, **look)
    for route, dash in (("small", "--"), ("big", "-")):
        level = float(found.any[f"loss_{route}"].mean(dtype=np.float64))
        axes.axhline(level, color=INK, linewidth=1, linestyle=dash, label=f"all {route}")


def _controls(axes: "Axes", found: Found) -> None:
    """The best of equally many at every budget: of its patterns, and of passes that differ by noise."""
    ks = list(found.exact)
    axes.set_title("the same number of candidates at every k")
    axes.plot(ks, by_sequence(found, "oracle_loss").mean(axis=1), color=MUTED, linestyle=":", label="oracle, best of N")
    axes.plot(ks, by_sequence(found, "mean_loss").mean(axis=1), color=GREEN, marker=".", label="patterns, mean")
    for size, mark, dash in zip(SIZES, MARKS, ("--", "-"), strict=True):
        for kind, label, colour in (("best_of", "patterns", BLUE), ("noise", "noise", ORANGE)):
            values = by_sequence(found, f"{kind}_{size}").mean(axis=1)
            axes.plot(
                ks, values, color=colour, marker=mark, markersize=5, linestyle=dash, label=f"{label}, best of {size}"
            )


def _gains_said(found: Found) -> list[str]:
    ks, oracle = list(found.exact), by_sequence(found, "oracle_loss")
    lowest = int(oracle.mean(axis=1).argmin())
    big, small = (found.any[f"loss_{route}"].mean(axis=1, dtype=np.float64) for route in ("big", "small"))
    said = [
        f"Loss by number of big layers. All small has {stated(over_sequences(small))}, all big "
        f"{stated(over_sequences(big))}; the oracle is lowest at k = {ks[lowest]} with "
        f"{stated(over_sequences(oracle[lowest]))}. The band is that of the mean over sequences, and all budgets' "
        "rise and fall together: their differences are surer than it looks."
    ]
    if 1 in ks:
        gain = over_sequences(oracle[ks.index(1)] - big)
        said.append(f"With one big layer the oracle has {stated(gain, '+')} against all big.")
    low, high = thirds(found.layers)[0], thirds(found.layers)[-1]
    if low < high and {low, high} <= set(ks):
        gain = over_sequences(oracle[ks.index(high)] - oracle[ks.index(low)])
        said.append(f"From k = {low} to k = {high} it changes by {stated(gain, '+')}; {_seen(found, low, high)}.")
    return said


def _seen(found: Found, *ks: int) -> str:
    counts = [f"{found.summary['budgets'][str(k)]['patterns_seen']:.4g}" for k in ks]
    return f"{'both' if len(set(counts)) == 1 else 'they'} choose from N = {' and '.join(dict.fromkeys(counts))}"


def _controls_said(found: Found) -> list[str]:
    said = ["Right: the expected minimum over equally many patterns, whatever k, and over as many all-big passes with "
            "noise to the same mean loss."]  # fmt: skip
    for size in SIZES:
        patterns, noise, oracle = (
            by_sequence(found, name).mean(axis=1) for name in (f"best_of_{size}", f"noise_{size}", "oracle_loss")
        )
        ks = np.array(list(found.exact))
        there = np.isfinite(patterns)
        if there.sum() > 1:
            said.append(
                f"Of {size} patterns the best is lowest at k = {ks[there][patterns[there].argmin()]}, and between k = "
                f"{ks[there].min()} and {ks[there].max()} its highest and lowest budget differ by "
                f"{np.ptp(patterns[there]):.3f}, the oracle's by {np.ptp(oracle[there]):.3f}."
            )
        both = np.flatnonzero(there & np.isfinite(noise))
        if len(both):
            apart = by_sequence(found, f"noise_{size}") - by_sequence(found, f"best_of_{size}")
            below = int((noise[both] < patterns[both]).sum())
            said.append(
                f"The best of {size} noisy passes is lower than that at {below} of {len(both)} budgets; on average it "
                f"lies {stated(over_sequences(apart[both].mean(axis=0)), '+')} from it."
            )
    return said
