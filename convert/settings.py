"""The settings of a source: someone's config.json in the words of `duo_mlx.model.Config`, or a line why not.

Dense models of three families can be said in llama's words: llama itself, mistral (one sliding window everywhere) and
qwen2 (biases on q, k and v). Whatever would make the same weights mean something else (another activation, q and k
norms, experts, a RoPE that mlx-lm computes differently) is an error that names the key.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx.config import Config
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.tensors import DTYPES, Tensor, Tensors
from duo_mlx.errors import DuoError

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}

# What the model does not do: the key, the values that ask for nothing, and what it is.
ABSENT: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("hidden_act", ("silu", "swish"), "silu is supported"),
    ("hidden_activation", ("silu", "swish"), "silu is supported"),
    ("partial_rotary_factor", (1,), "RoPE turns whole heads"),
    ("rotary_pct", (1,), "RoPE turns whole heads"),
    ("use_qk_norm", (False,), "there are no norms on q and k"),
    ("qk_norm", (False,), "there are no norms on q and k"),
    ("qk_layernorm", (False,), "there are no norms on q and k"),
    ("num_experts", (0, 1), "a mixture of experts is not supported"),
    ("num_local_experts", (0, 1), "a mixture of experts is not supported"),
    ("n_routed_experts", (0, 1), "a mixture of experts is not supported"),
    ("attn_logit_softcapping", (), "logits are not capped"),
    ("final_logit_softcapping", (), "logits are not capped"),
)

# RoPE scalings of mlx-lm's llama that give the angles of transformers. Left out: longrope, of which mlx-lm knows the
# long factors only; proportional, which turns a part of each head; mrope, which is for pictures.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
STRETCHED = ("llama3", "yarn")  # know the length of the first training
WINDOW = 4096  # of mistral and qwen2 where the key is not there
REPLACED = ("rope_parameters", "rope_scaling", "architectures", "auto_map")  # by other keys, or by nothing
LAYER = re.compile(r"model\.layers\.\d+\.self_attn\.")
ROUTER = re.compile(r"model\.layers\.\d+\.mlp\.router\.")


def is_duo(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a Duo's; else it is a dense model's."""
    return config.get("small_intermediate_size") is not None or config.get("model_type") == "duo"


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of weights that MLX quantised."""
    return isinstance(config.get("quantization"), dict)


def foreign_quantisation(config: Mapping[str, Any]) -> str | None:
    """By which method weights are quantised that MLX did not quantise, such as gptq; None: they are not."""
    theirs = config.get("quantization_config")
    if theirs is None or is_quantised(config):
        return None
    method = theirs.get("quant_method") if isinstance(theirs, dict) else None
    return shown(method) if method else "by an unknown method"


def family(config: Mapping[str, Any], source: Path) -> str:
    """One of `FAMILIES`, or "duo".

    Raises:
        DuoError: an architecture that is not supported.
    """
    kind = config.get("model_type")
    if kind is None and (architectures := config.get("architectures")):
        named = {architecture: name for name, architecture in FAMILIES.items()} | {"DuoForCausalLM": "duo"}
        names = [str(name) for name in (architectures if isinstance(architectures, list) else [architectures])]
        found = [named[name] for name in names if name in named]
        kind = found[0] if found else names[0]
    if kind is None:
        return "duo" if is_duo(config) else "llama"
    if kind not in (*FAMILIES, "duo"):
        raise DuoError(
            f"{source}: the architecture {shown(kind)!r} is not supported; known are duo, {', '.join(FAMILIES)}"
        )
    return str(kind)


def settings(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """A config.json that Config and mlx-lm's llama read as ``source`` means it.

    Of a Duo ``model_type`` becomes "duo", of a dense model "llama". Keys of no concern stay. A head that nobody says to
    be tied or not is left to `settle_head`.

    Raises:
        DuoError: what the model cannot do, or no sense can be made of.
    """
    kind = family(config, source)
    _check_weights(config, source)
    for key, values, meaning in ABSENT:
        if config.get(key) is not None and config[key] not in values:
            raise DuoError(f"{source}: config.json says {key} {config[key]!r}; {meaning}")
    result = {key: value for key, value in config.items() if key not in REPLACED}
    result |= _rope(config, source, fill=kind != "duo")
    if kind in ("mistral", "qwen2"):
        result = {key: value for key, value in result.items() if key not in ("sliding_window", "layer_types")}
        result |= {"attention_bias": kind == "qwen2", "mlp_bias": False}
    if kind == "mistral":  # with its class' defaults
        result |= _sliding(config, source, 0)
        result.setdefault("num_key_value_heads", 8)
    elif kind == "qwen2" and config.get("use_sliding_window"):
        result |= _sliding(config, source, config.get("max_window_layers", 28))
    for key in ("dtype", "torch_dtype"):
        if isinstance(result.get(key), str):
            result[key] = result[key].removeprefix("torch.")
    return result | {"model_type": "duo" if is_duo(config) else "llama"}


def _check_weights(config: Mapping[str, Any], source: Path) -> None:
    """Refuse quantised weights of others; their tensors hold no numbers that could be taken as they are."""
    if foreign_quantisation(config) is None:
        return
    raise DuoError(
        f"{source}: its weights are quantised ({foreign_quantisation(config)}); convert the model that it was made of, "
        f"with weights in {', '.join(DTYPES)}"
    )


def _sliding(config: Mapping[str, Any], source: Path, first: int) -> dict[str, Any]:
    """Sliding attention from layer ``first`` on, where the configuration does not say it layer by layer."""
    window, layers = config.get("sliding_window", WINDOW), config.get("num_hidden_layers")
    if window is None:
        return {}
    for key, value in (("sliding_window", window), ("num_hidden_layers", layers), ("max_window_layers", first)):
        if type(value) is not int or value < (key != "max_window_layers"):
            raise DuoError(f"{source}: config.json says {key} {value!r}; it must be a positive integer")
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers or 0)]
    return {"sliding_window": window, "layer_types": config.get("layer_types") or kinds}


def _rope(config: Mapping[str, Any], source: Path, fill: bool) -> dict[str, Any]:
    """rope_theta and rope_scaling, from those keys or from transformers 5's rope_parameters, which hold both."""
    given = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    for key, value in given.items():
        if value is not None and not isinstance(value, dict):
            raise DuoError(f"{source}: config.json says {key} {value!r}; it must be an object or null")
    scaling: dict[str, Any] = dict(given["rope_scaling"] or {})
    parameters: dict[str, Any] = dict(given["rope_parameters"] or {})
    if nested := sorted(key for key, value in parameters.items() if isinstance(value, dict)):
        raise DuoError(f"{source}: config.json has rope_parameters for {nested[0]}; all layers must share them")
    if scaling and parameters and _kind(scaling, source) != _kind(parameters, source):
        raise DuoError(f"{source}: config.json has rope_scaling and rope_parameters of different types; leave out one")
    scaling |= parameters
    theta = scaling.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    if scaling.pop("partial_rotary_factor", 1) not in (1, None):
        raise DuoError(f"{source}: config.json says partial_rotary_factor; RoPE turns whole heads")
    kind = _kind(scaling, source)
    if kind == "default":
        return {"rope_theta": theta}
    scaling = {"rope_type": kind} | {key: value for key, value in scaling.items() if key not in ("type", "rope_type")}
    if not isinstance(scaling.get("factor"), int | float) or isinstance(scaling["factor"], bool):
        raise DuoError(f"{source}: config.json: RoPE of type {kind} needs a factor, a number")
    if kind in STRETCHED and fill:  # as transformers does it; mlx-lm takes a fixed number
        length = config.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
        length = length or config.get("max_position_embeddings")
        if length is None:
            raise DuoError(f"{source}: config.json: RoPE of type {kind} needs original_max_position_embeddings")
        scaling["original_max_position_embeddings"] = length
    if kind == "dynamic" and not config.get("max_position_embeddings"):
        raise DuoError(f"{source}: config.json: RoPE of type dynamic needs max_position_embeddings")
    if kind == "yarn":
        scaling = _yarn(scaling, source)
    return {"rope_theta": theta, "rope_scaling": scaling}


