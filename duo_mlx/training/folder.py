"""The folder of a run: its checkpoint and log while it trains, and a model directory when it is done.

==================================  ==================================================================================
``tokenizer*.json``                 of the model
``tokens/``                         token files of the texts, and what they are of
``checkpoint/state.safetensors``    what ``--resume`` goes on from
``log.csv``                         a row a validation
``config.json``, ``model*``, ...    the model, once it is trained; config.json comes last, so that nobody loads a part
``loss.svg``                        the log as a figure, where matplotlib is installed
``training.json``                   the recipe and what came of it; the last file of all
==================================  ==================================================================================
"""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx import checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, write_text, writing
from duo_mlx.training import state
from duo_mlx.training.state import State
from duo_mlx.training.trainer import Row


class Folder:
    """The folder ``out`` of a run."""

    def __init__(self, out: Path):
        self.out = out
        self.tokens = out / "tokens"
        self.checkpoint = out / "checkpoint" / "state.safetensors"
        self.log = out / "log.csv"
        self.plot = out / "loss.svg"
        self.record = out / "training.json"

    def begin(self, resume: bool) -> None:
        """Make the folder, or with ``resume`` take the one that is there.

        Raises:
            DuoError: it is there and shall not be, or the other way round, or it is finished.
        """
        if self.record.exists():
            raise DuoError(f"--out {self.out}: holds a finished training; give another name")
        if resume and not self.tokens.is_dir():
            raise DuoError(f"--resume: {self.out} holds no training to go on with; leave out --resume to begin")
        if not resume and self.out.exists():
            raise DuoError(f"--out {self.out}: exists already; give --resume to go on with it, or another name")
        with writing(self.out):
            self.tokens.mkdir(parents=True, exist_ok=True)
            for place in (self.out, self.tokens, self.checkpoint.parent):
                for left in [*place.glob(".*.new*"), *place.glob(".tokenizer.*")]:  # by a process that was killed
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def remove(self) -> None:
        """Take back what `begin` and those after it have made."""
        shutil.rmtree(self.out, ignore_errors=True)

    def resumed(self, recipe: dict[str, Any], learned: dict[str, mx.array]) -> State | None:
        """The state that is kept, and the log up to it; None if there is none yet.

        Raises:
            DuoError: the checkpoint is damaged, or of another recipe or model.
        """
        if not self.checkpoint.exists():
            self.log.unlink(missing_ok=True)
            return None
        found = state.read(self.checkpoint, recipe, learned)
        self._write_rows([row for row in self.rows() if int(row["step"]) <= found.step])
        return found

    def keep(self, now: State, recipe: dict[str, Any], row: Row) -> None:
        """Add a row to the log and replace the checkpoint.

        A row without its checkpoint is dropped by `resumed`.

        Raises:
            DuoError: the system does not let it; the checkpoint before is whole.
        """
        before = [each for each in self.rows() if int(each["step"]) < now.step]
        try:
            self._write_rows([*before, row])
            state.write(self.checkpoint, now, recipe)
        except DuoError as error:
            raise DuoError(f"{error}; {self.kept()}; --resume goes on") from error

    def kept(self) -> str:
        """Which checkpoint there is, in words."""
        if not self.checkpoint.exists():
            return f"{self.out} keeps no checkpoint yet"
        return f"{self.out} keeps step {state.read_record(self.checkpoint)['step']}"

    def rows(self) -> list[Row]:
        """The log."""
        if not self.log.exists():
            return []
        with self.log.open(newline="", encoding="utf-8") as opened:
            return list(csv.DictReader(opened))

    def _write_rows(self, rows: list[Row]) -> None:
        if not rows:
            return
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        with output_file(self.log, force=True) as new:
            write_text(new, text.getvalue())

    def finish(self, config: dict[str, Any], weights: dict[str, mx.array], record: dict[str, Any]) -> None:
        """Write the model and then the record.

        Raises:
            DuoError: the system does not let them be written; the checkpoint stays.
        """
        with writing(self.out):
            new = self.out / ".model.new"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
        try:
            checkpoint.save(new, config, weights)
            with writing(self.out):
                for file in sorted(new.iterdir(), key=lambda file: file.name == "config.json"):
                    file.replace(self.out / file.name)
            with output_file(self.record, force=True) as file:
                write_text(file, json.dumps(record, indent=2) + "\n")
        except DuoError as error:
            raise DuoError(f"{str(error).replace(str(new), str(self.out))}; {self.kept()}; --resume goes on") from error
        finally:
            shutil.rmtree(new, ignore_errors=True)
