"""What a stage of training is to the loop: which parameters learn, what is drawn, the loss, and what is validated."""

import re
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Model

Drawn = dict[str, NDArray[Any]]  # by name; of a single sequence, or with an axis of sequences before all others


class Stage(Protocol):
    """One way of training a Duo. It has no state: what it draws depends on its arguments alone."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of what `measure` finds, which are columns of the log."""

    @property
    def text_losses(self) -> tuple[str, ...]:
        """Those of `columns` that are losses on the text, in nats a token."""

    def learns(self, name: str) -> bool:
        """Whether the parameter of that canonical name learns."""

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:
        """What a step draws for one sequence of ``length`` inputs; the same names and shapes for every sequence.

        A value that changes with ``step``, such as a temperature, is drawn like any other.
        """

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:
        """The loss ``[sequences]`` of ``windows [sequences, length + 1]`` with what was drawn for them."""

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """What validation finds, by the names of `columns`, each ``[sequences]``.

        Args:
            model: its parameters are the trained ones.
            windows: ``[sequences, length + 1]``.
            first: the number of the first of these windows among all that are validated; what is drawn for a window
                depends on its number alone.
        """


def module_of(name: str) -> str:
    """Return "big", "small" or "router" for a weight of a Duo's FFN by its name, and else nothing.

    The first of these words counts: experts inside big have routers, too.
    """
    found = re.search(r"\.(big|small|router)\.", name)
    return found[1] if found else ""


def randomness(seed: int, *place: int) -> np.random.Generator:
    """Random numbers that depend on the seed and a place (such as a step and a sequence) alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=place)))
