"""Before nested small FFNs are solved: the worth of big's neurons in each layer, and how wide each small FFN should be.

One pass of the dense model ranks the neurons of every layer, which also tells how its error falls with its width. How
much an error of a layer matters is measured: on a few windows its small FFN, at the mean width, stands in for big while
all other layers are whole, and the divergence of the next tokens from the dense model's is taken. Both together give
the divergence that each width costs in each layer; the widths are those for which their sum is least.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.importance import heard, size
from duo_mlx.convert.graft.kinds import NestedSmall
from duo_mlx.convert.graft.layers import Layers, batches
from duo_mlx.convert.graft.nested import Ranking, divide, rank, solve_down
from duo_mlx.convert.graft.neurons import Neurons, name_neurons
from duo_mlx.convert.graft.solve import Moments
from duo_mlx.convert.graft.state import State

TRIED = 4  # windows on which the layers' errors are measured
UNIT = 64  # neurons; widths are multiples of it, which quantising in groups needs
UNITS = 8  # at least of a big FFN; one with fewer than UNIT * UNITS neurons has smaller units


def survey(
    layers: Layers,
    windows: NDArray[np.integer],
    chosen: tuple[bool, ...],
    ratio: float,
    state: State,
    step: Callable[[], object],
) -> None:
    """Leave in ``state`` each layer's ``order-N [neurons]``, and ``widths [layers]``.

    Args:
        layers: the dense model's, whose neurons are known in every chosen layer.
        windows: token ids ``[windows, tokens]``.
        chosen: which layers get a small FFN.
        ratio: neurons of all big FFNs over those of all small ones.
        state: where the result is kept, and the metrics are (`duo_mlx.convert.graft.importance`).
        step: is called after each layer.
    """
    states = layers.embed(windows)
    trials: dict[int, NDArray[np.float32]] = {}  # by the layer whose small FFN spoke: the states that came of it
    rankings: dict[int, Ranking] = {}
    for index in range(len(layers)):
        before = states[:TRIED].copy()
        with layers.in_float32(index):
            for trial in trials.values():
                trial[:] = np.array(layers.run(index, mx.array(trial)))
            if chosen[index]:
                neurons = neurons_of(layers, index, before[:1])
                assert neurons is not None
                moments = _moments(layers, index, neurons, states)
                metric = state.load(f"metric-{index}")
                rankings[index] = ranking = rank(moments.gram, np.array(neurons.down.weight), metric)
                state.save(f"order-{index}", ranking.order)
                width = round(len(ranking.order) / ratio)
                small = NestedSmall(neurons, ranking.order[:width], *solve_down(moments, ranking.order, width))
                trials[index] = np.array(layers.say(index, mx.array(before), small))
            else:
                for rows in batches(len(states)):
                    states[rows] = np.array(layers.run(index, mx.array(states[rows])))
        step()
    with layers.outside_in_float32():
        harm = {index: _divergence(layers, states[:TRIED], trial) for index, trial in trials.items()}
    widths = _widths(rankings, harm, ratio)
    state.save("widths", np.array([widths.get(index, 0) for index in range(len(layers))], np.int64))


def neurons_of(layers: Layers, index: int, h: NDArray[np.float32]) -> Neurons | None:
    """A layer's neurons where they are known, tried on its inputs ``h [windows, tokens, hidden]``."""
    _, x, *_ = layers.open(index, mx.array(h))
    return name_neurons(layers.big(index), x)


def _moments(layers: Layers, index: int, neurons: Neurons, states: NDArray[np.float32]) -> Moments:
    """Those of a layer in the dense model; ``states`` become its outputs."""
    moments = Moments.empty(0, neurons.count, states.shape[-1])
    positions = None
    for rows in batches(len(states)):
        out, x, said, inner = layers.open(index, mx.array(states[rows]), neurons)
        positions = heard(layers, index + 1, out) if positions is None else positions
        moments.add(x[..., :0], inner, said, positions / size(out))
        states[rows] = np.array(out)
    return moments


def _divergence(layers: Layers, dense: NDArray[np.float32], trial: NDArray[np.float32]) -> float:
    """KL of the next tokens after ``trial`` from those after ``dense``, last states ``[windows, tokens, hidden]``."""
    total = 0.0
    for one, other in zip(dense, trial, strict=True):
        p, q = (layers.logits(mx.array(each)[None]) for each in (one, other))
        p, q = (each - mx.logsumexp(each, axis=-1, keepdims=True) for each in (p, q))
        total += float(np.array((mx.exp(p) * (p - q)).sum(axis=-1).mean()))
    return total / len(dense)


def _widths(rankings: dict[int, Ranking], harm: dict[int, float], ratio: float) -> dict[int, int]:
    """Neurons of each small FFN; 0 where it would be as wide as big."""
    counts = {index: len(ranking.order) for index, ranking in rankings.items()}
    least = min(counts.values())
    unit = UNIT if least >= UNIT * UNITS else max(1, least // UNITS)
    most = max(-(-count // unit) for count in counts.values())
    errors = np.empty((len(counts), most + 1))
    for row, (index, ranking) in zip(errors, rankings.items(), strict=True):
        at = np.minimum(np.arange(most + 1) * unit, counts[index])
        row[:] = harm[index] * ranking.errors[at] / ranking.errors[round(counts[index] / ratio)]
        row[0] = np.inf
        row[at == counts[index]] = 0
    units = divide(errors, max(len(counts), round(sum(counts.values()) / ratio / unit)))
    widths = {index: min(int(count) * unit, counts[index]) for index, count in zip(counts, units, strict=True)}
    return {index: 0 if width == counts[index] else width for index, width in widths.items()}
