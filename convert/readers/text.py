"""What stands in foreign files, read without surprises: JSON objects, and names that go into a single line."""

import json
from pathlib import Path
from typing import Any

from duo_mlx.errors import DuoError
from duo_mlx.files import foreign_content

LONGEST = 120  # characters of a foreign name in a message


class _TwiceError(ValueError):
    """A JSON object has a key twice; readers differ in which one they take."""


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice, at any depth.

    Raises:
        ValueError: it is no JSON, no object, or has a key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object that is the whole of ``file``.

    Raises:
        DuoError: it cannot be read, is no JSON object, or has a key twice.
        FileNotFoundError: it is not there; what that means, the caller knows.
    """
    try:
        return parse_object(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except _TwiceError as error:
        raise DuoError(f"{file}: {error}") from None
    except (ValueError, OSError) as error:
        if str(error) == "not an object":
            raise DuoError(f"{file}: must hold a JSON object") from None
        raise DuoError(f"{file}: {foreign_content(file) or f'is no JSON ({error})'}") from None


def shown(name: object) -> str:
    """A foreign name for a message: on one line, and not endless."""
    text = str(name)
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    return text if text.isprintable() else ascii(text)


def one_line(error: BaseException) -> str:
    """An exception's words for a message."""
    return shown(" ".join(str(error).split()))


def is_file(path: Path) -> bool:
    """`Path.is_file`, also for what can be no file's name."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise _TwiceError(f"has the key {shown(name)} twice in one object")
        found[name] = value
    return found
