"""The folder of an oracle: what it holds while it is filled, and when it is done.

``question.json`` says what is searched; ``sequences/00000.npz`` and so on are what is done; when all are, one table a
budget takes their place, and ``summary.json``. The table is ``tokens.npz``, or ``tokens-BUDGET.npz`` where there are
several budgets, with arrays ``[sequences, length]``: ``inputs``, ``targets``, ``loss_big``, ``loss_small``,
``loss_skip``, ``entropy_big``, ``entropy_small``, ``oracle_loss`` and ``difficulty`` (nats; all-small's loss less the
oracle's), and ``oracle_routes [sequences, length, layers]`` (0 skip, 1 small, 2 big), which ``duo-mlx generate --route
FILE:N`` replays; and ``model_sha256``, of the weights that they are of (see `duo_mlx.checkpoint.fingerprint`). Controls
add the arrays that `duo_mlx.study.controls` names, and all-big's and all-small's losses in the second context,
``short_loss_big`` and ``short_loss_small``.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, write_text, writing
from duo_mlx.study import controls

SCHEMA = "duo-mlx-oracle/1"
QUESTION, SUMMARY, SEQUENCES = "question.json", "summary.json", "sequences"
COPIED = ("inputs", "targets", "loss_big", "loss_small", "loss_skip", "entropy_big", "entropy_small")
CONTEXTS = ("short_loss_big", "short_loss_small")
BY_BUDGET = ("oracle_loss", "oracle_routes", *controls.NAMES, controls.WORST)
MODEL = "model_sha256"
Arrays = dict[str, NDArray[Any]]


def begin(out: Path, question: dict[str, Any], force: bool) -> set[int]:
    """Make the folder, or find it as an interrupted run of the same question left it: the sequences that are done.

    Raises:
        DuoError: it is finished and ``force`` is not given, or holds something else.
    """
    asked = {"schema": SCHEMA} | json.loads(json.dumps(question))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        file = out / QUESTION
        if not file.is_file():
            raise DuoError(f"--out {out}: is not empty and holds no {QUESTION} of an oracle; give another name")
        found = _json(file)
        if force:
            _clear(out)
        elif (out / SUMMARY).exists():
            raise DuoError(f"--out {out}: holds a finished oracle; give --force to replace it, or another name")
        elif found != asked:
            other = [name for name in asked if found.get(name) != asked[name]] or ["keys"]
            raise DuoError(
                f"--out {out}: holds an unfinished oracle of other {' and '.join(other)}; give --force to replace it, "
                "or another name"
            )
    with writing(out):
        (out / SEQUENCES).mkdir(parents=True, exist_ok=True)
    if not (out / QUESTION).exists():
        _save_json(out / QUESTION, asked)
    return {int(file.stem) for file in (out / SEQUENCES).glob("[0-9]*.npz")}


def save_sequence(out: Path, number: int, arrays: Arrays) -> None:
    """Keep what was found on one sequence."""
    _save_arrays(out / SEQUENCES / f"{number:05d}.npz", arrays)


def read_sequence(out: Path, number: int, window: NDArray[np.integer]) -> Arrays:
    """What was kept of one sequence.

    Raises:
        DuoError: it is damaged, or of another text.
    """
    file = out / SEQUENCES / f"{number:05d}.npz"
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
        same = np.array_equal(found["inputs"], window[:-1]) and np.array_equal(found["targets"], window[1:])
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise DuoError(f"{file}: is damaged; delete it, and the same command computes it again ({error})") from error
    if not same:
        raise DuoError(f"{file}: is of another text; delete it, and the same command computes it again")
    return found


def finish(
    out: Path, found: Sequence[Arrays], budgets: Sequence[str], question: dict[str, Any], summary: dict[str, Any]
) -> None:
    """Write the tables and the summary in place of the sequences."""
    for place, budget in enumerate(budgets):
        kept = {name: name for name in (*COPIED, *CONTEXTS)} | {name: f"{name}_{place}" for name in BY_BUDGET}
        arrays = {
            name: np.stack([each[of] for each in found])
            for name, of in kept.items()
            if all(of in each for each in found)
        }
        arrays["difficulty"] = arrays["loss_small"] - arrays["oracle_loss"]
        arrays[MODEL] = np.array(question["model"].get("sha256", ""))
        _save_arrays(out / table_name(budget, len(budgets)), arrays)
    _save_json(out / SUMMARY, {"schema": SCHEMA} | question | summary)
    shutil.rmtree(out / SEQUENCES)


def table_name(budget: str, budgets: int) -> str:
    """The file of a budget's table."""
    return "tokens.npz" if budgets == 1 else f"tokens-{budget.replace(':', '-').replace('..', '-to-')}.npz"


def _clear(out: Path) -> None:
    """Remove what an oracle wrote, and nothing else."""
    shutil.rmtree(out / SEQUENCES, ignore_errors=True)
    for file in [out / QUESTION, out / SUMMARY, *out.glob("tokens*.npz")]:
        file.unlink(missing_ok=True)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DuoError(f"{file}: is damaged: {error}") from None


def _save_json(file: Path, record: dict[str, Any]) -> None:
    with output_file(file, force=True) as new:
        write_text(new, json.dumps(record, indent=1) + "\n")


def _save_arrays(file: Path, arrays: Arrays) -> None:
    with output_file(file, force=True) as new, writing(file):
        save: Any = np.savez_compressed  # whose type takes no names beside allow_pickle
        save(new, **arrays)
