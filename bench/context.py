"""What a longer context costs: milliseconds of a decoding step by the positions in the cache, beside mlx-lm's.

    python -m duo_mlx.bench.context --out context.json

All lengths and models are timed in the same interleaved rounds, each a run of decoded tokens through mlx-lm's own loop.
The caches are filled with noise of that length. Keys and values are read whatever the FFNs' routes are, so the longer
the context, the less of a step is left to save; the bytes beside the times say how much.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
from duo_mlx.bench import options
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.peer import (
    PATTERNS,
    Decoder,
    base_twin,
    check_context,
    decoders,
    open_model,
    pattern,
    spread,
    step_bytes,
)
from duo_mlx.bench.prefill import CLOCKS
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.errors import DuoError
from duo_mlx.model import Model

DUO = ("all-big", "all-small")
NAMES = ("mlx-lm", *DUO)


def parse_contexts(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    """``128,1024`` as numbers."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise DuoError(f"--contexts {text}: must be numbers of positions with commas between, such as 128,1024")
    return sorted({int(part) for part in parts})


def cases(model: Model, contexts: list[int], seed: int) -> dict[str, Decoder]:
    """Decoders by ``NAME at POSITIONS``."""
    twin = base_twin(model)
    return {
        f"{name} at {context}": decoder
        for context in contexts
        for name, decoder in decoders(model, twin, context, seed, DUO).items()
    }


def summary(timings: Timings, model: Model, contexts: list[int], tokens: int) -> list[dict[str, Any]]:
    """One entry a context: milliseconds and bytes a step, and what all-small gains there."""
    found = []
    for context in contexts:
        half_way = context + tokens // 2 + 1
        touched = {name: step_bytes(model, pattern(model, PATTERNS[name]), half_way) for name in DUO}
        at = {name: f"{name} at {context}" for name in NAMES}
        found.append(
            {
                "context": context,
                "median_ms": {name: 1e3 * timings.median(at[name]) / (tokens + 1) for name in NAMES},
                "bytes": touched,
                "byte_ratio": touched["all-big"] / touched["all-small"],
                "mlx-lm / all-big": spread(timings.ratios(at["mlx-lm"], {at["all-big"]: 1})),
                "all-big / all-small": spread(timings.ratios(at["all-big"], {at["all-small"]: 1})),
            }
        )
    return found


def table(result: list[dict[str, Any]]) -> str:
    """The summary for a reader."""
    lines = [
        f"{'ms a step at':>12} {'mlx-lm':>8} {'all-big':>8} {'all-small':>10}  "
        "mlx-lm / all-big     all-big / all-small    bytes"
    ]
    for at in result:
        peer, small = (
            "{:.2f} ({:.2f} to {:.2f})".format(at[name]["median"], *at[name]["interval_95"])
            for name in ("mlx-lm / all-big", "all-big / all-small")
        )
        ms = at["median_ms"]
        lines.append(
            f"{at['context']:>12} {ms['mlx-lm']:>8.2f} {ms['all-big']:>8.2f} {ms['all-small']:>10.2f}"
            f"  {peer:<20} {small:<22} {at['byte_ratio']:.2f}"
        )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@options.model
@click.option("--contexts", default="128,1024,4096,8192", callback=parse_contexts, help="Positions in the cache.")
@options.rounds
@click.option("--tokens", type=click.IntRange(1), default=8, help="Tokens decoded in a run.")
@options.layers
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and caches.")
@options.clock
@options.out
@options.force
def command(
    directory: Path | None,
    contexts: list[int],
    rounds: int,
    tokens: int,
    layers: int,
    seed: int,
    clock: str,
    out: Path | None,
    force: bool,
) -> None:
    """Time decoding steps at several lengths of context."""
    if out:
        check_output(out, force)
    model = open_model(directory, layers, seed)
    check_context(model, contexts[-1] + tokens + 1)
    before = system_record()

    def decoding(case: Decoder) -> Callable[[], object]:
        return lambda: case(tokens)

    timings = interleave(
        {name: decoding(case) for name, case in cases(model, contexts, seed).items()},
        rounds,
        after_round=lambda done: click.echo(f"round {done} of {rounds}", err=True),
        clock=CLOCKS[clock],
    )
    result = summary(timings, model, contexts, tokens)
    click.echo(table(result))
    if out:
        of = options.weights_of(directory, layers)
        arguments = f"--contexts {','.join(map(str, contexts))} --rounds {rounds} --tokens {tokens}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.context {of} {arguments} --seed {seed} --clock {clock}",
            before,
            timings.runs,
            shape=model.config.to_dict(),
            steps_a_run=tokens + 1,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "context")


if __name__ == "__main__":
    main()
