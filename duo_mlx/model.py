"""The Duo architecture: a Llama-like decoder in which every layer has a big and a small FFN side by side.

Attention, RoPE variants, sliding windows, masks and caches are mlx-lm's own; what is new here is the pair of FFNs and
the routes, which are an argument of the pass. The method is Duo-LLM's (arXiv 2410.10846, section "Model").
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache
from numpy.typing import NDArray

from duo_mlx import conditional
from duo_mlx.arguments import KnownPattern, ModelArgs
from duo_mlx.errors import DuoError
from duo_mlx.llama_parts import MLP, Attention, RMSNorm, Rotation
from duo_mlx.lookahead import LookAhead
from duo_mlx.products import few, first, on_cpu, through, times
from duo_mlx.router import LinearRouter, Router
from duo_mlx.routes import LETTERS, Route

__all__ = ["KnownPattern", "Model", "ModelArgs"]


class RouterWeights(nn.Module):
    """A layer's linear router; no `nn.Linear`, so that quantising a model leaves the few weights that decide alone."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.weight = mx.zeros((len(args.router_choices), args.router_width))
        if args.router_bias:
            self.bias = mx.zeros(len(args.router_choices))

    def __call__(self, x: mx.array) -> mx.array:
        """Logits ``[..., choices]`` in float32 of normalised hidden states ``x [..., hidden]``."""
        logits = (x @ self.weight.T).astype(mx.float32)
        return logits + self.bias if "bias" in self else logits


class BigOnlyFFN(nn.Module):
    """A layer's FFN where no small one was made: small is another word for big."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.big = MLP(args)
        if args.router_choices:
            self.router = RouterWeights(args)

    @property
    def small(self) -> MLP:
        return self.big


class DuoFFN(nn.Module):
    """A layer's big and small FFN, each SwiGLU; `duo_mlx.conditional` decides which of them runs on what."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.big = MLP(args)
        self.small = MLP(
            replace(args, intermediate_size=args.small_intermediate_size, mlp_bias=args.mlp_bias or args.small_bias)
        )
        if args.router_choices:
            self.router = RouterWeights(args)


