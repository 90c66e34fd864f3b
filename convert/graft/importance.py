"""Which errors of a hidden state matter: a weight for each token, and a metric over the channels.

Least squares on hidden states as they are go wrong in two ways. A window's first token is an attention sink with
activations a hundred times the others', whose scale hardly matters and whose presence does; and the channels of the
loudest variance are not those that the rest of the model listens to.

- A token's error counts relative to the size of its own state, and in proportion to one plus the attention that it
  receives in the next layer: a sink has that of most tokens after it.
- The channels' metric is the Fisher information: the second moments of the gradient of the log-probability of a token
  drawn from the model's own prediction.
"""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.layers import Dense, batches, whole
from duo_mlx.convert.graft.state import State
from duo_mlx.model import Layer

WINDOWS = 16  # that the metric is measured on
ISOTROPIC = 0.1  # share of the metric in which all channels count alike, as it is measured on few tokens


def token_weights(states: mx.array, following: Layer | None, visible: mx.array) -> mx.array:
    """How much each token's error counts, ``[windows, tokens, 1]``.

    Args:
        states: the layer's output ``[windows, tokens, hidden]`` in the dense model.
        following: the next layer; None after the last one.
        visible: see `Dense.visible`.
    """
    size = mx.square(states).mean(axis=-1)
    attention = 0 if following is None else received_attention(following, states, visible)
    return mx.sqrt((1 + attention) / size)[..., None]


def received_attention(layer: Layer, h: mx.array, visible: mx.array) -> mx.array:
    """The attention that each token gets from all tokens of its window, mean of the heads, ``[windows, tokens]``."""
    attention, x = layer.self_attn, layer.input_layernorm(h)
    queries, keys = (
        attention.rope(proj(x).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3))
        for proj, heads in ((attention.q_proj, attention.n_heads), (attention.k_proj, attention.n_kv_heads))
    )
    keys = mx.repeat(keys, attention.n_heads // attention.n_kv_heads, axis=1)
    scores = (queries * attention.scale) @ keys.swapaxes(-1, -2)
    scores = mx.where(visible, scores, mx.array(-mx.inf))
    return mx.softmax(scores, axis=-1).sum(axis=-2).mean(axis=1)


def measure_metrics(dense: Dense, windows: NDArray[np.integer], state: State, step: Callable[[], object]) -> None:
    """Leave in ``state`` each layer's ``metric-N [hidden, hidden]``, the root of its output's Fisher information.

    A pass forward and a pass backward through the dense model, a layer at a time; hidden states wait on disk.

    Args:
        dense: the model.
        windows: token ids ``[windows, tokens]``, of which the first are used.
        state: where the result and what is needed meanwhile are kept.
        step: is called after each layer, twice for each.
    """
    windows = windows[:WINDOWS]
    states, layers = dense.embed(windows), dense.config.num_hidden_layers
    for index in range(layers):
        state.save(f"input-{index}", states)
        layer = dense.layer(index)
        visible = dense.visible(layer, windows.shape[1])
        for rows in batches(len(windows)):
            states[rows] = np.array(whole(layer, mx.array(states[rows]), visible))
        step()
    gradient = _of_predictions(dense, states)
    for index in reversed(range(layers)):
        state.save(f"metric-{index}", _root(gradient))
        layer, states = dense.layer(index), state.load(f"input-{index}")
        visible = dense.visible(layer, windows.shape[1])
        for rows in batches(len(windows)):
            through = partial(whole, layer, visible=visible)
            _, (before,) = mx.vjp(through, [mx.array(states[rows])], [mx.array(gradient[rows])])
            gradient[rows] = np.array(before)
        state.drop(f"input-{index}")
        step()


def _of_predictions(dense: Dense, states: NDArray[np.float32]) -> NDArray[np.float32]:
    """The gradient, by the last hidden states, of the log-probabilities of tokens that are drawn from them."""
    weight, head = dense.head()

    def logits(h: mx.array) -> mx.array:
        return mx.fast.rms_norm(h, weight, dense.config.rms_norm_eps) @ head.T

    def said(h: mx.array, tokens: mx.array) -> mx.array:
        return -nn.losses.cross_entropy(logits(h), tokens, reduction="sum")

    gradient = np.empty_like(states)
    for row, h in enumerate(states):
        hidden = mx.array(h)
        tokens = mx.random.categorical(logits(hidden), key=mx.random.key(row))
        gradient[row] = np.array(mx.grad(said)(hidden, tokens))
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
