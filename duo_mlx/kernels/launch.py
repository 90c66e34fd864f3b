"""One launch of a kernel: what it is given, and the only place that touches Metal.

Callers say ``launch.execute(...)``, so that tests can put an emulator in its place.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

BODY = "// ---- body ----\n"  # in a kernel's file: helpers stand before, the body after it

_init_value: float | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel by name (``NAME.metal``), its inputs, template arguments and outputs; ``grid`` counts threads."""

    kernel: str
    inputs: tuple[tuple[str, mx.array], ...]
    template: tuple[tuple[str, mx.Dtype | int | bool], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    outputs: tuple[tuple[str, tuple[int, ...], mx.Dtype], ...]


def unavailable() -> str | None:
    """Why no kernel can run here; None if one can."""
    if not mx.metal.is_available():
        return "Metal kernels need an Apple GPU, and MLX finds none here"
    if mx.default_device().type != mx.DeviceType.gpu:
        return "Metal kernels need the GPU, and MLX's default device is the CPU"
    return None


def execute(launch: Launch) -> list[mx.array]:
    """The outputs, not yet evaluated."""
    return _call(launch, [array for _, array in launch.inputs], init_value=_init_value)


@contextmanager
def prefilled_with_nan() -> Iterator[None]:
    """Kernels launched within find NaN in their outputs in place of whatever was there: what is not written shows."""
    global _init_value
    _init_value = float("nan")
    try:
        yield
    finally:
        _init_value = None


def source(launch: Launch) -> str:
    """The complete Metal source that MLX makes of a launch, but for its own utils.h in front; needs no GPU.

    MLX prints it to the process's standard output when it traces the kernel, which is turned aside for that moment.
    """
    with tempfile.TemporaryDirectory() as directory:
        printed = Path(directory, "printed")
        sys.stdout.flush()
        stdout = os.dup(1)
        try:
            with printed.open("wb") as file:
                os.dup2(file.fileno(), 1)
            graph = str(Path(directory, "graph.mlxfn"))
            inputs = [mx.zeros(array.shape, array.dtype) for _, array in launch.inputs]
            mx.export_function(graph, lambda *traced: _call(launch, list(traced), verbose=True), *inputs)
        finally:
            os.dup2(stdout, 1)
            os.close(stdout)
        return printed.read_text(encoding="utf-8").split("```\n")[1]


def parts(kernel: str) -> tuple[str, str]:
    """The text in front of a kernel, helpers shared and its own, and the kernel's body."""
    directory = Path(__file__).parent
    helpers, body = (directory / f"{kernel}.metal").read_text(encoding="utf-8").split(BODY)
    return (directory / "common.metal").read_text(encoding="utf-8") + "\n" + helpers, body


@cache
def _kernel(kernel: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Any:
    header, body = parts(kernel)
    return mx.fast.metal_kernel(f"duo_{kernel}", inputs, outputs, source=body, header=header)


def _call(launch: Launch, inputs: list[mx.array], **options: Any) -> list[mx.array]:
    names = tuple(name for name, _ in launch.inputs)
    kernel = _kernel(launch.kernel, names, tuple(name for name, _, _ in launch.outputs))
    made: list[mx.array] = kernel(
        inputs=inputs,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for _, shape, _ in launch.outputs],
        output_dtypes=[dtype for _, _, dtype in launch.outputs],
        **options,
    )
    return made
