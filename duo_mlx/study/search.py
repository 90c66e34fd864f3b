"""``duo-mlx oracle``: the oracle of many texts, kept one by one in a folder, and what to judge it by.

Texts may be shared out among processes, see `duo_mlx.processes`; the table does not depend on how many there are.
"""

import io
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
from duo_mlx.processes import Processes
from duo_mlx.products import on_cpu
from duo_mlx.routes import LETTERS, Route
from duo_mlx.study import controls, oracle, table
from duo_mlx.study.limits import parse_limit
from duo_mlx.study.summary import drawn_by, summarise
from duo_mlx.study.tree import Options, Work, layer_options

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
    seed: int  # of the random patterns and of the controls' noise
    text: Mapping[str, Any]  # where it is from
    model: Mapping[str, Any]  # name and sha256
    controls: bool = False  # see `duo_mlx.study.controls`
    search: str = "exhaustive"


def run(
    model: Model,
    windows: NDArray[np.integer],
    question: Question,
    out: Path,
    command: str,
    max_memory: int,
    progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
    force: bool = False,
) -> dict[str, Any] | None:
    """Search ``windows [sequences, length + 1]``, or go on searching them, and give the summary.

    Args:
        model: a Duo.
        windows: token ids; each window is a text of its own.
        question: what to search.
        out: the folder, see `duo_mlx.study.table`; only rank 0 of several processes reads and writes it.
        command: what was typed.
        max_memory: bytes that the passes may take beside the weights, roughly; at least one pattern goes at a time.
        progress: is called with a stage, what is done and what is to be.
        force: replace a finished result.

    Returns:
        The summary; None in processes other than rank 0.

    Raises:
        DuoError: more patterns than can be searched, an impossible budget, or a folder that cannot be used.
    """
    tokens = windows.shape[1] - 1
    one = Searcher(model, question, tokens, max_memory)
    asked = asdict(question) | {"sequences": len(windows), "length": tokens}
    processes = Processes()
    done = _begin(processes, out, asked, force)
    started, todo = time.monotonic(), [number for number in range(len(windows)) if number not in done]
    for start in range(0, len(todo), processes.count):
        these = todo[start : start + processes.count]
        own = these[processes.rank : processes.rank + 1]
        packed = processes.gather(_packed(one.sequence(windows[own[0]], own[0])) if own else b"")
        if processes.rank == 0:
            for number, arrays in zip(these, packed, strict=False):
                table.save_sequence(out, number, _unpacked(arrays))
        progress("searching", len(done) + start + len(these), len(windows))
    if processes.rank:
        return None
    found = [table.read_sequence(out, number, windows[number]) for number in range(len(windows))]
    one.across(found)
    summary = summarise(found, one.space, one.limits, question.seed) | {
        "command": command,
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm", "numpy")},
        "rows": one.rows,
        "processes": processes.count,
        "seconds": {"of_sequences": len(todo), "in_all": time.monotonic() - started},
    }
    table.finish(out, found, [limit.name for limit in one.limits], asked, summary)
    return summary


def _begin(processes: Processes, out: Path, asked: dict[str, Any], force: bool) -> set[int]:
    """The sequences that are done, as rank 0 finds them in the folder; all processes stop if it cannot be used."""
    if processes.rank:
        return processes.agree([])
    try:
        done = table.begin(out, asked, force)
    except DuoError:
        processes.agree([], failed=True)
        raise
    return processes.agree(sorted(done))


