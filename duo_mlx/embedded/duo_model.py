"""Lets stock mlx-lm load this directory (trust_remote_code); needs the package duo-mlx."""

from duo_mlx.model import Model, ModelArgs

__all__ = ["Model", "ModelArgs"]
