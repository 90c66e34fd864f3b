"""Outputs that are either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duo_mlx.errors import DuoError


@contextmanager
def output_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A new directory to fill; it becomes ``path`` when the block ends well and is removed when it does not.

    Raises:
        DuoError: ``path`` exists and ``force`` is not given, or is given for something that is no model directory.
    """
    if path.exists():
        if not force:
            raise DuoError(f"{path} exists already; give --force to replace it, or another name")
        if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
            raise DuoError(f"{path} is no model directory, so --force does not replace it; give another name")
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    new.mkdir()
    try:
        yield new
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
