"""A Duo language model: mlx-lm's own model of the base's type, whose FFNs are replaced by a big and a small one.

Embedding, attention, norms, masks, caches and head are mlx-lm's; `duo_mlx.hosting` says how routes reach the FFNs. The
method is Duo-LLM's (arXiv 2410.10846, section "Model").
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache
from numpy.typing import NDArray

from duo_mlx import bases, conditional, hosting
from duo_mlx.config import Config, KnownPattern
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN, GatedFFN, RouterWeights
from duo_mlx.forward import Forward
from duo_mlx.hosting import primitives
from duo_mlx.lookahead import LookAhead
from duo_mlx.nested import NestedFFN
from duo_mlx.router import LinearRouter, Router
from duo_mlx.routes import LETTERS, Route
from duo_mlx.skipping import Skippable, skippable
from duo_mlx.transformers_config import register

__all__ = ["Config", "KnownPattern", "Model", "ModelArgs"]

register()  # stock mlx-lm imports this module before it loads the tokenizer

ModelArgs = Config  # mlx-lm's name for what a model file's `Model` takes
GivenRoutes = NDArray[np.integer] | mx.array | Sequence[int] | Router


class Model(nn.Module):
    """A Duo in the form that mlx-lm expects of an architecture.

    ``Model(config)`` makes a subclass of the base's own class, so everything that mlx-lm's model has is there.

    Args:
        config: the Duo's configuration.

    Raises:
        DuoError: mlx-lm has no such base, or none whose FFNs can be replaced.
    """

    config: Config
    args: Any  # the base's own
    base_class: type
    kind: str  # the base's model_type
    trunk: Any  # the module that holds the layers
    ffns: list[DuoFFN]  # of the layers
    parts: list[Skippable] | None  # of the layers, where a skip bypasses attention, too

    def __new__(cls, config: Config | None = None) -> Self:
        own: Any = cls if cls is not Model or config is None else _hosted(bases.classes(config.base)[0])
        made: Self = super().__new__(own)
        return made

    def __init__(self, config: Config):
        self.kind = config.base["model_type"]
        super().__init__(_base_args(config))  # type: ignore[call-arg]
        if "config" in vars(self):
            vars(config)["of_base"] = vars(self)["config"]
        self.config = config
        try:
            self._host()
        except DuoError as error:
            raise DuoError(f"no Duo can be hosted in a {self.kind}: {error}") from None

    def _host(self) -> None:
        config, blocks = self.config, list(self.layers)
        if len(blocks) != config.num_hidden_layers:
            raise DuoError(f"it has {len(blocks)} layers, and its config.json says {config.num_hidden_layers}")
        if len({id(block) for block in blocks}) != len(blocks):
            raise DuoError("layers share their weights")
        trunk = hosting.trunk_of(self, blocks)
        ffns = [self._replace_ffn(block, index) for index, block in enumerate(blocks)]
        if len({id(ffn.big) for ffn in ffns}) != len(blocks):
            raise DuoError("layers share an FFN")
        parts = None
        if config.skip_scope == "layer":
            parts = [skippable(block, ffn, self.kind) for block, ffn in zip(blocks, ffns, strict=True)]
        # not as MLX's modules keep their children, or these would be the model's children twice
        vars(self).update(trunk=trunk, ffns=ffns, parts=parts)
        for index, block in enumerate(blocks):
            hosting.open_up(block, hosting.Block, index)
            block.duo_default = self._default
        hosting.open_up(trunk, hosting.Trunk)

    def _default(self) -> Forward:
        """A pass by ``default_route`` for a layer that is called outside of a pass."""
        return Forward([Route(route) for route in self.config.default_pattern.tolist()], "auto", self.parts)

    def _replace_ffn(self, block: nn.Module, index: int) -> DuoFFN:
        config, name = self.config, hosting.ffn_name(block)
        small: nn.Module | None = None
        if width := config.small_width(index):
            if config.small_kind == "nested":
                small = NestedFFN(block[name], config.hidden_size, width, config.small_bias)
            else:
                small = GatedFFN(config.hidden_size, width, config.small_activation, config.small_has_bias)
        router = RouterWeights(config) if config.router_choices else None
        block[name] = made = DuoFFN(block[name], small, router, index, index in config.small_skips)
        return made

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
        *,
        routes: GivenRoutes | None = None,
        strategy: str = "auto",
        **hooks: Any,
    ) -> mx.array:
        """Logits ``[batch, tokens, vocab]`` of ``inputs [batch, tokens]``.

        Args:
            inputs: token ids.
            cache: mlx-lm's prompt cache, one entry a layer; None for a pass without one.
            input_embeddings: ``[batch, tokens, hidden]`` in place of the tokens' own, for bases that take them.
            routes: 0 skip, 1 small, 2 big; ``[layers]``, one pattern for all tokens, or ``[batch, tokens, layers]``.
                NumPy arrays and lists are known to the host, an `mx.array` to the device. Or a router, which each
                layer asks. None: the config's ``default_route``.
            strategy: how routes are carried out, see `duo_mlx.conditional`.
            hooks: see `duo_mlx.forward.Forward`.

        Raises:
            DuoError: routes of another shape or with other values, or a strategy that is unknown or cannot run here.
        """
        given = inputs if input_embeddings is None else input_embeddings
        rest = {} if input_embeddings is None else {"input_embeddings": input_embeddings}
        with self.opened(given.shape[0], given.shape[1], routes, strategy, **hooks):
            logits: mx.array = super().__call__(inputs, cache=cache, **rest)
        return logits

    @contextmanager
    def opened(
        self, batch: int, tokens: int, routes: GivenRoutes | None = None, strategy: str = "auto", **hooks: Any
    ) -> Iterator[Forward]:
        """Open a pass over ``[batch, tokens]``; arguments as of a call."""
        chosen = self.config.default_pattern if routes is None else routes
        entries = conditional.plan(chosen, batch, tokens, self.config.num_hidden_layers, strategy)
        with self.carried_out(entries, strategy, **hooks) as made:
            yield made

    @contextmanager
    def carried_out(self, entries: list[Any], strategy: str, **hooks: Any) -> Iterator[Forward]:
        """Open a pass whose routes were planned before (`duo_mlx.conditional.plan`)."""
        made = Forward(entries, strategy, self.parts, **hooks)
        with hosting.opened(made):
            yield made

    def states(
        self,
        inputs: mx.array,
        cache: list[Any] | None,
        entries: list[Any],
        strategy: str,
        start: int = 0,
        stop: int | None = None,
        hidden: mx.array | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> mx.array:
        """Hidden states ``[batch, tokens, hidden]`` that layers ``start`` to ``stop`` give.

        After the last layer they are the trunk's final ones, which `head` takes.

        Args:
            inputs: token ids ``[batch, tokens]``.
            cache: one entry a layer, or None. Those of layers that do not run are not touched.
            entries: the planned routes of each layer.
            strategy: how they are carried out.
            start: the first layer to run.
            stop: the layer before which to stop; None: none.
            hidden: what goes into layer ``start``; None: what comes out of the embedding.
            memo: see `duo_mlx.forward.Forward`.
        """
        layers = self.config.num_hidden_layers
        stop = layers if stop is None else stop
        if start == 0 and stop == layers and hidden is None:
            with self.carried_out(entries, strategy, memo=memo):
                out: mx.array = self.trunk(inputs, cache=cache)
            return out
        if cache is not None and start:
            cache = _of_running(cache, start)
        left: list[mx.array] = []

        def some(index: int, run: Callable[[mx.array], mx.array], h: mx.array) -> mx.array:
            if index == start and hidden is not None:
                h = hidden[:, 0] if h.ndim == 2 else hidden
            if index == stop:
                left.append(h[:, None] if h.ndim == 2 else h)
            return run(h) if start <= index < stop else h

        with self.carried_out(entries, strategy, on_block=some, memo=memo):
            out = self.trunk(inputs, cache=cache)
        return left[0] if left else out

    def head(self, final: mx.array) -> mx.array:
        """Logits ``[batch, tokens, vocab]`` of the trunk's final hidden states ``[batch, tokens, hidden]``."""
        nothing = mx.zeros(final.shape[:2], mx.uint32)
        with hosting.opened(Forward([], "auto", final=final)):
            logits: mx.array = super().__call__(nothing)
        return logits

    def draft_head(self) -> Callable[[mx.array], mx.array]:
        """`head` for drafts, with logits ``[..., draft_vocabulary]``; the weights must not be changed.

        A draft need not know rare tokens (FR-Spec, arXiv 2502.14856), and byte-pair vocabularies begin with the
        frequent ones.
        """
        if self.config.draft_vocabulary == self.config.vocab_size:
            return self.head
        part = copy.copy(self.table)
        part.update({name: value[: self.config.draft_vocabulary] for name, value in part.items()})
        return _product(part)

    def draft_from(self, tokens: int) -> None:
        """Let drafts choose from the first ``tokens`` of the vocabulary alone.

        Raises:
            DuoError: it has fewer, or the head is more than a product with the vocabulary.
        """
        if not 1 <= tokens <= self.config.vocab_size:
            raise DuoError(f"--draft-vocabulary {tokens}: the model's vocabulary has {self.config.vocab_size} tokens")
        final = mx.zeros((1, 1, self.config.hidden_size), mx.float32)
        if primitives(self.head(final)) != primitives(_product(self.table)(final)):
            raise DuoError(f"--draft-vocabulary: the head of a {self.kind} does more than multiply; leave it out")
        self.config = self.config.changed(draft_vocabulary=tokens)

    @property
    def table(self) -> nn.Module:
        """The vocabulary's, which the head multiplies with: an embedding, or a linear map."""
        inside = {id(module) for block in self.layers for module in block.modules()}
        for module in self.modules():
            linear = isinstance(module, nn.Linear | nn.QuantizedLinear) and id(module) not in inside
            if linear and module.weight.shape[0] == self.config.vocab_size:
                return module
        return self.embedding

    @property
    def embedding(self) -> nn.Module:
        """The vocabulary's table at the beginning."""
        for module in self.modules():
            table = isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
            if table and module.weight.shape[0] == self.config.vocab_size:
                return module
        raise DuoError(f"the trunk of a {self.kind} has no embedding")

    def router(self, offsets: mx.array | None = None) -> LinearRouter | LookAhead:
        """The model's own router; ``offsets [choices]`` are added to its logits.

        One that looks ahead is no argument of a pass; `duo_mlx.routed.RoutedModel` asks it.

        Raises:
            DuoError: the model has none.
        """
        choices = [LETTERS.index(letter) for letter in self.config.router_choices]
        if not choices:
            raise DuoError("this model has no router: its config.json has no router_choices")
        routers = [ffn.router for ffn in self.ffns]
        biases = [router.bias for router in routers] if self.config.router_bias else None
        weights = [router.weight for router in routers]
        if self.config.router_looks_ahead:
            return LookAhead(weights, choices, self.config.norm_eps, offsets, biases)
        return LinearRouter(weights, choices, offsets, biases)

    @property
    def dtype(self) -> mx.Dtype:
        """The float type of hidden states."""
        table = self.embedding
        found: mx.Dtype = (table.scales if "scales" in table else table.weight).dtype
        if mx.issubdtype(found, mx.floating):
            return found
        # scales of eight bits, as mxfp4 has them, say nothing; norms stay in float
        weights = dict(tree_flatten(self.parameters())).values()
        return next(value.dtype for value in weights if mx.issubdtype(value.dtype, mx.floating))

    @cached_property
    def ffn_paths(self) -> tuple[str, ...]:
        """The names of the layers' FFNs, such as ``model.layers.0.mlp``."""
        paths = {id(module): path for path, module in self.named_modules()}
        return tuple(paths[id(ffn)] for ffn in self.ffns)

    def big_name(self, name: str) -> str:
        """The name in this Duo of a weight, or a module, of its base."""
        path = next((path for path in self.ffn_paths if f"{name}.".startswith(f"{path}.")), None)
        return name if path is None else f"{path}.big{name.removeprefix(path)}"

    def base_name(self, name: str) -> str:
        """The name in the base of a weight, or a module, of this Duo: the inverse of `big_name`."""
        path = next((path for path in self.ffn_paths if f"{name}.".startswith(f"{path}.big.")), None)
        return name if path is None else f"{path}{name.removeprefix(f'{path}.big')}"

    def make_cache(self) -> list[Any]:
        """One cache a layer, as the base makes them."""
        base = super()
        made: list[Any] = base.make_cache() if hasattr(base, "make_cache") else [KVCache() for _ in self.layers]
        return made

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop what PyTorch checkpoints hold besides weights: rotary tables and a second copy of a tied head.

        A Duo's weights have the names of mlx-lm's model already, so the base's own renaming has nothing to do. It is
        called for what it changes in the model: some bases take away a head that the weights do not have.
        """
        base: Any = super()
        if hasattr(base, "sanitize"):
            base.sanitize({self.base_name(name): value for name, value in weights.items()})
        dropped = () if "lm_head" in self else ("lm_head.weight",)
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith("rotary_emb.inv_freq") and name not in dropped
        }


@cache
def _hosted(base: type) -> type[Model]:
    """The class of Duos in a base, its subclass."""
    own: dict[str, Any] = {"__module__": __name__, "base_class": base}
    if hasattr(base, "quant_predicate"):
        own["quant_predicate"] = property(_quant_predicate)
    return type("Model", (Model, base), own)


def _quant_predicate(model: Model) -> Callable[[str, nn.Module], Any] | None:
    """The base's own rule of what to quantise and how, under the names of its FFNs; None: it has none."""
    rule = model.base_class.quant_predicate.fget(model)  # type: ignore[attr-defined]
    if rule is None:
        return None
    return lambda path, module, *rest: rule(model.base_name(path), module, *rest)


def _product(table: nn.Module) -> Callable[[mx.array], mx.array]:
    """The product with a vocabulary's table."""
    product: Any = table
    found: Callable[[mx.array], mx.array] = getattr(product, "as_linear", product)
    return found


def _base_args(config: Config) -> Any:
    try:
        return bases.classes(config.base)[1].from_dict(config.base)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        kind = config.base["model_type"]
        raise DuoError(f"config.json: mlx-lm's {kind} does not take it: {' '.join(str(error).split())}") from None


def _of_running(cache: list[Any], start: int) -> list[Any]:
    """The caches, with those of the layers before ``start`` replaced by such a layer's that runs.

    Masks are made from a first layer's cache, whose positions may be others than those of the layers that run.
    """
    running = cache[start:]
    alike = {type(each): each for each in reversed(running)}
    return [alike.get(type(each), running[0]) for each in cache[:start]] + running
