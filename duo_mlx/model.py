"""The Duo architecture: a Llama-like decoder in which every layer has a big and a small FFN side by side.

Attention, RoPE variants, sliding windows, masks and caches are mlx-lm's own; what is new here is the pair of FFNs and
the routes, which are an argument of the pass. The method is Duo-LLM's (arXiv 2410.10846, section "Model").
"""

from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, Self, TypedDict

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache
from numpy.typing import NDArray

from duo_mlx import conditional
from duo_mlx.errors import DuoError
from duo_mlx.routes import Route, Routes, parse_pattern


class KnownPattern(TypedDict):
    """A fixed pattern and its mean loss in nats a token on the text that it was measured on."""

    pattern: str
    loss: float


@dataclass(frozen=True)
class ModelArgs:
    """A model's config.json: the keys of ``model_type: llama`` as mlx-lm reads them, and those of a Duo."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int  # big's inner width
    small_intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    vocab_size: int
    model_type: str = "duo"
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    num_key_value_heads: int = 0  # 0: as many as num_attention_heads
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000
    rope_traditional: bool = False
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = True
    layer_types: tuple[str, ...] = ()  # empty: full_attention everywhere
    sliding_window: int | None = None
    small_layers: tuple[int, ...] | None = None  # layers that have a small FFN; in the others small means big
    small_bias: bool = False  # whether small's projections have biases, whatever mlp_bias says of big's
    skip_scope: str = "ffn"  # what SKIP bypasses: "ffn", or "layer" (attention too; keys and values are still written)
    default_route: str = "big"  # the pattern of a pass for which nobody gives routes
    best_patterns: tuple[KnownPattern, ...] = ()  # see `duo_mlx.budget`; what a measurement found

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_key_value_heads", self.num_key_value_heads or self.num_attention_heads)
        layer_types = tuple(self.layer_types or ()) or ("full_attention",) * self.num_hidden_layers
        object.__setattr__(self, "layer_types", layer_types)
        if self.skip_scope not in ("ffn", "layer"):
            raise DuoError(f"config.json: skip_scope is {self.skip_scope!r}; it must be 'ffn' or 'layer'")
        if len(layer_types) != self.num_hidden_layers or not set(layer_types) <= {
            "full_attention",
            "sliding_attention",
        }:
            raise DuoError(
                f"config.json: layer_types must name full_attention or sliding_attention for each of the "
                f"{self.num_hidden_layers} layers"
            )
        if "sliding_attention" in layer_types and not self.sliding_window:
            raise DuoError("config.json: layer_types has sliding_attention, so sliding_window must say how many tokens")
        if self.num_attention_heads % self.num_key_value_heads:
            raise DuoError(
                f"config.json: num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise DuoError(
                f"config.json: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {self.num_attention_heads}, and there is no head_dim"
            )
        if self.small_layers is not None:
            numbers = tuple(self.small_layers)
            if not all(type(number) is int and 0 <= number < self.num_hidden_layers for number in numbers):
                raise DuoError(
                    f"config.json: small_layers must be layer numbers from 0 to {self.num_hidden_layers - 1}"
                )
            object.__setattr__(self, "small_layers", tuple(sorted(set(numbers))))
        object.__setattr__(self, "best_patterns", tuple(self.best_patterns))
        try:
            for known in self.best_patterns:
                parse_pattern(known["pattern"], self.num_hidden_layers)
                float(known["loss"])
        except (DuoError, KeyError, TypeError, ValueError) as error:
            raise DuoError(f"config.json: best_patterns must be a list of patterns with their losses: {error}") from None
        try:
            parse_pattern(self.default_route, self.num_hidden_layers)
        except DuoError as error:
            raise DuoError(f"config.json: default_route: {error}") from None

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """The arguments in a config.json; keys of no concern are passed over, unknown routing keys are an error.

        Raises:
            DuoError: a key is missing or unusable.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in config.items() if key in known and value is not None}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if missing := sorted(required - given.keys()):
            raise DuoError(f"config.json lacks {', '.join(missing)}")
        routing = {key for key in config if key.startswith(("small_", "skip_", "default_rout", "rout"))}
        if unknown := sorted(routing - known):
            raise DuoError(f"config.json has routing keys that are not known: {', '.join(unknown)}")
        sizes = [field.name for field in fields(cls) if field.name in required - {"rms_norm_eps"}]
        if wrong := [key for key in sizes if type(given[key]) is not int or given[key] < 1]:
            raise DuoError(f"config.json: {wrong[0]} is {given[wrong[0]]!r}; it must be a positive integer")
        return cls(**given)

    def has_small(self, layer: int) -> bool:
        """Whether the layer has a small FFN of its own."""
        return self.small_layers is None or layer in self.small_layers

    def realised(self, routes: Routes) -> Routes:
        """What ``routes [..., layers]`` come to: big where a layer without a small FFN is asked for small."""
        if self.small_layers is None:
            return routes
        big_only = np.array([not self.has_small(layer) for layer in range(self.num_hidden_layers)])
        return np.where(big_only & (routes == Route.SMALL), np.uint8(Route.BIG), routes)

    @cached_property
    def default_pattern(self) -> Routes:
        """`default_route` as routes ``[layers]``."""
        return parse_pattern(self.default_route, self.num_hidden_layers)


