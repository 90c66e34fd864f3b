"""The figures that decide between strategies on a machine: what bytes, kernels, reads and changes of device cost.

Each is a difference or a ratio within interleaved rounds, so that what a call costs anyway drops out. They are taken on
MLX's default device. ``python -m duo_mlx.bench.figures`` prints one of them, the crossing, as JSON: a switch such as
``MLX_METAL_FAST_SYNCH`` is read once a process, so another value of it needs another process.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import mlx.core as mx

from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.kernels.verdicts import Figures

FAST = {"MLX_METAL_FAST_SYNCH": "1"}
PATIENCE = 120.0  # s for the other process

Clock = Callable[[], float]


@dataclass(frozen=True)
class Figure:
    """The median of a quantity over the rounds, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Effort:
    """How much is measured: ``rounds`` there and back (at least 2), ``steps`` a chain, ``weights`` to read in bytes."""

    rounds: int = 9
    steps: int = 200
    weights: int = 1 << 30


def effort() -> Effort:
    """What suits the default device: weights well beyond its caches, and a small part of its memory."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return Effort(weights=1 << 28)
    memory = int(mx.device_info().get("memory_size", 1 << 33))
    return Effort(weights=min(1 << 30, memory // 16))


def measure(
    by: Effort,
    after_round: Callable[[int], object] = lambda done: None,  # noqa: ARG005
    clock: Clock = time.perf_counter,
) -> dict[str, Figure]:
    """The fields of `Figures` but for ``fast_crossing_s``, each measured on the default device.

    On a CPU ``crossing_s`` is that between two streams of the CPU, and no route ever needs it.
    """
    short, long = ([_chain(by.steps * times) for _ in range(2 * by.rounds + 1)] for times in (1, 2))
    product, read = _products(by.weights)
    calls = {
        "short": lambda: mx.eval(short.pop()),  # built before, so that only their execution counts
        "long": lambda: mx.eval(long.pop()),
        "unread": lambda: mx.eval(_chain(by.steps)),
        "read": lambda: _read_each(by.steps),
        "products": lambda: mx.eval(product()),
        **_crossings(by.steps),
    }
    timings = interleave(calls, by.rounds, after_round=after_round, clock=clock)
    return {
        "bandwidth_bytes_s": Figure.of([read / seconds for seconds in timings.rounds("products")]),
        "dispatch_s": _more(timings, "long", "short", by.steps),
        "read_back_s": _more(timings, "read", "unread", by.steps),
        "crossing_s": _more(timings, "crossing", "staying", by.steps),
    }


def bandwidth(by: Effort) -> Figure:
    """``bandwidth_bytes_s`` alone."""
    product, read = _products(by.weights)
    timings = interleave({"products": lambda: mx.eval(product())}, by.rounds)
    return Figure.of([read / seconds for seconds in timings.rounds("products")])


def crossing(by: Effort) -> Figure:
    """The time that ``crossing_s`` is, alone."""
    return _more(interleave(_crossings(by.steps), by.rounds), "crossing", "staying", by.steps)


def fast_crossing() -> tuple[Figure | None, str]:
    """`crossing` in another process with ``MLX_METAL_FAST_SYNCH=1``; without a figure, why there is none."""
    command = [sys.executable, "-P", "-m", "duo_mlx.bench.figures"]  # -P: a checkout's duo_mlx/ lacks bench
    try:
        done = subprocess.run(
            command, env=os.environ | FAST, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return Figure(**json.loads(done.stdout)), ""
    except subprocess.TimeoutExpired:
        return None, f"no answer in {PATIENCE:g} s"
    except subprocess.CalledProcessError as error:
        return None, error.stderr.strip().rpartition("\n")[2] or f"exit code {error.returncode}"
    except (OSError, ValueError, TypeError) as error:
        return None, " ".join(str(error).split())


def chosen(found: dict[str, Figure]) -> Figures | None:
    """The medians as `duo_mlx.auto` uses them; None where one drowned in noise, so that none may be used."""
    try:
        return Figures(**{name: figure.median for name, figure in found.items()})
    except ValueError:
        return None


def _more(timings: Timings, name: str, than: str, steps: int) -> Figure:
    """What each step of a call takes more than one of another."""
    pairs = zip(timings.rounds(name), timings.rounds(than), strict=True)
    return Figure.of([(longer - shorter) / steps for longer, shorter in pairs])


def _chain(steps: int) -> mx.array:
    """Tiny operations of which each waits for the one before."""
    x, one = mx.array(0), mx.array(1)
    for _ in range(steps):
        x = x + one
    return x


def _read_each(steps: int) -> None:
    x, one = mx.array(0), mx.array(1)
    for _ in range(steps):
        x = x + one
        x.item()


def _crossings(steps: int) -> dict[str, Callable[[], object]]:
    """A chain that goes to a stream of the CPU and back each time, and one of as many operations that stays."""
    here, there = mx.default_stream(mx.default_device()), mx.new_stream(mx.cpu)

    def go(by: mx.Stream) -> None:
        x, one = mx.array(0), mx.array(1)
        for _ in range(steps):
            x = mx.add(mx.add(x, one, stream=by), one, stream=here)
        mx.eval(x)

    return {"crossing": lambda: go(there), "staying": lambda: go(here)}


def _products(weights: int) -> tuple[Callable[[], mx.array], int]:
    """A chain of matrix-vector products, and the bytes of weights that it reads.

    On a GPU every matrix is read four times: a single pass would last no longer than it takes to begin.
    """
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    dtype, passes = (mx.float32, 1) if on_cpu else (mx.bfloat16, 4)
    side = min(4096 if on_cpu else 8192, int((weights / dtype.size) ** 0.5))
    count = weights // (side * side * dtype.size)
    bound = (3 / side) ** 0.5  # keeps the vector's size
    keys = mx.random.split(mx.random.key(0), count)
    matrices = [mx.random.uniform(-bound, bound, (side, side), dtype, key=key) for key in keys]
    mx.eval(matrices)

    def chain() -> mx.array:
        x = mx.ones((1, side), dtype)
        for matrix in matrices * passes:
            x = x @ matrix.T
        return x

    return chain, passes * sum(matrix.nbytes for matrix in matrices)


if __name__ == "__main__":
    print(json.dumps(asdict(crossing(effort()))))
