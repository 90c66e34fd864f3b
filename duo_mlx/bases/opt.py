"""OPT (Zhang et al., arXiv 2205.01068) in mlx-lm's form: learned positions, ReLU, two matrices, and biases everywhere.

The paper's second model. OPT-350m differs from the others: its norms come after each branch, and its embedding is
narrower than its hidden states.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

OFFSET = 2  # rows of the table of positions before that of the first one
ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu}


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of an OPT's config.json."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int = 2048
    word_embed_proj_dim: int | None = None
    do_layer_norm_before: bool = True
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    _remove_final_layer_norm: bool = False

    def __post_init__(self) -> None:
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(f"activation_function {self.activation_function!r}: OPT has {' or '.join(ACTIVATIONS)}")


class Attention(nn.Module):
    """Attention without rotation; positions were added to the embedding."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        width, bias = args.hidden_size, args.enable_bias
        self.heads = args.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.q_proj = nn.Linear(width, width, bias=bias)
        self.k_proj = nn.Linear(width, width, bias=bias)
        self.v_proj = nn.Linear(width, width, bias=bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def __call__(self, x: mx.array, mask: mx.array | str | None, cache: Any) -> mx.array:
        batch, tokens, width = x.shape

        def heads(projected: mx.array) -> mx.array:
            return projected.reshape(batch, tokens, self.heads, -1).transpose(0, 2, 1, 3)

        queries, keys, values = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        mixed = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        out: mx.array = self.out_proj(mixed.transpose(0, 2, 1, 3).reshape(batch, tokens, width))
        return out


class MLP(nn.Module):
    """Two matrices."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.activation = args.activation_function

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))
        return out


class Block(nn.Module):
    """A layer; its norms come before or after its branches."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        affine = args.layer_norm_elementwise_affine
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.self_attn_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)
        self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)
        self.norms_first = args.do_layer_norm_before

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any = None) -> mx.array:
        if self.norms_first:
            h = x + self.self_attn(self.self_attn_layer_norm(x), mask, cache)
            return h + self.mlp(self.final_layer_norm(h))
        h = self.self_attn_layer_norm(x + self.self_attn(x, mask, cache))
        out: mx.array = self.final_layer_norm(h + self.mlp(h))
        return out


class Decoder(nn.Module):
    """Embedding, layers, and what follows them up to the head."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        width, narrow = args.hidden_size, args.word_embed_proj_dim
        self.embed_tokens = nn.Embedding(args.vocab_size, narrow)
        self.embed_positions = nn.Embedding(args.max_position_embeddings + OFFSET, width)
        self.positions = args.max_position_embeddings
        self.layers = [Block(args) for _ in range(args.num_hidden_layers)]
        if narrow != width:
            self.project_in = nn.Linear(narrow, width, bias=False)
            self.project_out = nn.Linear(width, narrow, bias=False)
        if args.do_layer_norm_before and not args._remove_final_layer_norm:
            self.final_layer_norm = nn.LayerNorm(width, affine=args.layer_norm_elementwise_affine)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        if "project_in" in self:
            h = self.project_in(h)
        h = h + self.embed_positions(self._places(h.shape[1], 0 if cache[0] is None else cache[0].offset) + OFFSET)
        mask = create_attention_mask(h, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            h = layer(h, mask, layer_cache)
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h

    def _places(self, tokens: int, offset: int | mx.array) -> mx.array:
        """The positions ``[tokens]`` after so many, or ``[batch, tokens]`` where each sequence has its own number.

        Raises:
            ValueError: there are fewer positions. Numbers that only the device knows are kept within them, as a
                padded sequence has positions before its first.
        """
        if isinstance(offset, mx.array):
            return mx.clip(offset[:, None] + mx.arange(tokens), 0, self.positions - 1)
        if offset + tokens > self.positions:
            raise ValueError(f"{offset + tokens} positions: the model has max_position_embeddings {self.positions}")
        return mx.arange(offset, offset + tokens)


class Model(nn.Module):
    """OPT with its head, which is the embedding."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.word_embed_proj_dim, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        """Logits ``[batch, tokens, vocab]``."""
        out = self.model(inputs, cache, input_embeddings)
        logits: mx.array = self.lm_head(out) if "lm_head" in self else self.model.embed_tokens.as_linear(out)
        return logits

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Hugging Face's names as this file's; those that are so already stay."""
        found = {}
        for name, value in weights.items():
            name = name.removeprefix("model.").removeprefix("decoder.")
            if name == "lm_head.weight":
                if not self.args.tie_word_embeddings:
                    found[name] = value
                continue
            for matrix in ("fc1", "fc2"):
                name = name.replace(f".{matrix}.", f".mlp.{matrix}.") if f".mlp.{matrix}." not in name else name
            found[f"model.{name}"] = value
        return found

    @property
    def layers(self) -> list[Block]:
        layers: list[Block] = self.model.layers
        return layers
