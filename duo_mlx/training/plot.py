"""The log of a training run as a figure."""

import io
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from duo_mlx.training.trainer import Row

ASIDE = ("step", "tokens", "lr", "train_loss", "tokens_per_s")
COLOURS = ("#0072b2", "#d55e00", "#007a5a", "#a3478a", "#767c85", "#1c2128")  # told apart by the colour-blind
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "duo-mlx",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def available() -> bool:
    """Whether matplotlib, which is an optional extra, is installed."""
    return find_spec("matplotlib") is not None


def losses(rows: list[Row], names: Sequence[str]) -> bytes:
    """Loss over trained tokens as SVG: training dotted, and of what is validated the columns ``names``."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(STYLE, after_reset=True):
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        tokens = [int(row["tokens"]) for row in rows]
        train = [float(row["train_loss"]) for row in rows]
        axes.plot(tokens, train, color=COLOURS[-1], linestyle=":", marker=".", label="training")
        for name, colour in zip(names, COLOURS, strict=False):
            axes.plot(tokens, [float(row[name]) for row in rows], color=colour, marker=".", label=f"held out, {name}")
        axes.set_xlabel("trained tokens")
        axes.set_ylabel("loss (nats a token)")
        axes.legend()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
