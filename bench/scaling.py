"""How cost grows with layers, width, tokens and processes: the formulas of docs/scaling.md against counts.

    OPENBLAS_NUM_THREADS=1 python -m duo_mlx.bench.scaling --out scaling.json

At three sizes that grow in layers, width, vocabulary and length, each figure of decoding, training and the oracle's
search is computed by `duo_mlx.bench.growth` from sizes alone, and counted by `duo_mlx.bench.counted` on the real thing:
matrix products and weights in MLX's graphs, arrays, peaks of memory in new processes, rows that go through modules, and
bytes that processes write to their connections. Counts must agree exactly, peaks within a tolerance. Nothing is timed.

Beside that stands what the formulas alone say of SmolLM2-135M's shape.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import numpy as np

from duo_mlx.bench import counted, growth, options
from duo_mlx.bench.budget import evenly_spaced
from duo_mlx.bench.prefill import SHAPE
from duo_mlx.bench.record import check_output, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.errors import DuoError
from duo_mlx.model import Config, Model
from duo_mlx.policies import RandomPolicy
from duo_mlx.routes import Route, Routes

SEQUENCES = 4  # of a training step
PROCESSES = (2, 4)
SEARCHED, ROWS = 32, 64  # tokens of a search's text, and patterns of its batches
TEXTS = 5  # that processes share out
PEAK = 0.05  # what a predicted peak of training may be off
SEARCH_PEAK = 0.25  # and of a search, where it depends on how far the host is ahead of the device


class Size(NamedTuple):
    """A model's sizes and the length of its sequences; a token that is decoded attends to as many positions."""

    layers: int
    hidden: int
    big: int
    small: int
    vocabulary: int
    length: int

    def __str__(self) -> str:
        return f"{self.layers} x {self.hidden}"

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""
        return {
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.big,
            "small_intermediate_size": self.small,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "vocab_size": self.vocabulary,
        }


SIZES = (
    Size(4, 64, 256, 16, 512, 64),
    Size(8, 128, 512, 32, 1024, 128),
    Size(12, 256, 1024, 64, 2048, 256),
)


class Row(NamedTuple):
    """One figure, as predicted and as counted."""

    part: str
    size: str
    what: str
    predicted: float
    counted: float | None  # None: this system does not tell
    tolerance: float = 0.0

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of the count."""
        return 0.0 if self.counted is None else abs(self.predicted / self.counted - 1)


def patterns(layers: int) -> dict[str, Routes]:
    """Patterns ``[layers]`` by name, from all big to all skip."""
    return {
        "all big": np.full(layers, Route.BIG, np.uint8),
        "half big": evenly_spaced(layers, layers // 2),
        "all small": np.full(layers, Route.SMALL, np.uint8),
        "all skip": np.full(layers, Route.SKIP, np.uint8),
    }


def decoding(size: Size, model: Model) -> Iterator[Row]:
    """One token."""
    for name, pattern in patterns(size.layers).items():
        expected = growth.decoding(model.config, pattern, size.length)
        for what, predicted, count in zip(
            expected._fields, expected, counted.decoding(model, pattern, size.length), strict=True
        ):
            yield Row("decoding", str(size), f"{name}: {what}", predicted, count)


def training(size: Size, args: Config) -> Iterator[Row]:
    """One step."""
    at = ("training", str(size))
    for name, small_only in (("routes", False), ("small", True)):
        found = counted.training(size.config, small_only, SEQUENCES, size.length)
        routes, learned = found["routes"], growth.learned(args, small_only)
        flops = growth.training_flops(args, routes, size.length, small_only)
        added = growth.recomputed_products(routes, small_only)
        yield Row(*at, f"{name}: parameters that learn", learned, found["learned"])
        yield Row(*at, f"{name}: bytes of parameters and moments", 12 * learned, found["moments"])
        yield Row(*at, f"{name}: FLOPs", flops, found["flops"])
        yield Row(*at, f"{name}: products added by --checkpoint-layers", added, found["added"])
    routes = counted.training(size.config, False, SEQUENCES, size.length)["routes"]
    for recompute in (False, True):
        name = "checkpointed layers" if recompute else "all kept"
        (peaks,) = counted.together(counted.training_peak, size.config, SEQUENCES, size.length, recompute)
        gradients = growth.gradient_bytes(args, routes, size.length, True, recompute)
        yield Row(*at, f"{name}: peak bytes of forward and backward", gradients, peaks["gradients"], PEAK)
        yield Row(*at, f"{name}: peak bytes of a step", growth.step_bytes(args, gradients), peaks["step"], PEAK)
    yield Row(*at, "peak bytes of a step of one short sequence", growth.step_bytes(args, 0), peaks["short"], PEAK)


def exchange(sizes: tuple[Size, ...]) -> Iterator[Row]:
    """What processes give each other in a step, and the texts that each of them searches."""
    length = sizes[0].length
    configs = [size.config for size in sizes]
    for count in PROCESSES:
        batch = SEQUENCES * -(-count // SEQUENCES)
        found = counted.together(counted.exchanged, configs, batch, length, TEXTS, processes=count)
        for number, size in enumerate(sizes):
            steps = [each["steps"][number] for each in found]
            learned = growth.learned(Config.from_dict(size.config), small_only=False)
            summed = growth.FLOAT * (learned + 1 + batch * (length + 1))  # the loss, and everybody's windows
            at = ("processes", str(size))
            yield Row(*at, f"{count}: bytes that each adds to sums", summed, _mean(steps, "summed"))
            yield Row(*at, f"{count}: bytes that each sends", growth.ring_bytes(summed, count), _mean(steps, "sent"))
        for rank, texts in enumerate(growth.sequences(TEXTS, count)):
            what = f"{count}: texts of {TEXTS} that process {rank} searches"
            yield Row("processes", str(sizes[0]), what, texts, found[rank]["searched"])


def _mean(steps: list[dict[str, Any]], key: str) -> float | None:
    values = [step[key] for step in steps]
    return None if None in values else sum(values) / len(values)


def search(size: Size, model: Model) -> Iterator[Row]:
    """The oracle's search."""
    layers, half = size.layers, size.layers // 2
    two, three = (Route.SMALL, Route.BIG), tuple(Route)
    cases = {
        f"2^{layers}": (growth.tree(layers, 2, 2), counted.searching(model, layers, two, SEARCHED, ROWS)),
        f"3^{half}": (growth.tree(half, 3, 2), counted.searching(model, half, three, SEARCHED, ROWS)),
        f"committed, {half} big": (growth.budgeted(layers, half), counted.committed(model, half)),
    }
    for name, (expected, work) in cases.items():
        for kind in ("attention", "ffn", "head"):
            yield Row("search", str(size), f"{name}: {kind}", getattr(expected, kind), getattr(work, kind))
    (peak,) = counted.together(counted.search_peak, size.config, SEARCHED, ROWS)
    predicted = growth.search_bytes(model.config, 2, SEARCHED, ROWS)
    yield Row("search", str(size), f"2^{layers}: peak bytes", predicted, peak, SEARCH_PEAK)


