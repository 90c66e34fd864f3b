"""A model's config.json as a dataclass; it needs neither MLX nor mlx-lm, so that what only reads it starts fast."""

import math
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from typing import Any, Self, TypedDict

import numpy as np

from duo_mlx.errors import DuoError
from duo_mlx.routes import LETTERS, Route, Routes, parse_pattern

ROUTING = ("small_", "skip_", "default_rout", "default_dra", "draft_", "rout")  # how the names of a Duo's keys begin


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
    router_choices: str = ""  # the routes that the layers' routers choose between, such as "sB"; empty: no routers
    router_bias: bool = False  # whether a router adds a bias to its logits
    router_looks_ahead: bool = False  # whether routers see what is known before the pass, see `duo_mlx.lookahead`
    router_offsets: tuple[tuple[float, float], ...] = ()  # see `duo_mlx.threshold`; what a measurement found
    default_route: str = "big"  # the pattern of a pass for which nobody gives routes
    default_draft: str = ""  # the pattern by which ``speculate="default"`` drafts; empty: none is known
    draft_vocabulary: int = 0  # how many first tokens of the vocabulary drafts choose from; 0: vocab_size
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
            object.__setattr__(self, "small_layers", _layer_numbers(self.small_layers, self.num_hidden_layers))
        if type(self.small_bias) is not bool:
            raise DuoError(f"config.json: small_bias is {self.small_bias!r}; it must be true or false")
        choices = self.router_choices
        if not isinstance(choices, str) or not set(choices) <= set(LETTERS) or len(set(choices)) != len(choices):
            raise DuoError(
                f"config.json: router_choices is {choices!r}; it must name each route to choose from once, such as 'sB'"
            )
        if len(choices) == 1:
            raise DuoError(f"config.json: router_choices is {choices!r}; a router needs two or three routes")
        for key in ("router_bias", "router_looks_ahead"):
            if type(getattr(self, key)) is not bool:
                raise DuoError(f"config.json: {key} is {getattr(self, key)!r}; it must be true or false")
        object.__setattr__(self, "router_offsets", _offsets(self.router_offsets))
        object.__setattr__(self, "best_patterns", _known_patterns(self.best_patterns, self.num_hidden_layers))
        _check_pattern("default_route", self.default_route, self.num_hidden_layers)
        if self.default_draft != "":
            _check_pattern("default_draft", self.default_draft, self.num_hidden_layers)
        if type(self.draft_vocabulary) is not int or not 0 <= self.draft_vocabulary <= self.vocab_size:
            raise DuoError(
                f"config.json: draft_vocabulary is {self.draft_vocabulary!r}; it must be a whole number up to "
                f"vocab_size {self.vocab_size}"
            )
        object.__setattr__(self, "draft_vocabulary", self.draft_vocabulary or self.vocab_size)

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
        routing = {key for key in config if key.startswith(ROUTING)}
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

    @property
    def router_width(self) -> int:
        """How many values a layer's router sees."""
        return self.hidden_size * (2 if self.router_looks_ahead else 1)

    @cached_property
    def default_pattern(self) -> Routes:
        """`default_route` as routes ``[layers]``."""
        return parse_pattern(self.default_route, self.num_hidden_layers)


def _check_pattern(key: str, given: Any, layers: int) -> None:
    if not isinstance(given, str):
        raise DuoError(f"config.json: {key} is {given!r}; it must be a pattern as text, such as 'big' or 'BBss'")
    try:
        parse_pattern(given, layers)
    except DuoError as error:
        raise DuoError(f"config.json: {key}: {error}") from None


def _layer_numbers(given: Any, layers: int) -> tuple[int, ...]:
    if isinstance(given, list | tuple) and all(type(number) is int and 0 <= number < layers for number in given):
        return tuple(sorted(set(given)))
    raise DuoError(f"config.json: small_layers must be a list of layer numbers from 0 to {layers - 1}")


def _offsets(given: Any) -> tuple[tuple[float, float], ...]:
    wanted = "config.json: router_offsets must be a list of pairs, share of big and offset, both increasing"
    try:
        pairs = tuple((float(share), float(offset)) for share, offset in given)
    except (TypeError, ValueError):
        raise DuoError(wanted) from None
    shares, offsets = ([pair[of] for pair in pairs] for of in (0, 1))
    if any(sorted(set(each)) != each for each in (shares, offsets)):
        raise DuoError(wanted)
    if not all(0 <= share <= 1 and abs(offset) < math.inf for share, offset in pairs):
        raise DuoError(f"{wanted}, with shares from 0 to 1")
    return pairs


def _known_patterns(given: Any, layers: int) -> tuple[KnownPattern, ...]:
    wanted = "config.json: best_patterns must be a list of objects with a pattern and its loss in nats"
    if not isinstance(given, list | tuple):
        raise DuoError(wanted)
    for number, known in enumerate(given):
        match known:
            case {"pattern": str(pattern), "loss": loss} if type(loss) in (int, float) and abs(loss) < math.inf:
                try:
                    parse_pattern(pattern, layers)
                except DuoError as error:
                    raise DuoError(f"{wanted}; number {number}: {error}") from None
            case _:
                raise DuoError(f"{wanted}; number {number} is {known!r}")
    return tuple(given)
