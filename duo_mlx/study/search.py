"""``duo-mlx oracle``: the oracle of many texts, kept one by one in a folder, and what to judge it by.

Beside each budget's oracle stand fixed patterns (one for all tokens, chosen on the very sequences that it is scored on,
as the paper does, and chosen on one half and scored on the other) and the best of 100 random patterns, by average loss
and token by token. All of them come from the same passes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.products import on_cpu
from duo_mlx.routes import LETTERS, Route
from duo_mlx.study import oracle, table
from duo_mlx.study.limits import Limit, parse_limit
from duo_mlx.study.tree import Options, Work, layer_options

RANDOM = 100  # patterns that the random baseline is the best of
MOST = 2_000_000  # patterns that are searched one by one
MOST_ROWS = 256  # patterns of a batch
CACHED = 1024  # tokens of a batch on a CPU, where larger ones leave its caches and take longer
PREFIXES = ("shared", "committed")

Progress = Callable[[str, float, float], object]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Question:
    """What is searched; two runs of one question give the same table."""

    choices: str  # letters of routes
    prefix: str
    budgets: tuple[str, ...]
    seed: int  # of the random patterns
    text: Mapping[str, Any]  # where it is from
    model: Mapping[str, Any]  # name and sha256


def run(
    model: Model,
    windows: NDArray[np.integer],
    question: Question,
    out: Path,
    command: str,
    max_memory: int,
    progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
    force: bool = False,
) -> dict[str, Any]:
    """Search ``windows [sequences, length + 1]``, or go on searching them, and give the summary.

    Args:
        model: a Duo.
        windows: token ids; each window is a text of its own.
        question: what to search.
        out: the folder, see `duo_mlx.study.table`.
        command: what was typed.
        max_memory: bytes that the passes may take beside the weights, roughly; at least one pattern goes at a time.
        progress: is called with a stage, what is done and what is to be.
        force: replace a finished result.

    Raises:
        DuoError: more patterns than can be searched, an impossible budget, or a folder that cannot be used.
    """
    tokens = windows.shape[1] - 1
    options = layer_options(model, [Route(LETTERS.index(letter)) for letter in question.choices])
    refuse_many(options, tokens)
    limits = [parse_limit(budget, model, tokens) for budget in question.budgets]
    space = oracle.Space(model, options)
    for limit in limits:
        if (without := ~limit.allows(space.patterns, tokens).any(axis=0)).any():
            raise DuoError(f"--budget {limit.name!r}: no pattern of {question.choices!r} is within it at all tokens"
                           f" ({int(without.sum())} have none)")  # fmt: skip
    asked = asdict(question) | {"sequences": len(windows), "length": tokens}
    done = table.begin(out, asked, force)
    rows = rows_within(model, tokens, max_memory)
    allowed = _allowed(limits, space, tokens, question) if question.prefix == "shared" else {}
    started, before = time.monotonic(), len(done)
    for number in range(len(windows)):
        if number not in done:
            arrays = sequence(model, windows[number], space, limits, allowed, rows)
            table.save_sequence(out, number, arrays)
        progress("searching", number + 1, len(windows))
    seconds = time.monotonic() - started
    found = [table.read_sequence(out, number, windows[number]) for number in range(len(windows))]
    summary = summarise(found, question, space, limits) | {
        "command": command,
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm", "numpy")},
        "rows": rows,
        "seconds": {"of_sequences": len(windows) - before, "in_all": seconds},
    }
    table.finish(out, found, [limit.name for limit in limits], asked, summary)
    return summary


def refuse_many(options: Options, tokens: int) -> None:
    """Raise `DuoError` with the cost and what would do, where there are more patterns than can be searched."""
    count = prod(map(len, options))
    if count > MOST:
        raise DuoError(
            f"{count:.2g} patterns of {len(options)} layers are too many to search one by one: that is as many passes "
            f"over {tokens} tokens for each sequence, and {MOST:,} is the limit; give fewer --choices, or a model of "
            "fewer layers"
        )


def rows_within(model: Model, tokens: int, max_memory: int) -> int:
    """Patterns of a batch whose states, inner values and logits take about so many bytes."""
    args = model.args
    waiting = args.num_hidden_layers * len(Route) * args.hidden_size
    at_work = (
        6 * args.hidden_size + 3 * args.intermediate_size + 3 * args.vocab_size + args.num_attention_heads * tokens
    )
    most = max(1, CACHED // tokens) if on_cpu() else MOST_ROWS
    return int(np.clip(max_memory // (4 * tokens * (waiting + at_work)), 1, most))


def sequence(
    model: Model,
    window: NDArray[np.integer],
    space: oracle.Space,
    limits: list[Limit],
    allowed: Mapping[str, NDArray[np.bool_]],
    rows: int,
) -> Arrays:
    """Everything about one sequence, as arrays by name; ``allowed`` is for `oracle.shared`, empty for `committed`."""
    inputs, targets = window[:-1], window[1:]
    found: Arrays = {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
    for route in Route:
        found[f"loss_{route.name.lower()}"] = oracle.uniform(model, inputs, targets, route)
    mx.reset_peak_memory()
    if allowed:
        best, means, work = oracle.shared(model, inputs, targets, space, allowed, rows)
        found["means"] = means.astype(np.float32)
        for place, limit in enumerate(limits):
            if f"random {limit.name}" in best:
                found[f"random_{place}"] = best[f"random {limit.name}"].loss
    else:
        best, work = {}, Work()
        for limit in limits:
            best[limit.name], each = oracle.committed(model, inputs, targets, space, limit, rows)
            work += each
    for place, limit in enumerate(limits):
        of = best[limit.name]
        found |= {f"loss_{place}": of.loss, f"routes_{place}": space.patterns[of.number], f"seen_{place}": of.seen}
    found["work"] = np.array([work.attention, work.ffn, work.head])
    found["peak_bytes"] = np.array(mx.get_peak_memory())
    return found


def _allowed(limits: list[Limit], space: oracle.Space, tokens: int, question: Question) -> dict[str, NDArray[np.bool_]]:
    """The patterns of each limit, and the random ones within it; the same for all texts."""
    drawn = {f"random {name}": chosen for name, chosen in random_patterns(limits, space, question.seed).items()}
    return oracle.allowed_by(limits, space, tokens) | drawn


def random_patterns(limits: list[Limit], space: oracle.Space, seed: int) -> dict[str, NDArray[np.bool_]]:
    """`RANDOM` patterns within each limit that is the same for all tokens, ``[n, 1]``, the same ones for all texts."""
    found = {}
    for limit in limits:
        if not limit.scheduled:
            within = np.flatnonzero(limit.at(space.patterns, 0, 1))
            drawn = np.random.default_rng(seed).choice(within, min(RANDOM, len(within)), replace=False)
            found[limit.name] = np.isin(np.arange(len(space.patterns)), drawn)[:, None]
    return found


def summarise(found: list[Arrays], question: Question, space: oracle.Space, limits: list[Limit]) -> dict[str, Any]:
    """Mean losses in nats a token, by budget, with the baselines."""
    every = {name: np.stack([each[name] for each in found]) for name in found[0] if name != "peak_bytes"}
    uniform = {route.name.lower(): every[f"loss_{route.name.lower()}"] for route in Route}
    budgets = {}
    for place, limit in enumerate(limits):
        losses = every[f"loss_{place}"]
        big = (every[f"routes_{place}"] == Route.BIG).sum(axis=-1)
        budgets[limit.name] = {
            "oracle": float(losses.mean()),
            "oracle_by_sequence": losses.mean(axis=1).tolist(),
            "difficulty": float((uniform["small"] - losses).mean()),
            "patterns_seen": float(every[f"seen_{place}"].mean()),
            "big_layers": float(big.mean()),
        } | _baselines(every, limit, place, space, question)
    return {
        "uniform": {name: float(losses.mean()) for name, losses in uniform.items()},
        "uniform_by_sequence": {name: losses.mean(axis=1).tolist() for name, losses in uniform.items()},
        "budgets": budgets,
        "patterns": len(space.patterns),
        "work_a_sequence": dict(zip(("attention", "ffn", "head"), every["work"].mean(axis=0).tolist(), strict=True)),
        "peak_bytes": int(max(each["peak_bytes"] for each in found)),
    }


def _baselines(
    every: Arrays, limit: Limit, place: int, space: oracle.Space, question: Question
) -> dict[str, float | str | None]:
    """One pattern for all tokens, and the best of random ones; null where the reading has no pass for each pattern."""
    if "means" not in every or limit.scheduled:
        why = (
            "a schedule has no pattern for all tokens" if limit.scheduled else "only shared has a pass for each pattern"
        )
        return {"fixed": None, "fixed_split": None, "random": None, "random_by_token": None, "why_no_baselines": why}
    within = np.flatnonzero(limit.at(space.patterns, 0, 1))
    means = every["means"].astype(np.float64)[:, within]
    drawn = random_patterns([limit], space, question.seed)[limit.name][within, 0]
    halves = [means[::2], means[1::2]]
    split = None
    if len(means) > 1:
        scored = [other[:, own.mean(axis=0).argmin()] for own, other in (halves, halves[::-1])]
        split = float(np.concatenate(scored).mean())
    return {
        "fixed": float(means.mean(axis=0).min()),
        "fixed_split": split,
        "random": float(means[:, drawn].mean(axis=0).min()),
        "random_by_token": float(every[f"random_{place}"].mean()),
    }
