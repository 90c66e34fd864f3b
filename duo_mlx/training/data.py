"""What a run trains on and is validated on: token files, made once from texts, and windows of them."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, write_text
from duo_mlx.training import texts, tokens
from duo_mlx.training.texts import Piece
from duo_mlx.training.tokens import SUFFIX, Ids

TRAIN, HELD_OUT, RECORD = f"train{SUFFIX}", f"held_out{SUFFIX}", "tokens.json"

Progress = Callable[[float, float], object]  # called with what is done and what is to be


class Tokenizer(Protocol):
    """What is needed of `duo_mlx.checkpoint.read_tokenizer`'s."""

    eos_token_id: int | None

    def encode(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> list[list[int]]: ...


@dataclass(frozen=True)
class Question:
    """Which texts, and how they are divided.

    Args:
        files: texts (see `duo_mlx.training.texts`), or a single token file.
        key: of documents in JSONL.
        held_out: the share at the end of every text that is held out.
    """

    files: tuple[Path, ...]
    key: str = "text"
    held_out: float = 0.05

    @property
    def is_token_file(self) -> bool:
        return self.files[0].suffix == SUFFIX

    def check(self) -> None:
        """Refuse what cannot be trained on, as far as that is seen without reading it.

        Raises:
            DuoError: a file is not there, or a token file is not alone.
        """
        for file in self.files:
            if not file.is_file():
                raise DuoError(f"{file}: there is no such file to train on")
        if len(self.files) > 1 and any(file.suffix == SUFFIX for file in self.files):
            raise DuoError("a token file is trained on alone; give one of them, or texts")

    def described(self) -> dict[str, Any]:
        """Names and sizes of the files and how they are divided, in JSON's types."""
        files = [{"name": file.name, "bytes": file.stat().st_size} for file in self.files]
        return {"files": files, "text_key": self.key, "held_out": self.held_out}


@dataclass(frozen=True)
class Data:
    """Tokens to train on, and those that are held out.

    Args:
        train: ids ``[tokens]``.
        held_out: ids ``[tokens]`` of one text after the other.
        ends: where each text ends in ``held_out``.
        held_out_bytes: of the held-out texts in UTF-8; None: there was no text.
    """

    train: Ids
    held_out: Ids
    ends: Sequence[int]
    held_out_bytes: int | None

    def window(self, start: int, length: int) -> Ids:
        """A training window ``[length + 1]``."""
        return self.train[start : start + length + 1]

    def starts(self, length: int) -> NDArray[np.int64]:
        """Where validation windows begin, one after the other through each text, each with its last target."""
        begins = [0, *self.ends[:-1]]
        each = [np.arange(begin, end - length, length) for begin, end in zip(begins, self.ends, strict=True)]
        return np.concatenate(each)

    def check(self, length: int) -> None:
        """Refuse data without a window.

        Raises:
            DuoError: there are too few tokens.
        """
        if len(self.train) <= length:
            raise DuoError(f"there are {len(self.train)} tokens to train on, too few for a window of {length}")
        if not len(self.starts(length)):
            raise DuoError(
                f"no held-out text fills a window of {length} tokens, and validation needs one; hold out more with "
                "--held-out, or give a shorter --length"
            )


def spread(starts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """``count`` of these at equal distances, or all if there are fewer."""
    return starts[np.linspace(0, len(starts) - 1, min(count, len(starts))).astype(np.int64)]


def tokenise(
    question: Question,
    folder: Path,
    tokenizer: Tokenizer,
    vocabulary: int,
    recipe: dict[str, Any],
    progress: Progress = lambda *_: None,
) -> None:
    """Make the token files of texts in a folder.

    The documents of a stream are joined with the tokenizer's end-of-text token, where it has one.

    Args:
        question: the texts.
        folder: exists.
        tokenizer: of the model.
        vocabulary: how many ids there are.
        recipe: of the run; written down last, for `made`.
        progress: is called with bytes.

    Raises:
        DuoError: a text cannot be read or holds none, or the folder cannot be written.
    """
    joint = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends: list[int] = []
    counts, held_out_bytes = [0, 0], 0
    total, done = sum(file.stat().st_size for file in question.files), 0
    with (
        tokens.token_file(folder / TRAIN, vocabulary) as train,
        tokens.token_file(folder / HELD_OUT, vocabulary) as held_out,
    ):
        for file in question.files:
            between = [counts[0] > 0, False]  # whether a document of the stream ended before
            for piece, ids in _encoded(texts.pieces(file, question.key, question.held_out), tokenizer):
                which = int(piece.held_out)
                ids = [*joint, *ids] if between[which] else ids
                (train, held_out)[which](ids)
                counts[which] += len(ids)
                between[which] = piece.ends
                size = len(piece.content.encode())
                held_out_bytes += size if piece.held_out else 0
                done += size
                progress(min(done, total), total)
            ends.append(counts[1])
    record = {"ends": ends, "held_out_bytes": held_out_bytes, "tokens": counts, "recipe": recipe}
    with output_file(folder / RECORD, force=True) as new:
        write_text(new, json.dumps(record, indent=2) + "\n")


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, list[int]]]:
    """The pieces with their ids; a batch of them is encoded at once, by several threads."""
    for batch in texts.batches(pieces):
        ids = tokenizer.encode([piece.content for piece in batch], add_special_tokens=False, verbose=False)
        yield from zip(batch, ids, strict=True)


def made(folder: Path, recipe: dict[str, Any]) -> bool:
    """Whether the folder has the token files of a run of that recipe."""
    if not (folder / RECORD).is_file():
        return False
    found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    return bool(found["recipe"] == recipe)


def open_data(question: Question, folder: Path, vocabulary: int, progress: Progress) -> Data:
    """The data of texts whose token files are made, or of a token file.

    Raises:
        DuoError: a token file cannot be read, or has an id beyond the vocabulary.
    """
    if question.is_token_file:
        ids = tokens.read(question.files[0], vocabulary, progress)
        cut = round(len(ids) * (1 - question.held_out))
        return Data(ids[:cut], ids[cut:], [len(ids) - cut], None)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    train, held_out = (tokens.read(folder / name, vocabulary, progress) for name in (TRAIN, HELD_OUT))
    return Data(train, held_out, record["ends"], record["held_out_bytes"])
