"""The tokenizer of a run: another model's, or one that is trained on the run's texts with sentencepiece."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer

from duo_mlx.convert import tokenizer as files
from duo_mlx.errors import DuoError
from duo_mlx.files import writing
from duo_mlx.training import texts
from duo_mlx.training.data import Question

MODEL = "tokenizer.model"  # sentencepiece's
FILES = ("tokenizer.json", MODEL)  # a directory has one of them
SEEN = 1 << 28  # bytes of text that sentencepiece, which has its text in memory, is trained on, about
LONGEST = 1 << 16  # bytes of a paragraph; sentencepiece leaves out what is longer


def bring(source: Path, out: Path, vocabulary: int | None = None) -> int:
    """Bring the tokenizer files of a directory into ``out``, and say how many ids the vocabulary has.

    Args:
        source: a model directory, or any with a tokenizer.json or a tokenizer.model (sentencepiece).
        out: exists.
        vocabulary: of the model; None: what the tokenizer needs.

    Raises:
        DuoError: see `duo_mlx.convert.tokenizer.write`; or ``out`` cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".tokenizer.") as name:
        new = Path(name)
        with writing(out):
            files.write(source, new, vocabulary or 1 << 31)
            needed = max(Tokenizer.from_file(str(new / "tokenizer.json")).get_vocab().values()) + 1
            for file in sorted(new.iterdir()):
                file.replace(out / file.name)
    return vocabulary or needed


def train(question: Question, out: Path, vocabulary: int) -> int:
    """Train a tokenizer of ``vocabulary`` pieces on what is not held out, write its files, and say how many it has.

    It is sentencepiece's BPE over paragraphs, with bytes for what it does not know. Of very long texts it sees
    paragraphs at equal distances.

    Raises:
        DuoError: a text cannot be read, or sentencepiece cannot make that many pieces of them.
    """
    size = sum(file.stat().st_size for file in question.files)
    with tempfile.TemporaryDirectory(dir=out, prefix=".tokenizer.") as name:
        model = Path(name) / MODEL
        with writing(model), model.open("wb") as writer:
            read = _Reading(_paragraphs(question, every=1 + size // SEEN))
            try:
                sentencepiece.SentencePieceTrainer.train(
                    sentence_iterator=iter(read),
                    model_writer=writer,
                    vocab_size=vocabulary,
                    model_type="bpe",
                    byte_fallback=True,
                    character_coverage=1.0,
                    max_sentence_length=LONGEST,
                    minloglevel=2,
                )
            except RuntimeError as error:
                if read.error is not None:
                    raise read.error from None
                reason = " ".join(str(error).split()).rpartition("] ")[2]
                raise DuoError(f"--vocab {vocabulary}: sentencepiece cannot train on these texts: {reason}") from error
        bring(model.parent, out, vocabulary)
    return vocabulary


class _Reading:
    """Lines for sentencepiece, which makes a `RuntimeError` of what they raise; the error itself is kept here."""

    def __init__(self, lines: Iterator[str]):
        self.lines = lines
        self.error: DuoError | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            yield from self.lines
        except DuoError as error:
            self.error = error
            raise


def _paragraphs(question: Question, every: int) -> Iterator[str]:
    """Every so manieth paragraph of the training text, on one line."""
    number = 0
    for file in question.files:
        for piece in texts.pieces(file, question.key, question.held_out):
            if piece.held_out:
                continue
            for paragraph in piece.content.split("\n\n"):
                if line := " ".join(paragraph.split()):
                    if number % every == 0:
                        yield line
                    number += 1
