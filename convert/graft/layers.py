"""A dense model in pieces: its embedding, a layer at a time, its head; in float32, read when they are needed."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.config import Config
from duo_mlx.convert.settings import dense_args
from duo_mlx.convert.tensors import Tensors
from duo_mlx.model import Layer

BATCH = 8  # windows in one call: what bounds the memory of activations


class Dense:
    """A dense model under canonical names; hidden states are ``[windows, tokens, hidden]``."""

    def __init__(self, tensors: Tensors, config: dict[str, Any]):
        self.tensors = tensors
        self.args: Config = replace(dense_args(config), small_layers=())

    def _load(self, name: str) -> mx.array:
        return self.tensors[name].load().astype(mx.float32)

    def embed(self, windows: NDArray[np.integer]) -> NDArray[np.float32]:
        """The first hidden states of token ids ``[windows, tokens]``."""
        return np.array(self._load("model.embed_tokens.weight")[mx.array(windows)])

    def layer(self, index: int) -> Layer:
        """A layer with its weights, whose FFN is ``mlp.big``."""
        made = Layer(self.args, index)
        prefix = f"model.layers.{index}."
        own = [name for name in self.tensors if name.startswith(prefix)]
        made.load_weights([(name.removeprefix(prefix).replace("mlp.", "mlp.big."), self._load(name)) for name in own])
        mx.eval(made.parameters())
        return made

    def head(self) -> tuple[mx.array, mx.array]:
        """The last norm's weight and the matrix that makes logits, ``[vocab, hidden]``."""
        name = "model.embed_tokens.weight" if self.args.tie_word_embeddings else "lm_head.weight"
        return self._load("model.norm.weight"), self._load(name)

    def visible(self, layer: Layer, tokens: int) -> mx.array:
        """Which keys (columns) each query (row) of a window sees, boolean ``[tokens, tokens]``."""
        query, key = mx.arange(tokens)[:, None], mx.arange(tokens)[None]
        window = self.args.sliding_window if layer.use_sliding else None
        return (key <= query) & (key > query - (window or tokens))


def attend(layer: Layer, h: mx.array, visible: mx.array) -> mx.array:
    """Hidden states after the layer's attention and before its FFN."""
    rotate = layer.self_attn.rotation(h.shape[1], None)
    out: mx.array = h + layer.self_attn(layer.input_layernorm(h), visible, None, rotate)
    return out


def whole(layer: Layer, h: mx.array, visible: mx.array) -> mx.array:
    """Hidden states after the whole dense layer."""
    middle = attend(layer, h, visible)
    out: mx.array = middle + layer.mlp.big(layer.post_attention_layernorm(middle))
    return out


def batches(count: int) -> Iterator[slice]:
    """Slices over ``count`` windows."""
    return (slice(start, min(start + BATCH, count)) for start in range(0, count, BATCH))
