"""What an oracle's search costs and misses: the tree of patterns beside a naive loop, local search beside the tree.

    OPENBLAS_NUM_THREADS=1 python -m duo_mlx.bench.oracle --out oracle.json

The naive loop is what one would write first: a pass of the model and MLX's cross-entropy for each pattern, and the
minimum over them. Both search the embedded model on the same text in interleaved rounds: big and small in 12 layers,
and all three routes in its first 8 layers.

Beam search and coordinate descent are compared with the exhaustive search as a user runs them: in the shared reading
all tokens of a text at once, in the committed one token by token, each after what the exhaustive search chose before
it. A gap is the mean over tokens of their loss less the exhaustive oracle's, over the range from all small's loss to
the oracle's without a budget.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

import duo_mlx  # (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.bench import options, reading
from duo_mlx.bench.interleave import interleave
from duo_mlx.bench.peer import spread
from duo_mlx.bench.prefill import CLOCKS
from duo_mlx.bench.record import check_output, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.config import LAYERS
from duo_mlx.device import on_cpu
from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.study import local, oracle
from duo_mlx.study.committed import Token
from duo_mlx.study.limits import Limit, parse_limit
from duo_mlx.study.sequence import rows_within
from duo_mlx.study.tree import Text, Work, layer_options

CASES = {"2^12": (12, (Route.SMALL, Route.BIG)), "3^8": (8, tuple(Route))}
BUDGETS = ("none", "1", "2", "4", "6", "8", "10", "11")
METHODS = ("beam", "descent")
MEMORY = 1 << 30
LIMIT = 0.01  # a gap that the default beam may have

Ids = NDArray[np.int32]


def first_layers(model: Model, count: int) -> Model:
    """The same model with its first layers alone, whose norm and head are untrained for that."""
    config = model.config
    if count == config.num_hidden_layers:
        return model
    base = config.base | {name: count for name in LAYERS if name in config.base}
    if "layer_types" in base:
        base["layer_types"] = base["layer_types"][:count]
    cut = Model(replace(config, base=base, best_patterns=(), default_draft=""))
    weights: Any = dict(tree_flatten(model.parameters()))
    kept: Any = dict(tree_flatten(cut.parameters()))
    cut.load_weights([(name, weights[name]) for name in kept])
    if on_cpu():
        from duo_mlx import cpu

        cpu.quicken(cut)
    return cut


def naive(model: Model, ids: Ids, space: oracle.Space) -> NDArray[np.float32]:
    """The lowest loss ``[tokens]`` of all patterns, pass by pass, in nats."""
    inputs, targets = mx.array(ids[None, :-1]), mx.array(ids[None, 1:])
    lowest = mx.full(targets.shape, mx.inf)
    for pattern in space.patterns:
        losses = nn.losses.cross_entropy(model(inputs, routes=pattern).astype(mx.float32), targets)
        lowest = mx.minimum(lowest, losses)
        mx.eval(lowest)
    return np.array(lowest[0])


def by_tree(model: Model, ids: Ids, space: oracle.Space) -> tuple[oracle.Best, Work]:
    """The same by the tree of patterns, and what it evaluated."""
    tokens = len(ids) - 1
    every = {"all": np.ones((len(space.patterns), 1), bool)}
    rows = rows_within(model, tokens, tokens, MEMORY)
    best, _, work = oracle.shared(model, ids[:-1], ids[1:], space, every, rows)
    return best["all"], work


def race(model: Model, ids: Ids, rounds: int, clock: Callable[[], float], say: Callable[[str], object]) -> Any:
    """Both searches in each case of `CASES`: times, evaluations, and how far their losses are apart."""
    found: dict[str, Any] = {}
    runs: dict[str, list[float]] = {}
    for name, (layers, choices) in CASES.items():
        cut = first_layers(model, layers)
        space = oracle.Space(cut, layer_options(cut, choices))
        best, work = by_tree(cut, ids, space)
        calls: dict[str, Callable[[], object]] = {
            "naive": partial(naive, cut, ids, space),
            "tree": partial(by_tree, cut, ids, space),
        }
        timings = interleave(calls, rounds, warm_up=0, clock=clock)
        say(f"{name}: done")
        ffns = int((space.patterns != Route.SKIP).sum())
        found[name] = {
            "patterns": len(space.patterns),
            "naive_evaluations": {"attention": space.patterns.size, "ffn": ffns, "head": len(space.patterns)},
            "tree_evaluations": {"attention": work.attention, "ffn": work.ffn, "head": work.head},
            "naive_over_tree": spread(timings.ratios("naive", {"tree": 1})),
            "largest_difference_nats": float(np.abs(best.loss - naive(cut, ids, space)).max()),
        }
        runs |= {f"{name} {each}": seconds for each, seconds in timings.runs.items()}
    return found, runs


def gaps(model: Model, windows: Ids, say: Callable[[str], object]) -> dict[str, Any]:
    """Mean gap of each method by reading and budget, over the range, and patterns that it tried for a token."""
    space = oracle.Space(model, layer_options(model, (Route.SMALL, Route.BIG)))
    tokens = windows.shape[1] - 1
    within = [spec for spec in BUDGETS if spec == "none" or int(spec) < model.config.num_hidden_layers]
    limits = [parse_limit(spec, model, tokens) for spec in within]
    found: dict[str, Any] = {}
    for reading_name, compare in (("shared", _shared), ("committed", _committed)):
        each = [compare(model, ids, space, limits) for ids in windows]
        say(f"{reading_name}: done")
        span = np.mean([of["range"] for of in each])
        found[reading_name] = {"range_nats": float(span)}
        for method in METHODS:
            found[reading_name][str(local.parse_method(method))] = {
                limit.name: {
                    "gap": float(np.mean([of[method, limit.name][0] for of in each]) / span),
                    "tried": float(np.mean([of[method, limit.name][1] for of in each])),
                }
                for limit in limits
            }
    return found


def _shared(model: Model, ids: Ids, space: oracle.Space, limits: list[Limit]) -> dict[Any, Any]:
    tokens, (inputs, targets) = len(ids) - 1, (ids[:-1], ids[1:])
    rows = rows_within(model, tokens, tokens, MEMORY)
    best, _, _ = oracle.shared(model, inputs, targets, space, oracle.allowed_by(limits, space, tokens), rows)
    small, _ = oracle.uniform(model, inputs, targets, Route.SMALL)
    found: dict[Any, Any] = {"range": float((small - best["none"].loss).mean())}
    score = local.Scorer(partial(Text, model, inputs, targets, space.options, rows))
    for limit in limits:
        for method in METHODS:
            pool = local.Pool(
                score, partial(limit.allows, tokens=tokens), cost.weight_bytes(model).of, tokens, len(space.options)
            )
            chosen = local.find(pool, space.options, local.parse_method(method), 0)
            found[method, limit.name] = float((chosen.loss - best[limit.name].loss).mean()), len(pool.patterns)
    return found


def _committed(model: Model, ids: Ids, space: oracle.Space, limits: list[Limit]) -> dict[Any, Any]:
    tokens, layers, price = len(ids) - 1, len(space.options), cost.weight_bytes(model).of
    rows = rows_within(model, 1, tokens, MEMORY)
    gap: dict[Any, list[float]] = {(method, limit.name): [] for method in METHODS for limit in limits}
    tried: dict[Any, list[int]] = {key: [] for key in gap}

    def choose(limit: Limit, cache: list[Any], place: int) -> oracle.Chosen:
        walk = partial(Token, model, cache, int(ids[place]), int(ids[place + 1]), space.options, rows)
        wanted = partial(limit.reaches, layers=layers, token=place, tokens=tokens)
        best = oracle.lowest(walk(wanted), space)
        for method in METHODS:
            pool = local.Pool(local.Scorer(walk), lambda of: limit.at(of, place, tokens)[:, None], price, 1, layers)
            chosen = local.find(pool, space.options, local.parse_method(method), 0)
            gap[method, limit.name].append(float(chosen.loss[0] - best.loss[0]))
            tried[method, limit.name].append(len(pool.patterns))
        return best

    losses = {limit.name: oracle.committed(model, ids[:-1], partial(choose, limit)).loss.mean() for limit in limits}
    small, _ = oracle.uniform(model, ids[:-1], ids[1:], Route.SMALL)
    found = {key: (float(np.mean(values)), float(np.mean(tried[key]))) for key, values in gap.items()}
    return found | {"range": float(small.mean() - losses["none"])}


def table(result: dict[str, Any]) -> str:
    """The result for a reader."""
    lines = []
    for name, of in result["race"].items():
        ratio, naively, tree = of["naive_over_tree"], of["naive_evaluations"], of["tree_evaluations"]
        low, high = ratio["interval_95"]
        lines.append(
            f"{name}: naive / tree {ratio['median']:.2f} ({low:.2f} to {high:.2f}); attention "
            f"{naively['attention']:,} / {tree['attention']:,}, FFNs {naively['ffn']:,} / {tree['ffn']:,}; losses "
            f"within {of['largest_difference_nats']:.1e} nats"
        )
    for name, of in result["gaps"].items():
        lines.append(f"{name}: gap to exhaustive, % of {of['range_nats']:.3f} nats (patterns tried)")
        for method, budgets in of.items():
            if method != "range_nats":
                cells = (f"{budget} {100 * cell['gap']:.2f} ({cell['tried']:.0f})" for budget, cell in budgets.items())
                lines.append(f"  {method}: {', '.join(cells)}")
    return "\n".join(lines)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--length", type=click.IntRange(2), default=32, help="Tokens of a text.")
@click.option("--texts", type=click.IntRange(1), default=2, help="Texts that gaps are means over.")
@click.option(
    "--rounds", type=click.IntRange(1), default=2, help="Interleaved rounds of the race, each there and back."
)
@options.clock
@options.out
@options.force
def command(length: int, texts: int, rounds: int, clock: str, out: Path | None, force: bool) -> None:
    """Time the search of all patterns against a naive loop, and measure what local search misses."""
    if out:
        check_output(out, force)
    model, tokenizer = duo_mlx.load()
    windows = reading.windows(reading.read(None, "held_out"), tokenizer, texts * length, length)
    before = system_record()

    def say(what: str) -> None:
        click.echo(what, err=True)

    races, runs = race(model, windows[0], rounds, CLOCKS[clock], say)
    result = {"race": races, "gaps": gaps(model, windows, say), "limit": LIMIT}
    click.echo(table(result))
    if out:
        record = {
            "command": f"python -m duo_mlx.bench.oracle --length {length} --texts {texts} --rounds {rounds} "
            f"--clock {clock}",
            "system": before,
            "summary": result,
            "runs_s": runs,
        }
        write_output(out, record)


def main() -> None:
    """Run the command; bad input is one line on stderr and exit code 2."""
    run(command, "oracle")


if __name__ == "__main__":
    main()
