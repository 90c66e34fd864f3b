"""Models whose arrays have sizes but next to no numbers: their graphs are built and counted, never computed."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from duo_mlx import hosting
from duo_mlx.model import Model


def sized(array: mx.array) -> mx.array:
    """Return an array with the same shape and dtype that holds one number in memory."""
    made = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
    mx.eval(made)
    return made


def weightless(model: Model) -> Model:
    """Return a copy of a model without its weights, in which all modules compute as mlx-lm's do.

    On a CPU some of the model's own may have been replaced (`duo_mlx.cpu`).
    """
    known: dict[int, Any] = {}  # what is not copied, by the id of what it stands for
    for module in model.modules():
        known |= {id(value): sized(value) for value in module.values() if isinstance(value, mx.array)}
        functions = (value for value in vars(module).values() if callable(value) and not isinstance(value, nn.Module))
        known |= {id(value): value for value in functions}
    made = copy.deepcopy(model, known)
    for module in made.modules():
        hosting.restore_class(module)
    return made


def arrays(tree: Any) -> list[mx.array]:
    """Return the arrays in a tree."""
    flat: Any = tree_flatten(tree)
    return [each for _, each in flat if isinstance(each, mx.array)]


def without_graph(tree: Any) -> Any:
    """Return a tree whose arrays are `sized`."""
    return tree_map(lambda each: sized(each) if isinstance(each, mx.array) else each, tree)


def forget(cache: Any) -> None:
    """Let caches hold arrays without a graph."""
    for each in cache:
        for name, value in vars(each).items():
            if name == "caches":
                forget(value)
            elif isinstance(value, mx.array | list | tuple):
                setattr(each, name, without_graph(value))
