"""``--show-routes``: the generated text with each token coloured by its share of big, and drafts marked."""

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
MARKS = {"accepted": Style(underline=True), "corrected": Style(bold=True)}  # of what became of drafts
CONTEXT = 4  # tokens before a new one that decide how it is written, such as whether a space precedes it


def style(share: float) -> Style:
    """The colours of a token with that share of big; the letters stay readable on the background."""
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    letters = Color.from_rgb(255, 255, 255) if share > 0.45 else Color.from_rgb(0, 0, 0)
    return Style(color=letters, bgcolor=Color.from_rgb(red, green, blue))


def mark(response: Response) -> str:
    """What a token is to a draft: ``accepted`` from one, ``corrected`` where another was drafted, or nothing."""
    return "accepted" if response.from_draft else "corrected" if response.corrected else ""


class RoutePainter:
    """Writes tokens as they come: coloured on a terminal, else plain text and then a list of tokens with patterns."""

    def __init__(self, tokenizer: TokenizerWrapper, prompt: list[int], out: TextIO, notes: Console | None = None):
        self.tokenizer = tokenizer
        self.console = Console(file=out, highlight=False, soft_wrap=True)
        self.notes = notes or Console(stderr=True, highlight=False, soft_wrap=True)
        self.before = prompt[-CONTEXT:]
        self.pending: list[int] = []
        self.shown: list[tuple[str, Routes, str]] = []

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
        drafted = mark(response)
        self.shown.append((text, response.routes, drafted))
        look = style(float((response.routes == Route.BIG).mean())) + MARKS.get(drafted, Style())
        self.console.print(Text(text, look if self.console.is_terminal else ""), end="")

    def _text(self) -> str:
        """What the pending tokens add to the text before them."""
        before = self.tokenizer.decode(self.before)
        return str(self.tokenizer.decode(self.before + self.pending))[len(before) :]

    def finish(self) -> None:
        """The legend; where colours cannot be shown, the tokens with their patterns instead."""
        drafts = any(drafted for _, _, drafted in self.shown)
        if self.console.is_terminal:
            legend = Text("share of big: ")
            for share in (0.0, 0.25, 0.5, 0.75, 1.0):
                legend.append(f" {share:.0%} ", style(share))
            if drafts:
                legend.append("  drafts: ")
                for drafted, look in MARKS.items():
                    legend.append(drafted, look).append(" ")
            self.notes.print(legend)
            return
        table = Table("pattern", *["draft"] * drafts, "token", box=None, pad_edge=False)
        for text, routes, drafted in self.shown:
            table.add_row(format_pattern(routes), *[drafted] * drafts, Text(repr(text)))
        self.notes.print(table)
        self.notes.print("B big, s small, - skip; one character a layer")
