"""The settings of a source: someone's config.json as a Duo's, whose base mlx-lm runs, or a line why not.

The base's keys stay as they are. Keys are added where transformers and mlx-lm say one thing in different words, and
where transformers' class has a default that mlx-lm has not. Whatever would make the same weights mean something else in
mlx-lm (another activation, capped logits, a RoPE that it computes differently) is an error that names the key.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx import bases
from duo_mlx.config import HEADS, HIDDEN, LAYERS, Config
from duo_mlx.convert import rope_settings
from duo_mlx.convert.packing import quantization, theirs
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.rope_settings import LIKE_LLAMA
from duo_mlx.convert.tensors import DTYPES, Tensor, Tensors
from duo_mlx.errors import DuoError

# Keys that change the numbers, and the values that ask for nothing. One that mlx-lm's ModelArgs does not have is
# refused with any other value, unless that is what transformers' class says where nobody does.
MEANINGFUL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "attention_multiplier": (),
    "residual_multiplier": (1,),
    "logits_scaling": (1,),
    "clip_qkv": (),
    "alibi": (False,),
}
# Keys that say the same in transformers, in this version or an earlier one, and in mlx-lm.
ALIASES = (
    ("num_experts", "num_local_experts", "n_routed_experts"),
    ("n_ctx", "n_positions", "max_position_embeddings"),
)
WINDOW = 4096  # of mistral where the key is not there
ROUTER = re.compile(r"(?:(?!\.big\.).)+\.router\.")  # of a Duo, not of a base's experts


def is_duo(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a Duo's; else it is a dense model's."""
    return config.get("small_intermediate_size") is not None or config.get("model_type") == "duo"


def foreign_quantisation(config: Mapping[str, Any]) -> str | None:
    """By which method weights are quantised that MLX does not compute with, such as gptq; None: they are not."""
    said = theirs(config)
    if said is None or quantization(config) is not None:
        return None
    method = said.get("quant_method") if isinstance(said, dict) else None
    return shown(method) if method else "by an unknown method"


def base_type(config: Mapping[str, Any], source: Path) -> str:
    """The ``model_type`` of the base.

    Raises:
        DuoError: mlx-lm does not have it.
    """
    kind = named_base(config)
    try:
        bases.classes({**config, "model_type": kind})
    except DuoError as error:
        raise DuoError(f"{source}: {error}") from None
    except TypeError:  # mlx-lm looks for the architectures in a table
        raise DuoError(f"{source}: config.json: architectures must be a list of names") from None
    return kind


def named_base(config: Mapping[str, Any]) -> str:
    """The ``model_type`` of the base that a config.json names, in one way or the other; llama where it names none."""
    kind = config.get("base_model_type") if is_duo(config) else None
    if kind is None and config.get("model_type") != "duo":
        kind = config.get("model_type")
    if kind is None and (architectures := config.get("architectures")):
        name = str(architectures[0] if isinstance(architectures, list) else architectures)
        kind = re.sub(r"(?<!^)(?=[A-Z])", "_", name.removesuffix("ForCausalLM")).lower()
    return "llama" if kind in (None, "duo") else str(kind)


