"""What routers make of an oracle's text: their losses and routes on the very tokens that the oracle was asked about.

A router is measured at the oracle's budgets: its threshold is moved to k of L layers (`duo_mlx.threshold`), and what it
really took is kept beside it. It is causal: each token's route is decided from what came before its next token, and
later tokens read the keys and values of that route.

A folder of them holds ``routers.json``, and for each a table ``NAME.npz``: ``ks [budgets]``, ``loss`` and ``routes`` as
`Routed` has them, and the oracle's ``inputs`` and ``model_sha256``, by which it is known.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import threshold
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory, refuse_foreign, write_text, writing
from duo_mlx.model import Model
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.routes import Route, Routes
from duo_mlx.study.losses import token_losses
from duo_mlx.study.results import Found
from duo_mlx.study.table import MODEL

# Nats by which a model's losses may differ, on the mean of a sequence's tokens, where another machine computes them:
# float16 moves the embedded model's by 0.001, bfloat16 by 0.012.
SAME = 0.02
ARRAYS = ("ks", "loss", "routes", "inputs", MODEL)
RECORD = "routers.json"


@dataclass(frozen=True, eq=False)
class Routed:
    """A router on an oracle's text.

    Args:
        name: of its model.
        ks: the budgets, big layers of a token on average; those within reach of its threshold.
        loss: nats ``[budgets, sequences, length]``.
        routes: ``[budgets, sequences, length, layers]``.
    """

    name: str
    ks: tuple[int, ...]
    loss: NDArray[np.float32]
    routes: Routes

    @property
    def share(self) -> NDArray[np.float64]:
        """The share of big that it took, by budget."""
        big: NDArray[np.float64] = (self.routes == Route.BIG).mean(axis=(1, 2, 3))
        return big

    def at(self, k: int) -> tuple[NDArray[np.float32], Routes] | None:
        """Loss and routes of a budget, if it was within reach."""
        return (self.loss[self.ks.index(k)], self.routes[self.ks.index(k)]) if k in self.ks else None


def measure(
    name: str, model: Model, found: Found, progress: Callable[[float, float], object] = lambda *_: None
) -> Routed:
    """A model's router at every budget of k big layers that the oracle has between none and all.

    Raises:
        DuoError: the model has no measured router, or is another one than the oracle's beside its router.
    """
    if model.config.num_hidden_layers != found.layers:
        raise DuoError(f"{name}: has {model.config.num_hidden_layers} layers, and the oracle's model {found.layers}")
    if not _is_of(model, found):
        raise DuoError(f"{name}: all big's or all small's losses are not the oracle's, so its model is another one")
    if not model.config.router_offsets:
        raise DuoError(f"{name}: has no measured router; duo-mlx train router trains and measures one")
    lowest, highest = model.config.router_offsets[0][0], model.config.router_offsets[-1][0]
    ks = [k for k in found.exact if 0 < k < found.layers and lowest <= k / found.layers <= highest]
    if not ks:
        raise DuoError(f"{name}: the oracle has no budgets of k big layers within reach, {lowest:.2f} to {highest:.2f}")
    inputs, targets = found.any["inputs"], found.any["targets"]
    losses, routes = [], []
    for done, k in enumerate(ks):
        by = model.router(threshold.offsets(model.config, f"{threshold.PREFIX}{k / found.layers!r}"))
        passed = [run(model, by, row, true) for row, true in zip(inputs, targets, strict=True)]
        losses.append(np.stack([each[0] for each in passed]))
        routes.append(np.stack([each[1] for each in passed]))
        progress(done + 1, len(ks))
    return Routed(name, tuple(ks), np.stack(losses), np.stack(routes))


def _is_of(model: Model, found: Found) -> bool:
    """Whether the oracle's first sequence costs all big and all small what it cost the oracle's model."""
    inputs, targets = found.any["inputs"][0], found.any["targets"][0]
    if max(inputs.max(), targets.max()) >= model.config.vocab_size:
        return False
    for route in (Route.BIG, Route.SMALL):
        losses = token_losses(model(mx.array(inputs[None]), routes=[route] * found.layers), targets)[0]
        if not np.abs(losses - found.any[f"loss_{route.name.lower()}"][0]).mean() <= SAME:
            return False
    return True


def run(
    model: Model, router: Source, inputs: NDArray[np.integer], targets: NDArray[np.integer]
) -> tuple[NDArray[np.float32], Routes]:
    """Losses ``[length]`` and routes ``[length, layers]`` of a sequence by its router."""
    routed = RoutedModel(model, router)
    losses = token_losses(routed(mx.array(inputs[None])), targets)[0]
    return losses, routed.taken(0, len(inputs))[0]


def refuse_existing(out: Path, force: bool) -> None:
    """Refuse what `write` would refuse, before the work.

    Raises:
        DuoError: ``out`` exists and ``force`` is not given, or it is or holds something else than routers' tables.
    """
    if force and out.is_dir() and any(out.iterdir()) and not (out / RECORD).exists():
        raise DuoError(f"--out {out}: holds no {RECORD}, so --force does not replace it")
    refuse_foreign(out, force, lambda name: name == RECORD or name.endswith(".npz"), "no router's")


def write(out: Path, measured: Sequence[Routed], found: Found, about: Mapping[str, Any], force: bool) -> None:
    """Write a folder of routers and ``about`` as its `RECORD`, whole or not at all.

    Raises:
        DuoError: see `refuse_existing`; or it cannot be written.
    """
    refuse_existing(out, force)
    text = json.dumps(about, indent=1, allow_nan=False) + "\n"
    if out.is_dir():
        with writing(out):
            for file in out.iterdir():
                file.unlink()
    with output_directory(out, force) as new:
        for each in measured:
            of: dict[str, Any] = {"inputs": found.any["inputs"], MODEL: found.any[MODEL]}
            with writing(new / f"{each.name}.npz"):
                np.savez_compressed(
                    new / f"{each.name}.npz", ks=np.array(each.ks), loss=each.loss, routes=each.routes, **of
                )
        write_text(new / RECORD, text)


def read_folder(folder: Path, found: Found) -> tuple[Routed, ...]:
    """The routers of a folder, by name.

    Raises:
        DuoError: it has none, or one that `read` refuses.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise DuoError(f"--routers {folder}: holds no table of duo-mlx oracle routers")
    return tuple(read(file, found) for file in files)


