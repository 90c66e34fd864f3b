"""A whole training run in its folder, from texts to a model directory.

Of several processes rank 0 alone reads and writes; see `duo_mlx.training.parallel` for how the others get their part.
"""

import math
import platform
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten

from duo_mlx import __version__, checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, writing
from duo_mlx.model import Config, Model
from duo_mlx.processes import Processes
from duo_mlx.training import parallel, plot, start
from duo_mlx.training.folder import Folder
from duo_mlx.training.job import Job, Watch
from duo_mlx.training.optimizer import Arrays, Moments
from duo_mlx.training.prepare import Prepared, prepare
from duo_mlx.training.stage import Stage
from duo_mlx.training.state import State
from duo_mlx.training.trainer import LossError, Row, Trainer

SETTLED = 16  # windows that a job's `settle` is given


def run(job: Job, watch: Watch | None = None) -> dict[str, Any] | None:
    """Train, or go on training, and give what training.json holds.

    Returns:
        None where training stopped at ``stop_at``, and in processes other than rank 0.

    Raises:
        DuoError: what is wrong with an option, a text, a model or the folder; a loss that is no number; a disk that is
            full; another process that is lost.
    """
    processes = Processes()
    return _Run(job, watch if watch and processes.rank == 0 else Watch(), processes).run()


