"""A router that learns what an oracle chose: its routes are labels, the loss their cross-entropy in each layer.

The hidden states that the router sees are those of the oracle's own routes. The oracle has seen the next token and the
router has not, so what can be learnt is the part of the oracle's choice that the past foretells.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routed import ask
from duo_mlx.routes import Routes, format_pattern
from duo_mlx.training.routers import RouterLearns
from duo_mlx.training.stage import Drawn


@dataclass(frozen=True, eq=False)
class Labels(RouterLearns):
    """Args beside those of `RouterLearns`:

    inputs: ids of the oracle's sequences ``[sequences, length]``; training draws from these, and texts validate.
    routes: the oracle's, ``[sequences, length, layers]``.

    Raises:
        DuoError: the oracle took a route that the router cannot.
    """

    inputs: NDArray[Any]
    routes: Routes

    columns: ClassVar[tuple[str, ...]] = ("hard", "share", "label_loss", "agreement")
    text_losses: ClassVar[tuple[str, ...]] = ("hard",)

    def __post_init__(self) -> None:
        if strangers := set(np.unique(self.routes).tolist()) - set(self.choices):
            raise DuoError(
                f"the oracle took {format_pattern(np.array(sorted(strangers)))}, which this router cannot; "
                "give --choices with all that it took"
            )

    def draw(self, random: np.random.Generator, length: int, step: int) -> Drawn:  # noqa: ARG002
        number = int(random.integers(len(self.inputs)))
        return {"inputs": self.inputs[number], "routes": self.routes[number]}

    def loss(self, model: Model, windows: mx.array, drawn: Drawn) -> mx.array:  # noqa: ARG002
        return self._compared(model, drawn["inputs"], drawn["routes"])[0]

    def measure(self, model: Model, windows: mx.array, first: int) -> dict[str, mx.array]:
        """Beside the text: how well the labels of some sequences are told, ``agreement`` by share."""
        these = np.arange(first, first + len(windows)) % len(self.inputs)
        told, agreed = self._compared(model, self.inputs[these], self.routes[these])
        return self.hard(model, windows) | {"label_loss": told, "agreement": agreed}

    def _compared(self, model: Model, inputs: NDArray[Any], routes: Routes) -> tuple[mx.array, mx.array]:
        """The loss of the labels and the share of them that has the largest logit, ``[sequences]``."""
        _, said = ask(model, mx.array(inputs), routes)
        true = self.one_hot(mx.array(routes))
        told = mx.logsumexp(said, axis=-1) - (true * said).sum(axis=-1)
        agreed = mx.argmax(said, axis=-1) == mx.argmax(true, axis=-1)
        return told.mean(axis=(1, 2)), agreed.mean(axis=(1, 2))
