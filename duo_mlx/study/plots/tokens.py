"""Which tokens gain: one sequence token by token, and difficulty against what all small loses.

Difficulty is the paper's potential to benefit from more compute, all-small's loss less the oracle's (stage 2).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.study.difficulty import HIGH, correlation, ranks
from duo_mlx.study.plots.style import (
    BLUE,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    LackingError,
    Plot,
    canvas,
    counting,
    stated,
)
from duo_mlx.study.results import Found

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW = 64  # tokens beside one another
QUANTILES = (0.1, 0.5, 0.9)
Values = NDArray[np.floating]


def token_budget(found: Found) -> str:
    """The budget that tokens are looked at under: none, else the middle one of exact budgets, else the first."""
    exact = list(found.exact)
    if "none" in found.tables or not exact:
        return "none" if "none" in found.tables else next(iter(found.tables))
    return str(min(exact, key=lambda k: (abs(k - found.layers / 2), k)))


def text(found: Found, sequence: int, words: Sequence[str] | None) -> Plot:
    """Losses of one sequence's tokens under all small, all big and the oracle, and their difficulty below.

    Args:
        found: an oracle.
        sequence: its number.
        words: the text of its target tokens ``[length]``.

    Raises:
        LackingError: there are no ``words``.
    """
    if words is None:
        raise LackingError(
            f"the tokens' text takes the oracle's own model, {found.summary['model']['name']}; give --model"
        )
    budget = token_budget(found)
    table = found.tables[budget]
    small, big, oracle = (
        table[name][sequence].astype(np.float64) for name in ("loss_small", "loss_big", "oracle_loss")
    )
    gain = small - oracle
    rows = np.array_split(np.arange(len(small)), -(-len(small) // ROW))
    figure = canvas(max(5, 1.5 + 0.2 * len(rows[0])), 0.5 + 4.2 * len(rows))
    panels = figure.subplots(2 * len(rows), 1, gridspec_kw={"height_ratios": [2.6, 1] * len(rows)}, squeeze=False)[:, 0]
    for at, (above, below) in zip(rows, panels.reshape(-1, 2), strict=True):
        edges = np.append(at, at[-1] + 1) - 0.5
        above.stairs(oracle[at], edges, fill=True, color=GREEN, alpha=0.25)
        above.stairs(oracle[at], edges, baseline=None, color=GREEN, linewidth=1.5, label="oracle")
        above.plot(at, small[at], color=BLUE, marker="o", markersize=4, linestyle="none", label="all small")
        above.plot(at, big[at], color=ORANGE, marker="x", markersize=5, linestyle="none", label="all big")
        below.bar(at, gain[at], color=PURPLE, width=0.8)
        above.set(ylabel="loss (nats)", ylim=(0, 1.05 * max(small.max(), big.max(), oracle.max())), xticks=[])
        below.set(ylabel="difficulty\n(nats)", ylim=(min(0, gain.min()), 1.05 * max(gain.max(), 1e-3)))
        below.set_xticks(at, [shown(words[token]) for token in at], rotation=90, fontsize=8)
        for axes in (above, below):
            axes.set_xlim(at[0] - 0.8, at[0] + len(rows[0]) - 0.2)
            axes.grid(visible=True, axis="y")
    panels[-1].set_xlabel("true next token")
    panels[0].set_title(f"sequence {sequence}, oracle's budget {budget}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    hardest = int(gain.argmax())
    caption = (
        f"Losses of the {len(small)} tokens of sequence {sequence} under all small (mean {small.mean():.3f}), all big "
        f"({big.mean():.3f}) and the oracle of budget {budget} ({oracle.mean():.3f}); bars are difficulty, all small "
        f"less the oracle. Big in every layer is worse than small in every layer for {int((big > small).sum())} of "
        f"the tokens. The most difficult is {_quoted(words[hardest])}, token {hardest} ({gain[hardest]:.3f}); the "
        f"most difficult tenth holds {_top_share(gain):.2f} of all difficulty."
    )
    return Plot(figure, caption)


def _top_share(gain: Values) -> float:
    """What the most difficult tenth of tokens has of the whole."""
    whole = float(gain.sum())
    return float(np.sort(gain)[-max(1, len(gain) // 10) :].sum()) / whole if whole else float("nan")


def shown(word: str) -> str:
    """A token's text as a label: no space around it, and signs for what cannot be seen."""
    kept = word.strip() or word.replace("\n", "\u23ce").replace(" ", "\u2423") or "\u2205"
    return "".join(letter if letter.isprintable() else "?" for letter in kept)[:16]


