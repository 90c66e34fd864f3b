"""The guard of a conversion: a few tokens through what was written, and through mlx-lm's own model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils

from duo_mlx import checkpoint, guard, hosting
from duo_mlx.config import Config
from duo_mlx.device import on_cpu

TOKENS = 3  # reading the weights takes most of the time, and more than one token needs a mask
LAYERS = 8  # in which every kind of layer has its turn: sliding and full attention, experts and dense FFNs

Pass = tuple[mx.array, list[Any]]  # logits and the output of each layer, all unevaluated


def check(directory: Path, dense: Path | None = None, config: Mapping[str, Any] | None = None) -> None:
    """Refuse a Duo that is not bit for bit its base by all big.

    Of a dense model that mlx-lm loads, logits are compared, so every weight that was written is held against its own.
    Else a copy of the same weights without small FFNs is the base: the outputs of the first `LAYERS` layers are
    compared, and the graph of all when the directory is read. Weights are read as the passes come to them, and
    forgotten.

    Args:
        directory: the model directory.
        dense: the directory of the dense model that it was made of, if mlx-lm loads that itself.
        config: of the dense model, with the base's own keys; None: as it stands there.

    Raises:
        DuoError: they differ, or the base cannot be hosted.
    """
    made = Config.from_dict(checkpoint.read_config(directory))
    ids = mx.random.randint(0, made.vocab_size, (1, TOKENS), key=mx.random.key(0))
    model = _in_float(checkpoint.read_model(directory))
    theirs = None if dense is None else _of_dense(dense, config, ids)
    if theirs is None:  # first: a base may change its weights in a call, as gemma3n clips them
        theirs = _recorded(hosting.without(model), ids)
    outputs: list[mx.array] = []
    logits = guard.all_big(model, ids, on_block=lambda _, run, h: _kept(run(h), outputs))
    del model  # so that the passes hold no weight that they are done with
    if not _equal((logits, outputs), theirs, whole=dense is not None):
        raise guard.refusal(made.base["model_type"])


def _of_dense(dense: Path, config: Mapping[str, Any] | None, ids: mx.array) -> Pass | None:
    """The pass of mlx-lm's own model; None: the directory's names are not those that mlx-lm takes."""
    try:
        model = mlx_lm_utils.load_model(dense, lazy=True, model_config=dict(config or {}))[0]
        return _recorded(_in_float(model), ids)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError):
        return None


def _recorded(model: Any, ids: mx.array) -> Pass:
    outputs: list[Any] = []
    for block in model.layers:
        own = type(block)

        def call(self: Any, *args: Any, _own: Any = own, **named: Any) -> Any:
            return _kept(_own.__call__(self, *args, **named), outputs)

        block.__class__ = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
    return model(ids), outputs


def _kept(output: Any, outputs: list[Any]) -> Any:
    outputs.append(output)
    return output


def _in_float(model: Any) -> Any:
    if on_cpu():  # where half precision takes ages
        model.set_dtype(mx.float32)
    return model


def _equal(ours: Pass, theirs: Pass, whole: bool) -> bool:
    """Whether both passes are the same; they go from layer to layer together, so that each weight is read once."""
    for each in list(zip(ours[1], theirs[1], strict=False))[: None if whole else LAYERS]:
        mx.eval(each)
        if not all(_same(*pair) for pair in zip(_arrays(each[0]), _arrays(each[1]), strict=True)):
            return False
    return _same(ours[0], theirs[0]) if whole or len(ours[1]) <= LAYERS else True


def _arrays(output: Any) -> list[mx.array]:
    leaves: Any = tree_flatten(output)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def _same(a: mx.array, b: mx.array) -> bool:
    return bool(mx.array_equal(a, b, equal_nan=True).item())
