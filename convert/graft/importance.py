"""Which errors of a hidden state matter: a weight for each token, and a metric over the channels.

Least squares on hidden states as they are go wrong in two ways. A window's first token is an attention sink with
activations a hundred times the others', whose scale hardly matters and whose presence does; and the channels of the
loudest variance are not those that the rest of the model listens to.

- A token's error counts relative to the size of its own state, and by how much it changes what the next layer's
  attention gives to all tokens: a sink is heard by most of those after it. Random changes of attention's output, of the
  relative size that counts, tell how much is heard of each position of a window.
- The channels' metric is the Fisher information: the second moments of the gradient, by the FFN's output, of the
  log-probability of a token drawn from the model's own prediction.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.layers import Layers, batches
from duo_mlx.convert.graft.state import State

WINDOWS = 12  # that the metric is measured on
ISOTROPIC = 0.1  # share of the metric in which all channels count alike, as it is measured on few tokens


def heard(layers: Layers, index: int, states: mx.array) -> mx.array:
    """How much a change of each position is heard, ``[tokens, 1]``, if it is as large as the state itself.

    Args:
        layers: the model's.
        index: of the layer that hears; as many as there are layers after the last one.
        states: what goes into it in the dense model, ``[windows, tokens, hidden]``, of some windows.
    """
    if index == len(layers):
        return mx.ones((states.shape[1], 1))
    loudness = size(states)
    signs = 1 - 2 * mx.random.bernoulli(0.5, states.shape, key=mx.random.key(index))
    nothing = mx.zeros_like(states)
    with layers.in_float32(index):
        _, (back,) = mx.vjp(lambda h: layers.give(index, h, nothing), [states], [signs / loudness])
        found = mx.sqrt(mx.square(back * loudness).mean(axis=(0, -1)))[:, None]
        mx.eval(found)
    return found


def size(states: mx.array) -> mx.array:
    """How loud each token's state is, ``[..., 1]``."""
    return mx.sqrt(mx.square(states).mean(axis=-1, keepdims=True))


def measure_metrics(layers: Layers, windows: NDArray[np.integer], state: State, step: Callable[[], object]) -> None:
    """Leave in ``state`` each layer's ``metric-N [hidden, hidden]``, the root of its FFN output's Fisher information.

    A pass forward and a pass backward through the dense model, a layer at a time; hidden states wait on disk.

    Args:
        layers: the dense model's.
        windows: token ids ``[windows, tokens]``, of which the first are used.
        state: where the result and what is needed meanwhile are kept.
        step: is called after each layer, twice for each.
    """
    windows = windows[:WINDOWS]
    states = layers.embed(windows)
    for index in range(len(layers)):
        state.save(f"input-{index}", states)
        with layers.in_float32(index):
            for rows in batches(len(windows)):
                states[rows] = np.array(layers.run(index, mx.array(states[rows])))
        step()
    with layers.outside_in_float32():
        gradient = _of_predictions(layers, states)
    for index in reversed(range(len(layers))):
        states, ffns = state.load(f"input-{index}"), np.empty_like(gradient)
        with layers.in_float32(index):
            for rows in batches(len(windows)):
                h = mx.array(states[rows])
                given = [h, mx.zeros_like(h)]
                _, found = mx.vjp(lambda h, n, i=index: layers.run(i, h, n), given, [mx.array(gradient[rows])])
                gradient[rows], ffns[rows] = (np.array(each) for each in found)
        state.save(f"metric-{index}", _root(ffns))
        state.drop(f"input-{index}")
        step()


def _of_predictions(layers: Layers, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gradient, by the last hidden states, of the log-probabilities of tokens that are drawn from them."""

    def said(h: mx.array, tokens: mx.array) -> mx.array:
        return -nn.losses.cross_entropy(layers.logits(h), tokens, reduction="sum")

    gradient = np.empty_like(states)
    for row, h in enumerate(states):
        hidden = mx.array(h)[None]
        tokens = mx.random.categorical(layers.logits(hidden), key=mx.random.key(row))
        gradient[row] = np.array(mx.grad(said)(hidden, tokens))[0]
    return gradient


def _root(gradient: NDArray[np.float32]) -> NDArray[np.float64]:
    """The square root of the gradients' second moments, of trace ``hidden``; without a window's first token."""
    rows = gradient[:, 1:].reshape(-1, gradient.shape[-1]).astype(np.float64)
    hidden = rows.shape[1]
    fisher = rows.T @ rows
    fisher *= (1 - ISOTROPIC) * hidden / np.trace(fisher)
    fisher += ISOTROPIC * np.eye(hidden)
    values, vectors = np.linalg.eigh(fisher)
    return np.asarray((vectors * np.sqrt(values)) @ vectors.T)
