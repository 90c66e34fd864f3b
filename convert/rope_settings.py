"""RoPE's keys in config.json: transformers' in mlx-lm's words.

transformers 5 writes one object, rope_parameters, where most of mlx-lm's models read rope_theta and rope_scaling.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duo_mlx.errors import DuoError

LIKE_LLAMA = ("llama", "mistral", "qwen2")  # bases whose scalings are held against transformers'

# RoPE scalings of mlx-lm's llama that give the angles of transformers. Left out: longrope, of which mlx-lm knows the
# long factors only; proportional, which turns a part of each head; mrope, which is for pictures.
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
STRETCHED = ("llama3", "yarn")  # know the length of the first training


def rope(config: Mapping[str, Any], source: Path, known: set[str], fill: bool) -> dict[str, Any]:
    """The keys of RoPE that mlx-lm reads, from those or from transformers 5's rope_parameters, which hold all."""
    given = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    for key, value in given.items():
        if value is not None and not isinstance(value, dict):
            raise DuoError(f"{source}: config.json says {key} {value!r}; it must be an object or null")
    scaling: dict[str, Any] = dict(given["rope_scaling"] or {})
    parameters: dict[str, Any] = dict(given["rope_parameters"] or {})
    found: dict[str, Any] = {}
    if nested := sorted(key for key, value in parameters.items() if isinstance(value, dict)):
        if "rope_parameters" in known:
            return {}
        whole, local = (parameters.get(f"{attention}_attention") or {} for attention in ("full", "sliding"))
        alike = whole.get("rope_theta") == local.get("rope_theta")  # sliding attention never scales in mlx-lm
        if set(nested) != {"full_attention", "sliding_attention"} or not ("rope_local_base_freq" in known or alike):
            raise DuoError(f"{source}: config.json has rope_parameters for {nested[0]}; all layers must share them")
        if _named(local) != "default":
            raise DuoError(f"{source}: config.json scales the RoPE of sliding attention, which mlx-lm does not")
        if "rope_local_base_freq" in known:
            found["rope_local_base_freq"] = local.get("rope_theta", 10000.0)
        parameters = dict(whole)
    kind = config["model_type"]
    if scaling and parameters and _named(scaling) != _named(parameters):
        raise DuoError(f"{source}: config.json has rope_scaling and rope_parameters of different types; leave out one")
    scaling |= parameters
    theta, part = scaling.pop("rope_theta", None), scaling.pop("partial_rotary_factor", None)
    for value, names in ((theta, ("rope_theta", "rotary_emb_base")), (part, ("partial_rotary_factor", "rotary_pct"))):
        if value is None:
            continue
        name = next((name for name in names if name in known), None)
        if name is not None:
            found[name] = value
        elif name is None and names[0] == "partial_rotary_factor" and value != 1:
            raise DuoError(
                f"{source}: config.json says partial_rotary_factor; RoPE of mlx-lm's {kind} turns whole heads"
            )
    if kind in LIKE_LLAMA:
        found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
        scaled = _scaling(scaling, config, source, fill)
        return found | ({} if not scaled and config.get("rope_scaling") is None else {"rope_scaling": scaled})
    if parameters and config.get("rope_scaling") is None and _named(scaling) != "default":
        if "rope_scaling" not in known and "rope_parameters" not in known:
            raise DuoError(f"{source}: config.json scales its RoPE, which mlx-lm's {kind} does not")
        found["rope_scaling"] = scaling
    return found


def _scaling(scaling: dict[str, Any], config: Mapping[str, Any], source: Path, fill: bool) -> dict[str, Any] | None:
    """The rope_scaling of a Llama in mlx-lm's words; None: it has none."""
    kind = _kind(scaling, source)
    if kind == "default":
        return None
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
    return _yarn(scaling, source) if kind == "yarn" else scaling


def _kind(scaling: Mapping[str, Any], source: Path) -> str:
    kinds = {str(scaling[key]) for key in ("type", "rope_type") if scaling.get(key) is not None} or {"default"}
    if len(kinds) > 1:
        raise DuoError(f"{source}: config.json gives RoPE two types, {' and '.join(sorted(kinds))}")
    kind = kinds.pop()
    if kind not in ROPE_TYPES:
        raise DuoError(f"{source}: config.json says RoPE of type {kind!r}; supported are {', '.join(ROPE_TYPES)}")
    return kind


def _named(scaling: Mapping[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _yarn(scaling: dict[str, Any], source: Path) -> dict[str, Any]:
    """Without what mlx-lm does not read, and without what transformers does not read unless it is complete."""
    for key, harmless in (("attention_factor", None), ("truncate", True)):
        if scaling.pop(key, None) not in (None, harmless):
            raise DuoError(f"{source}: config.json says {key} for RoPE of type yarn, which is not supported")
    scales = ("mscale", "mscale_all_dim")
    if not all(scaling.get(key) for key in scales):
        scaling = {key: value for key, value in scaling.items() if key not in scales}
    return {key: value for key, value in scaling.items() if value is not None}
