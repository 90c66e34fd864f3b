"""Where a decoding step's time goes: milliseconds of each part, of building its graph and of running it.

    python -m duo_mlx.bench.parts --out parts.json

Each part's own graph, over all layers and on the model's real shapes and weights, is timed in the same interleaved
rounds as whole steps: once as it is built and dropped, once as it is built and evaluated; the difference is what
running it takes. ``attention`` is everything in a block except its FFN: norms and residuals, too. The FFNs of the
layers follow each other, as they do in a step, by `mx.depends`. What a whole step takes beyond its parts' runs is the
rest: the last norm, and what parts cost only together.
While `generate_step` decodes, the host builds a step as the device runs the one before; what that hides, or what it
costs, shows between a whole step and one of ``decoding``. A router that the host reads runs while its graph is built,
so it stands under graph.
"""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import can_trim_prompt_cache

from duo_mlx import cost
from duo_mlx.bench import options
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.peer import PATTERNS, Decoder, base_twin, check_context, decoders, open_model
from duo_mlx.bench.prefill import CLOCKS
from duo_mlx.bench.record import check_output, run, write_runs
from duo_mlx.bench.system import system_record
from duo_mlx.ffn import DuoFFN
from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers, can_open
from duo_mlx.router import LinearRouter

Build = Callable[[], mx.array]  # makes the unevaluated array that a part ends in

ALWAYS = ("embedding", "attention", "head", "sampling")  # in every step of a Duo
FFNS = {"all-big": ("big",), "all-small": ("small",), "all-skip": ()}


def chain(x: mx.array, ffns: Iterable[DuoFFN], part: Callable[[DuoFFN, mx.array], mx.array]) -> mx.array:
    """``part`` of every layer's FFNs on the same ``x``, each after the one before."""
    for ffn in ffns:
        x = mx.depends([x], [part(ffn, x)])[0]
    return x


def sample(logits: mx.array) -> mx.array:
    """The next token as `generate_step` finds it greedily."""
    last = logits[:, -1, :]
    return mx.argmax(last - mx.logsumexp(last, keepdims=True), axis=-1)


def possible(model: Model) -> bool:
    """Whether a step of the model can be taken apart: its caches can be taken back, its layers called one by one."""
    return can_trim_prompt_cache(model.make_cache()) and not any(cost.windows(model)) and can_open(model)


def parts(model: Model, cache: list[Any]) -> dict[str, Build]:
    """What builds each part of a decoding step after what ``cache`` holds.

    Raises:
        DuoError: the base's layers cannot be called one by one.
    """
    token = mx.array([[1]])
    x = mx.random.normal((1, 1, model.config.hidden_size), model.dtype)
    logits = mx.random.normal((1, 1, model.config.vocab_size), x.dtype)
    mx.eval(x, logits)
    OpenLayers(model, token)  # refuses here, and not while the clock runs

    def attention() -> mx.array:
        layers, h = OpenLayers(model, token, cache), x
        for index in range(len(model.ffns)):
            h = layers.open(index, h, lambda _, normed: normed)
        return h

    built = {
        "embedding": lambda: model.embedding(token),
        "attention": attention,
        "big": lambda: chain(x, model.ffns, lambda ffn, x: ffn.big(x)),
        "small": lambda: chain(x, model.ffns, lambda ffn, x: ffn.small(x)),
        "head": lambda: model.head(x),
        "sampling": lambda: sample(logits),
    }
    router = model.router() if model.config.router_choices else None
    if isinstance(router, LinearRouter):  # one that looks ahead is asked before the pass, not by its layers

        def read(ffn: DuoFFN, x: mx.array) -> mx.array:
            route = router.routes(ffn.index, x)
            np.array(route)
            return route

        built["router"] = lambda: chain(x, model.ffns, lambda ffn, x: router.routes(ffn.index, x))
        built["router, read by the host"] = lambda: chain(x, model.ffns, read)
    return built


def calls(
    built: dict[str, Build], cache: list[Any], context: int, cases: dict[str, Decoder], tokens: int
) -> dict[str, Callable[[], object]]:
    """What to time: each part and whole step ``NAME: graph`` and ``NAME: all``, and ``NAME: decoding``."""

    def graph(build: Build, cache: list[Any]) -> Callable[[], None]:
        def run() -> None:
            before = [layer.state for layer in cache]
            for layer, (keys, values, offset) in zip(cache, before, strict=True):
                layer.state = mx.array(keys), mx.array(values), offset  # a cache writes into the arrays that it holds
            build()
            for layer, state in zip(cache, before, strict=True):
                layer.state = state

        return run

    def everything(build: Build, cache: list[Any]) -> Callable[[], None]:
        def run() -> None:
            mx.eval(build())
            for layer in cache:
                layer.trim(layer.offset - context)

        return run

    def step(case: Decoder) -> Build:
        return lambda: sample(case.bind()(mx.array([[1]]), cache=case.cache))

    made: dict[str, Callable[[], object]] = {}
    for name, build, own in [
        *((name, build, cache) for name, build in built.items()),
        *((name, step(case), case.cache) for name, case in cases.items()),
    ]:
        made[f"{name}: graph"], made[f"{name}: all"] = graph(build, own), everything(build, own)
    for name, case in cases.items():
        made[f"{name}: decoding"] = lambda case=case: case(tokens)  # type: ignore[misc]
    return made


