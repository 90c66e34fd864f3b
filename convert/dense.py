"""A base hosted for conversion: the model that a checkpoint's tensors fit, as a Duo that has no small FFN yet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _takes_global_scale, infer_quant_config

from duo_mlx.config import Config
from duo_mlx.convert import stored
from duo_mlx.convert.tensors import Tensors
from duo_mlx.errors import DuoError
from duo_mlx.model import Model


def empty(config: Config) -> Model:
    """Return the model with weights that are never computed: it is there for their names and shapes.

    Raises:
        DuoError: the configuration makes no model.
    """
    try:
        return Model(config)
    except DuoError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, AttributeError) as error:  # mlx-lm's and MLX's words
        reason = " ".join(str(error).split())
        raise DuoError(f"config.json: no {config.base['model_type']} can be made of it: {reason}") from error


def pack(model: Model, quantization: Mapping[str, Any], tensors: Tensors) -> None:
    """Give modules the packed form in which ``tensors`` have them, as mlx-lm's loader does.

    Args:
        model: an empty one.
        quantization: config.json's, by this model's names.
        tensors: by this model's names.

    Raises:
        DuoError: mlx-lm cannot say how they are packed.
    """
    shapes = {name: mx.zeros(tensor.shape, getattr(mx, tensor.dtype)) for name, tensor in tensors.items()}

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path in quantization:
            said: bool | dict[str, Any] = quantization[path]
            return said
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in shapes:
            return False
        how: dict[str, Any] = infer_quant_config(path, module, shapes)
        if f"{path}.global_scale" in shapes and _takes_global_scale(module):
            how["global_scale"] = True
        return how

    try:
        mode = quantization.get("mode", "affine")
        nn.quantize(model, quantization["group_size"], quantization["bits"], mode=mode, class_predicate=choose)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DuoError(
            f"config.json: its quantization is none that MLX knows ({' '.join(str(error).split())})"
        ) from None


def host(tensors: Tensors, config: Mapping[str, Any]) -> Model:
    """Return a Duo with these weights, each of which is read when it is used where its tensor loads lazily.

    Args:
        tensors: by the Duo's names (``model.layers.0.mlp.big.gate_proj.weight``), as they are stored.
        config: a Duo's config.json; with ``small_layers`` empty it is of a dense model.

    Raises:
        DuoError: weights and configuration disagree.
    """
    model = empty(Config.from_dict(dict(config)))
    weights = model.sanitize({name: tensor.load() for name, tensor in tensors.items()})
    if isinstance(config.get("quantization"), dict):
        pack(model, config["quantization"], tensors)
    model.eval()
    try:
        model.load_weights(list(weights.items()))
    except ValueError as error:
        raise DuoError(f"config.json and weights disagree: {' '.join(str(error).split())}") from None
    return model


def written(directory: Path) -> Tensors:
    """Return the tensors of a model directory as they are stored; loading one reads nothing before it is used."""
    return {
        name: tensor
        for file in sorted(directory.glob("model*.safetensors"))
        for name, tensor in stored.headers(file).items()
    }
