"""What ``duo-mlx bench doctor`` looks at: the machine, its meters, the kernels, figures, and what `auto` makes of them.

On a Mac each variant of the kernels is compared with the modules whose work it does, and timed; the verdicts and the
figures go to the user's cache, where `duo_mlx.auto` finds them. What a kernel refuses is not launched. Elsewhere there
is nothing to store, and the same report says so. This project has not run it on a Mac.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx import _blas, auto, checkpoint
from duo_mlx.bench import figures, meters, variants
from duo_mlx.bench.figures import Figure
from duo_mlx.bench.system import system_record
from duo_mlx.bench.variants import Case, Check, Clock, Plan
from duo_mlx.kernels import launch, selfcheck, verdicts
from duo_mlx.kernels.verdicts import Verdict
from duo_mlx.model import Model
from duo_mlx.routes import FEW

SITUATIONS = (
    ("host", "few", FEW, f"host knows routes that differ, {FEW} tokens"),
    ("device", "one", 1, "device knows the route, 1 token"),
    ("device", "few", FEW, f"device knows the routes, {FEW} tokens"),
    ("device", "many", 512, "device knows the routes, 512 tokens"),
)

Progress = Callable[[str, float, float], object]  # stage, what is done and what is to be


@dataclass(frozen=True)
class Decision:
    """What `auto` does in one situation, and why not what it would rather do on a GPU."""

    situation: str
    ffns: str
    strategy: str
    passed_over: dict[str, str]


@dataclass(frozen=True)
class Report:
    """All that there is to say."""

    system: dict[str, Any]
    blas: str
    meters: list[meters.Found]
    no_kernels: str | None  # why none can run here
    checks: list[Check]
    device: str  # that the figures are of
    figures: dict[str, Figure]
    notes: list[str]  # what could not be measured or stored, and why
    auto: list[Decision]
    stored: str | None  # the file, if something was stored

    @property
    def failed(self) -> list[str]:
        """Which checks failed, and why."""
        return [f"{check}: {check.failed}" for check in self.checks if check.failed]

    def as_json(self) -> dict[str, Any]:
        """All of it for people to share: the home directory, whose name is the user's, is ``~``."""
        found: dict[str, Any] = _without_home(asdict(self) | {"failed": self.failed})
        return found


def examine(
    plan: Plan,
    model: str | None = None,
    progress: Progress = lambda *_: None,
    clock: Clock = time.perf_counter,
) -> Report:
    """Look at everything, and store what was found if the kernels can run here.

    Args:
        plan: how thoroughly.
        model: the model directory whose FFNs are checked in place of made ones.
        progress: called with a stage, what is done and what is to be.
        clock: seconds.

    Raises:
        DuoError: there is no such model.
    """
    loaded = checkpoint.read_model(checkpoint.resolve(model)) if model else None
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    if loaded and on_cpu:
        loaded.set_dtype(mx.float32)  # as `checkpoint.load` does
    no_kernels = launch.unavailable()
    checks: list[Check] = []
    kept: dict[str, Verdict] = {}
    notes: list[str] = []
    if no_kernels is None:
        cases = variants.of_model(loaded) if loaded else variants.made(plan)
        for done, (case, total) in enumerate(cases):
            progress("kernels", done, total)
            for rows in variants.ROWS:
                checks += variants.check_ffns(case, rows, plan, kept, clock)
        checks += variants.check_routers(
            variants.routers(loaded) if loaded else variants.made_routers(plan), plan, kept
        )
    found = _figures(plan, no_kernels, notes, progress, clock)
    stored = None
    if no_kernels is None:
        record = verdicts.record()
        if record.store(kept, figures.chosen(found) if found else None):
            stored = str(record.file)
        else:
            notes.append(f"{record.file} cannot be written: what was found is lost when this ends")
    return Report(
        system_record(),
        blas(),
        meters.found(),
        no_kernels,
        checks,
        "CPU" if on_cpu else "GPU",
        found,
        notes,
        decisions(_examples(plan, loaded)),
        stored,
    )


def blas() -> str:
    """The BLAS that MLX multiplies with on the CPU, with advice where it is slow."""
    if sys.platform == "darwin":
        return "Accelerate"
    if loaded := _blas.preload():
        return str(loaded)
    if os.environ.get(_blas.OPT_OUT) == "0":
        return f"mlx's own, as {_blas.OPT_OUT}=0 asks for"
    return _blas.ADVICE.removeprefix("duo-mlx: ").strip()


def decisions(examples: Sequence[Case]) -> list[Decision]:
    """What `auto` does in each situation with each of the examples' FFNs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a failed check is in the report anyway
        return [decision for case in examples for decision in _decide(case)]


def _decide(case: Case) -> Iterator[Decision]:
    ffns, name = case.layers[0], f"{case.weights} {variants.name(case.dtype)} {case.shape}"
    yield Decision("host knows one route for all tokens", name, "planned", {})
    slower = "saves nothing on a CPU" if launch.unavailable() else "slower by this machine's figures"
    for known_by, tokens, rows, situation in SITUATIONS:
        strategy = auto.choose(ffns, rows, case.dtype, known_by)
        preferred = auto.PREFERENCES[known_by, tokens, "gpu"]
        passed_over = preferred[: preferred.index(strategy)]
        reasons = {other: auto.refusal(other, ffns, rows, case.dtype) or slower for other in passed_over}
        yield Decision(situation, name, strategy, reasons)


def _examples(plan: Plan, model: Model | None) -> list[Case]:
    """FFNs that stand for those of most models, or a model's own kinds."""
    if model:
        return [case for case, _ in variants.of_model(model)]
    dtype, all_bits = (mx.float32, (0,)) if launch.unavailable() else (mx.bfloat16, (0, 4))
    return [Case([variants.make(plan.shapes[0], bits, dtype)], dtype, False) for bits in all_bits]


def _figures(
    plan: Plan, no_kernels: str | None, notes: list[str], progress: Progress, clock: Clock
) -> dict[str, Figure]:
    """The figures by name, unless nothing is to be timed; what could not be measured is added to ``notes``."""
    if not plan.rounds:
        notes.append("figures were not measured, as nothing was to be timed")
        return {}
    by = figures.effort()
    try:
        found = figures.measure(by, lambda done: progress("figures", done, by.rounds), clock)
    except Exception as error:  # noqa: BLE001  (what Metal says is for the report)
        notes.append(f"figures cannot be measured: {selfcheck.one_line(error)}")
        return {}
    if no_kernels is None:
        crossing, why = figures.fast_crossing()
        if crossing:
            found["fast_crossing_s"] = crossing
        else:
            notes.append(f"the crossing with MLX_METAL_FAST_SYNCH=1 cannot be measured: {why}")
    if figures.chosen(found) is None:
        notes.append("a figure is less than the noise, so none is used; measure again on a quiet machine")
    return found


def _without_home(value: Any) -> Any:
    """The same with ``~`` in place of the home directory, whose name is the user's."""
    home = str(Path.home())
    if isinstance(value, str):
        return value.replace(home, "~") if len(home) > 1 else value
    if isinstance(value, dict):
        return {key: _without_home(item) for key, item in value.items()}
    return [_without_home(item) for item in value] if isinstance(value, list | tuple) else value
