"""Outputs that are either whole or not there."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from duo_mlx.errors import DuoError

PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # suffixes of PyTorch's checkpoints


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one line that ``path`` cannot be written: the disk is full, nobody may write there, and so on.

    Raises:
        DuoError: in place of the block's `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise DuoError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file; an error of the system is a `DuoError`."""
    with writing(path):
        path.write_text(text, encoding="utf-8")


def refuse_existing(path: Path, force: bool = False) -> None:
    """Refuse what `output_directory` would refuse, before the work that fills it.

    Raises:
        DuoError: ``path`` exists and ``force`` is not given, or is given for something that is no model directory.
    """
    if not path.exists():
        return
    if not force:
        raise DuoError(f"{path} exists already; give --force to replace it, or another name")
    if not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").is_file()):
        raise DuoError(f"{path} is no model directory, so --force does not replace it; give another name")


def refuse_output(out: Path, force: bool, suffixes: dict[str, str]) -> None:
    """Refuse a file for ``--out``, before the work whose result it will hold.

    Args:
        out: the file.
        force: it may be replaced.
        suffixes: that its name may have, and what for.

    Raises:
        DuoError: its name ends otherwise, its folder is not there, or it exists and ``force`` is not given.
    """
    if out.suffix not in suffixes:
        known = " or ".join(f"{suffix} ({what})" for suffix, what in suffixes.items())
        raise DuoError(f"--out {out}: the name must end in {known}")
    if not out.parent.is_dir():
        raise DuoError(f"--out {out}: there is no directory {out.parent}")
    if out.exists() and not force:
        raise DuoError(f"--out {out} exists already; give --force to replace it, or another name")


def refuse_foreign(out: Path, force: bool, own: Callable[[str], bool], whose: str) -> None:
    """Refuse a folder for ``--out`` that exists, unless it may be replaced and holds nothing but what is its own.

    Args:
        out: the folder.
        force: it may be replaced.
        own: whether a file of that name is its own.
        whose: is said of a file that is not, such as "no figure's".

    Raises:
        DuoError: it exists and ``force`` is not given, or it is or holds something else.
    """
    if not out.exists():
        return
    if not force:
        raise DuoError(f"--out {out}: exists already; give --force to replace it, or another name")
    if not out.is_dir():
        raise DuoError(f"--out {out}: is a file; give the name of a folder")
    if others := sorted(each.name for each in out.iterdir() if not own(each.name)):
        raise DuoError(f"--out {out}: holds {others[0]}, which is {whose}, so --force does not replace it")


def foreign_content(file: Path) -> str | None:
    """Say what a file is by its first bytes where its name promises something else; None: nothing is known.

    Such files stand where a download went wrong or somebody changed a name.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(512)
    except OSError:
        return None
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; fetch that with `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file itself; download that"
    kinds = (
        ((".gguf",), head.startswith(b"GGUF")),
        ((".safetensors",), head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 27),
        (PICKLES, head.startswith(b"PK\x03\x04")),
    )
    for suffixes, found in kinds:
        if found and file.suffix not in suffixes:
            return f"is a {suffixes[0]} file by its content; give it that suffix"
    return None


@contextmanager
def output_directory(path: Path, force: bool = False) -> Iterator[Path]:
    """A new directory to fill; it becomes ``path`` when the block ends well and is removed when it does not.

    An error in the block that names the directory's temporary name names ``path`` instead.

    Raises:
        DuoError: ``path`` exists and ``force`` is not given, or is given for something that is no model directory; or
            the system does not let it be written.
    """
    refuse_existing(path, force)
    path = path.absolute()
    new, old = (path.with_name(f".{path.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        new.mkdir()
    try:
        yield new
        for file in sorted(new.rglob("*")):
            if file.is_file():
                settle(file)
        with writing(path):
            if path.exists():
                path.rename(old)
            new.rename(path)
    except DuoError as error:
        _rename(error, new, path)
        raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def output_file(path: Path, force: bool = False) -> Iterator[Path]:
    """A name to write a file under; it becomes ``path`` when the block ends well and is removed when it does not.

    The name has the same suffix as ``path``. An error in the block that names it names ``path`` instead.

    Raises:
        DuoError: ``path`` exists and ``force`` is not given, or it is a directory; or the system does not let it be
            written.
    """
    if path.is_dir():
        raise DuoError(f"{path} is a directory; give the name of a file")
    if path.exists() and not force:
        raise DuoError(f"{path} exists already; give --force to replace it, or another name")
    path = path.absolute()
    new = path.with_name(f".{path.stem}.{os.getpid()}.new{path.suffix}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        settle(new)
        with writing(path):
            new.replace(path)
    except DuoError as error:
        _rename(error, new, path)
        raise
    finally:
        new.unlink(missing_ok=True)


def _rename(error: DuoError, new: Path, path: Path) -> None:
    error.args = (str(error).replace(str(new), str(path)),)


def refuse_overlap(source: Path, destination: Path) -> None:
    """Refuse to write over what is read.

    Raises:
        DuoError: ``destination`` is or holds ``source``, or lies inside it.
    """
    if source.resolve().is_relative_to(destination.resolve()):
        raise DuoError(f"{destination}: is or holds the source {source}; give another destination")
    if source.is_dir() and destination.resolve().is_relative_to(source.resolve()):
        raise DuoError(f"{destination}: lies inside the source {source}; give another destination")


def settle(file: Path) -> None:
    """Wait until a file is on the disk: its new name must not outlive its content when the power goes."""
    with writing(file), file.open("rb") as opened:
        os.fsync(opened.fileno())