def read(file: Path, found: Found) -> Routed:
    """A table that `write` wrote, for the same oracle; the router's name is the file's.

    Raises:
        DuoError: it cannot be read, or is of another oracle.
    """
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            arrays: dict[str, NDArray[Any]] = {name: archive[name] for name in ARRAYS}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise DuoError(f"{file}: is no table of a router ({' '.join(str(error).split())})") from error
    of = found.any
    if str(arrays[MODEL]) != str(of[MODEL]) or not np.array_equal(arrays["inputs"], of["inputs"]):
        raise DuoError(f"{file}: is of another oracle's text or model, not of {found.folder}'s")
    ks, loss, routes = (arrays[name] for name in ("ks", "loss", "routes"))
    shape = (*ks.shape, *of["inputs"].shape)
    if ks.ndim != 1 or not ks.size or loss.shape != shape or routes.shape != (*shape, found.layers):
        raise DuoError(f"{file}: is damaged: its arrays do not fit one another")
    return Routed(file.stem, tuple(ks.tolist()), loss, routes)


def record(routed: Routed, found: Found) -> dict[str, Any]:
    """A router's figures for programs, by budget: losses, shares, and where it puts big."""
    budgets = {}
    for k, loss, routes, share in zip(routed.ks, routed.loss, routed.routes, routed.share, strict=True):
        of = found.summary["budgets"][str(k)]
        big = routes == Route.BIG
        budgets[str(k)] = {
            "share": float(share),
            "loss": float(loss.mean(dtype=np.float64)),
            "loss_by_sequence": loss.mean(axis=1, dtype=np.float64).tolist(),
            "fixed": of.get("fixed"),
            "fixed_split": of.get("fixed_split"),
            "random": of.get("random"),
            "oracle": of.get("oracle"),
            "share_by_layer": big.mean(axis=(0, 1)).tolist(),
            "skip_by_layer": (routes == Route.SKIP).mean(axis=(0, 1)).tolist(),
            "share_by_position": big.mean(axis=(0, 2)).tolist(),
        }
    return {"router": routed.name, "budgets": budgets}


def names(paths: Sequence[str]) -> list[str]:
    """A name for each model directory, its last part.

    Raises:
        DuoError: two are alike, or differ in nothing but capitals, which some file systems do not tell apart.
    """
    found = [Path(path).resolve().name for path in paths]
    folded = [name.casefold() for name in found]
    if twice := sorted(name for name in found if folded.count(name.casefold()) > 1):
        raise DuoError(f"two routers are called {twice[0]}; give directories of different names")
    return found
