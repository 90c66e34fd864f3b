"""OPT (Zhang et al. 2022, https://arxiv.org/abs/2205.01068), as Hugging Face stores it, in mlx-lm's form.

OPT has learned positions, LayerNorms and biases, and an FFN of two matrices. Its 350m variant normalises after each
sublayer and embeds tokens in fewer dimensions than the blocks have.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import BatchKVCache

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {"relu": nn.relu, "gelu": nn.gelu}

POSITION_OFFSET = 2
"""Rows of the position table before the row of position 0."""

_SWITCHES = (
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)
_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "ffn_dim",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "word_embed_proj_dim",
)


@dataclass
class ModelArgs(BaseModelArgs):
    """OPT's keys in config.json. Keys with a default here have the same default in transformers."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a key has a value that OPT does not know; the message names the key.
        """
        for key in _SIZES:
            value = self.embedding_size if key == "word_embed_proj_dim" else getattr(self, key)
            if type(value) is not int or value < 1:
                raise ValueError(f"{key} is {value!r}; OPT needs a positive integer")
        for key in _SWITCHES:
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key} is {getattr(self, key)!r}; OPT knows true and false")
        if not isinstance(self.activation_function, str) or self.activation_function not in ACTIVATIONS:
            known = " and ".join(ACTIVATIONS)
            raise ValueError(f"activation_function is {self.activation_function!r}; OPT knows {known}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}; it must divide hidden_size, {self.hidden_size}"
            )

    @property
    def embedding_size(self) -> int:
        """The width of token embeddings: `word_embed_proj_dim`, or `hidden_size` without that key."""
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    @property
    def final_layer_norm(self) -> bool:
        """Whether a LayerNorm follows the last block."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


def positions(length: int, cache: Any, limit: int) -> mx.array:
    """Return the positions of ``length`` new tokens: `[length]`, or `[batch, length]` with a batched cache.

    Padded places of a batch get some position within the limit; attention never reads them. A batched cache keeps its
    offsets on the device. They are read back only when the cache is so full that a row may reach the limit.

    Args:
        length: new tokens of each row.
        cache: the first layer's cache, or None.
        limit: the number of positions that the model has.

    Raises:
        ValueError: a token would have a position beyond the limit. In a batch whose padded prompts are read in several
            passes, the last of these passes may be the one that raises.
    """
    offset = 0 if cache is None else cache.offset
    if not isinstance(offset, mx.array):
        _check(offset + length, limit)
        return mx.arange(offset, offset + length)
    if not (isinstance(cache, BatchKVCache) and cache.size() + length <= limit):
        longest: Any = mx.max(_ends(length, cache)).item()
        _check(longest, limit)
    return mx.clip(offset[..., None] + mx.arange(length), 0, limit - 1)


def _ends(length: int, cache: Any) -> mx.array:
    """Return each row's number of tokens after ``length`` more, without padding on the right."""
    ends = cache.offset + length
    if (padding := getattr(cache, "_right_padding", None)) is not None:  # BatchKVCache
        return ends - padding
    if (lengths := getattr(cache, "_lengths", None)) is not None:  # BatchRotatingKVCache
        return mx.minimum(ends, lengths)
    return ends


def _check(tokens: int, limit: int) -> None:
    if tokens > limit:
        raise ValueError(f"a sequence of {tokens} tokens exceeds max_position_embeddings, {limit}")


class Attention(nn.Module):
    """Causal attention with as many key heads as query heads."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the four projections."""
        super().__init__()
        self.n_heads = args.num_attention_heads
        self.scale = (args.hidden_size // args.num_attention_heads) ** -0.5
        self.q_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias)
        self.k_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias)
        self.v_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias)
        self.out_proj = nn.Linear(args.hidden_size, args.hidden_size, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """Attend from ``x``, `[batch, tokens, hidden]`, to itself and to the cache's tokens."""
        batch, length, _ = x.shape
        queries, keys, values = (
            project(x).reshape(batch, length, self.n_heads, -1).transpose(0, 2, 1, 3)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(batch, length, -1))


class MLP(nn.Module):
    """FFN of two matrices: ``fc2(act(fc1(x)))``."""

    def __init__(self, args: ModelArgs) -> None:
        """Make both matrices."""
        super().__init__()
        self.act = ACTIVATIONS[args.activation_function]
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the FFN's output, of the shape of ``x``."""
        return self.fc2(self.act(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and FFN, each with a residual and with a LayerNorm before it (or after its residual: 350m)."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the block's parts."""
        super().__init__()
        self.norm_before = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = nn.LayerNorm(args.hidden_size, affine=args.layer_norm_elementwise_affine)
        self.mlp = MLP(args)
        self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=args.layer_norm_elementwise_affine)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        """Return the hidden states after the block, of the shape of ``x``."""
        if self.norm_before:
            x = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return x + self.mlp(self.final_layer_norm(x))
        x = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        return self.final_layer_norm(x + self.mlp(x))


class OPTModel(nn.Module):
    """OPT without its head."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the embeddings, the blocks and what follows them."""
        super().__init__()
        width, hidden = args.embedding_size, args.hidden_size
        self.max_positions = args.max_position_embeddings
        self.embed_tokens = nn.Embedding(args.vocab_size, width)
        self.embed_positions = nn.Embedding(args.max_position_embeddings + POSITION_OFFSET, hidden)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        if width != hidden:
            self.project_in = nn.Linear(width, hidden, bias=False)
            self.project_out = nn.Linear(hidden, width, bias=False)
        if args.final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(hidden, affine=args.layer_norm_elementwise_affine)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Return what the head reads: `[batch, tokens, word_embed_proj_dim]`."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if "project_in" in self:
            h = self.project_in(h)
        cache = [None] * len(self.layers) if cache is None else cache
        h = h + self.embed_positions(positions(h.shape[1], cache[0], self.max_positions) + POSITION_OFFSET)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, mask, layer_cache)
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h


class Model(nn.Module):
    """OPT with its head, which is the token embedding where the two are tied."""

    def __init__(self, args: ModelArgs) -> None:
        """Make the model with random weights."""
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = OPTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.embedding_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Return logits.

        Args:
            inputs: token ids, `[batch, tokens]`.
            cache: one of mlx-lm's caches a layer, or None.
            input_embeddings: `[batch, tokens, word_embed_proj_dim]`, in the place of the tokens' embeddings.

        Returns:
            `[batch, tokens, vocab_size]`.

        Raises:
            ValueError: a sequence is longer than `max_position_embeddings` (see `positions`).
        """
        out = self.model(inputs, cache, input_embeddings)
        return self.model.embed_tokens.as_linear(out) if self.args.tie_word_embeddings else self.lm_head(out)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the weights under this model's names; weights that have these names already keep them.

        transformers' `model.decoder.layers.0.fc1` (or `decoder.layers.0.fc1`, without a head) becomes
        `model.layers.0.mlp.fc1`. A tied head is dropped, and so is the version number of old checkpoints.
        """
        renamed = {}
        for name, value in weights.items():
            name = re.sub(r"^(model\.)?decoder\.", "model.", name)
            name = re.sub(r"^(model\.layers\.\d+\.)(fc[12]\.)", r"\1mlp.\2", name)
            if name == "model.version" or (self.args.tie_word_embeddings and name.startswith("lm_head.")):
                continue
            renamed[name] = value
        return renamed

    @property
    def layers(self) -> list[TransformerBlock]:
        """The decoder blocks."""
        return self.model.layers
