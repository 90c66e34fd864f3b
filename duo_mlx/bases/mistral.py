"""Mistral: mlx-lm's Llama, all of whose layers may see a window only. mlx-lm's own needs one that sees everything."""

from dataclasses import dataclass
from typing import Any

from mlx_lm.models import llama


@dataclass
class Config(llama.ModelArgs):
    """mlx-lm's arguments of a Llama."""


def _all_full(args: Config) -> Config:
    return Config(**(vars(args) | {"layer_types": None}))


class Trunk(llama.LlamaModel):
    """A Llama's layers, each of which may see a window only."""

    def __init__(self, args: Config):
        kinds = args.layer_types or []
        super().__init__(_all_full(args))
        sliding = [index for index, kind in enumerate(kinds) if kind == "sliding_attention"]
        for index in sliding:
            self.layers[index].use_sliding = True
        self.layer_types = kinds
        self.swa_idx = sliding[0] if sliding else None
        self.fa_idx = kinds.index("full_attention") if "full_attention" in kinds else 0


class Model(llama.Model):
    """The architecture."""

    def __init__(self, args: Config):
        super().__init__(_all_full(args))
        self.args: Any = args
        self.model = Trunk(args)
