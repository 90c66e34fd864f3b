"""The guard of a conversion: a few tokens through what was written, and through mlx-lm's own model."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import utils as mlx_lm_utils

from duo_mlx import checkpoint, guard, hosting
from duo_mlx.config import Config
from duo_mlx.device import on_cpu

TOKENS = 8


def check(directory: Path, dense: Path | None = None, config: Mapping[str, Any] | None = None) -> None:
    """Refuse a Duo whose logits by all big are not bit for bit its base's.

    Weights are read as the pass comes to them, and forgotten.

    Args:
        directory: the model directory.
        dense: the directory of the dense model that it was made of, if mlx-lm loads that itself.
        config: of the dense model, with the base's own keys; None: as it stands there.

    Raises:
        DuoError: they differ, or the base cannot be hosted.
    """
    made = Config.from_dict(checkpoint.read_config(directory))
    ids = mx.random.randint(0, made.vocab_size, (1, TOKENS), key=mx.random.key(0))
    kind = made.base["model_type"]
    ours = _logits(lambda: checkpoint.read_model(directory), lambda model: guard.all_big(model, ids))
    theirs = _logits(lambda: hosting.without(checkpoint.read_model(directory)), lambda model: model(ids))
    same = _equal(ours, theirs)
    if same and dense is not None:
        try:
            theirs = _logits(
                lambda: mlx_lm_utils.load_model(dense, lazy=True, model_config=dict(config or {}))[0],
                lambda model: model(ids),
            )
        except (ValueError, TypeError, KeyError, OSError, RuntimeError):  # its names are not what mlx-lm takes
            return
        same = _equal(ours, theirs)
    if not same:
        raise guard.refusal(kind)


def _logits(load: Callable[[], Any], run: Callable[[Any], mx.array]) -> mx.array:
    model = load()
    if on_cpu():  # where half precision takes ages
        model.set_dtype(mx.float32)
    logits = run(model)
    del model  # so that the pass holds no weight that it is done with
    mx.eval(logits)
    return logits


def _equal(ours: mx.array, theirs: mx.array) -> bool:
    return bool(mx.array_equal(ours, theirs, equal_nan=True).item())
