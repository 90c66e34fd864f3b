"""Checkpoints: all that training goes on from, in one file that is either the one before or the new one."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from duo_mlx import shards
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file
from duo_mlx.training.optimizer import Moments

KINDS = ("learned", "first", "second")
RECORD = "duo_training"  # the key of what is no array, in the file's metadata


@dataclass(frozen=True)
class State:
    """Where training is. Random numbers are no part of it: they depend on the seed and the step alone.

    Args:
        step: how many are done.
        moments: the parameters that learn, and AdamW's means.
        before: what validation found before the first step; empty: nobody asked.
    """

    step: int
    moments: Moments
    before: dict[str, float] = field(default_factory=dict)


def write(file: Path, state: State, recipe: dict[str, Any]) -> None:
    """Replace a checkpoint, or leave the one that is there.

    Raises:
        DuoError: it cannot be written.
    """
    arrays = {f"{kind}.{name}": each for kind in KINDS for name, each in getattr(state.moments, kind).items()}
    record = json.dumps({"step": state.step, "before": state.before, "recipe": recipe})
    with output_file(file, force=True) as new:
        try:
            shards.write(
                new.parent,
                shards.held(arrays),
                limit=1 << 62,
                stem=new.stem,
                metadata={"format": "mlx", RECORD: record},
            )
        finally:
            new.with_name(f"{new.name}.index.json").unlink(missing_ok=True)


def read(file: Path, recipe: dict[str, Any], learned: dict[str, mx.array]) -> State:
    """The state in a checkpoint.

    Args:
        file: what `write` wrote.
        recipe: what is being trained, and how, in JSON's types.
        learned: the parameters that learn, for their names and shapes.

    Raises:
        DuoError: the file is damaged, or is of another recipe or model.
    """
    refuse_other(file, recipe)
    record = read_record(file)
    with safe_open(file, framework="numpy") as opened:
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        _refuse_misfits(file, shapes, {name: each.shape for name, each in learned.items()})
        kinds = [{name: mx.array(opened.get_tensor(f"{kind}.{name}")) for name in learned} for kind in KINDS]
    return State(record["step"], Moments(*kinds), record["before"])


def read_record(file: Path) -> dict[str, Any]:
    """What a checkpoint holds besides arrays: step, before and recipe.

    Raises:
        DuoError: it is damaged, or no checkpoint.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            record: dict[str, Any] = json.loads((opened.metadata() or {})[RECORD])
    except (SafetensorError, OSError) as error:
        raise DuoError(f"{file}: is damaged or no checkpoint ({' '.join(str(error).split())})") from None
    except (KeyError, json.JSONDecodeError):
        raise DuoError(f"{file}: is no checkpoint of duo-mlx train") from None
    return record


def refuse_other(file: Path, recipe: dict[str, Any]) -> None:
    """Refuse a checkpoint of another recipe.

    Raises:
        DuoError: with the first thing in which they differ; or it is no checkpoint.
    """
    made = read_record(file)["recipe"]
    for key in sorted({*made, *recipe}):
        if made.get(key) != recipe.get(key):
            raise DuoError(
                f"{file}: was made with {key} {made.get(key)!r}, not {recipe.get(key)!r}; resume with what it was made "
                "with, or give another --out"
            )


def _refuse_misfits(file: Path, found: dict[str, tuple[int, ...]], learned: dict[str, tuple[int, ...]]) -> None:
    expected = {f"{kind}.{name}": shape for kind in KINDS for name, shape in learned.items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            there, here = (str(list(of[name])) if name in of else "not there" for of in (found, expected))
            raise DuoError(f"{file}: is of another model: {name} is {there} in it, and {here} in this one")
