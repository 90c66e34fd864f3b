"""``--show-routes``: the generated text with each token coloured by its share of big."""

from typing import TextIO

from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from duo_mlx.generation import Response
from duo_mlx.routes import Route, Routes, format_pattern

LOW, HIGH = (200, 225, 255), (20, 60, 140)  # background without any big, and with big in every layer
CONTEXT = 4  # tokens before a new one that decide how it is written, such as whether a space precedes it


def style(share: float) -> Style:
    """The colours of a token with that share of big; the letters stay readable on the background."""
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    letters = Color.from_rgb(255, 255, 255) if share > 0.45 else Color.from_rgb(0, 0, 0)
    return Style(color=letters, bgcolor=Color.from_rgb(red, green, blue))


class RoutePainter:
    """Writes tokens as they come: coloured on a terminal, else plain text and then a list of tokens with patterns."""

    def __init__(self, tokenizer: TokenizerWrapper, prompt: list[int], out: TextIO, notes: Console | None = None):
        self.tokenizer = tokenizer
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.notes = notes or Console(stderr=True, highlight=False, soft_wrap=True)
        self.before = prompt[-CONTEXT:]
        self.pending: list[int] = []
        self.shown: list[tuple[str, Routes]] = []

    def add(self, response: Response) -> None:
        """Write one more token; bytes of an unfinished character wait for the rest."""
        if response.finish_reason == "stop":  # the stop token itself is no text
            return
        self.pending.append(response.token)
        text = self._text()
        if text.endswith("�") and len(self.pending) < 4 and response.finish_reason is None:
            return
        self.before = (self.before + self.pending)[-CONTEXT:]
        self.pending = []
        self.shown.append((text, response.routes))
        share = float((response.routes == Route.BIG).mean())
        self.console.print(Text(text, style(share) if self.console.is_terminal else ""), end="")

    def _text(self) -> str:
        """What the pending tokens add to the text before them."""
        before = self.tokenizer.decode(self.before)
        return str(self.tokenizer.decode(self.before + self.pending))[len(before) :]

    def finish(self) -> None:
        """The legend; where colours cannot be shown, the tokens with their patterns instead."""
        if self.console.is_terminal:
            legend = Text("share of big: ")
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                legend.append(f" {share:.0%} ", style(share))
            self.notes.print(legend)
            return
        table = Table("pattern", "token", box=None, pad_edge=False)
        for text, routes in self.shown:
            table.add_row(format_pattern(routes), Text(repr(text)))
        self.notes.print(table)
        self.notes.print("B big, s small, - skip; one character a layer")