class _Run:
    """One process's part."""

    def __init__(self, job: Job, watch: Watch, processes: Processes):
        self.job, self.watch, self.processes = job, watch, processes
        self.folder = Folder(job.out)
        self.own: Prepared | None = None  # rank 0's

    def run(self) -> dict[str, Any] | None:
        job, settings = self.job, self.job.settings
        settings.check(self.processes.count)
        plan = self.processes.from_first(self._prepare)
        args = Config.from_dict(plan["config"])
        stage = job.stage(args)
        model, now = self._model(args, stage, plan["types"])
        data = self.own.data if self.own else None
        starts = data.starts(settings.length) if data else np.zeros(plan["windows"], np.int64)
        trainer = Trainer(model, stage, settings, data, plan["tokens"], starts, self.processes)
        steps, final = settings.schedule.steps, trainer.spread(job.final_windows or len(starts))
        self.watch.note(
            f"{_count(now.moments.learned):,} of {_count(checkpoint.parameters(model)):,} parameters learn; "
            f"{plan['tokens']:,} training tokens, {len(starts):,} held-out windows of {settings.length}"
        )
        if job.model is not None and now.step == 0:
            now = State(0, now.moments, trainer.validate(now.moments.learned, final))
        self.watch.progress("training", now.step, steps)
        try:
            now = trainer.run(
                now,
                min(steps, job.stop_at or steps),
                self._keep,
                lambda step, _: self.watch.progress("training", step, steps),
            )
        except LossError as error:
            more = f"; {self.folder.kept()}; try a lower --lr in another --out" if self.own else ""
            raise DuoError(f"{error}{more}") from None
        if now.step < steps:
            self.watch.note(f"stopped at step {now.step} of {steps}; --resume goes on")
            return None
        learned = {name: each.astype(start.TYPES[plan["types"][name]]) for name, each in now.moments.learned.items()}
        learned, follows = self._settle(trainer, learned)
        found = trainer.validate(learned, final)
        if not self.own:
            return None
        self.own.config.update(follows)
        return self._finish(self.own, model, stage, now.before, learned, found, len(final))

    def _prepare(self) -> dict[str, Any]:
        """What the other processes need to know of what rank 0 prepares."""
        self.own = prepare(self.job, self.folder, self.watch)
        return {
            "config": self.own.config,
            "types": {name: _name(each.dtype) for name, each in self.own.weights.items()},
            "tokens": len(self.own.data.train),
            "windows": len(self.own.data.starts(self.job.settings.length)),
        }

    def _model(self, args: Config, stage: Stage, types: dict[str, str]) -> tuple[Model, State]:
        """The model with the parameters that do not learn, and the state to go on from."""
        model = Model(args)
        shapes = {name: each.shape for name, each in checkpoint.parameters(model).items()}
        names = {name for name in shapes if stage.learns(name)}
        if self.own:
            weights = self.own.weights
        else:
            weights = {name: mx.zeros(shape, start.TYPES[types[name]]) for name, shape in shapes.items()}
        frozen = {name: each.astype(self.job.settings.dtype) for name, each in weights.items() if name not in names}
        # in the model's order, which is one in all processes and asks for the first layer's gradients first: then a
        # layer that is computed twice is gone before the one below it comes (16 layers: a peak of 15 MB, else 28)
        learned = {name: weights[name].astype(mx.float32) for name in shapes if name in names}
        start.learn(model, names)
        model.update(tree_unflatten(list(parallel.same(self.processes, frozen).items())))
        now = State(0, Moments.of(learned))

        def go_on() -> dict[str, Any]:
            nonlocal now
            if self.own and self.job.resume:
                now = self.folder.resumed(self.own.recipe, learned) or now
            return {"step": now.step, "before": now.before}

        begin = self.processes.from_first(go_on)
        kinds = (now.moments.learned, now.moments.first, now.moments.second)
        moments = Moments(*(parallel.same(self.processes, kind) for kind in kinds))
        mx.eval(model.parameters(), moments.arrays())
        return model, State(begin["step"], moments, begin["before"])

    def _settle(self, trainer: Trainer, learned: Arrays) -> tuple[Arrays, dict[str, Any]]:
        """What is kept of what was learned, in all processes, and the keys of config.json that follow from it."""
        settle, kept = self.job.settle, learned
        if settle is None:
            return learned, {}

        def follows() -> dict[str, Any]:
            nonlocal kept
            assert self.own
            data, length = self.own.data.train, self.job.settings.length
            starts = np.linspace(0, len(data) - length, SETTLED).astype(np.int64)
            windows = np.stack([data[begin : begin + length] for begin in starts]).astype(np.int32)
            kept, found = settle(trainer.model, learned, windows)
            return found

        trainer.use(learned)
        found: dict[str, Any] = self.processes.from_first(follows)
        return parallel.same(self.processes, kept), found

    def _keep(self, now: State, row: Row) -> None:
        if self.own:
            self.folder.keep(now, self.own.recipe, row)
            self.watch.note("  ".join(f"{key} {value}" for key, value in row.items()))

    def _finish(
        self,
        own: Prepared,
        model: Model,
        stage: Stage,
        before: dict[str, float],
        learned: Arrays,
        found: dict[str, float],
        windows: int,
    ) -> dict[str, Any]:
        """Write what is written at the end; training.json's content."""
        job, settings = self.job, self.job.settings
        held_out = own.data.held_out_bytes
        per_token = None if held_out is None else held_out / len(own.data.held_out)
        record = {
            "method": job.method,
            "recipe": own.recipe,
            "command": job.command,
            "versions": {"duo-mlx": __version__, "mlx": version("mlx"), "python": platform.python_version()},
            "processes": self.processes.count,
            "parameters": _count(checkpoint.parameters(model)),
            "learned_parameters": _count(learned),
            "steps": settings.schedule.steps,
            "tokens": settings.schedule.steps * settings.batch * settings.length,
            "validation_windows": windows,
            "before": before or None,
            "validation": found,
            "held_out_bytes_per_token": per_token,
            "validation_bits_per_byte": per_token
            and {name: found[name] / math.log(2) / per_token for name in stage.text_losses},
        }
        if plot.available():
            with output_file(self.folder.plot, force=True) as new, writing(new):
                new.write_bytes(plot.losses(self.folder.rows(), stage.text_losses))
        else:
            self.watch.note(f"no {self.folder.plot.name} without matplotlib: pip install 'duo-mlx[plot]'")
        rest = start.weights_of(job.model, job.config)[1] if job.model is not None else {}
        self.folder.finish(own.config, rest | learned, record)
        return record


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def _count(arrays: Arrays) -> int:
    return sum(each.size for each in arrays.values())
