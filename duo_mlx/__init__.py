"""Duo-LLM adaptive computation with MLX: each token meets, in every layer, a big FFN, a small one or neither.

    import duo_mlx

    model, tokenizer = duo_mlx.load()  # the embedded model; or a directory, or a Hugging Face id
    for response in duo_mlx.stream_generate(model, tokenizer, "Emma was", route="BBBBBBssssss"):
        print(response.text, response.routes)

Importing the package is cheap: each name below is imported, and mlx with it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from duo_mlx import _blas

if TYPE_CHECKING:
    from duo_mlx.checkpoint import load
    from duo_mlx.config import Config
    from duo_mlx.errors import DuoError
    from duo_mlx.generation import Response, generate, stream_generate
    from duo_mlx.model import Model
    from duo_mlx.policies import FixedPolicy, Policy, RandomPolicy, ReplayPolicy, parse_route
    from duo_mlx.routes import Route, format_pattern, parse_pattern

__version__ = "0.1.0"

__all__ = [
    "Config",
    "DuoError",
    "FixedPolicy",
    "Model",
    "Policy",
    "RandomPolicy",
    "ReplayPolicy",
    "Response",
    "Route",
    "__version__",
    "format_pattern",
    "generate",
    "load",
    "parse_pattern",
    "parse_route",
    "stream_generate",
]

_HOMES = {
    "checkpoint": ("load",),
    "errors": ("DuoError",),
    "generation": ("Response", "generate", "stream_generate"),
    "config": ("Config",),
    "model": ("Model",),
    "policies": ("FixedPolicy", "Policy", "RandomPolicy", "ReplayPolicy", "parse_route"),
    "routes": ("Route", "format_pattern", "parse_pattern"),
}

_blas.preload()

if not TYPE_CHECKING:  # a type checker that saw this would let every misspelt name pass

    def __getattr__(name):
        for home, names in _HOMES.items():
            if name in names:
                globals()[name] = value = getattr(import_module(f"{__name__}.{home}"), name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *__all__})