class Layer(nn.Module):
    """Attention that all tokens share, then the FFN that each token's route names."""

    def __init__(self, args: ModelArgs, index: int):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = DuoFFN(args) if args.has_small(index) else BigOnlyFFN(args)
        self.input_layernorm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.index = index
        self.use_sliding = args.layer_types[index] == "sliding_attention"
        self.skips_attention = args.skip_scope == "layer"

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | str | None,
        cache: Any,
        rotate: Rotation,
        entry: conditional.LayerRoutes | Router,
        strategy: str,
    ) -> mx.array:
        if self.skips_attention:
            normed, route, by = conditional.decide(entry, self.index, x, self.input_layernorm, self.mlp, strategy)
            if route is Route.SKIP and by != "dense":
                return x if cache is None else self._write_only(x, normed, cache, rotate)
            attended = conditional.keep_unless_skipped(self.self_attn(normed, mask, cache, rotate), route)
            h = x + attended
            normed = self.post_attention_layernorm(h)
        else:
            h = self.self_attn(self.input_layernorm(x), mask, cache, rotate, residual=x)
            normed, route, by = conditional.decide(
                entry, self.index, h, self.post_attention_layernorm, self.mlp, strategy
            )
            if route is Route.SKIP and by != "dense":
                return h
        return conditional.run(self.mlp, normed, route, by, residual=h)

    def _write_only(self, x: mx.array, normed: mx.array, cache: Any, rotate: Rotation) -> mx.array:
        written = self.self_attn.remember(normed, cache, rotate)
        # without this nobody would ask for the write, and step after step it would stay an unevaluated graph
        after: list[mx.array] = mx.depends([x], list(written))
        return after[0]


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args, index) for index in range(args.num_hidden_layers)]
        self.norm = RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self,
        h: mx.array,
        cache: list[Any] | None,
        routes: list[conditional.LayerRoutes | Router],
        strategy: str,
        start: int = 0,
        stop: int | None = None,
    ) -> mx.array:
        """What layers ``start`` to ``stop`` make of ``h [batch, tokens, hidden]``; after the last one comes the norm.

        ``cache`` and ``routes`` have an entry for each layer of the model.
        """
        layers = self.layers[start:stop]
        if not layers:
            return h
        caches = cache[start:stop] if cache else [None] * len(layers)
        masks = self.masks(h, caches, start)
        rotate = layers[0].self_attn.rotation(h.shape[1], caches[0])
        single = h.shape[1] == 1  # goes through the layers as [batch, hidden]
        h = h[:, 0] if single else h
        for layer, layer_cache, route in zip(layers, caches, routes[start:stop], strict=True):
            h = layer(h, masks[layer.use_sliding], layer_cache, rotate, route, strategy)
        h = self.norm(h) if layers[-1] is self.layers[-1] else h
        return h[:, None] if single else h

    def masks(self, h: mx.array, caches: list[Any], start: int = 0) -> dict[bool, mx.array | str | None]:
        """The attention masks of a pass over ``h [batch, tokens, hidden]``, by whether a layer's attention slides.

        ``caches`` are those of the layers from ``start`` on.
        """
        masks: dict[bool, mx.array | str | None] = {}
        slides = [layer.use_sliding for layer in self.layers[start : start + len(caches)]]
        for sliding in sorted(set(slides)):
            window = self.args.sliding_window if sliding else None
            masks[sliding] = create_attention_mask(
                h, caches[slides.index(sliding)], window_size=window, return_array=few(h) and on_cpu()
            )
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
        routes: NDArray[np.integer] | mx.array | list[int] | Router | None = None,
        strategy: str = "auto",
    ) -> mx.array:
        """Logits ``[batch, tokens, vocab]`` of ``inputs [batch, tokens]``.

        Args:
            inputs: token ids.
            cache: mlx-lm's prompt cache, one entry a layer; None for a pass without one.
            input_embeddings: ``[batch, tokens, hidden]`` in place of the tokens' own.
            routes: 0 skip, 1 small, 2 big; ``[layers]``, one pattern for all tokens, or ``[batch, tokens, layers]``.
                NumPy arrays and lists are known to the host, an `mx.array` to the device. Or a router, which each
                layer asks. None: the config's ``default_route``.
            strategy: how routes are carried out, see `duo_mlx.conditional`.

        Raises:
            DuoError: routes of another shape or with other values, or a strategy that is unknown or cannot run here.
        """
        h = self.model.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        chosen = self.args.default_pattern if routes is None else routes
        planned = conditional.plan(chosen, h.shape[0], h.shape[1], self.args.num_hidden_layers, strategy)
        return self.head(self.model(h, cache, planned, strategy))

    def head(self, out: mx.array) -> mx.array:
        """Logits ``[..., vocab]`` of what the decoder gave, ``[..., hidden]``."""
        table = self.table
        if few(out) and type(table) in (nn.Embedding, nn.Linear):
            return times(out, table.weight)
        return table.as_linear(out) if self.args.tie_word_embeddings else table(out)

    def draft_head(self) -> Callable[[mx.array], mx.array]:
        """`head` for drafts of few tokens, with logits ``[..., draft_vocabulary]``; the weights must not be changed.

        A draft need not know rare tokens (FR-Spec, arXiv 2502.14856), and byte-pair vocabularies begin with the
        frequent ones.
        """
        return partial(through, first(self.table, self.args.draft_vocabulary))

    def draft_from(self, tokens: int) -> None:
        """Let drafts choose from the first ``tokens`` of the vocabulary alone.

        Raises:
            DuoError: it has fewer.
        """
        if not 1 <= tokens <= self.args.vocab_size:
            raise DuoError(f"--draft-vocabulary {tokens}: the model's vocabulary has {self.args.vocab_size} tokens")
        self.args = replace(self.args, draft_vocabulary=tokens)

    @property
    def table(self) -> nn.Module:
        """The vocabulary's, which the head multiplies with: an embedding, or a linear map."""
        table: nn.Module = self.model.embed_tokens if self.args.tie_word_embeddings else self.lm_head
        return table

    def router(self, offsets: mx.array | None = None) -> LinearRouter | LookAhead:
        """The model's own router; ``offsets [choices]`` are added to its logits.

        One that looks ahead is no argument of a pass; `duo_mlx.routed.RoutedModel` asks it.

        Raises:
            DuoError: the model has none.
        """
        choices = [LETTERS.index(letter) for letter in self.args.router_choices]
        if not choices:
            raise DuoError("this model has no router: its config.json has no router_choices")
        routers = [layer.mlp.router for layer in self.layers]
        biases = [router.bias for router in routers] if self.args.router_bias else None
        weights = [router.weight for router in routers]
        if self.args.router_looks_ahead:
            return LookAhead(weights, choices, self.args.rms_norm_eps, offsets, biases)
        return LinearRouter(weights, choices, offsets, biases)

    def fuse(self) -> None:
        """Decode with fewer and larger products; from then on the weights must not be changed. Numbers stay."""
        for layer in self.layers:
            layer.self_attn.fuse()
            for module in {id(module): module for module in (layer.mlp.big, layer.mlp.small)}.values():
                module.fuse()

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