class Attention(llama.Attention):
    """Llama's attention, which can also do no more than write a token's keys and values."""

    def remember(self, x: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
        """Write the keys and values of ``x [batch, tokens, hidden]`` to the cache and return all that it holds."""
        keys, values = (
            proj(x).reshape(*x.shape[:2], self.n_kv_heads, -1).transpose(0, 2, 1, 3)
            for proj in (self.k_proj, self.v_proj)
        )
        fetched: tuple[mx.array, mx.array] = cache.update_and_fetch(self.rope(keys, offset=cache.offset), values)
        return fetched


class DuoFFN(nn.Module):
    """A layer's big and small FFN, each SwiGLU; `duo_mlx.conditional` decides which of them runs on what."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.big = llama.MLP(args)
        self.small = llama.MLP(
            replace(
                args, intermediate_size=args.small_intermediate_size, mlp_bias=args.mlp_bias or args.small_bias
            )
        )


class BigOnlyFFN(nn.Module):
    """A layer's FFN where no small one was made: small is another word for big."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.big = llama.MLP(args)

    @property
    def small(self) -> llama.MLP:
        return self.big


class Layer(nn.Module):
    """Attention that all tokens share, then the FFN that each token's route names."""

    def __init__(self, args: ModelArgs, layer_type: str, has_small: bool = True):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = DuoFFN(args) if has_small else BigOnlyFFN(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.use_sliding = layer_type == "sliding_attention"
        self.skips_attention = args.skip_scope == "layer"

    def __call__(
        self, x: mx.array, mask: mx.array | str | None, cache: Any, route: conditional.LayerRoutes, strategy: str
    ) -> mx.array:
        route = conditional.settle(route, strategy)
        skipped = route is Route.SKIP and strategy != "dense"
        if skipped and self.skips_attention:
            return x if cache is None else self._write_only(x, cache)
        attended = self.self_attn(self.input_layernorm(x), mask, cache)
        if self.skips_attention:
            attended = conditional.keep_unless_skipped(attended, route)
        h = x + attended
        if skipped:
            return h
        return h + conditional.run(self.mlp, self.post_attention_layernorm(h), route, strategy)

    def _write_only(self, x: mx.array, cache: Any) -> mx.array:
        written = self.self_attn.remember(self.input_layernorm(x), cache)
        # without this nobody would ask for the write, and step after step it would stay an unevaluated graph
        after: list[mx.array] = mx.depends([x], list(written))
        return after[0]


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args, kind, args.has_small(index)) for index, kind in enumerate(args.layer_types)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, h: mx.array, cache: list[Any] | None, routes: list[conditional.LayerRoutes], strategy: str
    ) -> mx.array:
        caches = cache or [None] * len(self.layers)
        masks = self.masks(h, caches)
        for layer, layer_cache, route in zip(self.layers, caches, routes, strict=True):
            h = layer(h, masks[layer.use_sliding], layer_cache, route, strategy)
        return self.norm(h)

    def masks(self, h: mx.array, caches: list[Any]) -> dict[bool, mx.array | str | None]:
        """The attention masks of a pass over ``h [batch, tokens, hidden]``, by whether a layer's attention slides."""
        masks: dict[bool, mx.array | str | None] = {}
        for sliding in sorted({layer.use_sliding for layer in self.layers}):
            first = next(index for index, layer in enumerate(self.layers) if layer.use_sliding == sliding)
            window = self.args.sliding_window if sliding else None
            masks[sliding] = create_attention_mask(h, caches[first], window_size=window)
        return masks


class Model(nn.Module):
    """A Duo language model in the form that mlx-lm expects of an architecture."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        routes: NDArray[np.integer] | mx.array | list[int] | None = None,
        strategy: str = "auto",
    ) -> mx.array:
        """Logits ``[batch, tokens, vocab]`` of ``inputs [batch, tokens]``.

        Args:
            inputs: token ids.
            cache: mlx-lm's prompt cache, one entry a layer; None for a pass without one.
            input_embeddings: ``[batch, tokens, hidden]`` in place of the tokens' own.
            routes: 0 skip, 1 small, 2 big; ``[layers]``, one pattern for all tokens, or ``[batch, tokens, layers]``.
                NumPy arrays and lists are known to the host, an `mx.array` to the device. None: the config's
                ``default_route``.
            strategy: how routes are carried out, see `duo_mlx.conditional`.

        Raises:
            DuoError: routes of another shape or with other values, or an unknown strategy.
        """
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        chosen = self.args.default_pattern if routes is None else routes
        planned = conditional.plan(chosen, h.shape[0], h.shape[1], self.args.num_hidden_layers, strategy)
        return self.head(self.model(h, cache, planned, strategy))

    def head(self, out: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of what the decoder gave, ``[..., hidden]``."""
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(out)
        return self.lm_head(out)

    @property
    def layers(self) -> list[Layer]:
        layers: list[Layer] = self.model.layers
        return layers

    def make_cache(self) -> list[KVCache | RotatingKVCache]:
        """One cache a layer; rotating where attention slides."""
        window = self.args.sliding_window
        return [RotatingKVCache(max_size=window) if layer.use_sliding else KVCache() for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop what PyTorch checkpoints hold besides weights: rotary tables and a second copy of a tied head."""
        dropped = ("lm_head.weight",) if self.args.tie_word_embeddings else ()
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith("rotary_emb.inv_freq") and name not in dropped
        }
