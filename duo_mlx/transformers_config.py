"""What transformers makes of a Duo's config.json.

transformers reads config.json for a tokenizer, too. It does not know the type ``duo``, so it checks some keys by rules
for all models. It fails where a base needs rules of its own. So these keys stand in an object that it does not check.
"""

from collections.abc import Mapping
from typing import Any

from duo_mlx.errors import DuoError

NESTED = "base_config"  # the key of config.json that holds the keys of the base which transformers would check
CHECKED = ("layer_types", "mlp_layer_types", "rope_parameters", "rope_scaling")


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys to write into a config.json, those that transformers would check under `NESTED`."""
    flat = flattened(config)
    checked = {key: flat.pop(key) for key in CHECKED if key in flat}
    return flat | ({NESTED: checked} if checked else {})


def flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json's keys without nesting: the inverse of `nested`.

    Raises:
        DuoError: what is nested is no object.
    """
    inner = config.get(NESTED, {})
    if not isinstance(inner, dict):
        raise DuoError(f"config.json: {NESTED} is {inner!r}; it must be an object")
    return {key: value for key, value in config.items() if key != NESTED} | inner


def register() -> None:
    """Make the type ``duo`` known to transformers, so that it also takes directories whose keys are not nested."""
    from transformers import AutoConfig, PretrainedConfig

    class DuoConfig(PretrainedConfig):
        """The keys of a Duo that transformers does not check."""

        model_type = "duo"

        def __init__(self, **keys: Any):
            super().__init__(**{key: value for key, value in keys.items() if key not in CHECKED})

    AutoConfig.register("duo", DuoConfig, exist_ok=True)
