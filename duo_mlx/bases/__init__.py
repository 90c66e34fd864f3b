"""Bases: the architectures that a Duo is hosted in, mlx-lm's own and those that mlx-lm lacks."""

import io
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mlx_lm.utils import _get_classes

from duo_mlx.errors import DuoError


def classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the Model and ModelArgs classes of a base's config.json.

    Raises:
        DuoError: neither this package nor mlx-lm has the architecture.
    """
    kind = config.get("model_type")
    slides = set(config.get("layer_types") or ()) == {"sliding_attention"}
    if kind in ("llama", "mistral") and slides:
        kind = "sliding_llama"
    if isinstance(kind, str) and kind.isidentifier() and find_spec(f"{__name__}.{kind}"):
        module = import_module(f"{__name__}.{kind}")
        return module.Model, module.ModelArgs
    said = io.StringIO()
    try:
        with redirect_stdout(said):
            found: tuple[Any, Any] = _get_classes(config)
    except SystemExit:  # a module that wants another package and ends the process
        raise DuoError(f"mlx-lm's {kind} cannot be imported ({' '.join(said.getvalue().split())})") from None
    except (ValueError, KeyError, AttributeError):
        raise DuoError(
            f"the installed mlx-lm has no architecture {kind!r}, so no Duo can be hosted in it; "
            "a newer mlx-lm may have it (pip install -U mlx-lm)"
        ) from None
    return found
