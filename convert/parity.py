"""``--verify``: a model directory's logits beside another implementation's, on the same tokens and routes.

The other one is the reference in PyTorch (`duo_mlx.convert.references`) with the source's weights, with an export's, or
with what a quantised directory's weights stand for. Where PyTorch has no reference, and for a dense model and the Duo
that it became, it is mlx-lm's own model, for the route big alone. Both sides compute in float32.

In models with large activations (a grafted SmolLM2 is one) float32 alone costs some logits up to a hundred times the
tolerance, in PyTorch as in MLX: both are as far from the reference in double precision as from each other. There the
difference is judged by what it does to the distribution, see `failures`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils as mlx_lm_utils
from numpy.typing import NDArray

from duo_mlx import checkpoint, guard, hosting
from duo_mlx.config import Config
from duo_mlx.convert import dense, references, settings, stored
from duo_mlx.convert.keymaps import named
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.references import Reference
from duo_mlx.convert.tensors import Tensors
from duo_mlx.model import Model
from duo_mlx.policies import RandomPolicy
from duo_mlx.routed import ask
from duo_mlx.routes import Route, Routes, parse_pattern

TOLERANCE = 1e-4  # on logits
ROUNDING = 0.1  # on single logits, where the distributions agree
SAME = 5e-8  # mean KL in nats of distributions that agree; logits that are all off by 3e-4 give it


@dataclass(frozen=True)
class Parity:
    """How far a directory is from the other implementation under one kind of route."""

    route: str
    max_abs_difference: float
    mean_kl: float  # nats, of the directory's distribution from the other one
    argmax_agreement: float  # share of tokens

    def __str__(self) -> str:
        return f"{self.route:8}{self.max_abs_difference:12.2e}{self.mean_kl:12.2e}{self.argmax_agreement:12.2%}"


HEAD = f"{'route':8}{'max |diff|':>12}{'mean KL':>12}{'argmax':>12}"


def measure(
    directory: Path,
    config: dict[str, Any],
    weights: Tensors,
    batch: int = 2,
    tokens: int = 64,
    seed: int = 0,
    *,
    rounded: bool = False,
    note: Callable[[str], object] = lambda line: None,  # noqa: ARG005
) -> list[Parity]:
    """A Duo directory and the reference for big, small, skip and random routes, on random tokens.

    Where PyTorch has no reference (`duo_mlx.convert.references.lacking`), mlx-lm's own model is it, for big alone. The
    same goes for weights on which mlx-lm's model itself is not transformers', because a Duo is mlx-lm's.

    If there are routers, also for the routes of the reference's. The directory's must agree: as a decision may hang on
    rounding, a route's logit may lag behind the largest one by the tolerance, relative to the layer's logits.

    Args:
        directory: the model directory.
        config: of the reference.
        weights: the reference's, by canonical names.
        batch: sequences.
        tokens: of a sequence.
        seed: of tokens and routes.
        rounded: dequantise a quantised directory's weights to the type of its scales, as an export does, before they
            are computed with.
        note: is told in a line if mlx-lm and transformers differ.

    Raises:
        DuoError: PyTorch is not installed, or the reference does not take the weights.
    """
    model = _model(directory, rounded)
    inputs = _inputs(model.config, batch, tokens, seed)
    if references.lacking(config):
        return [_all_big(model, _dense_logits(config, weights), inputs)]
    found = _measured(model, references.made(config, weights), batch, tokens, seed)
    if failures(row for row in found if row.route == "big"):
        by_mlx_lm = _all_big(model, _dense_logits(config, weights), inputs)
        if not failures([by_mlx_lm]):
            note(
                f"mlx-lm and transformers differ on a {model.kind} of these weights, by up to "
                f"{found[0].max_abs_difference:.1e} in logits; a Duo is mlx-lm's model, so --verify compares all big "
                "with that and no other routes"
            )
            return [by_mlx_lm]
    return found


def _measured(model: Model, reference: Reference, batch: int, tokens: int, seed: int) -> list[Parity]:
    layers = model.config.num_hidden_layers
    inputs = _inputs(model.config, batch, tokens, seed)
    fixed = {word: parse_pattern(word, layers) for word in ("big", "small", "skip")}
    drawn = {"random": RandomPolicy(layers, 0.4, 0.3, 0.3, seed).routes(0, inputs.shape[1], batch)}
    found = []
    for name, routes in (fixed | drawn).items():
        expected, _ = _run(reference, inputs, routes)
        # Gemma 3n's layers share keys and values in mlx-lm only where there is a cache
        found.append(compare(name, expected, np.array(model(mx.array(inputs), model.make_cache(), routes=routes))))
    return [*found, _by_router(reference, model, inputs)] if model.config.router_choices else found


def _by_router(reference: Reference, model: Model, inputs: NDArray[np.int64]) -> Parity:
    expected, routes = _run(reference, inputs, None)
    logits, said = ask(model, mx.array(inputs), routes.astype(np.uint8))
    row = compare("router", expected, np.array(logits))
    choices = model.router().choices
    rows = mx.array([choices.index(route) if route in choices else 0 for route in Route])[mx.array(routes)]
    lags = [_lag(said[:, :, layer], rows[..., layer]) for layer in range(routes.shape[-1])]
    worst = np.maximum(row.max_abs_difference, np.array(mx.stack(lags)).max())  # a NaN stays one
    return replace(row, max_abs_difference=float(worst))


def _lag(logits: mx.array, rows: mx.array) -> mx.array:
    """How far behind the largest logit ``[..., choices]`` those of ``rows [...]`` are, relative to all of them."""
    taken = mx.take_along_axis(logits, rows[..., None], axis=-1)
    scale = mx.maximum(mx.abs(logits).max(), 1e-30)  # a router that was never trained says 0 to everything
    return (logits - taken).max() / scale


def measure_quantised(directory: Path, batch: int = 2, tokens: int = 64, seed: int = 0) -> list[Parity]:
    """A quantised directory and the PyTorch reference with the numbers that its weights stand for, as `measure`.

    How much was lost by quantising is another question; this finds weights that were packed or named wrongly.
    """
    weights = stored.weights(directory, dequantise="float32")
    return measure(directory, checkpoint.read_config(directory), weights, batch, tokens, seed)


def measure_export(
    exported: Path,
    directory: Path,
    *,
    names: str = references.TRANSFORMERS,
    batch: int = 2,
    tokens: int = 64,
    seed: int = 0,
) -> list[Parity]:
    """A model directory and the PyTorch reference with what was exported from it, as `measure`.

    Args:
        exported: what `duo_mlx.convert.export.export` wrote.
        directory: what it was exported from; a quantised one counts as what it was dequantised to.
        names: the key map that it was exported with.
        batch, tokens, seed: as for `measure`.
    """
    config = checkpoint.read_config(directory)
    found = open_checkpoint(exported, config=directory / "config.json").tensors
    if names == references.TRANSFORMERS:
        return _measured(_model(directory, True), references.of_transformers(config, found), batch, tokens, seed)
    weights = named(names).to_canonical(found, config)
    return measure(directory, config, weights, batch, tokens, seed, rounded=True)


def measure_dense(directory: Path, batch: int = 2, tokens: int = 64, seed: int = 0) -> list[Parity]:
    """A Duo directory with all routes big and mlx-lm's own model of the base with the same weights.

    Args:
        directory: the model directory.
        batch, tokens, seed: as for `measure`.
    """
    model = _model(directory)
    return [_all_big(model, hosting.without(model), _inputs(model.config, batch, tokens, seed))]


def _all_big(model: Model, dense_logits: Callable[[mx.array], mx.array], inputs: NDArray[np.int64]) -> Parity:
    given = mx.array(inputs)
    return compare("big", np.array(dense_logits(given)), np.array(guard.all_big(model, given)))


def _dense_logits(config: dict[str, Any], weights: Tensors) -> Callable[[mx.array], mx.array]:
    model = dense.host(weights, {key: value for key, value in config.items() if key != "quantization"})
    model.set_dtype(mx.float32)
    logits: Callable[[mx.array], mx.array] = hosting.without(model)
    return logits


def compare(route: str, theirs: NDArray[np.floating], ours: NDArray[np.floating]) -> Parity:
    """The row of two arrays of logits ``[..., vocab]``."""
    double_theirs, double_ours = theirs.astype(np.float64), ours.astype(np.float64)
    with np.errstate(invalid="ignore"):  # infinite logits differ by a NaN, which no tolerance covers
        log_theirs, log_ours = _log_softmax(double_theirs), _log_softmax(double_ours)
        return Parity(
            route,
            float(np.abs(double_theirs - double_ours).max()),
            float((np.exp(log_theirs) * (log_theirs - log_ours)).sum(-1).mean()),
            float((theirs.argmax(-1) == ours.argmax(-1)).mean()),
        )


def failures(found: Iterable[Parity], *, identical_argmax: bool = False) -> list[Parity]:
    """Those beyond the tolerance, as a NaN is; with ``identical_argmax`` those that choose another token, too.

    Without ``identical_argmax``, which is for two sides that compute alike, rounding is no failure: some logits may
    differ by up to `ROUNDING` where every token chooses the same and the mean KL is at most `SAME`.
    """
    return [row for row in found if not (_strictly(row) if identical_argmax else _but_for_rounding(row))]


def _strictly(row: Parity) -> bool:
    return row.max_abs_difference <= TOLERANCE and row.argmax_agreement == 1


def _but_for_rounding(row: Parity) -> bool:
    unchanged = row.argmax_agreement == 1 and abs(row.mean_kl) <= SAME
    return row.max_abs_difference <= TOLERANCE or (row.max_abs_difference <= ROUNDING and unchanged)


def _model(directory: Path, rounded: bool = False) -> Model:
    model = checkpoint.read_model(directory)
    if rounded:
        mlx_lm_utils.dequantize_model(model)
    model.set_dtype(mx.float32)
    return model


def _inputs(config: Config, batch: int, tokens: int, seed: int) -> NDArray[np.int64]:
    window = settings.unread_window(config.to_dict())  # where transformers slides and mlx-lm does not
    tokens = min(tokens, config.max_position_embeddings or tokens, window or tokens)
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, tokens))


def _run(
    reference: Reference, inputs: NDArray[np.int64], routes: Routes | None
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Logits and the routes that were taken; None: by the reference's routers."""
    import torch

    given = None if routes is None else torch.from_numpy(routes.astype(np.int64))
    with torch.no_grad():
        logits, taken = reference.routed(torch.from_numpy(inputs), given)
    return logits.numpy(), taken.numpy()


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised
