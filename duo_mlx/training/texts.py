"""Texts to train on, read piece by piece: what is in memory does not grow with them.

A text is a file. In a JSONL file each line is an object with a document under a key; any other file is one document.
The end of every text is held out for validation: a share of its characters, or of its documents.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from duo_mlx.errors import DuoError

JSONL = (".jsonl", ".ndjson")
BLOCK = 1 << 20  # characters of a document that are in memory, and are encoded, at once
BATCH, DOCUMENTS = 1 << 18, 1 << 10  # characters and pieces that fill a batch


@dataclass(frozen=True)
class Piece:
    """A part of a document."""

    content: str
    held_out: bool
    ends: bool  # its document, or the part of that which is (not) held out


def pieces(file: Path, key: str, share: float) -> Iterator[Piece]:
    """The pieces of a text, from its beginning to its end.

    Args:
        file: UTF-8.
        key: what documents stand under in JSONL.
        share: that is held out.

    Raises:
        DuoError: the file cannot be read, is not UTF-8 or not what its name says, or holds no text.
    """
    found = False
    try:
        for piece in (_documents if file.suffix in JSONL else _running)(file, key, share):
            found = found or not piece.content.isspace()
            yield piece
    except OSError as error:
        raise DuoError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DuoError(f"{file}: is not UTF-8 text") from None
    if not found:
        raise DuoError(f"{file}: holds no text")


def batches(found: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in batches that are encoded at once; one ends with the piece that fills it."""
    batch: list[Piece] = []
    size = 0
    for piece in found:
        batch.append(piece)
        size += len(piece.content)
        if size >= BATCH or len(batch) == DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _running(file: Path, _: str, share: float) -> Iterator[Piece]:
    """A document in pieces that end where a paragraph does, or a line, or a word."""
    with file.open(encoding="utf-8") as opened:
        characters = sum(map(len, iter(lambda: opened.read(BLOCK), "")))
    cut = round(characters * (1 - share))
    with file.open(encoding="utf-8") as opened:
        yield from _part(opened, cut, held_out=False)
        yield from _part(opened, characters - cut, held_out=True)


def _part(opened: TextIO, left: int, held_out: bool) -> Iterator[Piece]:
    kept = ""
    while left and (block := opened.read(min(BLOCK, left))):
        left -= len(block)
        kept += block
        if left:
            at = _break(kept)
            yield Piece(kept[:at], held_out, ends=False)
            kept = kept[at:]
    if kept:
        yield Piece(kept, held_out, ends=True)


def _break(text: str) -> int:
    """Where a piece may end with the least harm to its tokens: after a paragraph, after a line, before a space."""
    for mark, after in (("\n\n", 2), ("\n", 1), (" ", 0)):
        if (at := text.rfind(mark)) > 0:
            return at + after
    return len(text)


def _documents(file: Path, key: str, share: float) -> Iterator[Piece]:
    with file.open(encoding="utf-8") as opened:
        documents = sum(not line.isspace() for line in opened)
    cut, number = round(documents * (1 - share)), 0
    with file.open(encoding="utf-8") as opened:
        for line_number, line in enumerate(opened, 1):
            if line.isspace():
                continue
            number += 1
            if document := _document(line, key, f"{file}: line {line_number}"):
                yield Piece(document, number > cut, ends=True)


def _document(line: str, key: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise DuoError(f"{where} is no JSON ({problem})") from None
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        raise DuoError(f"{where} is no object with a text under {key!r}; --text-key names another key")
    document = str(found[key])
    try:
        document.encode()
    except UnicodeEncodeError:
        raise DuoError(f"{where} has half of a character, a lone surrogate") from None
    return document
