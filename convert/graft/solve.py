"""A small FFN in closed form: what it must say is given, what it may be made of is chosen, and how much is solved.

A gated neuron is ``act(gate) * up``. Two kinds are used side by side:

- *copied* neurons of the big FFN, picked greedily: each time the one that explains most of what those before it
  leave (simultaneous orthogonal matching pursuit), not the ones that are loudest by themselves;
- *linear* neurons, whose gate is a constant bias with ``act(bias) = 1``: together the best linear map of their rank
  (reduced-rank regression), and all that there is where big's neurons cannot be named. A narrow FFN gains more by them
  than by copied neurons, but copied ones are needed where the big FFN does something abrupt, such as making the huge
  activations of an attention sink.

Given the neurons, the down projection with its bias is a ridge regression. Which errors matter is told by a weight a
token and a metric over the hidden channels, see `duo_mlx.convert.graft.importance`.
"""

from dataclasses import dataclass
from typing import Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.neurons import Neurons

Matrix = NDArray[np.floating]

UNIT_GATE = {  # by activation, what it takes to be 1
    "silu": 1.2784645427610738,
    "gelu_tanh": 1.1446303090227818,
    "gelu": 1.1444507183528787,
    "gelu_fast": 1.1429453389509778,
    "relu": 1.0,
    "relu2": 1.0,
}
COPIED_RIDGE = 1e-3  # of the mean square of big's neurons
LINEAR_RIDGE = 1e-3  # of the mean square of the FFN's inputs
FEATURE_RIDGE = 1e-4  # of linear features, whose mean square is 1
TINY = 1e-6  # a neuron of which less than this share is new adds nothing


@dataclass
class Moments:
    """Weighted second moments of inputs ``x``, of a constant, of big's neurons ``a`` and of targets ``y``.

    Tokens are added in any number of batches; nothing else of them is kept.
    """

    gram: Matrix  # [features, features] of x, 1, a
    cross: Matrix  # [features, hidden] of the features with y
    inputs: int  # width of x
    tokens: int = 0

    @classmethod
    def empty(cls, inputs: int, neurons: int, outputs: int) -> Self:
        features = inputs + 1 + neurons
        return cls(np.zeros((features, features), np.float32), np.zeros((features, outputs), np.float32), inputs)

    def add(self, x: mx.array, said: mx.array | None, target: mx.array, weights: mx.array) -> None:
        """Add tokens.

        Args:
            x: ``[..., inputs]``.
            said: what big's neurons say, ``[..., neurons]``; None where they are not known.
            target: ``[..., outputs]``.
            weights: ``[..., 1]``.
        """
        features = mx.concatenate([x, mx.ones((*x.shape[:-1], 1)), *([] if said is None else [said])], axis=-1)
        rows = np.array(features * weights).reshape(-1, features.shape[-1])
        self.gram += rows.T @ rows  # by NumPy, which computes no more than a half of what is symmetric
        self.cross += rows.T @ np.array(target * weights).reshape(len(rows), -1)
        self.tokens += len(rows)


@dataclass(frozen=True)
class SmallFFN:
    """Weights and biases of a small FFN in float32, shaped as a linear layer has them."""

    gate: Matrix  # [neurons, inputs]
    gate_bias: Matrix
    up: Matrix
    up_bias: Matrix
    down: Matrix  # [outputs, neurons]
    down_bias: Matrix

    def tensors(self) -> dict[str, Matrix]:
        """By the names of a layer's small FFN."""
        return {
            "gate_proj.weight": self.gate,
            "gate_proj.bias": self.gate_bias,
            "up_proj.weight": self.up,
            "up_proj.bias": self.up_bias,
            "down_proj.weight": self.down,
            "down_proj.bias": self.down_bias,
        }


@dataclass(frozen=True)
class Copyable:
    """Big's neurons as a small FFN may take them over."""

    gate: Matrix  # [neurons, inputs]
    gate_bias: Matrix
    up: Matrix
    up_bias: Matrix

    @classmethod
    def of(cls, neurons: Neurons | None, inputs: int) -> Self:
        """Those that are known; none at all where they are not."""
        if neurons is None:
            return cls(np.zeros((0, inputs)), np.zeros(0), np.zeros((0, inputs)), np.zeros(0))
        gate, up = neurons.gate, neurons.up
        own = np.array(gate.weight), np.array(gate.bias)
        if up is None:
            return cls(*own, np.zeros_like(own[0]), np.ones_like(own[1]))
        return cls(*own, np.array(up.weight), np.array(up.bias))