def _packed(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    save: Any = np.savez  # whose type takes no names beside allow_pickle
    save(file, **arrays)
    return file.getvalue()


def _unpacked(packed: bytes) -> Arrays:
    with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


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


class Searcher:
    """What is the same for all texts of a question, and the search of one.

    Raises:
        DuoError: more patterns than can be searched, an impossible budget, or controls that do not fit the memory.
    """

    def __init__(self, model: Model, question: Question, tokens: int, max_memory: int):
        self._model, self._question = model, question
        options = layer_options(model, [Route(LETTERS.index(letter)) for letter in question.choices])
        refuse_many(options, tokens)
        self.limits = [parse_limit(budget, model, tokens) for budget in question.budgets]
        self.space = oracle.Space(model, options)
        self._allowed = oracle.allowed_by(self.limits, self.space, tokens)
        for name, allowed in self._allowed.items():
            if without := int((~allowed.any(axis=0)).sum()):
                raise DuoError(
                    f"--budget {name!r}: no pattern of {question.choices!r} is within it at all tokens"
                    f" ({without} have none)"
                )
        if question.controls:
            if question.prefix != "shared":
                raise DuoError("--controls: only --prefix shared has a pass for each pattern to compare")
            if (needed := controls.memory(len(self.space.patterns), tokens)) > max_memory:
                raise DuoError(f"--controls keeps all losses and needs --max-memory {-(-needed >> 20) + 1} or more")
        self.rows = rows_within(model, tokens, max_memory)
        self._drawn = {
            f"random {name}": drawn for name, drawn in drawn_by(self.limits, self.space, question.seed).items()
        }

    def sequence(self, window: NDArray[np.integer], number: int) -> Arrays:
        """Everything about one sequence ``[length + 1]``, as arrays by name; its number seeds the noise."""
        inputs, targets = window[:-1], window[1:]
        found: Arrays = {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
        for route in Route:
            name = route.name.lower()
            found[f"loss_{name}"], found[f"entropy_{name}"] = oracle.uniform(self._model, inputs, targets, route)
        mx.reset_peak_memory()
        if self._question.prefix == "shared":
            best, work = self._shared(inputs, targets, number, found)
        else:
            best, work = self._committed(inputs, targets)
        for place, limit in enumerate(self.limits):
            of = best[limit.name]
            found |= {
                f"oracle_loss_{place}": of.loss,
                f"oracle_routes_{place}": self.space.patterns[of.number],
                f"seen_{place}": of.seen,
            }
        found["work"] = np.array([work.attention, work.ffn, work.head])
        found["peak_bytes"] = np.array(mx.get_peak_memory())
        return found

    def _shared(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer], number: int, found: Arrays
    ) -> tuple[dict[str, oracle.Best], Work]:
        kept = np.empty((len(self.space.patterns), len(inputs)), np.float32) if self._question.controls else None
        allowed = self._allowed | self._drawn
        best, means, work = oracle.shared(self._model, inputs, targets, self.space, allowed, self.rows, kept)
        found["means"] = means.astype(np.float32)
        for place, limit in enumerate(self.limits):
            if f"random {limit.name}" in best:
                found[f"random_{place}"] = best[f"random {limit.name}"].loss
        if kept is not None:
            self._controls(inputs, targets, number, found, best, kept)
        return best, work

    def _committed(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer]
    ) -> tuple[dict[str, oracle.Best], Work]:
        best, work = {}, Work()
        for limit in self.limits:
            best[limit.name], each = oracle.committed(self._model, inputs, targets, self.space, limit, self.rows)
            work += each
        return best, work

    def _controls(
        self,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        number: int,
        found: Arrays,
        best: Mapping[str, oracle.Best],
        kept: NDArray[np.float32],
    ) -> None:
        passes = controls.Noise(self._model, inputs, targets, self.rows)
        second = controls.SecondContext(self._model, inputs, targets, self.space, self.rows, kept)
        found |= second.losses | {"table": kept}
        for place, limit in enumerate(self.limits):
            allowed = self._allowed[limit.name]
            means = found["means"][allowed[:, 0]]
            of = controls.equal_n(kept, allowed)
            of |= controls.noise(passes, limit, means, len(inputs), (self._question.seed, number, place))
            of |= second.compare(allowed, best[limit.name].number)
            of[controls.WORST] = controls.worst(kept, allowed, self.space)
            found |= {f"{name}_{place}": losses for name, losses in of.items()}

    def across(self, found: list[Arrays]) -> None:
        """Add to the arrays of all sequences what takes all of them to know."""
        if not self._question.controls:
            return
        for name, kinds in controls.kinds_of(found).items():
            for place, limit in enumerate(self.limits):
                if not limit.scheduled:
                    losses = controls.split_by_kind(found, self._allowed[limit.name], kinds)
                    for each, of in zip(found, losses, strict=True):
                        each[f"{name}_{place}"] = of
