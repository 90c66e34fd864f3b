"""A Duo of a tiny Gemma 3n, written, read again, and what it was made of."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from duo_mlx import checkpoint
from duo_mlx.convert.directory import convert
from tests.convert import gemma3n_reference as reference

LAYERS, TOKENS = 10, 13
SLICINGS = {
    # as E2B: one width, layers that share keys and values are skipped
    "skips shared layers": ([64] * 7, [6, 7, 9]),
    # widths by layer, one of them whole, and a layer with keys and values of its own is skipped
    "skips a layer with keys": ([64, 32, INNER := reference.INNER, 96, 64, 64, 32, 64], [1, 8]),
    "skips none": ([64] * 5 + [INNER] * 4 + [96], []),
}


class Made:
    """A Duo that was written and read again, and what it was made of."""

    def __init__(self, name: str, folder: Path, write_tokenizer: Any):
        self.state = reference.random_state()
        self.source = reference.write(folder / "dense", self.state)
        write_tokenizer(self.source)
        self.kept, self.skips = SLICINGS[name]
        self.slicing = folder / "slicing.json"
        self.slicing.write_text(json.dumps({"ffn_hidden_dims": self.kept, "layers_to_skip": self.skips}))
        self.directory = folder / "duo"
        convert(self.source, self.directory, slicing=str(self.slicing))
        self.model = checkpoint.read_model(self.directory)
        random = np.random.default_rng(1)
        self.tokens = random.integers(3, reference.TEXT["vocab_size"], (2, TOKENS))
        self.routes = random.integers(0, 3, (2, TOKENS, LAYERS))

    @property
    def widths(self) -> list[int]:
        """Of small, one a layer."""
        return [self.model.config.small_width(layer) for layer in range(LAYERS)]

    def logits(
        self, routes: Any, cuts: tuple[int, ...] = (TOKENS,), strategy: str = "auto", model: Any = None
    ) -> np.ndarray:
        """Logits with a cache, which alone has Gemma 3n's shared keys and values in mlx-lm."""
        model = self.model if model is None else model
        cache, found = model.make_cache(), []
        for start, stop in pairwise(np.cumsum([0, *cuts])):
            part = routes[:, start:stop] if len(routes.shape) == 3 else routes
            given = mx.array(self.tokens[:, start:stop])
            found.append(model(given, cache=cache, routes=part, strategy=strategy))
        return np.array(mx.concatenate(found, axis=1))