def _kind(scaling: Mapping[str, Any], source: Path) -> str:
    kinds = {str(scaling[key]) for key in ("type", "rope_type") if scaling.get(key) is not None} or {"default"}
    if len(kinds) > 1:
        raise DuoError(f"{source}: config.json gives RoPE two types, {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in ROPE_TYPES:
        raise DuoError(f"{source}: config.json says RoPE of type {kind!r}; supported are {', '.join(ROPE_TYPES)}")
    return kind


def _yarn(scaling: dict[str, Any], source: Path) -> dict[str, Any]:
    """Without what mlx-lm does not read, and without what transformers does not read unless it is complete."""
    for key, harmless in (("attention_factor", None), ("truncate", True)):
        if scaling.pop(key, None) not in (None, harmless):
            raise DuoError(f"{source}: config.json says {key} for RoPE of type yarn, which is not supported")
    scales = ("mscale", "mscale_all_dim")
    if not all(scaling.get(key) for key in scales):
        scaling = {key: value for key, value in scaling.items() if key not in scales}
    return {key: value for key, value in scaling.items() if value is not None}


def with_output_biases(config: Mapping[str, Any], source: Path, tensors: Tensors) -> dict[str, Tensor]:
    """Canonical ``tensors`` with what the model has and the source's family has not: of qwen2 biases of o_proj, zeros.

    ``config`` is the source's own, before `settings`.
    """
    result = dict(tensors)
    if family(config, source) != "qwen2":
        return result
    for name, tensor in tensors.items():
        bias = f"{name.removesuffix('weight')}bias"
        if LAYER.match(name) and name.endswith("o_proj.weight") and bias not in tensors:
            result[bias] = _zeros(tensor.shape[:1], tensor.dtype)
    return result


def _zeros(shape: tuple[int, ...], dtype: str) -> Tensor:
    return Tensor(shape, dtype, lambda: mx.zeros(shape, getattr(mx, dtype)))


def settle_head(config: Mapping[str, Any], tensors: Tensors, source: Path) -> dict[str, Any]:
    """The configuration with ``tie_word_embeddings`` said: as it says, else by the canonical ``tensors``.

    Where nobody says, a head that is not there or is the embedding's twin is tied: Hugging Face's default and ours
    differ, and so does what people leave out.

    Raises:
        DuoError: a tied head is another tensor than the embedding, or an untied one is not there.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    said = config.get("tie_word_embeddings")
    if said is not None and not isinstance(said, bool):
        raise DuoError(f"{source}: config.json says tie_word_embeddings {said!r}; it must be true or false")
    if said is False and head is None:
        raise DuoError(f'{source}: has no lm_head.weight, so config.json must say "tie_word_embeddings": true')
    if said is False:
        return dict(config)
    tied = head is None or embedding is None or _same(head, embedding)
    if said and not tied:
        raise DuoError(
            f"{source}: lm_head.weight is not model.embed_tokens.weight, so config.json must say "
            '"tie_word_embeddings": false'
        )
    return {**config, "tie_word_embeddings": tied}


def settle_router(config: Mapping[str, Any], choices: str | None, tensors: Tensors, source: Path) -> dict[str, Any]:
    """The configuration with what routers among the canonical ``tensors`` need said.

    Which row stands for which route, weights do not tell. ``choices`` say it in place of ``router_choices``; whether
    there are biases (``router_bias``), and whether routers look ahead, by their width, is seen where nobody says.

    Raises:
        DuoError: ``choices`` of no router; a router is more than a linear map; its rows are not said, or otherwise.
    """
    routers = {name: tensor for name, tensor in tensors.items() if ROUTER.match(name)}
    if choices and not routers:
        raise DuoError(f"--router-choices {choices}: {source} has no router")
    said = choices or config.get("router_choices")
    for name, tensor in routers.items():
        what = f"{source}: {tensor.name or name} {list(tensor.shape)}"
        if not name.endswith((".router.weight", ".router.bias")):
            raise DuoError(f"{what}: a router is one linear map a layer, with a weight and perhaps a bias")
        if tensor.shape[:1] not in ((2,), (3,)):
            raise DuoError(f"{what}: a router has two or three rows, one for each route")
        fitting = {2: "sB", 3: "-sB"}[tensor.shape[0]]
        if not said:
            raise DuoError(
                f"{what} is a router's and config.json has no router_choices; say which routes its rows stand for, in "
                f"their order, such as --router-choices {fitting}"
            )
        if isinstance(said, str) and len(said) != tensor.shape[0]:
            raise DuoError(
                f"{what}: router_choices is {said!r}; it must name a route for each row, such as {fitting!r}"
            )
    result = {**config, "router_choices": choices} if choices else dict(config)
    if config.get("router_bias") is None and any(name.endswith(".bias") for name in routers):
        result["router_bias"] = True
    if config.get("router_looks_ahead") is None:
        widths = {tensor.shape[1] for tensor in routers.values() if len(tensor.shape) == 2}
        if widths == {2 * config["hidden_size"]}:
            result["router_looks_ahead"] = True
    return result


def _same(a: Tensor, b: Tensor) -> bool:
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and a.dtype in DTYPES
        and bool(mx.array_equal(a.load(), b.load()).item())
    )


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration of weights in another type; a key that is not there is not added."""
    return {key: dtype if key in ("dtype", "torch_dtype") else value for key, value in config.items()}


def dense_args(config: Mapping[str, Any]) -> Config:
    """The arguments of a dense model's `settings`; its small FFN has the least width, as arguments must have one."""
    return Config.from_dict({**config, "small_intermediate_size": 1})