def summary(timings: Timings, tokens: int) -> dict[str, Any]:
    """Median milliseconds of each part, and each whole step with what its parts leave unexplained."""

    def graph(name: str) -> float:
        return 1e3 * timings.median(f"{name}: graph")

    def running(name: str) -> float:
        both = zip(timings.rounds(f"{name}: all"), timings.rounds(f"{name}: graph"), strict=True)
        return 1e3 * statistics.median(all_of_it - built for all_of_it, built in both)

    names = [name.removesuffix(": graph") for name in timings.runs if name.endswith(": graph")]
    of_parts = {name: {"graph_ms": graph(name), "run_ms": running(name)} for name in names}
    steps = {name: of_parts.pop(name) for name in ("mlx-lm", *PATTERNS) if name in of_parts}
    for name, step in steps.items():
        step["all_ms"] = 1e3 * timings.median(f"{name}: all")
        step["decoding_ms"] = 1e3 * timings.median(f"{name}: decoding") / (tokens + 1)
        if name in FFNS:
            step["rest_ms"] = step["run_ms"] - sum(of_parts[part]["run_ms"] for part in (*ALWAYS, *FFNS[name]))
    return {"parts": of_parts, "steps": steps}


def measure(model: Model, context: int, rounds: int = 6) -> dict[str, Any]:
    """The parts of a step after ``context`` positions, in seconds, and whole steps by uniform pattern, for a result."""
    cases = decoders(model, None, context)
    cache = cases["all-big"].cache
    timed = interleave(calls(parts(model, cache), cache, context, cases, tokens=1), rounds, warm_up=2)
    found = summary(timed, tokens=1)
    return {
        "seconds": {
            name: found["parts"][name]["run_ms"] / 1e3
            for name in (*ALWAYS, "big", "small", "router")
            if name in found["parts"]
        },
        "whole": {
            name.removeprefix("all-"): {"run_s": of["run_ms"] / 1e3, "graph_s": of["graph_ms"] / 1e3}
            for name, of in found["steps"].items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The summary for a reader."""
    lines = [f"{'ms a step':<26} {'graph':>7} {'run':>7}"]
    for name, of in result["parts"].items():
        lines.append(f"{name:<26} {of['graph_ms']:>7.2f} {of['run_ms']:>7.2f}")
    lines.append(f"{'whole step':<26} {'graph':>7} {'run':>7} {'rest':>7} {'all':>7} {'decoding':>9}")
    for name, of in result["steps"].items():
        rest = f"{of['rest_ms']:.2f}" if "rest_ms" in of else ""
        both = f"{of['graph_ms']:>7.2f} {of['run_ms']:>7.2f}"
        lines.append(f"{name:<26} {both} {rest:>7} {of['all_ms']:>7.2f} {of['decoding_ms']:>9.2f}")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@options.model
@click.option("--rounds", type=click.IntRange(1), default=20, help="Interleaved rounds, each there and back.")
@click.option("--tokens", type=click.IntRange(1), default=8, help="Tokens decoded in a run of whole decoding.")
@click.option("--context", type=click.IntRange(1), default=128, help="Positions in the cache before a step.")
@options.layers
@click.option("--seed", type=click.IntRange(0), default=0, help="Of weights and caches.")
@options.clock
@options.out
@options.force
def command(
    directory: Path | None,
    rounds: int,
    tokens: int,
    context: int,
    layers: int,
    seed: int,
    clock: str,
    out: Path | None,
    force: bool,
) -> None:
    """Break a decoding step down into milliseconds of its parts."""
    if out:
        check_output(out, force)
    model = open_model(directory, layers, seed)
    check_context(model, context + tokens + 1)
    cases = decoders(model, base_twin(model), context, seed)
    cache = cases["all-big"].cache
    before = system_record()
    timings = interleave(
        calls(parts(model, cache), cache, context, cases, tokens),
        rounds,
        warm_up=2,
        after_round=lambda done: click.echo(f"round {done} of {rounds}", err=True),
        clock=CLOCKS[clock],
    )
    result = summary(timings, tokens)
    click.echo(table(result))
    if out:
        of = options.weights_of(directory, layers)
        arguments = f"--rounds {rounds} --tokens {tokens} --context {context} --seed {seed} --clock {clock}"
        write_runs(
            out,
            f"python -m duo_mlx.bench.parts {of} {arguments}",
            before,
            timings.runs,
            shape=model.config.to_dict(),
            summary=result,
        )


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "parts")


if __name__ == "__main__":
    main()