def solve(
    moments: Moments, big: Copyable, metric: Matrix, width: int, linear: int, activation: str = "silu"
) -> SmallFFN:
    """The small FFN of ``width`` neurons.

    Args:
        moments: of the calibration tokens.
        big: its neurons.
        metric: ``[outputs, outputs]``, symmetric; an error e counts as the square of ``metric @ e``.
        width: neurons of the result. Those for which there is no use, as a linear map has no more directions, say
            nothing.
        linear: how many of them are linear, if big has as many others.
        activation: of the result.
    """
    n, available = moments.inputs, len(big.gate_bias)
    copied = min(width - linear, available)
    linear = min(width - copied, n, moments.cross.shape[1])
    x, a = slice(0, n + 1), slice(n + 1, None)  # inputs with the constant, and big's neurons
    reads = _best_linear(moments, metric, linear)
    reads = np.concatenate([reads, np.eye(n + 1)[:, -1:]], axis=1)  # the constant is the down projection's bias
    own = reads.T @ moments.gram[x, x] @ reads
    mixed = reads.T @ moments.gram[x, a]
    cross = np.concatenate([reads.T @ moments.cross[x], moments.cross[a]])
    ridge = COPIED_RIDGE * float(np.diag(moments.gram)[a].sum()) / max(available, 1)
    picked = _pick(own, mixed, moments.gram[a, a], cross @ metric, copied, ridge)

    among = moments.gram[a, a][np.ix_(picked, picked)]
    gram = np.block([[own, mixed[:, picked]], [mixed[:, picked].T, among]]).astype(np.float64)
    penalty = np.r_[np.full(linear, FEATURE_RIDGE * moments.tokens), TINY, np.full(copied, ridge)]
    down = np.linalg.solve(gram + np.diag(penalty), np.concatenate([cross[: linear + 1], cross[linear + 1 + picked]]))
    idle = np.zeros((width - linear - copied, n))
    return SmallFFN(
        gate=np.concatenate([np.zeros((linear, n)), big.gate[picked], idle]).astype(np.float32),
        gate_bias=np.r_[np.full(linear, UNIT_GATE[activation]), big.gate_bias[picked], idle[:, 0]].astype(np.float32),
        up=np.concatenate([reads[:n, :linear].T, big.up[picked], idle]).astype(np.float32),
        up_bias=np.r_[reads[n, :linear], big.up_bias[picked], idle[:, 0]].astype(np.float32),
        down=np.pad(np.delete(down, linear, axis=0).T, ((0, 0), (0, len(idle)))).astype(np.float32),
        down_bias=down[linear].astype(np.float32),
    )


def _best_linear(moments: Moments, metric: Matrix, rank: int) -> Matrix:
    """What the best map of this rank reads of inputs and constant, ``[inputs + 1, rank]``, each with mean square 1."""
    size = moments.inputs + 1
    gram, cross = (part[:size].astype(np.float64) for part in (moments.gram[:, :size], moments.cross))
    ridge = LINEAR_RIDGE * np.trace(gram) / size
    whole = np.linalg.solve(gram + ridge * np.eye(size), cross) @ metric
    _, directions = np.linalg.eigh(whole.T @ gram @ whole)
    reads = whole @ directions[:, ::-1][:, :rank]
    loudness = np.sqrt(np.einsum("ik,ij,jk->k", reads, gram, reads, optimize=True) / moments.tokens)
    return np.asarray(reads / np.maximum(loudness, np.finfo(np.float64).tiny))


def _pick(own: Matrix, mixed: Matrix, neurons: Matrix, cross: Matrix, count: int, ridge: float) -> NDArray[np.intp]:
    """The ``count`` neurons that explain most beside the features that are there already, greedily.

    A Cholesky factorisation that chooses its pivots: ``rows`` are the factor's, so that a neuron's gain is known
    without its regression being solved.

    Args:
        own: ``[first, first]``, moments of the features that are there.
        mixed: ``[first, neurons]``, theirs with the neurons.
        neurons: ``[neurons, neurons]``.
        cross: ``[first + neurons, outputs]``, of all with the targets, in the metric.
        count: how many to pick.
        ridge: on each neuron.
    """
    first = len(own)
    factor = np.linalg.cholesky(own + TINY * np.trace(own) / first * np.eye(first))
    rows = np.zeros((first + count, len(neurons)))
    rows[:first] = np.linalg.solve(factor, mixed)
    left = cross[first:] - rows[:first].T @ np.linalg.solve(factor, cross[:first])
    whole = np.diag(neurons).astype(np.float64)
    new = whole - np.square(rows[:first]).sum(axis=0)
    picked: list[int] = []
    for done in range(first, first + count):
        gain = np.square(left).sum(axis=1) / (np.maximum(new, 0) + ridge)
        gain[new < TINY * whole] = 0
        gain[picked] = -1
        best = int(gain.argmax())
        pivot = np.sqrt(max(new[best], 0.0) + ridge)
        rows[done] = (neurons[best] - rows[:done].T @ rows[:done, best]) / pivot
        rows[done, picked] = 0
        left -= np.outer(rows[done], left[best] / pivot)
        new -= np.square(rows[done])
        picked.append(best)
    return np.array(picked, np.intp)
