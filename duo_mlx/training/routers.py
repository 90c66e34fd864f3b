"""What all ways to train a router have in common: nothing but routers learns, and what is validated."""

from dataclasses import dataclass

import mlx.core as mx

from duo_mlx.model import Model
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Route
from duo_mlx.training.passes import Passes, cross_entropy
from duo_mlx.training.stage import module_of


@dataclass(frozen=True)
class RouterLearns:
    """A router for a Duo that stays as it is.

    Args:
        choices: the routes between which it chooses.
        layers: of the model.
        budget: the share of big that it is to take.
        seed: of what is drawn for validation.
        passes: how passes are made.
    """

    choices: tuple[int, ...]
    layers: int
    budget: float
    seed: int
    passes: Passes

    def learns(self, name: str) -> bool:
        return module_of(name) == "router"

    def hard(self, model: Model, windows: mx.array) -> dict[str, mx.array]:
        """The loss by the router's own routes, ``hard``, and the share of big among them, ``share``."""
        routed, (rows, length) = RoutedModel(model, model.router()), windows[:, :-1].shape
        logits = routed(windows[:, :-1])
        big = (routed.taken(0, length, rows) == Route.BIG).mean(axis=(1, 2))
        return {"hard": cross_entropy(logits, windows[:, 1:]), "share": mx.array(big, mx.float32)}

    def one_hot(self, routes: mx.array) -> mx.array:
        """``[..., choices]`` of ``routes [...]``."""
        return (routes[..., None] == mx.array(self.choices)).astype(mx.float32)
