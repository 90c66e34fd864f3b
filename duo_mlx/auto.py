"""Which strategy ``auto`` takes for a layer, and why one that was asked for cannot be had."""

import weakref
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from duo_mlx import masked
from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFNs, nbytes
from duo_mlx.forms import form
from duo_mlx.kernels import fused, launch, selfcheck, verdicts
from duo_mlx.routes import FEW

# By who knows a layer's routes, on how many tokens, on which device: the first that is usable. On a GPU with the
# doctor's figures, those for routes on the device are tried in the order of their estimated times instead.
PREFERENCES = {
    ("host", "one", "cpu"): ("sorted",),
    ("host", "one", "gpu"): ("sorted",),
    ("host", "few", "cpu"): ("sorted",),
    ("host", "few", "gpu"): ("fused", "sorted"),
    ("host", "many", "cpu"): ("sorted",),
    ("host", "many", "gpu"): ("sorted",),
    ("device", "one", "cpu"): ("sync",),
    ("device", "one", "gpu"): ("fused", "masked", "sync"),
    ("device", "few", "cpu"): ("sorted",),
    ("device", "few", "gpu"): ("fused", "masked", "sorted"),
    ("device", "many", "cpu"): ("sorted",),
    ("device", "many", "gpu"): ("sorted",),
}


def choose(ffns: FFNs, rows: int, dtype: mx.Dtype, known_by: str) -> str:
    """The strategy for a layer's FFNs on ``rows`` tokens whose routes differ or are known by the ``device`` only."""
    tokens = "one" if rows == 1 else "few" if rows <= FEW else "many"
    on = "cpu" if launch.unavailable() else "gpu"
    candidates = PREFERENCES[known_by, tokens, on]
    if len(candidates) == 1:
        return candidates[0]
    key, record, found = (id(ffns), rows, dtype, known_by), verdicts.record(), form(ffns.big)
    part = found.up if found else ffns.big
    known = _chosen.get(key)
    if known is None or not known.holds(part, record):
        figures = record.figures if known_by == "device" else None  # where the host knows, no wait is saved
        name = _best(candidates, ffns, rows, dtype, figures)
        known = _chosen[key] = _Choice(name, weakref.ref(part), record, record.version)
    return known.name


class _Choice(NamedTuple):
    """What was chosen, and what it holds for: weights quantised since then, say, are another module."""

    name: str
    part: weakref.ref[nn.Module]
    record: verdicts.Record
    version: int

    def holds(self, part: nn.Module, record: verdicts.Record) -> bool:
        return self.part() is part and self.record is record and self.version == record.version


_chosen: dict[tuple[int, int, mx.Dtype, str], _Choice] = {}  # every layer asks in every pass


def _best(candidates: tuple[str, ...], ffns: FFNs, rows: int, dtype: mx.Dtype, figures: verdicts.Figures | None) -> str:
    usable = (name for name in candidates if refusal(name, ffns, rows, dtype) is None)
    if figures is None:
        return next(usable)
    return min(usable, key=lambda name: _seconds(name, ffns, rows, dtype, figures))


def refusal(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype) -> str | None:
    """Why ``strategy`` cannot decode ``rows`` tokens with these FFNs on this machine; None if it can.

    What runs only on a GPU must have passed its self-check there, which is made now if it was never made.
    """
    if strategy not in ("masked", "fused"):
        return None
    no_gpu = launch.unavailable()
    refused = {
        "fused": lambda: no_gpu or fused.refusal(ffns, rows, dtype),
        "masked": lambda: masked.refusal(ffns, dtype),
    }
    reason = refused[strategy]()
    if reason or no_gpu:
        return reason
    verdict = selfcheck.verdict(strategy, ffns, rows, dtype)
    return None if verdict.passed else f"its self-check failed on this machine: {verdict.reason}"


def require(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype) -> None:
    """Raise `DuoError` where ``strategy`` cannot decode ``rows`` tokens here."""
    if reason := refusal(strategy, ffns, rows, dtype):
        raise DuoError(f"strategy {strategy!r} cannot run here: {reason}; use auto, sync, sorted or dense")


def router_refusal(hidden: int, choices: int, rows: int, dtype: mx.Dtype) -> str | None:
    """Why the kernel of a router cannot decide for ``rows`` tokens on this machine; None if it can."""
    if reason := launch.unavailable() or fused.router_refusal(hidden, choices, rows, dtype):
        return reason
    verdict = selfcheck.router_verdict(hidden, choices, rows, dtype)
    return None if verdict.passed else f"its self-check failed on this machine: {verdict.reason}"


def _seconds(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype, figures: verdicts.Figures) -> float:
    """Estimated time of big under a strategy: the read of its weights, and the wait for the route if there is one."""
    read = nbytes(ffns.big) / figures.bandwidth_bytes_s
    if strategy in ("sync", "sorted"):
        return read + figures.read_back_s
    return read * (selfcheck.verdict(strategy, ffns, rows, dtype).slowdown or 1.0)
