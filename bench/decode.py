"""Decoding beside mlx-lm's own model, and how much of what routes leave unread shows as time.

    python -m duo_mlx.bench.decode --out decode.json

Interleaved rounds, each a run of decoded tokens through mlx-lm's own loop: mlx-lm's model on the Duo's big weights, the
Duo by uniform patterns that the host knows, and by a router against the very routes that it took, given as a plan.
Beside the times stand what they should follow: the primitives in a step's graph and the bytes that it touches. The
same model is timed twice: how far the two are apart is what the machine cannot tell. A prefill of all-big is timed
against mlx-lm's in rounds of its own.

Without --model the weights are random: SmolLM2-135M's shape, a small FFN 16 times narrower, routers over skip, small
and big. What a trained router decides on the tokens here, which no one wrote, means nothing; what it costs does.
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
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.peer import (
    PATTERNS,
    Decoder,
    base_twin,
    check_context,
    decoders,
    filled_cache,
    open_model,
    pattern,
    routed,
    spread,
    step_bytes,
)
from duo_mlx.bench.prefill import CLOCKS
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.conditional import STRATEGIES
from duo_mlx.model import Model
from duo_mlx.policies import ReplayPolicy
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Route, Routes, histogram

PEER_GOAL = 1.00  # mlx-lm's time over all-big's, at least
SHARE_GOAL = 0.85  # of the ratio of bytes that shows as a ratio of times, at least
ROUTER_GOAL = 1.03  # a router's time over that of its routes given as a plan, at most


def routes_taken(model: Model, context: int, tokens: int, strategy: str, seed: int = 0) -> Routes:
    """The routes ``[positions, layers]`` that the model's router takes while ``tokens`` are decoded after ``context``.

    Before ``context``, where nothing is decoded, they are big.
    """
    recording = RoutedModel(model, model.router(), strategy, start=context)
    Decoder(lambda: recording, filled_cache(model, context, seed), context)(tokens)
    taken = np.full((context + tokens + 1, model.config.num_hidden_layers), Route.BIG, np.uint8)
    for position in range(context, len(taken)):
        taken[position] = recording.later(position)()
    return taken


def prefills(model: Model, twin: Any, tokens: int, seed: int) -> dict[str, Callable[[], None]]:
    """What prefills a prompt, by name; keys and values are evaluated, logits are not."""
    prompt = mx.array(np.random.default_rng(seed).integers(0, model.config.vocab_size, (1, tokens)))
    big = pattern(model, Route.BIG)

    def prefill(call: Callable[..., mx.array]) -> Callable[[], None]:
        def run() -> None:
            cache = model.make_cache()
            call(prompt, cache=cache)
            mx.eval([layer.state for layer in cache])

        return run

    return {"mlx-lm": prefill(twin), "all-big": prefill(lambda prompt, cache: model(prompt, cache=cache, routes=big))}


def summary(
    timings: Timings, steps: int, bytes_by_name: dict[str, float], primitives: dict[str, int]
) -> dict[str, Any]:
    """Medians and fastest runs in seconds a step, and the paired ratios that have goals."""
    names = timings.runs.keys()
    result: dict[str, Any] = {
        "median_s": {name: timings.median(name) / steps for name in names},
        "fastest_s": {name: timings.best(name) / steps for name in names},
        "bytes": bytes_by_name,
        "primitives": primitives,
    }
    if "mlx-lm" in names:
        result["noise: mlx-lm / itself"] = spread(timings.ratios("mlx-lm again", {"mlx-lm": 1}))
        result["mlx-lm / all-big"] = spread(timings.ratios("mlx-lm", {"all-big": 1})) | {"at_least": PEER_GOAL}
    for name in ("all-small", "all-skip"):
        ratio = bytes_by_name["all-big"] / bytes_by_name[name]
        times = timings.ratios("all-big", {name: 1})
        result[f"all-big / {name}"] = spread(times) | {"bytes": ratio}
        result[f"share of the byte ratio, {name}"] = spread([time / ratio for time in times]) | {"at_least": SHARE_GOAL}
    if "router" in names:
        result["router / its routes as a plan"] = spread(timings.ratios("router", {"plan": 1})) | {
            "at_most": ROUTER_GOAL
        }
    return result


def table(result: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'decoding':<13} {'median ms':>10} {'fastest ms':>11} {'MB':>8} {'primitives':>11}"]
    for name, median in result["median_s"].items():
        touched, primitives = result["bytes"].get(name), result["primitives"].get(name, "")
        size = "" if touched is None else f"{touched / 1e6:.1f}"
        lines.append(
            f"{name:<13} {1e3 * median:>10.2f} {1e3 * result['fastest_s'][name]:>11.2f} {size:>8} {primitives:>11}"
        )
    return "\n".join([*lines, *(line(name, of) for name, of in result.items() if "interval_95" in of)])


def line(name: str, of: dict[str, Any]) -> str:
    """One paired ratio for a reader."""
    low, high = of["interval_95"]
    goal = "".join(
        f", goal: {word} {of[key]:.2f}" for key, word in (("at_least", ">="), ("at_most", "<=")) if key in of
    )
    byte_ratio = f", bytes {of['bytes']:.3f}" if "bytes" in of else ""
    return f"{name}: {of['median']:.3f} ({low:.3f} to {high:.3f}){byte_ratio}{goal}"


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@options.model
@click.option(
    "--against", type=click.Choice(["mlx-lm", "none"]), default="mlx-lm", help="What to compare all-big with."
)
@options.rounds
@click.option("--tokens", type=click.IntRange(1), default=32, help="Tokens decoded in a run.")
@click.option("--context", type=click.IntRange(1), default=128, help="Positions in the cache before a run.")
@click.option("--prefill", type=click.IntRange(1), default=512, help="Length of the prompt whose prefill is timed.")
@options.layers
@click.option("--strategy", type=click.Choice(STRATEGIES), default="auto", help="How the router's routes are run.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights, prompt and caches.")
@options.clock
@options.out
@options.force
def command(
    directory: Path | None,
    against: str,
    rounds: int,
    tokens: int,
    context: int,
    prefill: int,
    layers: int,
    strategy: str,
    seed: int,
    clock: str,
    out: Path | None,
    force: bool,
) -> None:
    """Time decoding by uniform patterns and by a router against mlx-lm's own model on the same weights."""
    if out:
        check_output(out, force)
    model = open_model(directory, layers, seed)
    check_context(model, context + tokens + 1)
    twin = base_twin(model) if against == "mlx-lm" else None
    cases = decoders(model, twin, context, seed)
    if twin is not None:
        cases["mlx-lm again"] = Decoder(lambda: twin, cases["mlx-lm"].cache, context)
    half_way = context + tokens // 2 + 1
    touched = {name: step_bytes(model, pattern(model, route), half_way) for name, route in PATTERNS.items()}
    counts = {name: case.primitives() for name, case in cases.items()}
    mix = None
    if model.config.router_choices:
        taken = routes_taken(model, context, tokens, strategy, seed)
        mix = histogram(taken[context:])
        cases["router"] = routed(model, model.router(), context, strategy, seed)
        cases["plan"] = routed(model, ReplayPolicy(taken), context, seed=seed)
        touched |= {
            "router": step_bytes(model, taken[context:], half_way, by_router=True),
            "plan": step_bytes(model, taken[context:], half_way),
        }
    if twin is not None:
        touched["mlx-lm"] = touched["all-big"]
    before = system_record()

    def progress(done: int) -> None:
        click.echo(f"round {done} of {rounds}", err=True)

    def decoding(case: Decoder) -> Callable[[], object]:
        return lambda: case(tokens)

    timings = interleave(
        {name: decoding(case) for name, case in cases.items()}, rounds, after_round=progress, clock=CLOCKS[clock]
    )
    result = summary(timings, tokens + 1, touched, counts)
    runs = dict(timings.runs)
    if twin is not None:
        timed = interleave(prefills(model, twin, prefill, seed), rounds, after_round=progress, clock=CLOCKS[clock])
        result["prefill mlx-lm / all-big"] = spread(timed.ratios("mlx-lm", {"all-big": 1})) | {"at_least": PEER_GOAL}
        runs |= {f"prefill {name}": seconds for name, seconds in timed.runs.items()}
    click.echo(table(result))
    if out:
        of = options.weights_of(directory, layers)
        arguments = f"--against {against} --rounds {rounds} --tokens {tokens} --context {context} --prefill {prefill}"
        arguments = f"{arguments} --strategy {strategy} --seed {seed} --clock {clock}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.decode {of} {arguments}",
            before,
            runs,
            shape=model.config.to_dict(),
            steps_a_run=tokens + 1,
            routes_of_router=mix,
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "decode")


if __name__ == "__main__":
    main()
