"""The texts of ``duo-mlx bench run``: prompts to generate after, and held-out text to measure quality on.

Random tokens would mean nothing to a router, so both are real text. The bundled ones are from the last twentieth of
five novels by Jane Austen, on which the embedded model was not trained.
"""

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError

BUNDLED = "bundled"


@dataclass(frozen=True)
class Text:
    """A text and where it came from: ``bundled``, or a file's name without its directory."""

    source: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()

    def record(self, tokens: int, count: int) -> dict[str, Any]:
        """For a result's JSON."""
        return {"source": self.source, "sha256": self.sha256, "tokens": tokens, "count": count}


def read(file: Path | None, bundled: str) -> Text:
    """The user's file, or the bundled text ``prompts`` or ``held_out``.

    Raises:
        DuoError: the file cannot be read as text.
    """
    if file is None:
        return Text(BUNDLED, files("duo_mlx.bench").joinpath("texts", f"{bundled}.txt").read_text(encoding="utf-8"))
    try:
        return Text(file.name, file.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise DuoError(f"{file}: is no UTF-8 text") from None
    except OSError as error:
        raise DuoError(f"{file}: cannot be read ({error.strerror})") from None


def prompts(text: Text, tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt; prompts are paragraphs, with empty lines between them.

    Raises:
        DuoError: there is none.
    """
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.content)]
    ids = [tokenizer.encode(part, add_special_tokens=False) for part in found if part]
    ids = [each for each in ids if each]
    if not ids:
        raise DuoError(f"{text.source}: holds no prompt; write them as paragraphs with empty lines between")
    return ids


def cut(prompts: list[list[int]], number: int, tokens: int, first: int | None) -> list[int]:
    """``tokens`` ids from prompt ``number`` on, running on into those after it; ``first`` begins the text, if given."""
    ids = [] if first is None else [first]
    while len(ids) < tokens:
        ids += prompts[number % len(prompts)]
        number += 1
    return ids[:tokens]


def windows(text: Text, tokenizer: Any, tokens: int, length: int) -> NDArray[np.int32]:
    """Held-out windows ``[windows, length + 1]`` with about ``tokens`` predicted tokens, spread over the text.

    Raises:
        DuoError: the text is too short for one.
    """
    ids = np.array(tokenizer.encode(text.content, add_special_tokens=False), np.int32)
    fitting = (len(ids) - 1) // length
    count = min(max(1, tokens // length), fitting)
    if count < 1:
        raise DuoError(f"{text.source}: has {len(ids)} tokens; quality is measured on {length + 1} or more")
    starts = [round(place) * length for place in np.linspace(0, fitting - 1, count)]
    return np.stack([ids[start : start + length + 1] for start in starts])
