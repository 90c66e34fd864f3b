"""``duo-mlx oracle``: the oracle of many texts, kept one by one in a folder, and what to judge it by.

Texts may be shared out among processes, see `duo_mlx.processes`; the table does not depend on how many there are.
"""

import io
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Model
from duo_mlx.processes import Processes
from duo_mlx.study import table
from duo_mlx.study.sequence import Question, Searcher
from duo_mlx.study.summary import summarise

Progress = Callable[[str, float, float], object]
Arrays = dict[str, NDArray[Any]]


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
    done = set(processes.from_first(lambda: sorted(table.begin(out, asked, force))))
    started, todo = time.monotonic(), [number for number in range(len(windows)) if number not in done]
    for start in range(0, len(todo), processes.count):
        these = todo[start : start + processes.count]
        own = these[processes.rank : processes.rank + 1]

        def shown(share: float, before: int = len(done) + start, now: int = len(these)) -> None:
            if share < 1:  # a whole one is one that is kept
                progress("searching", before + share * now, len(windows))

        packed = processes.gather(_packed(one.sequence(windows[own[0]], own[0], shown)) if own else b"")
        if processes.rank == 0:
            for number, arrays in zip(these, packed, strict=False):
                table.save_sequence(out, number, _unpacked(arrays))
        progress("searching", len(done) + start + len(these), len(windows))
    if processes.rank:
        return None
    found = [table.read_sequence(out, number, windows[number]) for number in range(len(windows))]
    one.across(found)
    summary = summarise(found, one.space, one.limits, one.price) | {
        "command": command,
        "versions": {name: version(name) for name in ("duo-mlx", "mlx", "mlx-lm", "numpy")},
        "rows": one.rows,
        "processes": processes.count,
        "seconds": {"of_sequences": len(todo), "in_all": time.monotonic() - started},
    }
    table.finish(out, found, [limit.name for limit in one.limits], asked, summary)
    return summary


def _packed(arrays: Arrays) -> bytes:
    file = io.BytesIO()
    save: Any = np.savez  # whose type takes no names beside allow_pickle
    save(file, **arrays)
    return file.getvalue()


def _unpacked(packed: bytes) -> Arrays:
    with np.load(io.BytesIO(packed), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
