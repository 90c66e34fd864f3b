"""What the processes of a training run share: rank 0 reads and writes everything, and the others get it from there."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from duo_mlx.processes import Processes, in_touch


def shared(processes: Processes, array: NDArray[Any] | None, shape: tuple[int, ...]) -> NDArray[np.int32]:
    """Integers that rank 0 has, in all processes; the others know the shape alone."""
    if processes.count == 1:
        assert array is not None
        return array.astype(np.int32, copy=False)
    own = np.zeros(shape, np.int32) if array is None else array.astype(np.int32)
    summed = mx.distributed.all_sum(mx.array(own), stream=mx.cpu)
    with in_touch():
        mx.eval(summed)
    return np.array(summed)


def same(processes: Processes, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The arrays of rank 0 in all processes; those of the others give names, shapes and types."""
    if processes.count == 1:
        return arrays
    found = {}
    for name, array in sorted(arrays.items()):  # one by one, so that only one is there twice
        own = array if processes.rank == 0 else mx.zeros_like(array)
        found[name] = mx.distributed.all_sum(own, stream=mx.cpu)
        with in_touch():
            mx.eval(found[name])
    return found


def averaged(processes: Processes, arrays: dict[str, mx.array]) -> dict[str, mx.array]:
    """The mean of each array over all processes; unevaluated, see `duo_mlx.processes.in_touch`."""
    if processes.count == 1:
        return arrays
    return dict(tree_flatten(nn.average_gradients(tree_unflatten(list(arrays.items())))))
