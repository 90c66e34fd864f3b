"""A result of ``duo-mlx bench run``: its form, and reading it with a check.

The form is result.schema.json (a JSON Schema, version ``duo-mlx-bench/1``). A results folder holds ``results.json``
with all of it, ``results.csv`` with a row a cell, and ``results.md``, a table.
"""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from duo_mlx.errors import DuoError

SCHEMA = "duo-mlx-bench/1"
FILE = "results.json"


@cache
def _validator() -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(Path(__file__).with_name("result.schema.json").read_text(encoding="utf-8")))


def read(path: Path) -> dict[str, Any]:
    """The result in a file or a results folder.

    Raises:
        DuoError: there is none, it is cut off, or it is of another form; one line that names the file and the place.
    """
    file = path
    try:
        file = path / FILE if path.is_dir() else path
        record = json.loads(file.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        what = f"holds no {FILE}, so it is no results folder" if path.is_dir() else "there is no such file"
        raise DuoError(f"{path}: {what}") from None
    except (ValueError, RecursionError) as error:
        raise DuoError(f"{file}: is no JSON, or only the beginning of it ({error})") from None
    except OSError as error:
        raise DuoError(f"{file}: cannot be read ({error.strerror})") from None
    check(record, str(file))
    found: dict[str, Any] = record
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def routed(cell: Mapping[str, Any], short: Callable[[str], str] = str) -> str:
    """How a cell's tokens are routed, for people: its route, and what drafts for it, each as ``short`` gives it."""
    if not cell.get("speculate"):
        return short(cell["route"])
    many = "" if cell["draft_tokens"] == "auto" else f"{short(cell['draft_tokens'])} "
    return f"{short(cell['route'])}, {many}drafts by {short(cell['speculate'])}"


def check(record: Any, name: str) -> None:
    """Raise `DuoError` where ``record`` is no result of this version."""
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        said = f"its schema is {schema!r}" if schema else "it names no schema"
        raise DuoError(f"{name}: is no result of duo-mlx bench run: {said}, and this version reads {SCHEMA!r}")
    from jsonschema.exceptions import best_match

    error = best_match(_validator().iter_errors(record))
    if error:
        place, message = (" ".join(each.split()) for each in (".".join(map(str, error.absolute_path)), error.message))
        raise DuoError(f"{name}: is damaged at {place or 'the top'}: {message[:200]}")
