"""Colours, markers and hatchings of charts, on light and on dark ground.

Text has a contrast of 4.5 to the ground, and a series one of 3; series differ in marker or hatching, too.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """Colours as ``#rrggbb``."""

    ground: str
    ink: str
    grid: str
    muted: str
    series: tuple[str, ...]

    def colour(self, number: int | None) -> str:
        return self.muted if number is None else self.series[number % len(self.series)]


LIGHT = Theme(
    "#ffffff",
    "#1c2128",
    "#e1e4e8",
    "#767c85",
    ("#0b62a4", "#c2500a", "#087a55", "#8a3d98", "#8a6100", "#007a87", "#c01f5f", "#586a00"),
)
DARK = Theme(
    "#15191f",
    "#e6e9ee",
    "#343b45",
    "#949ba5",
    ("#6cb6f5", "#ff9a52", "#46d39a", "#d6a0ea", "#e8c15c", "#54d0da", "#ff8db1", "#bccb52"),
)
THEMES = {"light": LIGHT, "dark": DARK}

# of plotly and of matplotlib
MARKERS = (
    ("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"),
    ("cross", "P"), ("x", "X"), ("triangle-down", "v"), ("pentagon", "p"),
)  # fmt: skip
PEER_MARKER = ("star", "*")
HATCHES = (("", ""), ("/", "///"), ("x", "xxx"), ("-", "---"), (".", "..."), ("|", "|||"), ("\\", "\\\\\\"))
PEER_HATCH = HATCHES[1]
PROJECTED = ("longdash", (0, (8, 4)))
DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))
