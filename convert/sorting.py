"""Putting the neurons of a written model's big FFNs in another order: nested small FFNs are the first of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert import dense
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.convert.writer import write_weights
from duo_mlx.files import writing
from duo_mlx.model import Model
from duo_mlx.nested import linear_maps


def sort_neurons(directory: Path, model: Model, orders: Mapping[int, NDArray[np.intp]]) -> None:
    """Write the weights in a model directory anew with sorted neurons; what big computes is the same sum.

    Args:
        directory: of a model in float.
        model: the model that it holds.
        orders: by layer, the neurons of its big FFN in their new order.

    Raises:
        DuoError: a file cannot be written.
    """
    tensors = in_order(dense.written(directory), model, orders)
    old = sorted(directory.glob("model*.safetensors*"))
    with writing(made := directory / "sorted"):
        made.mkdir()
    write_weights(made, tensors, allow_nonfinite=True)  # they were looked at when they were first written
    for file in old:
        file.unlink()
    for file in sorted(made.iterdir()):
        file.replace(directory / file.name)
    made.rmdir()


def in_order(tensors: Tensors, model: Model, orders: Mapping[int, NDArray[np.intp]]) -> dict[str, Tensor]:
    """Return a model's ``tensors`` with sorted neurons; arguments as of `sort_neurons`."""
    found = dict(tensors)
    for layer, order in orders.items():
        path, *reads, down = f"{model.ffn_paths[layer]}.big", *linear_maps(model.ffns[layer].big)
        for name in reads:
            for part in ("weight", "bias"):
                if (whole := f"{path}.{name}.{part}") in found:
                    found[whole] = found[whole].apply(_taken(order, 0))
        found[f"{path}.{down}.weight"] = found[f"{path}.{down}.weight"].apply(_taken(order, 1))
    return found


def _taken(order: NDArray[np.intp], axis: int) -> Callable[[mx.array], mx.array]:
    places = mx.array(order.astype(np.uint32))
    return lambda array: mx.take(array, places, axis=axis)