def projected(sequences: int = 8, length: int = 512) -> dict[str, Any]:
    """What the formulas say of SmolLM2-135M's shape in float32; nothing here is counted."""
    args = Config.from_dict(SHAPE)
    layers = args.num_hidden_layers
    routes = np.concatenate(
        [
            RandomPolicy(layers, counted.BIG, counted.SMALL, counted.SKIP, seed=row).routes(0, length)[0]
            for row in range(sequences)
        ]
    )
    gradients = {
        name: growth.gradient_bytes(args, routes, length, True, recompute)
        for name, recompute in (("all kept", False), ("checkpointed layers", True))
    }
    learned = {name: growth.learned(args, small_only) for name, small_only in (("routes", False), ("small", True))}
    return {
        "decoding": {
            f"{name}, context {context}": growth.decoding(args, pattern, context)._asdict()
            for context in (1024, 8192)
            for name, pattern in patterns(layers).items()
        },
        "training": {
            "tokens": len(routes),
            "learned": learned,
            "flops": {
                name: growth.training_flops(args, routes, length, small_only)
                for name, small_only in (("routes", False), ("small", True))
            },
            "peak_bytes": {name: growth.step_bytes(args, each) for name, each in gradients.items()},
            "sent_bytes": {
                f"{name}, {count} processes": round(growth.ring_bytes(growth.FLOAT * each, count))
                for name, each in learned.items()
                for count in (2, 8)
            },
        },
        "search": {
            "2^30": asdict(growth.tree(layers, 2, 2)),
            "committed, 3 big": asdict(growth.budgeted(layers, 3)),
            "committed, 15 big": asdict(growth.budgeted(layers, 15)),
        },
    }


def rows(sizes: tuple[Size, ...]) -> Iterator[Row]:
    """All figures of all sizes."""
    for size in sizes:
        model = counted.model_of(size.config)
        for part in (decoding(size, model), training(size, model.config), search(size, model)):
            yield from part
    yield from exchange(sizes)


def table(found: list[Row]) -> str:
    """The rows for a reader."""
    lines = [
        f"{row.part:<10} {row.size:<9} {row.what:<52} {row.predicted:>16,.0f} "
        f"{'-' if row.counted is None else f'{row.counted:,.0f}':>16} {row.error:>6.1%}"
        for row in found
    ]
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json file.")
@options.force
def command(out: Path | None, force: bool) -> None:
    """Compare the formulas of docs/scaling.md with counts at three sizes."""
    if out:
        check_output(out, force)
        if out.suffix != ".json":
            raise DuoError(f"--out {out}: the name must end in .json; there are no runs to list")
    found = []
    for row in rows(SIZES):
        found.append(row)
        click.echo(table([row]))
    wrong = [row for row in found if row.error > row.tolerance]
    click.echo(f"{len(found) - len(wrong)} of {len(found)} agree")
    if out:
        record = {
            "command": "python -m duo_mlx.bench.scaling",
            "system": system_record(),
            "sizes": {str(size): size._asdict() for size in SIZES},
            "step": {"sequences": SEQUENCES, "processes": PROCESSES},
            "search": {"tokens": SEARCHED, "rows": ROWS},
            "rows": [row._asdict() | {"error": row.error} for row in found],
            "projected": {"shape": SHAPE, "of": projected()},
        }
        write_output(out, record)
    if wrong:
        raise DuoError(f"predictions that are off: {'; '.join(f'{row.size}, {row.what}' for row in wrong)}")


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "scaling")


if __name__ == "__main__":
    main()
