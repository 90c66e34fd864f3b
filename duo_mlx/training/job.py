"""What a training run is asked to do, and who is told how it goes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.model import Config, Model
from duo_mlx.training.data import Question
from duo_mlx.training.optimizer import Arrays
from duo_mlx.training.stage import Stage
from duo_mlx.training.start import Sizes
from duo_mlx.training.trainer import Settings


@dataclass(frozen=True)
class Job:
    """What to train.

    Args:
        method: its name.
        question: the texts.
        out: the folder, see `duo_mlx.training.folder`.
        settings: how long and how fast.
        stage: makes the stage for a model.
        options: all that the result depends on beside texts, tokenizer and model, in JSON's types.
        command: what was typed.
        model: a model directory to go on training; None: a new model of ``sizes``.
        sizes: of a new model.
        tokenizer: a directory with that of a new model; None: train one of ``vocabulary`` pieces.
        vocabulary: see there.
        resume: go on in ``out``.
        stop_at: a step to stop at, with a checkpoint.
        final_windows: windows that are validated at the end; None: all.
        config: what is put over the configuration of ``model``.
        settle: ends the training, see `Settle`.
    """

    method: str
    question: Question
    out: Path
    settings: Settings
    stage: Callable[[Config], Stage]
    options: dict[str, Any]
    command: str
    model: Path | None = None
    sizes: Sizes | None = None
    tokenizer: Path | None = None
    vocabulary: int = 4096
    resume: bool = False
    stop_at: int | None = None
    final_windows: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    settle: "Settle | None" = None


# From the trained model, what it has learned and training windows [windows, length]: what is kept of what was learned,
# and of config.json's keys those that follow from it.
Settle = Callable[[Model, Arrays, NDArray[np.int32]], tuple[Arrays, dict[str, Any]]]


@dataclass(frozen=True)
class Watch:
    """Who is told what happens."""

    progress: Callable[[str, float, float], object] = lambda *_: None  # stage, what is done and what is to be
    note: Callable[[str], object] = lambda _: None  # a line

    def stage(self, name: str) -> Callable[[float, float], object]:
        """`progress` of one stage."""
        return lambda done, total: self.progress(name, done, total)
