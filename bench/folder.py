"""A results folder: where a run keeps what it has, from which it goes on after an interruption."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from duo_mlx.bench import results, tables
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, write_text

SAME = ("settings", "model", "texts")  # what must be the same for a run to go on


def begin(folder: Path, fresh: dict[str, Any], force: bool) -> dict[str, Any]:
    """The result to go on with: ``fresh``, or what an interrupted run of the same question left in the folder.

    Raises:
        DuoError: the folder is not one of results, holds a finished result or that of another question, or was
            measured by another meter, on another machine or with other versions.
    """
    if folder.exists() and not folder.is_dir():
        raise DuoError(f"--out {folder}: is a file; give the name of a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return fresh
    if not (folder / results.FILE).is_file():
        raise DuoError(f"--out {folder}: is not empty and no results folder, so nothing is written there; give another")
    if force:
        return fresh
    found = results.read(folder)
    if found["complete"]:
        raise DuoError(f"--out {folder}: holds a finished result; give --force to replace it, or another name")
    other = [key for key in SAME if found[key] != fresh[key]]
    if found["meter"]["label"] != fresh["meter"]["label"]:
        other.append("meter")
    if [cell["id"] for cell in found["cells"]] != [cell["id"] for cell in fresh["cells"]]:
        other.append("cells")
    other += [key for key in ("device", "versions") if found["system"].get(key) != fresh["system"].get(key)]
    if other:
        raise DuoError(
            f"--out {folder}: holds an unfinished run with other {' and '.join(other)}, so this one cannot go on "
            "there; give --force to replace it, or another name"
        )
    return found


def save(folder: Path, result: dict[str, Any]) -> None:
    """Write all of it, each file whole or not at all."""
    texts: dict[str, Callable[[], str]] = {
        results.FILE: lambda: json.dumps(result, ensure_ascii=False) + "\n",
        "results.csv": lambda: tables.csv_text(result),
        "results.md": lambda: tables.markdown(result),
    }
    for name, text in texts.items():
        with output_file(folder / name, force=True) as file:
            write_text(file, text())
