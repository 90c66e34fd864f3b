"""How figures look, and the files that they become: text stays text, and the same figure is the same file.

matplotlib is an optional extra, so it is imported where it is used.
"""

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.intervals import Interval, interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150
KINDS = {"svg": {"Date": None}, "png": {"Software": None}}  # and the metadata that would change from run to run
INK, MUTED, GRID = "#1c2128", "#767c85", "#e1e4e8"
# told apart by the colour-blind
BLUE, ORANGE, GREEN, PURPLE, SKY = "#0072b2", "#d55e00", "#007a5a", "#a3478a", "#56b4e9"
SHARES, DIFFERENCES = "viridis", "PuOr"  # colour maps
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "duo-mlx",
    "text.parse_math": False,
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": GRID,
    "text.color": INK,
    "legend.frameon": False,
}


class LackingError(DuoError):
    """A figure cannot be drawn from what is there; the text says what it needs."""


@dataclass(frozen=True)
class Plot:
    """A figure and what is seen on it."""

    figure: "Figure"
    caption: str


@contextmanager
def drawing() -> Iterator[None]:
    """Figures are made and rendered in here, whatever matplotlib's settings are outside.

    Raises:
        DuoError: matplotlib is missing.
    """
    try:
        import matplotlib.style
    except ImportError:
        raise DuoError("oracle plot needs matplotlib: pip install 'duo-mlx[plot]'") from None
    with matplotlib.style.context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # then it is a box
        yield


def canvas(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def rendered(figure: "Figure") -> dict[str, bytes]:
    """A figure's files by kind."""
    found = {}
    for kind, metadata in KINDS.items():
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        found[kind] = file.getvalue()
    return found


def heat(
    axes: "Axes", values: NDArray[np.floating], colours: str, span: tuple[float, float], edges: Sequence[float] = ()
) -> Any:
    """A heat map ``[layers, columns]``, the first layer at the bottom; what a colour bar takes.

    Args:
        axes, values: where and what.
        colours: a colour map.
        span: its ends.
        edges: of the columns, one more than there are; none: column i is centred at i.
    """
    layers, columns = values.shape
    across = edges or np.arange(columns + 1) - 0.5
    mesh = axes.pcolormesh(
        across, np.arange(layers + 1) - 0.5, values, cmap=colours, vmin=span[0], vmax=span[1],
        edgecolors="white", linewidth=0.4,
    )  # fmt: skip
    axes.set_yticks(range(0, layers, 1 + layers // 16))
    return mesh


def counting(figure: "Figure", panels: Sequence["Axes"], meshes: Sequence[Any]) -> None:
    """One scale of counts for several panels: logarithmic, from a visible grey for 1 to black."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    most = max(2, *(int(mesh.get_array().max()) for mesh in meshes))
    greys = ListedColormap(colormaps["Greys"](np.linspace(0.25, 1, 128)))
    for mesh in meshes:
        mesh.set(cmap=greys, clim=(1, most))
    marks = [digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5) if digit * 10**power <= most]
    bar = figure.colorbar(meshes[0], ax=panels, label="tokens", ticks=marks, format="%d")
    bar.minorticks_off()


def symmetric(*values: NDArray[np.floating]) -> tuple[float, float]:
    """Ends of a diverging scale that holds them all, 0 in its middle."""
    most = max(float(np.abs(each).max()) for each in values) or 1.0
    return -most, most


def over_sequences(values: NDArray[np.floating]) -> Interval:
    """The mean of what each sequence has, ``[sequences]``, and its interval."""
    found = interval(values.tolist(), np.mean)
    return Interval(float(np.mean(values, dtype=np.float64)), found.low, found.high)


def stated(found: Interval, sign: str = "") -> str:
    """A figure with its interval, for a caption."""
    return f"{found.median:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def thirds(layers: int) -> list[int]:
    """The budgets that are looked at closely: a third, a half and two thirds of the layers."""
    return sorted({round(layers / 3), layers // 2, round(2 * layers / 3)})
