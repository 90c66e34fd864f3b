"""The projection's sum, checked on the machine at hand: predicted against measured ratios of route mixes.

    OPENBLAS_NUM_THREADS=1 python -m duo_mlx.bench.mixes --out mixes.json

Decodes by fixed patterns, from all big to all skip, and compares each pattern's time over all big's with what
`duo_mlx.projection.seconds` makes of the bytes that the pattern reads and of the primitives in its graph. The constants
are measured in the same interleaved rounds by benchmarks that know nothing of the mixes: the bandwidth by products of a
vector with weights of big's shape, more than the caches hold, and the cost of a primitive by a chain of small ones. The
head, which is in every mix and which a CPU reads faster than that (`duo_mlx.products.tall`), is timed by itself.
Nothing is fitted.

The default shape is SmolLM2-135M's with a small FFN 16 times narrower and random weights. On a machine that is busy
otherwise, ``--clock cpu`` counts the process's own seconds. What the host spends on building graphs, which overlaps
with the device on a free core, is then a part of the time that the sum does not know.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np

from duo_mlx.bench import options
from duo_mlx.bench.budget import evenly_spaced
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.peer import open_model, routed, spread, step_bytes
from duo_mlx.bench.prefill import CLOCKS, SHAPE
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.ffn import nbytes
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy
from duo_mlx.projection import Constants, seconds
from duo_mlx.routes import Route, Routes, format_pattern
from duo_mlx.work import Work

BIG = "all big"  # what every ratio is over
PRODUCTS, CHAIN, HEAD = "products", "chain", "head"  # the benchmarks of the constants
CHAIN_LENGTH = 1000
LIMIT = 0.15  # how far a predicted ratio may be from the measured one


def mixes(layers: int) -> dict[str, Routes]:
    """Patterns ``[layers]`` by name: big and small, big and skip, and all three."""
    found: dict[str, Routes] = {}
    for share in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        count = round(share * layers)
        found[{1.0: BIG, 0.0: "all small"}.get(share, f"{count} big, small")] = evenly_spaced(layers, count)
    cycle = np.arange(layers)
    found["big, skip in turn"] = np.where(cycle % 2, Route.SKIP, Route.BIG).astype(np.uint8)
    found["big, small, skip in turn"] = np.array([Route.BIG, Route.SMALL, Route.SKIP], np.uint8)[cycle % 3]
    found["all skip"] = np.full(layers, Route.SKIP, np.uint8)
    return found


def products(model: Model, megabytes: int) -> tuple[Callable[[], None], int]:
    """Products of a vector with weights of big's shape, and the bytes of all of them."""
    shape = model.config.intermediate_size, model.config.hidden_size
    count = max(1, megabytes * 10**6 // (4 * shape[0] * shape[1]))
    weights = [mx.random.normal(shape) for _ in range(count)]
    vector = mx.random.normal((1, shape[1]))
    mx.eval(weights, vector)
    return lambda: mx.eval([vector @ weight.T for weight in weights]), sum(weight.nbytes for weight in weights)


def chain(model: Model) -> Callable[[], None]:
    """`CHAIN_LENGTH` primitives on a hidden state, each of which needs the one before."""
    start = mx.random.normal((1, 1, model.config.hidden_size))
    mx.eval(start)

    def call() -> None:
        x = start
        for _ in range(CHAIN_LENGTH):
            x = mx.abs(x)
        mx.eval(x)

    return call


def head(model: Model) -> Callable[[], None]:
    """The logits of one token."""
    row = mx.random.normal((1, 1, model.config.hidden_size))
    mx.eval(row)
    return lambda: mx.eval(model.head(row))


def summary(timings: Timings, work: dict[str, Work], product_bytes: int, head_bytes: int, steps: int) -> dict[str, Any]:
    """The constants, and for each mix what was predicted of it and what was measured."""
    constants = Constants(
        bandwidth_bytes_s=product_bytes / timings.median(PRODUCTS),
        dispatch_s=timings.median(CHAIN) / CHAIN_LENGTH,
        read_back_s=0.0,  # routes are the host's: nothing waits
    )
    of_head = timings.median(HEAD)
    predicted = {
        name: of_head + seconds(each._replace(bytes=each.bytes - head_bytes), constants) for name, each in work.items()
    }
    found = {}
    for name, each in work.items():
        measured = spread(timings.ratios(name, {BIG: 1}))
        ratio = predicted[name] / predicted[BIG]
        found[name] = {
            "bytes": each.bytes,
            "primitives": each.dispatches,
            "predicted_s": predicted[name],
            "median_s": timings.median(name) / steps,
            "fastest_s": timings.best(name) / steps,
            "bytes_ratio": each.bytes / work[BIG].bytes,
            "predicted_ratio": ratio,
            "measured_ratio": measured,
            "error": ratio / measured["median"] - 1,
        }
    return {
        "constants": constants._asdict() | {"head_s": of_head},
        "mixes": found,
        "largest_error": max(abs(each["error"]) for each in found.values()),
        "limit": LIMIT,
    }


def table(result: dict[str, Any]) -> str:
    """The summary for a reader."""
    constants = result["constants"]
    bandwidth, primitive = constants["bandwidth_bytes_s"], constants["dispatch_s"]
    lines = [
        f"bandwidth {bandwidth / 1e9:.2f} GB/s, a primitive {1e6 * primitive:.2f} us, "
        f"the head {1e3 * constants['head_s']:.2f} ms",
        f"{'mix':<26} {'MB':>7} {'primitives':>11} {'ms':>7} {'predicted':>10} {'ratio':>7} {'predicted':>10} "
        f"{'bytes':>7} {'error':>7}",
    ]
    for name, of in result["mixes"].items():
        lines.append(
            f"{name:<26} {of['bytes'] / 1e6:>7.1f} {of['primitives']:>11.0f} {1e3 * of['median_s']:>7.2f} "
            f"{1e3 * of['predicted_s']:>10.2f} {of['measured_ratio']['median']:>7.3f} {of['predicted_ratio']:>10.3f} "
            f"{of['bytes_ratio']:>7.3f} {of['error']:>+7.1%}"
        )
    return "\n".join([*lines, f"largest error {result['largest_error']:.1%} (limit {result['limit']:.0%})"])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=5, help="Interleaved rounds, each there and back.")
