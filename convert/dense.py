"""A base hosted for conversion: a dense model as a Duo that has no small FFN yet."""

from collections.abc import Mapping
from typing import Any

from duo_mlx.config import Config
from duo_mlx.convert.tensors import Tensors
from duo_mlx.model import Model


def host(tensors: Tensors, config: Mapping[str, Any]) -> Model:
    """Return a Duo with these weights.

    Args:
        tensors: by the Duo's names (``model.layers.0.mlp.big.gate_proj.weight``).
        config: a Duo's config.json; with ``small_layers`` empty it is of a dense model.

    Raises:
        DuoError: the configuration makes no model.
    """
    model = Model(Config.from_dict(dict(config)))
    model.load_weights(list(model.sanitize({name: tensor.load() for name, tensor in tensors.items()}).items()))
    return model
