"""The reference of ``convert --verify`` for any architecture that transformers has, see `duo_mlx.convert.torch_host`.

A `TorchDuo` has the interface of `duo_mlx.convert.reference.DuoModel`: `routed` gives logits and the routes taken.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any, TypeVar

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from duo_mlx.convert.torch_host import host, routed
from duo_mlx.errors import DuoError

# <block path>.<layer>.<ffn>.small.gate_proj.weight
PART = re.compile(r"(?:.*?\.)?(\d+)\.\w+\.(small\.(?:gate|up|down)_proj\.(?:weight|bias)|router\.(?:weight|bias))")
HEADS = ("lm_head.weight", "embed_out.weight")
Value = TypeVar("Value")
# Where mlx-lm computes a type in another form than its checkpoints state, the reference follows mlx-lm, whose model a
# Duo is. These differences of 1e-4 to 1e-2 in logits would hide a wrong weight.
AS_MLX_LM: dict[str, dict[str, Any]] = {
    "gemma": {"hidden_act": "gelu"},  # not the tanh form
    "gpt_bigcode": {"activation_function": "gelu"},
    "gpt_neox": {"hidden_act": "gelu_pytorch_tanh"},  # not the exact one
    "gpt_oss": {"rope_parameters": {"truncate": True}},  # YaRN's range in whole dimensions
    "starcoder2": {"hidden_act": "gelu"},
}
# transformers' own class of the text part, which is what mlx-lm computes; the whole one needs further packages.
TEXT_ONLY = {"gemma3n": "gemma3n_text"}
OURS = ("model_file", "quantization", "quantization_config", "auto_map", "base_model_type", "architectures")


class TorchDuo:
    """transformers' model of a base's type with a Duo's FFNs.

    Args:
        config: a Duo's config.json; what concerns the small FFNs' sizes is taken from the weights.
        dense: the base's weights under the names of its checkpoints for transformers.
        parts: the small FFNs' and routers' under their canonical names. The number in a name says the layer.

    Raises:
        DuoError: transformers has no such type, weights are missing or superfluous, or its FFNs cannot be replaced.
    """

    def __init__(self, config: Mapping[str, Any], dense: Mapping[str, Tensor], parts: Mapping[str, Tensor]):
        self.model = dense_model(config, dense)
        tokens = torch.arange(min(8, self.model.config.vocab_size)).unsqueeze(0)
        before = self._logits(tokens)
        layers = _by_layer(parts)
        down = [
            layers.get(layer, {}).get("small.down_proj.weight")
            for layer in range(self.model.config.get_text_config().num_hidden_layers)
        ]
        self.ffns = host(
            self.model,
            [0 if weight is None else weight.shape[1] for weight in down],
            config.get("small_activation", "silu"),
            any(re.search(r"\.small\.\w+\.bias$", name) for name in parts),
            nested=config.get("small_kind") == "nested",
            router_choices=config.get("router_choices", ""),
            router_bias=any(name.endswith("router.bias") for name in parts),
            router_looks_ahead=config.get("router_looks_ahead", False),
            skip_scope=config.get("skip_scope", "ffn"),
            small_skips=config.get("small_skips", ()),
        )
        self._load(layers)
        self.model.eval()
        self.looks_ahead = bool(config.get("router_looks_ahead")) and bool(config.get("router_choices"))
        epsilons = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps")
        self.eps = next((config[name] for name in epsilons if config.get(name)), 1e-5)
        big = torch.full((len(self.ffns),), 2)
        if not torch.equal(before, self.routed(tokens, big)[0]):
            raise DuoError(f"{config_type(config)}: all big is not transformers' dense model, so it is no reference")

    def _load(self, layers: Mapping[int, Mapping[str, Tensor]]) -> None:
        if strangers := sorted(layers.keys() - range(len(self.ffns))):
            raise DuoError(f"there are weights for layer {strangers[0]}, the last layer is {len(self.ffns) - 1}")
        for layer, ffn in enumerate(self.ffns):
            own = {name: value for name, value in ffn.state_dict().items() if not name.startswith("big.")}
            given = layers.get(layer, {})
            _same_names(f"layer {layer}", own.keys() - given.keys(), given.keys() - own.keys())
            for name, value in given.items():
                if value.shape != own[name].shape:
                    raise DuoError(f"layer {layer}: {name} is {list(value.shape)}, not {list(own[name].shape)}")
            ffn.load_state_dict(dict(given), strict=False, assign=True)

    @torch.no_grad()
    def routed(self, tokens: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, tokens, vocab]`` of ``tokens [batch, tokens]``, and the routes ``[batch, tokens, layers]``.

        Args:
            tokens: token ids.
            routes: 0 skip, 1 small, 2 big; ``[layers]`` or ``[batch, tokens, layers]``. None: the routers decide.
        """
        if routes is None and self.looks_ahead:
            routes = self.foresee(tokens)
        with routed(routes) as opened:
            logits = self._logits(tokens)
        if len(opened.taken) != len(self.ffns):
            raise DuoError(f"{type(self.model).__name__}: FFNs of some layers did not run, so it is no reference")
        return logits, torch.stack([opened.taken[layer].reshape(tokens.shape) for layer in range(len(self.ffns))], -1)

    @torch.no_grad()
    def foresee(self, tokens: Tensor) -> Tensor:
        """Routes ``[batch, tokens, layers]`` by routers that look ahead, token by token.

        A token's are decided from its embedding and from what the last norm made of the token before it, see
        `duo_mlx.lookahead`. All tokens before are computed anew each time.
        """
        routes = tokens.new_zeros(len(tokens), 0, len(self.ffns))
        embedded = self.model.get_input_embeddings()(tokens)
        before = torch.zeros_like(embedded[:, 0])
        for place in range(tokens.shape[1]):
            two = torch.stack([embedded[:, place], before], 1)
            seen = (two * torch.rsqrt(two.pow(2).mean(-1, keepdim=True) + self.eps)).flatten(1)
            decided = torch.stack([ffn.decide(seen) for ffn in self.ffns], -1)
            routes = torch.cat([routes, decided[:, None]], 1)
            with routed(routes):
                out = self.model.base_model(input_ids=tokens[:, : place + 1], use_cache=False)
            before = out.last_hidden_state[:, -1]
        return routes

    @torch.no_grad()
    def _logits(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def reference_logits(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokens: NDArray[np.integer],
    routes: NDArray[np.integer] | Sequence[int],
) -> NDArray[np.floating]:
    """Return a Duo's logits ``[batch, tokens, vocab]``, computed by transformers in float32.

    Args:
        config: a Duo's config.json.
        weights: the base's under transformers' names, small FFNs and routers under their canonical ones.
        tokens: token ids ``[batch, tokens]``.
        routes: 0 skip, 1 small, 2 big; ``[layers]`` or ``[batch, tokens, layers]``.

    Raises:
        DuoError: as `TorchDuo`.
    """
    dense, parts = split(weights, bool(config.get("router_choices")))
    made = TorchDuo(config, dense, parts)
    logits = made.routed(torch.as_tensor(np.asarray(tokens, np.int64)), torch.as_tensor(np.asarray(routes, np.int64)))
    found: NDArray[np.floating] = logits[0].numpy()
    return found


def split(weights: Mapping[str, Value], routers: bool) -> tuple[dict[str, Value], dict[str, Value]]:
    """Return the base's weights and those of small FFNs and routers.

    Args:
        weights: by any names in which small FFNs and routers have their canonical ones.
        routers: whether the Duo has routers. Where it has none, ``<ffn>.router.weight`` is that of the base's experts.
    """
    parts = {name for name in weights if (found := PART.fullmatch(name)) and (routers or found[2].startswith("small"))}
    return (
        {name: value for name, value in weights.items() if name not in parts},
        {name: value for name, value in weights.items() if name in parts},
    )


def config_type(config: Mapping[str, Any]) -> str:
    """Return the ``model_type`` of a Duo's base, or of a dense model."""
    return str(config.get("base_model_type") or config.get("model_type") or "llama")


def transformers_config(config: Mapping[str, Any], names: Iterable[str]) -> Any:
    """Return transformers' configuration of a Duo's base.

    Args:
        config: a Duo's config.json.
        names: the base's weights. They say whether the head is tied where config.json does not: there mlx-lm and
            transformers assume different things.

    Raises:
        DuoError: transformers has no such type, or it refuses a value.
    """
    kind = config_type(config)
    if config.get("rope_traditional"):
        raise DuoError(f"transformers' {kind} has no rope_traditional")
    if kind in TEXT_ONLY:
        kind, config = TEXT_ONLY[kind], config.get("text_config") or config
    keys = {key: value for key, value in config.items() if key not in (*OURS, "model_type", "dtype", "torch_dtype")}
    keys.setdefault("tie_word_embeddings", not any(name.endswith(HEADS) for name in names))
    try:
        with quiet():
            made = AutoConfig.for_model(kind, **keys)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise DuoError(
            f"transformers cannot read a configuration of {kind}: {_line(error).partition('. Should ')[0]}"
        ) from error
    if type(made) not in AutoModelForCausalLM._model_mapping:
        raise DuoError(f"transformers has no causal language model of type {kind}")
    for key, value in AS_MLX_LM.get(kind, {}).items():
        setattr(made, key, {**getattr(made, key), **value} if isinstance(value, dict) else value)
    return made


def dense_model(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """Return transformers' model of a type in float32 with ``weights``, by the names of checkpoints.

    Raises:
        DuoError: transformers has no such type, or weights are missing, superfluous or of another shape.
    """
    made = transformers_config(config, weights)
    kind = config_type(config)
    own: Any = AutoModelForCausalLM._model_mapping[type(made)]
    state = {name: value.float() for name, value in weights.items()}
    if kind in TEXT_ONLY:
        state = {name.replace("model.language_model.", "model.", 1): value for name, value in state.items()}
    options = {"attn_implementation": "eager", "dtype": torch.float32, "output_loading_info": True}
    try:
        with quiet():
            model, info = own.from_pretrained(None, config=made, state_dict=state, **options)
    except (RuntimeError, ValueError, TypeError) as error:
        raise DuoError(f"{kind}: transformers cannot load the weights: {_line(error)}") from error
    _same_names(kind, info["missing_keys"], info["unexpected_keys"])
    return model.eval()


def _by_layer(parts: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in parts.items():
        found = PART.fullmatch(name)
        if found is None:
            raise DuoError(f"{name} is no weight of a small FFN or router")
        layers.setdefault(int(found[1]), {})[found[2]] = value.float()
    return layers


def _same_names(what: str, missing: Any, unexpected: Any) -> None:
    for word, names in (("lacks", missing), ("has unknown", unexpected)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DuoError(f"{what}: the reference {word} weights: {min(names)}{more}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar and report of names away; `_same_names` reports."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