@click.option("--tokens", type=click.IntRange(1), default=8, help="Tokens decoded in a run.")
@click.option("--context", type=click.IntRange(1), default=64, help="Positions in the cache before a run.")
@click.option("--layers", type=click.IntRange(3), default=SHAPE["num_hidden_layers"], help="Layers of the model.")
@click.option("--megabytes", type=click.IntRange(1), default=256, help="Weights that the bandwidth is measured with.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and caches.")
@options.clock
@options.out
@options.force
def command(
    rounds: int,
    tokens: int,
    context: int,
    layers: int,
    megabytes: int,
    seed: int,
    clock: str,
    out: Path | None,
    force: bool,
) -> None:
    """Time decoding by mixes of routes, and compare the ratios with those that the projection predicts."""
    if out:
        check_output(out, force)
    model = open_model(None, layers, seed)
    patterns = mixes(layers)
    decoders = {name: routed(model, FixedPolicy(each), context, seed=seed) for name, each in patterns.items()}
    half_way = context + tokens // 2 + 1
    work = {
        name: Work(step_bytes(model, each, half_way), decoders[name].primitives(), 0) for name, each in patterns.items()
    }
    multiply, product_bytes = products(model, megabytes)

    def decode(name: str) -> Callable[[], object]:
        return lambda: decoders[name](tokens)

    before = system_record()
    timings = interleave(
        {name: decode(name) for name in patterns} | {PRODUCTS: multiply, CHAIN: chain(model), HEAD: head(model)},
        rounds,
        after_round=lambda done: click.echo(f"round {done} of {rounds}", err=True),
        clock=CLOCKS[clock],
    )
    result = summary(timings, work, product_bytes, nbytes(model.embedding), tokens + 1)
    click.echo(table(result))
    if out:
        arguments = f"--rounds {rounds} --tokens {tokens} --context {context} --layers {layers} --megabytes {megabytes}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.mixes {arguments} --seed {seed} --clock {clock}",
            before,
            timings.runs,
            shape=SHAPE | {"num_hidden_layers": layers},
            patterns={name: format_pattern(each) for name, each in patterns.items()},
            steps_a_run=tokens + 1,
            product_bytes=product_bytes,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "mixes")


if __name__ == "__main__":
    main()
