"""Tiny things to train, as fixtures that hand out functions."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import checkpoint
from duo_mlx.model import Model, ModelArgs
from duo_mlx.processes import Processes
from duo_mlx.training.data import Data
from duo_mlx.training.optimizer import Moments, Schedule
from duo_mlx.training.stage import Stage
from duo_mlx.training.start import learn
from duo_mlx.training.state import State
from duo_mlx.training.trainer import Settings, Trainer

LENGTH = 12
IDS = (np.arange(700) * np.arange(700) % 31).astype(np.uint16)
DATA = Data(IDS[:600], IDS[600:], [60, 100], 250)
SETTINGS = Settings(Schedule(20, 2e-2, 0.1, 4), batch=4, length=LENGTH, decay=0.1, clip=1.0, seed=3, every=5, windows=4)


@pytest.fixture(scope="session")
def settings() -> Callable[..., Settings]:
    """``settings(**changes)``: 20 steps of four windows."""
    return lambda **changes: replace(SETTINGS, **changes)


@pytest.fixture
def trainer(tiny_model: Callable[..., Model], tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., Any]:
    """``trainer(stage, settings=..., **config)``: a trainer of a tiny model, and its first state."""

    def make(stage: Stage, settings: Settings = SETTINGS, **changes: Any) -> tuple[Trainer, State]:
        weights = checkpoint.parameters(tiny_model(**changes))
        model = Model(ModelArgs.from_dict(tiny_config(**changes)))
        model.load_weights([(name, mx.array(np.array(each))) for name, each in weights.items()])
        names = sorted(name for name in weights if stage.learns(name))
        learn(model, set(names))
        learned = {name: mx.array(np.array(weights[name])) for name in names}
        trained = Trainer(model, stage, settings, DATA, len(DATA.train), DATA.starts(LENGTH), Processes())
        return trained, State(0, Moments.of(learned))

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """``write(name, content)``: a text file."""

    def make(name: str, content: str) -> Path:
        file = tmp_path / name
        file.write_text(content, encoding="utf-8")
        return file

    return make
