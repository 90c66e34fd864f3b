"""What ``duo-mlx oracle`` left in a folder, read back to be studied; see `duo_mlx.study.table` for what it holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.study.table import MODEL, SCHEMA, SUMMARY, table_name

NEEDED = ("inputs", "targets", "loss_big", "loss_small", "oracle_loss", "oracle_routes", MODEL)
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Found:
    """A finished oracle."""

    folder: Path
    summary: Mapping[str, Any]
    tables: Mapping[str, Arrays]  # by budget's name, arrays ``[sequences, length]``

    @property
    def layers(self) -> int:
        """Of the model."""
        return int(self.any["oracle_routes"].shape[2])

    @property
    def any(self) -> Arrays:
        """A table, for what all of them hold: inputs, targets, losses and entropies under one route in every layer."""
        return next(iter(self.tables.values()))

    @property
    def exact(self) -> dict[int, Arrays]:
        """Tables of exactly k big layers, by k, from the lowest."""
        return {int(name): self.tables[name] for name in sorted((n for n in self.tables if n.isdecimal()), key=int)}


def read(folder: Path) -> Found:
    """Read a folder, or a part of one: budgets whose table is not there are left out.

    Raises:
        DuoError: it is not finished, not an oracle's, or damaged; the file is named.
    """
    summary = _summary(folder / SUMMARY)
    budgets = list(summary["budgets"])
    files = {budget: folder / table_name(budget, len(budgets)) for budget in budgets}
    files = {budget: file for budget, file in files.items() if file.exists()}
    if not files:
        raise DuoError(f"{folder}: holds none of the tables that its {SUMMARY} names")
    tables = {budget: _table(file) for budget, file in files.items()}
    for budget, table in tables.items():
        if str(table[MODEL]) != summary["model"].get("sha256", ""):
            raise DuoError(f"{files[budget]}: is of another model than the summary beside it")
    return Found(folder, summary, tables)


def _summary(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise DuoError(f"{file}: cannot be read; give the folder of a finished duo-mlx oracle") from None
    except ValueError as error:
        raise DuoError(f"{file}: is damaged: {error}") from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise DuoError(f"{file}: is no {SCHEMA}")
    if not all(isinstance(found.get(key), dict) and found[key] for key in ("budgets", "model")):
        raise DuoError(f"{file}: is damaged: it names no budgets or no model")
    return found


def _table(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as archive:
            found = {name: archive[name] for name in archive.files}
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise DuoError(f"{file}: is damaged ({' '.join(str(error).split())})") from error
    if missing := [name for name in NEEDED if name not in found]:
        raise DuoError(f"{file}: holds no {' and no '.join(missing)}; an oracle's table does")
    return found
