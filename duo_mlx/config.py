"""A Duo's config.json as a dataclass. It imports neither MLX nor mlx-lm, so commands that only read it start fast."""

import math
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Self, TypedDict

import numpy as np

from duo_mlx.errors import DuoError
from duo_mlx.routes import LETTERS, Route, Routes, parse_pattern
from duo_mlx.transformers_config import flattened

# How the names of a Duo's keys begin. Experts have routers, too, so only a Llama's "skip" and "rout" must be a Duo's.
OWN = ("small_", "default_rout", "default_dra", "draft_")
ROUTING = (*OWN, "skip_", "rout")


class KnownPattern(TypedDict):
    """A fixed pattern and its mean loss in nats a token on the text that it was measured on."""

    pattern: str
    loss: float


# One fact has several names in the config.json of different architectures.
HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "dim", "hidden_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_transformer_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_query_heads")
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "gelu_fast", "relu", "relu2")  # those of `duo_mlx.forms`

VERSION = 2  # of a Duo's config.json and names; one that older packages cannot read gets the next number
NAMING = ("base_model_type", "model_file", "duo_version")  # keys of config.json that are neither the base's nor fields


@dataclass(frozen=True)
class Config:
    """A Duo's config.json: its own keys as fields, and the base model's keys in ``base``."""

    base: dict[str, Any]  # what mlx-lm's Config of the base reads, ``model_type`` included
    small_intermediate_size: int | tuple[int, ...] = 0  # of all small FFNs, or one a layer; 0: the layer has none
    small_layers: tuple[int, ...] | None = None  # layers that have a small FFN; in the others small means big
    small_skips: tuple[int, ...] = ()  # layers without a small FFN in which small means skip, not big
    small_bias: bool = False  # whether the small FFNs' projections have biases, whatever mlp_bias says of big's
    small_activation: str = "silu"  # of the small FFNs' gates, one of `ACTIVATIONS`
    small_kind: str = "own"  # "own": a gated FFN; "nested": big's first neurons, with a down projection of its own
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
        for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
            if type(value := getattr(self, name)) is not int or value < 1:
                raise DuoError(f"config.json: {name} is {value!r}; it must be a positive integer")
        layers = self.num_hidden_layers
        needed = self.small_layers is None or bool(self.small_layers)
        object.__setattr__(self, "small_intermediate_size", _widths(self.small_intermediate_size, layers, needed))
        if self.small_kind not in ("own", "nested"):
            raise DuoError(f"config.json: small_kind is {self.small_kind!r}; it must be 'own' or 'nested'")
        if self.skip_scope not in ("ffn", "layer"):
            raise DuoError(f"config.json: skip_scope is {self.skip_scope!r}; it must be 'ffn' or 'layer'")
        if self.small_activation not in ACTIVATIONS:
            raise DuoError(
                f"config.json: small_activation is {self.small_activation!r}; there are {', '.join(ACTIVATIONS)}"
            )
        if len(self.layer_types) != layers:
            raise DuoError(f"config.json: layer_types must name the attention for each of the {layers} layers")
        if (heads := self.num_attention_heads) and heads % self.num_key_value_heads:
            raise DuoError(
                f"config.json: num_attention_heads {heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if heads and _first(self.base, ("head_dim",)) is None and self.hidden_size % heads:
            raise DuoError(
                f"config.json: hidden_size {self.hidden_size} is no multiple of "
                f"num_attention_heads {heads}, and there is no head_dim"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise DuoError("config.json: layer_types has sliding_attention, so sliding_window must say how many tokens")
        if self.small_layers is not None:
            object.__setattr__(self, "small_layers", _layer_numbers("small_layers", self.small_layers, layers))
        object.__setattr__(self, "small_skips", _layer_numbers("small_skips", self.small_skips, layers))
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
        object.__setattr__(self, "best_patterns", _known_patterns(self.best_patterns, layers))
        _check_pattern("default_route", self.default_route, layers)
        if self.default_draft != "":
            _check_pattern("default_draft", self.default_draft, layers)
        if type(self.draft_vocabulary) is not int or not 0 <= self.draft_vocabulary <= self.vocab_size:
            raise DuoError(
                f"config.json: draft_vocabulary is {self.draft_vocabulary!r}; it must be a whole number up to "
                f"vocab_size {self.vocab_size}"
            )
        object.__setattr__(self, "draft_vocabulary", self.draft_vocabulary or self.vocab_size)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Self:
        """Return the configuration that a config.json holds; unknown routing keys are an error.

        Raises:
            DuoError: a key is missing or unusable.
        """
        config = flattened(config)
        version = config.get("duo_version", VERSION)
        if type(version) is not int or version > VERSION:
            raise DuoError(
                f"config.json: the Duo is of version {version!r} and this package reads {VERSION}; "
                "a newer one may read it (pip install -U duo-mlx)"
            )
        known = {field.name for field in fields(cls)} - {"base"}
        prefixes = ROUTING if config.get("base_model_type", "llama") == "llama" else OWN
        if unknown := sorted(key for key in config if key.startswith(prefixes) and key not in known):
            raise DuoError(f"config.json has routing keys that are not known: {', '.join(unknown)}")
        ours = known | set(NAMING)
        base = {key: value for key, value in config.items() if key not in ours}
        base["model_type"] = config.get("base_model_type", "llama")  # directories of version 0.1 are all Llamas
        missing = [names[0] for names in (HIDDEN, LAYERS, ("vocab_size",)) if _first(base, names) is None]
        if config.get("small_intermediate_size") is None and config.get("small_layers") not in ([], ()):
            missing.append("small_intermediate_size")
        if missing:
            raise DuoError(f"config.json lacks {', '.join(sorted(missing))}")
        return cls(base, **{key: config[key] for key in known & config.keys() if config[key] is not None})

    def to_dict(self) -> dict[str, Any]:
        """Return the keys of a config.json; those that hold their defaults are left out."""
        defaults = {field.name: field.default for field in fields(self)}
        own = {key: value for key, value in asdict(self).items() if key != "base" and value != defaults[key]}
        if self.draft_vocabulary == self.vocab_size:
            own.pop("draft_vocabulary", None)
        return self.base | {"model_type": "duo", "base_model_type": self.base["model_type"]} | own

    def changed(self, **keys: Any) -> Self:
        """Return a configuration in which these keys of config.json are others; None removes a key."""
        return self.from_dict({key: value for key, value in (self.to_dict() | keys).items() if value is not None})

    def __getattr__(self, name: str) -> Any:
        """Return a base's own argument: some bases keep theirs under ``config``, where this object stands."""
        try:
            return getattr(self.__dict__["of_base"], name)
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    def small_width(self, layer: int) -> int:
        """How many neurons the layer's small FFN has; 0 where it has none."""
        if layer in self.small_skips or (self.small_layers is not None and layer not in self.small_layers):
            return 0
        width = self.small_intermediate_size
        return width if isinstance(width, int) else width[layer]

    def has_small(self, layer: int) -> bool:
        """Whether the layer has a small FFN of its own."""
        return self.small_width(layer) > 0

    def small_means(self, layer: int) -> Route:
        """What the small route comes to in a layer: big or skip where it has no small FFN."""
        if self.has_small(layer):
            return Route.SMALL
        return Route.SKIP if layer in self.small_skips else Route.BIG

    def realised(self, routes: Routes) -> Routes:
        """What ``routes [..., layers]`` come to where layers without a small FFN are asked for small."""
        small = np.array([self.small_means(layer) for layer in range(self.num_hidden_layers)], np.uint8)
        if (small == Route.SMALL).all():
            return routes
        return np.where(routes == Route.SMALL, small, routes)

    @property
    def small_has_bias(self) -> bool:
        """Whether the small FFNs' projections have biases."""
        return self.small_bias or bool(_first(self.base, ("mlp_bias",)))

    @property
    def hidden_size(self) -> int:
        """The width of hidden states."""
        width: int = _first(self.base, HIDDEN)
        return width

    @property
    def num_hidden_layers(self) -> int:
        """How many layers there are, and routes in a pattern."""
        layers: int = _first(self.base, LAYERS)
        return layers

    @property
    def vocab_size(self) -> int:
        """How many tokens the embedding has."""
        tokens: int = _first(self.base, ("vocab_size",))
        return tokens

    @property
    def intermediate_size(self) -> int:
        """The inner width of big as config.json states it; 0 where it does not, or layers differ."""
        width = _first(self.base, ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"))
        if isinstance(width, list) and width == width[:1] * len(width):  # one a layer, as Gemma 3n's states it
            width = width[0]
        return width if isinstance(width, int) else 0

    @property
    def num_attention_heads(self) -> int:
        """How many heads have queries; 0 where config.json does not say."""
        heads = _first(self.base, HEADS)
        return heads if isinstance(heads, int) else 0  # some have another number in each layer

    @property
    def num_key_value_heads(self) -> int:
        """How many heads have keys and values; 0 where config.json does not say."""
        heads = _first(self.base, ("num_key_value_heads",))
        return heads if isinstance(heads, int) and heads else self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """The width of a head; 0 where config.json does not say."""
        heads = self.num_attention_heads
        return _first(self.base, ("head_dim",)) or (self.hidden_size // heads if heads else 0)

    @property
    def max_position_embeddings(self) -> int | None:
        """The model's context in tokens; None where config.json does not say."""
        context: int | None = _first(self.base, CONTEXT)
        return context

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of each layer's attention as config.json names it; full attention where it does not."""
        return tuple(_first(self.base, ("layer_types",)) or ()) or ("full_attention",) * self.num_hidden_layers

    @property
    def sliding_window(self) -> int | None:
        """How many positions sliding attention sees."""
        window: int | None = _first(self.base, ("sliding_window",))
        return window

    @property
    def norm_eps(self) -> float:
        """What the norms add to a mean square."""
        eps: float = _first(self.base, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")) or 1e-5
        return eps

    @property
    def router_width(self) -> int:
        """How many values a layer's router sees."""
        return self.hidden_size * (2 if self.router_looks_ahead else 1)

    @cached_property
    def default_pattern(self) -> Routes:
        """`default_route` as routes ``[layers]``."""
        return parse_pattern(self.default_route, self.num_hidden_layers)


def _first(base: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the first of ``names`` that a base's config.json has, also in the text part of a larger model."""
    for config in (base.get("text_config"), base):
        if isinstance(config, dict):
            for name in names:
                if config.get(name) is not None:
                    return config[name]
    return None


def _check_pattern(key: str, given: Any, layers: int) -> None:
    if not isinstance(given, str):
        raise DuoError(f"config.json: {key} is {given!r}; it must be a pattern as text, such as 'big' or 'BBss'")
    try:
        parse_pattern(given, layers)
    except DuoError as error:
        raise DuoError(f"config.json: {key}: {error}") from None


def _widths(given: Any, layers: int, needed: bool) -> int | tuple[int, ...]:
    """``given`` as it is meant: one width for all layers, or one a layer."""
    if type(given) is int and given >= needed:
        return given
    if isinstance(given, list | tuple) and len(given) == layers:
        widths = tuple(given)
        if all(type(width) is int and width >= 0 for width in widths) and (any(widths) or not needed):
            return widths
    raise DuoError(
        f"config.json: small_intermediate_size is {given!r}; it must be a positive integer, or a list of one width for "
        f"each of the {layers} layers, 0 where a layer has no small FFN"
    )


def _layer_numbers(key: str, given: Any, layers: int) -> tuple[int, ...]:
    if isinstance(given, list | tuple) and all(type(number) is int and 0 <= number < layers for number in given):
        return tuple(sorted(set(given)))
    raise DuoError(f"config.json: {key} must be a list of layer numbers from 0 to {layers - 1}")


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
