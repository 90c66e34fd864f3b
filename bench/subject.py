"""The model that ``duo-mlx bench run`` measures, in the quantisations that are asked for."""

from pathlib import Path
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from duo_mlx import checkpoint, cost
from duo_mlx.device import on_cpu
from duo_mlx.errors import DuoError
from duo_mlx.model import Model

GROUP_SIZES = (64, 32)  # of quantisation; the first that divides the hidden size


class Subject:
    """A model directory, loaded in one quantisation at a time.

    Args:
        path: a model directory or a hub id; None: the embedded model.
        revision: of a hub id.

    Raises:
        DuoError: there is no such model.
    """

    def __init__(self, path: str | None, revision: str | None):
        self._directory = checkpoint.resolve(path, revision)
        self._model, self.tokenizer = checkpoint.load(self._directory, fuse=True)
        self.args = self._model.config
        self.window: int | None = min(filter(None, cost.windows(self._model)), default=None)  # of sliding attention
        self.stored = self._now = stored_format(self._model)
        self.name = "embedded" if path is None else Path(path).resolve().name if Path(path).is_dir() else path
        self.record = {
            "name": self.name,
            "revision": revision,
            "layers": self.args.num_hidden_layers,
            "parameters": parameters(self._model),
            "sha256": checkpoint.fingerprint(self._directory),
            "routing_sha256": checkpoint.fingerprint(self._directory, choosing=True),
        }
        plain, whole = self.tokenizer.encode("a", add_special_tokens=False), self.tokenizer.encode("a")
        # the token that begins a text, if there is one; some tokenizers add one that ends it
        self.first = int(whole[0]) if whole[: len(plain)] != plain else None

    def model(self, quantisation: str) -> Model:
        """The model so quantised: as it is stored, or ``N-bit``.

        Raises:
            DuoError: see `refusal`.
        """
        if reason := self.refusal(quantisation):
            raise DuoError(reason)
        if quantisation != self._now:
            model, _ = checkpoint.load(self._directory)
            if quantisation != self.stored:
                self._quantise(model, _bits(quantisation))
            if on_cpu():
                from duo_mlx import cpu

                cpu.quicken(model, fuse=True)
            mx.eval(model.parameters())
            self._model, self._now = model, quantisation
        return self._model

    def refusal(self, quantisation: str) -> str | None:
        """Why the model cannot be had in a quantisation, in one line; None if it can."""
        if quantisation == self.stored:
            return None
        if self.stored.endswith("-bit"):
            return f"--bits {_bits(quantisation)}: this model is stored with {self.stored} weights; leave --bits out"
        if self._group_size is None:
            hidden = self.args.hidden_size
            return f"--bits {_bits(quantisation)}: the hidden size {hidden} is no multiple of {GROUP_SIZES[-1]}"
        return None

    @property
    def _group_size(self) -> int | None:
        return next((size for size in GROUP_SIZES if self.args.hidden_size % size == 0), None)

    def _quantise(self, model: Model, bits: int) -> None:
        size = self._group_size
        assert size is not None

        def divides(_: str, module: nn.Module) -> bool:
            return hasattr(module, "to_quantized") and module.weight.shape[-1] % size == 0

        nn.quantize(model, size, bits, class_predicate=divides)


def _bits(quantisation: str) -> int:
    return int(quantisation.removesuffix("-bit"))


def stored_format(model: Model) -> str:
    """``float32``, ``float16``, ``bfloat16``, or ``N-bit`` of the first big FFN."""
    quantised = next((module for module in model.ffns[0].big.modules() if hasattr(module, "bits")), None)
    if quantised is not None:
        return f"{quantised.bits}-bit"
    weights: Any = tree_flatten(model.ffns[0].big.parameters())
    return str(weights[0][1].dtype).removeprefix("mlx.core.")


def parameters(model: Model) -> int:
    """How many parameters a model has, quantised weights counted as what they stand for."""
    count, modules, weights = 0, dict(model.named_modules()), checkpoint.parameters(model)
    for name, array in weights.items():
        owner, _, kind = name.rpartition(".")
        quantised = f"{owner}.scales" in weights
        if not quantised or kind == "bias":
            count += array.size
        elif kind == "weight":
            count += array.size * 32 // modules[owner].bits
    return count
