"""Calibration texts: what a graft is fitted to, and what a model's best patterns are measured on.

The two never see the same tokens: the end of the texts is set aside for measuring.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import __version__, checkpoint
from duo_mlx.config import KnownPattern
from duo_mlx.errors import DuoError
from duo_mlx.files import write_text

RECORD = "patterns.json"  # what measuring found, in the model directory
WINDOW = 512  # tokens of a measured window, at most
SHORTEST = 64
LEAST = 2 * (SHORTEST + 1)  # tokens that measuring cannot do without: two windows, each with its last target

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Text:
    """A file's content."""

    name: str
    sha256: str
    content: str


@dataclass(frozen=True)
class Calibration:
    """Texts, and how many of their last tokens are for measuring; 0: nothing is measured."""

    texts: tuple[Path, ...]
    measure_tokens: int = 1024


@dataclass(frozen=True)
class Split:
    """Token ids, divided."""

    graft: Ids  # [tokens]
    windows: Ids | None  # [windows, length + 1]; None: nothing is measured
    note: str | None  # if the texts were too short for what was asked


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """The texts in UTF-8 files.

    Raises:
        DuoError: a file cannot be read, or is not UTF-8.
    """
    texts = []
    for path in paths:
        try:
            data = path.read_bytes()
            texts.append(Text(path.name, hashlib.sha256(data).hexdigest(), data.decode("utf-8")))
        except OSError as error:
            raise DuoError(f"--calibrate {path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise DuoError(f"--calibrate {path}: is not UTF-8 (byte {error.start})") from None
    return texts


def encode(directory: Path, config: dict[str, Any], texts: Sequence[Text]) -> Ids:
    """The token ids ``[tokens]`` of all texts, one after the other and without special tokens, as ``directory``'s
    tokenizer has them.

    Raises:
        DuoError: the tokenizer cannot be read.
    """
    tokenizer = checkpoint.read_tokenizer(directory, config)
    # not verbose: transformers would warn of a text that is longer than the model's context
    ids = [tokenizer.encode(text.content, add_special_tokens=False, verbose=False) for text in texts]
    return np.concatenate([np.array(part, np.int32) for part in ids])


def split(ids: Ids, graft: int, measure: int, longest: int | None = None) -> Split:
    """Divide ``ids [tokens]``: the first are for the graft, the last for measuring.

    Args:
        ids: of all texts.
        graft: how many tokens the graft wants; 0: there is none.
        measure: how many tokens are to be predicted in windows; 0: nothing is measured.
        longest: what a window may have, if that is less than `WINDOW`.

    Raises:
        DuoError: there are too few.
    """
    least = (LEAST if measure else 0) + (2 * SHORTEST if graft else 0)
    if ids.size < least:
        raise DuoError(f"--calibrate: the texts have {ids.size} tokens; at least {least} are needed")
    windows = None
    wanted = held = predicted = 0
    if measure:
        width = min(WINDOW, longest or WINDOW)
        wanted = max(LEAST, measure + -(-measure // width))
        # where there is not enough for both, a fifth of the text is for measuring
        held = min(wanted, max(LEAST, ids.size // 5, ids.size - graft))
        count = max(2, -(-held // (width + 1)))
        windows = ids[ids.size - held :][: held // count * count].reshape(count, -1)
        predicted = windows.size - count
    used = min(graft, ids.size - held)
    note = None
    if used < graft or held < wanted:
        parts = [f"{number} {verb} (of {asked})" for number, verb, asked in _parts(used, graft, predicted, measure)]
        note = f"the texts have {ids.size} tokens: {', '.join(parts)}"
    return Split(ids[:used], windows, note)


def _parts(used: int, graft: int, predicted: int, measure: int) -> list[tuple[int, str, int]]:
    parts = [(used, "are grafted on", graft), (predicted, "are measured", measure)]
    return [part for part in parts if part[2]]


def measure(
    directory: Path, windows: Ids, texts: Sequence[Text], progress: Callable[[float], None]
) -> list[KnownPattern]:
    """Measure the best patterns of the model in ``directory``, and record there how they were found.

    Args:
        directory: a model directory in float.
        windows: token ids ``[windows, length + 1]``.
        texts: that they are from.
        progress: is called with the share that is done.

    Returns:
        ``best_patterns`` for config.json.

    Raises:
        DuoError: the record cannot be written.
    """
    from duo_mlx.study import patterns

    model, _ = checkpoint.load(directory)
    found = patterns.measure(model, mx.array(windows), progress)
    origin = {
        "texts": [{"name": text.name, "sha256": text.sha256} for text in texts],
        "windows": list(windows.shape),
        "versions": {"duo-mlx": __version__, "mlx": version("mlx")},
    }
    write_text(directory / RECORD, json.dumps(found.record() | origin, indent=2) + "\n")
    return found.patterns