def settings(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The config.json of a Duo, with the base's keys and those that ``source`` means without saying them.

    Of a dense model it has no layer with a small FFN. A head of which nobody says whether it is tied is left to
    `settle_head`.

    Raises:
        DuoError: mlx-lm cannot run it, or no sense can be made of it.
    """
    if config.get("model_file") is not None and not is_duo(config):
        raise DuoError(f"{source}: config.json has a model_file, which is code of its own; it is not run")
    kind = base_type(config, source)
    _check_weights(config, source)
    args = bases.classes({**config, "model_type": kind})[1]
    known = {field.name: field for field in fields(args)} if is_dataclass(args) else {}
    made = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config", "model_file")}
    made |= {"model_type": kind}
    if "text_config" not in known:
        made |= rope_settings.rope(made, source, set(known), fill=not is_duo(config))
        made |= _aliases(made, source, set(known))
        made |= _defaults(made, known)
        _refuse_unread(made, source, set(known))
    if kind == "mistral":
        made |= _sliding(made, source)
    if (packed := quantization(config)) is not None:
        made["quantization"] = packed
    for key in ("dtype", "torch_dtype"):
        if isinstance(made.get(key), str):
            made[key] = made[key].removeprefix("torch.")
    made |= {"model_type": "duo", "base_model_type": kind}
    return made if is_duo(config) else made | {"small_layers": []}


def unread_window(config: Mapping[str, Any]) -> int | None:
    """The tokens after which transformers' attention slides and that of mlx-lm's model does not; None: there are none.

    ``config`` is of `settings`.
    """
    kind, window = config["base_model_type"], config.get("sliding_window")
    args = bases.classes({**config, "model_type": kind})[1]
    known = {field.name for field in fields(args)} if is_dataclass(args) else {"sliding_window"}
    longest = config.get("max_position_embeddings")
    if "sliding_window" in known or type(window) is not int or config.get("use_sliding_window") is False:
        return None
    return window if type(longest) is not int or window < longest else None


def _check_weights(config: Mapping[str, Any], source: Path) -> None:
    """Refuse quantised weights of others; their tensors hold no numbers that could be taken as they are."""
    if foreign_quantisation(config) is None:
        return
    raise DuoError(
        f"{source}: its weights are quantised ({foreign_quantisation(config)}); convert the model that it was made of, "
        f"with weights in {', '.join(DTYPES)}, or one that MLX quantised"
    )


def _aliases(config: Mapping[str, Any], source: Path, known: set[str]) -> dict[str, Any]:
    """The keys that mlx-lm reads and that ``config`` says in another way."""
    found: dict[str, Any] = {}
    for names in ALIASES:
        value = next((config[name] for name in names if config.get(name) is not None), None)
        if value is not None:
            found |= {name: value for name in names if name in known and config.get(name) is None}
    experts = next((name for name in ALIASES[0] if config.get(name) not in (None, 0, 1)), None)
    if experts is not None and not known & set(ALIASES[0]):
        raise DuoError(f"{source}: config.json says {experts}; mlx-lm's {config['model_type']} has no experts")
    kinds, pattern = config.get("layer_types"), config.get("sliding_window_pattern")
    named = "sliding_window_pattern" in known and "layer_types" not in known
    if kinds and named and (pattern is None or type(pattern) is int):
        found["sliding_window_pattern"] = _pattern(kinds, source)
    return found


def _pattern(kinds: list[str], source: Path) -> int:
    """Every how manieth layer sees everything, as mlx-lm says it."""
    full = [index for index, kind in enumerate(kinds) if kind == "full_attention"]
    if full and full == list(range(full[0], len(kinds), full[0] + 1)):
        return full[0] + 1
    raise DuoError(f"{source}: config.json: in layer_types, mlx-lm expects full attention in every n-th layer")


def _defaults(config: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What transformers' class says where ``config`` does not and mlx-lm's ModelArgs cannot do without."""
    wanted = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and config.get(name) is None
    }
    wanted |= {"num_key_value_heads"} & (known.keys() - config.keys())
    wanted -= {"model_type", *HIDDEN, *LAYERS, *HEADS, "vocab_size", "intermediate_size"}
    if not wanted:
        return {}
    theirs = _of_transformers(config["model_type"])
    if theirs.get("num_key_value_heads") == theirs.get("num_attention_heads"):
        theirs.pop("num_key_value_heads", None)  # as many as there are heads is no number
    plain = {"rope_scaling": {"rope_type": "default"}}
    return {name: value for name in wanted if (value := theirs.get(name, plain.get(name))) is not None}


def _of_transformers(kind: str) -> dict[str, Any]:
    """The keys of a config.json of transformers' class with its defaults; none if it has no such class."""
    from transformers import CONFIG_MAPPING

    try:
        made = CONFIG_MAPPING[kind]()
    except (KeyError, ValueError, TypeError, ImportError):
        return {}
    found: dict[str, Any] = made.to_dict()
    return found | (made.rope_parameters or {} if hasattr(made, "rope_parameters") else {})


def _refuse_unread(config: Mapping[str, Any], source: Path, known: set[str]) -> None:
    for key, harmless in MEANINGFUL.items():
        value = config.get(key)
        if value is None or value in harmless or key in known:
            continue
        if _of_transformers(config["model_type"]).get(key) == value and config["model_type"] not in LIKE_LLAMA:
            continue
        raise DuoError(
            f"{source}: config.json says {key} {value!r}; mlx-lm's {config['model_type']} does not read that key, so "
            "the weights would mean something else"
        )


def _sliding(config: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Sliding attention in all layers of a mistral, whose configuration does not say it layer by layer."""
    window, layers = config.get("sliding_window", WINDOW), config.get("num_hidden_layers")
    if window is None:
        return {"layer_types": None}
    for key, value in (("sliding_window", window), ("num_hidden_layers", layers)):
        if type(value) is not int or value < 1:
            raise DuoError(f"{source}: config.json says {key} {value!r}; it must be a positive integer")
    return {"sliding_window": window, "layer_types": config.get("layer_types") or ["sliding_attention"] * (layers or 0)}


def settle_head(config: Mapping[str, Any], tensors: Tensors, source: Path) -> dict[str, Any]:
    """The configuration with ``tie_word_embeddings`` said: as it says, else by the canonical ``tensors``.

    Where nobody says, a head that is not there or is the embedding's twin is tied: Hugging Face's default and ours
    differ, and so does what people leave out.

    Raises:
        DuoError: a tied head is another tensor than the embedding, or an untied one is not there.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head is None and embedding is None:  # names of another base, which mlx-lm knows what to do with
        return dict(config)
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
        if widths == {2 * Config.from_dict(dict(config) | {"router_choices": ""}).hidden_size}:
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