def _quoted(word: str) -> str:
    return f"`{shown(word).replace('`', chr(39))}`"


def difficulty(found: Found) -> Plot:
    """All-small's loss against difficulty and what all big gains, by token: a high loss need not be difficult."""
    budget = token_budget(found)
    table = found.tables[budget]
    small = table["loss_small"].astype(np.float64)
    gains = {
        f"difficulty: all small - oracle, budget {budget}": small - table["oracle_loss"],
        "all small - all big": small - table["loss_big"],
    }
    figure = canvas(11, 5)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = (float(end(list(gains.values()))) for end in (np.min, np.max))
    extent = (0.0, float(small.max()), low, high)
    meshes = []
    for axes, (label, gain) in zip(panels, gains.items(), strict=True):
        meshes.append(_density(axes, small, gain, extent))
        axes.set(xlabel="loss of all small (nats a token)", ylabel=f"{label} (nats)")
    counting(figure, panels.tolist(), meshes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    of_oracle = next(iter(gains.values()))
    order, highest = ranks(small), small >= np.quantile(small, HIGH)
    with_oracle, with_big = (stated(correlation(order, ranks(gain)), "+") for gain in gains.values())
    easy = float((of_oracle[highest] < np.median(of_oracle)).mean())
    caption = (
        "Each token's all-small loss against its difficulty (left) and against what all big gains (right). Nothing "
        "lies above the diagonal, as no loss is negative: a token of low loss cannot be difficult, one of high loss "
        f"may be. Lines are quantiles ({', '.join(f'{100 * q:.0f} %' for q in QUANTILES)}) of tokens of like loss. "
        f"Rank correlation of all-small's loss with difficulty: {with_oracle}; with what all big gains: {with_big}. Of "
        f"the {100 * (1 - HIGH):.0f} % of tokens with the highest loss, {easy:.3f} are less difficult than the median "
        "token."
    )
    return Plot(figure, caption)


def _density(axes: "Axes", x: Values, y: Values, extent: tuple[float, float, float, float]) -> Any:
    """How many tokens are where, quantile lines and the diagonal; what a colour bar takes."""
    mesh = axes.hexbin(x.ravel(), y.ravel(), gridsize=45, extent=extent, bins="log", mincnt=1, linewidths=0.1)
    centres, lines = quantile_lines(x.ravel(), y.ravel())
    for quantile, line, dash in zip(QUANTILES, lines, (":", "-", "--"), strict=True):
        axes.plot(centres, line, color=ORANGE, linestyle=dash, linewidth=1.8, label=f"{100 * quantile:.0f} % quantile")
    axes.axline((0, 0), slope=1, color=BLUE, linestyle="-.", linewidth=1.2, label="all of the loss")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.grid(visible=True, color=GRID)
    return mesh


def quantile_lines(x: Values, y: Values) -> tuple[Values, Values]:
    """Medians of ``x`` in bins of equally many tokens ``[bins]``, and `QUANTILES` of ``y`` there ``[quantiles, bins]``.

    Bins have about 20 tokens or more, and there are 20 at most.
    """
    parts = np.array_split(np.argsort(x, kind="stable"), int(np.clip(len(x) // 20, 1, 20)))
    centres = np.array([np.median(x[part]) for part in parts])
    return centres, np.stack([np.quantile(y[part], QUANTILES) for part in parts], axis=1)
