"""A result of ``duo-mlx bench run``: its form, reading it with a check, and where it is kept.

The form is result.schema.json (a JSON Schema, version ``duo-mlx-bench/1``). A results folder holds ``results.json``
with all of it, ``results.csv`` with one row a cell, ``results.md`` with a table, and ``cells/`` with one file a
finished cell, from which an interrupted run goes on.
"""

import json
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
    file = path / FILE if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"holds no {FILE}, so it is no results folder" if path.is_dir() else "there is no such file"
        raise DuoError(f"{path}: {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DuoError(f"{file}: is no JSON, or only the beginning of it ({error})") from None
    except OSError as error:
        raise DuoError(f"{file}: cannot be read ({error.strerror})") from None
    check(record, str(file))
    found: dict[str, Any] = record
    return found


def check(record: Any, name: str) -> None:
    """Raise `DuoError` where ``record`` is no result of this version."""
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        said = f"its schema is {schema!r}" if schema else "it names no schema"
        raise DuoError(f"{name}: is no result of duo-mlx bench run: {said}, and this version reads {SCHEMA!r}")
    errors = sorted(_validator().iter_errors(record), key=lambda error: list(map(str, error.absolute_path)))
    if errors:
        place = ".".join(map(str, errors[0].absolute_path)) or "the top"
        raise DuoError(f"{name}: is damaged at {place}: {' '.join(errors[0].message.split())[:200]}")
