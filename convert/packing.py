"""Whether weights are packed, and how: what a config.json says of quantised ones."""

from collections.abc import Mapping
from typing import Any

PACKED = {"mxfp4": (32, 4), "mxfp8": (32, 8)}  # quant_method that MLX computes with as it is: group size and bits

FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")  # of compressed-tensors, that mlx-lm knows


def is_quantised(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of weights that MLX quantised."""
    return isinstance(config.get("quantization"), dict)


def quantization(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How weights are packed that MLX computes with as they are stored; None: they are in float."""
    if is_quantised(config):
        return dict(config["quantization"])
    said = theirs(config)
    if isinstance(said, dict) and said.get("quant_method") in PACKED:
        group_size, bits = PACKED[said["quant_method"]]
        return {"group_size": group_size, "bits": bits, "mode": said["quant_method"]}
    return None


def is_translated(config: Mapping[str, Any]) -> bool:
    """Whether weights are quantised by another tool, in a way of which mlx-lm's loader makes MLX's own form."""
    said = theirs(config)
    if quantization(config) is not None or not isinstance(said, dict):
        return False
    match said:
        case {"quant_method": "awq" | "modelopt"}:
            return True
        case {"quant_method": "compressed-tensors", "format": found}:
            return found in FORMATS
        case {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}:
            return True
    return False


def theirs(config: Mapping[str, Any]) -> Any:
    """What transformers says of how weights are quantised."""
    inner = config.get("text_config")
    return config.get("quantization_config") or (inner.get("quantization_config") if isinstance(inner, dict) else None)
