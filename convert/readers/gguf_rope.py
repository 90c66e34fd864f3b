"""Say in config.json's words how a GGUF file scales its rotary frequencies.

llama.cpp keeps Llama 3's scaling as a tensor, one factor for each pair of channels, and Phi 3's as two.
"""

from math import log, pi, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.readers.gguf_metadata import Metadata
from duo_mlx.errors import DuoError

LLAMA3 = "rope_freqs.weight"
LONGROPE = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
TENSORS = (LLAMA3, *LONGROPE.values())
KINDS = {  # by architecture
    "llama": ("none", "linear", "yarn"),
    "qwen2": ("none", "linear", "yarn"),
    "qwen3": ("none", "linear", "yarn"),
    "gemma2": ("none",),
    "gemma3": ("none", "linear"),
    "phi3": ("none", "longrope"),
}
TRAINED = 8192  # tokens, what Llama 3 was trained with
TOLERANCE = 1e-4  # of a factor; float32 and the rounding of a written number leave less

Factors = NDArray[np.float64]


def scaling(say: Metadata, factors: dict[str, Factors], theta: float, head_dim: int) -> dict[str, Any] | None:
    """Return ``rope_scaling``, or None where nothing is scaled.

    Args:
        say: the metadata.
        factors: the tensors of `TENSORS` that the file has.
        theta: the base of the frequencies.
        head_dim: channels of a head that are rotated.

    Raises:
        DuoError: the scaling is of a kind that the architecture does not have, or its factors follow no known rule.
    """
    for name, values in factors.items():
        if values.shape != (head_dim // 2,):
            raise DuoError(
                f"{name} is {list(values.shape)}, but a head has {head_dim // 2} pairs of channels to rotate"
            )
        if not np.isfinite(values).all() or (values <= 0).any():
            raise DuoError(f"{name} holds factors that are no numbers above 0")
    made = _by_metadata(say, factors)
    if LLAMA3 not in factors or (factors[LLAMA3] == 1).all():
        return made
    if made is not None:
        raise DuoError(f"has {LLAMA3} and {say.full('rope.scaling.type')}; only one scaling is supported")
    return llama3(factors[LLAMA3], theta, head_dim)


def _by_metadata(say: Metadata, factors: dict[str, Factors]) -> dict[str, Any] | None:
    kind = say.get("rope.scaling.type", "longrope" if factors.keys() & set(LONGROPE.values()) else "linear")
    known = KINDS[say.architecture]
    if kind == "longrope" and kind in known:
        return _longrope(say, factors)
    key = next((key for key in ("rope.scaling.factor", "rope.scale_linear") if say.has(key)), None)
    if kind == "none" or (kind == "linear" and key is None):
        return None
    if kind not in known or key is None:
        raise DuoError(
            f"its rotary scaling is {kind if key else f'{kind} without a factor'}; known are {', '.join(known)}, "
            "give others with --config FILE"
        )
    made: dict[str, Any] = {"type": kind, "rope_type": kind, "factor": say.real(key)}
    if kind == "linear":
        return made if made["factor"] != 1 else None
    for other, neutral in (
        ("attn_factor", 1),
        ("yarn_attn_factor", 1),
        ("yarn_ext_factor", 1),
        ("yarn_log_multiplier", 0),
    ):
        if (value := say.get(f"rope.scaling.{other}", neutral)) != neutral:
            raise DuoError(f"{say.full(f'rope.scaling.{other}')} is {value}, which config.json cannot say")
    made["original_max_position_embeddings"] = say.integer("rope.scaling.original_context_length")
    betas = [beta for beta in ("beta_fast", "beta_slow") if say.has(f"rope.scaling.yarn_{beta}")]
    return made | {beta: say.real(f"rope.scaling.yarn_{beta}") for beta in betas}


def _longrope(say: Metadata, factors: dict[str, Factors]) -> dict[str, Any]:
    if missing := [name for name in LONGROPE.values() if name not in factors]:
        raise DuoError(f"its rotary scaling is longrope, but it has no {missing[0]}")
    trained, length = say.integer("rope.scaling.original_context_length"), say.integer("context_length")
    expected = sqrt(1 + log(length / trained) / log(trained)) if length > trained > 1 else 1.0
    if abs(say.real("rope.scaling.attn_factor", expected) - expected) > TOLERANCE:
        raise DuoError(f"{say.full('rope.scaling.attn_factor')} is not the {expected:.4f} that its lengths imply")
    lists = {key: [float(np.float32(value)) for value in factors[name]] for key, name in LONGROPE.items()}
    return {"type": "longrope", "rope_type": "longrope", **lists, "original_max_position_embeddings": trained}


def llama3(factors: Factors, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the ``rope_scaling`` that gives these ``factors``.

    A factor is 1 for short waves and the largest for long ones. Between them its inverse is a straight line over the
    inverse of the wave's length. Two points of that line give the rest; ``low_freq_factor`` is 1 by custom, as only
    its ratios to the other keys matter.

    Raises:
        DuoError: no keys give these factors.
    """
    factor = float(factors.max())
    waves = 2 * pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    if np.ptp(factors) == 0:
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    tries = [(TRAINED, 4.0)]
    between = (factors > 1 + TOLERANCE) & (factors < factor * (1 - TOLERANCE))
    if between.sum() > 1:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        slope, start = np.polyfit(1 / waves[between], smooth, 1)
        if start < 0 < slope:
            high = 1 - 1 / start
            tries += [(round(slope * (high - 1)), round(high, digits)) for digits in (0, 1, 2, 4)]
    for trained, high in tries:
        if high > 1 and np.allclose(_llama3(waves, factor, high, trained), factors, rtol=TOLERANCE, atol=0):
            return {
                "type": "llama3",
                "rope_type": "llama3",
                "factor": float(np.float32(factor)),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(high),
                "original_max_position_embeddings": trained,
            }
    raise DuoError(
        f"{LLAMA3} follows no rule of RoPE scaling that is known; give the original model's config.json with "
        "--config FILE"
    )


def _llama3(waves: Factors, factor: float, high: float, trained: float) -> Factors:
    smooth = np.clip((trained / waves - 1) / (high - 1), 0, 1)
    made: Factors = 1 / ((1 - smooth) / factor + smooth)
    return made
