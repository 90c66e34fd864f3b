"""Prefill by per-token routes: what mixing big and small costs beyond its share of the FLOPs.

    python -m duo_mlx.bench.prefill --out prefill.json

Runs one prompt through a model with random weights, all-big, all-small and half and half (each token and layer draws
its own route, strategy ``sorted``, routes known to the host), interleaved. The ideal of the mixed pass lies between
the other two in proportion to its FLOPs, which is the share of big among its routes; what is above it is the price of
sorting. A pass ends as in mlx-lm's prefill: keys and values are evaluated and no logits are asked for, so the last
layer's FFN and the head, which would hide the price, do not run.

The default shape is SmolLM2-135M's with a small FFN 16 times narrower.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np

from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.model import Config, Model
from duo_mlx.policies import RandomPolicy
from duo_mlx.routes import Route, Routes

SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "intermediate_size": 1536,
    "small_intermediate_size": 96,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
LIMIT = 1.10  # what the mixed pass may take of its ideal


def passes(model: Model, tokens: int, seed: int) -> tuple[dict[str, Callable[[], None]], float]:
    """The three prefills to time, by name, and the share of big among the FFNs that the mixed one runs."""
    layers = model.config.num_hidden_layers
    prompt = mx.array(np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, tokens)))
    mixed = RandomPolicy(layers, big=0.5, small=0.5, seed=seed).routes(0, tokens)
    routes: dict[str, Routes] = {
        "all-big": np.full(layers, Route.BIG, np.uint8),
        "all-small": np.full(layers, Route.SMALL, np.uint8),
        "mixed": mixed,
    }

    def prefill(chosen: Routes) -> Callable[[], None]:
        def run() -> None:
            cache = model.make_cache()
            model(prompt, cache=cache, routes=chosen, strategy="sorted")
            mx.eval([layer.state for layer in cache])

        return run

    share = float((mixed[..., :-1] == Route.BIG).mean())  # nobody asks for the last layer's FFN
    return {name: prefill(chosen) for name, chosen in routes.items()}, share


def summary(timings: Timings, share: float) -> dict[str, Any]:
    """Medians and fastest runs in seconds, and the mixed pass's time over its ideal."""
    weights = {"all-big": share, "all-small": 1 - share}
    ratios = timings.ratios("mixed", weights)
    return {
        "median_s": {name: timings.median(name) for name in timings.runs},
        "fastest_s": {name: timings.best(name) for name in timings.runs},
        "share_of_big": share,
        "mixed_over_ideal": {
            "median_of_rounds": statistics.median(ratios),
            "of_fastest_runs": timings.best("mixed") / sum(timings.best(name) * part for name, part in weights.items()),
            "rounds": ratios,
        },
        "limit": LIMIT,
    }


def table(result: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'pass':<10} {'median ms':>10} {'fastest ms':>11}"]
    for name, median in result["median_s"].items():
        lines.append(f"{name:<10} {1e3 * median:>10.1f} {1e3 * result['fastest_s'][name]:>11.1f}")
    over = result["mixed_over_ideal"]
    lines.append(
        f"mixed / ideal ({result['share_of_big']:.3f} big): median of {len(over['rounds'])} paired rounds "
        f"{over['median_of_rounds']:.3f}, of fastest runs {over['of_fastest_runs']:.3f} (limit {result['limit']:.2f})"
    )
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--rounds", type=click.IntRange(1), default=10, help="Interleaved rounds, each there and back.")
@click.option("--tokens", type=click.IntRange(1), default=512, help="Length of the prompt.")
@click.option("--layers", type=click.IntRange(2), default=SHAPE["num_hidden_layers"], help="Layers of the model.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, prompt and routes.")
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    help="wall; or the process's own cpu seconds, for a machine that is busy otherwise (set OPENBLAS_NUM_THREADS=1).",
)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json or .csv file.")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
def command(rounds: int, tokens: int, layers: int, seed: int, clock: str, out: Path | None, force: bool) -> None:
    """Time prefill of all-big, all-small and mixed routes, and compare the mixed one with its ideal."""
    if out:
        check_output(out, force)
    mx.random.seed(seed)
    shape = SHAPE | {"num_hidden_layers": layers}
    model = Model(Config.from_dict(shape))
    mx.eval(model.parameters())
    calls, share = passes(model, tokens, seed)
    before = system_record()
    timings = interleave(
        calls,
        rounds,
        after_round=lambda done: click.echo(f"round {done} of {rounds}", err=True),
        clock=CLOCKS[clock],
    )
    result = summary(timings, share)
    click.echo(table(result))
    if out:
        options = f"--rounds {rounds} --tokens {tokens} --layers {layers} --seed {seed} --clock {clock}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.prefill {options}",
            before,
            timings.runs,
            shape=shape,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "prefill")


if __name__ == "__main__":
    main()
