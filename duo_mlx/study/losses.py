"""What a token's logits are worth: the loss of the true next token, and how unsure they are.

A search asks for the losses of thousands of passes over a text, and on a CPU the sum of exponentials over the
vocabulary would take longer than all layers: MLX's is computed element by element there, NumPy's in vectors.
"""

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.device import on_cpu

Losses = NDArray[np.float32]
BLOCK = 1 << 17  # logits at a time, which stay in a core's cache


def token_losses(logits: mx.array, targets: NDArray[np.integer]) -> Losses:
    """Nats ``[batch, tokens]`` of ``targets [tokens]`` by ``logits [batch, tokens, vocab]``."""
    if not on_cpu():
        wanted = mx.broadcast_to(mx.array(targets), logits.shape[:2])
        return np.array(nn.losses.cross_entropy(logits.astype(mx.float32), wanted))
    chosen = np.tile(np.asarray(targets), len(logits))
    losses = np.empty(chosen.shape, np.float32)
    for rows, shifted in _blocks(logits):
        true = shifted[np.arange(len(shifted)), chosen[rows]]
        losses[rows] = np.log(np.exp(shifted, out=shifted).sum(axis=1)) - true
    return losses.reshape(logits.shape[:2])


def entropies(logits: mx.array) -> Losses:
    """Entropy ``[batch, tokens]`` in nats of the distributions that ``logits [batch, tokens, vocab]`` stand for."""
    found = np.empty(logits.shape[0] * logits.shape[1], np.float32)
    for rows, shifted in _blocks(logits):
        weights = np.exp(shifted)
        total = weights.sum(axis=1)
        found[rows] = np.log(total) - (weights * shifted).sum(axis=1) / total
    return found.reshape(logits.shape[:2])


def _blocks(logits: mx.array) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Tokens' logits with their largest taken off, some rows at a time."""
    vocab = logits.shape[-1]
    table = np.array(logits.astype(mx.float32), copy=False).reshape(-1, vocab)
    step = max(1, BLOCK // vocab)
    for start in range(0, len(table), step):
        rows = slice(start, start + step)
        yield rows, table[rows] - table[rows].max(axis=1, keepdims=True)
