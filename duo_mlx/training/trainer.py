"""The loop of training, which knows no stage: steps, clipping, accumulation, validation, several processes.

All that a step draws depends on the seed, the step and the sequence's place in the batch. So a batch may be cut into
parts that go one after the other (``accumulate``) or to several processes, and training goes on bit for bit after an
interruption, with nothing kept but parameters, moments and the step's number.

Parameters that learn, their gradients and moments are float32. In bfloat16 a pass computes with rounded copies: steps
of a small learning rate would be lost in bfloat16 parameters.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.processes import Processes, in_touch
from duo_mlx.training import parallel
from duo_mlx.training.data import Data, spread
from duo_mlx.training.optimizer import Arrays, Schedule, adamw, clipping, norm
from duo_mlx.training.stage import Drawn, Stage, randomness
from duo_mlx.training.state import State

TRAINING = 0  # where random numbers of training are, beside those of validation
LOSS = "loss"  # travels between processes beside the gradients; no parameter's name
ROWS = 8  # windows that are validated at once

Row = dict[str, str]  # of the log


@dataclass(frozen=True)
class Settings:
    """How long and how fast.

    Args:
        schedule: the learning rate.
        batch: sequences of a step, over all processes and parts.
        length: tokens of a sequence.
        decay: AdamW's weight decay, of matrices.
        clip: the norm that gradients are clipped to.
        seed: of all that is drawn.
        every: steps between validations and checkpoints.
        windows: that are validated then.
        accumulate: parts that each process computes its sequences in, one after the other.
        dtype: of the passes.
    """

    schedule: Schedule
    batch: int
    length: int
    decay: float
    clip: float
    seed: int
    every: int
    windows: int
    accumulate: int = 1
    dtype: mx.Dtype = mx.float32

    def check(self, processes: int) -> None:
        """Refuse a batch that cannot be cut as it is to be.

        Raises:
            DuoError: it cannot.
        """
        if self.batch % (processes * self.accumulate):
            raise DuoError(
                f"--batch {self.batch}: must be a multiple of processes x --accumulate, {processes} x {self.accumulate}"
            )


class LossError(DuoError):
    """A loss or a gradient is no number."""


class Trainer:
    """Trains one model.

    Args:
        model: a Duo; its parameters that do not learn have the type of the passes.
        stage: what is trained, and how.
        settings: see there.
        data: None in processes other than rank 0.
        tokens: how many there are to train on.
        starts: where validation windows begin in ``data``; for the other processes, any array as long.
        processes: of the run.
    """

    def __init__(
        self,
        model: Model,
        stage: Stage,
        settings: Settings,
        data: Data | None,
        tokens: int,
        starts: NDArray[np.int64],
        processes: Processes,
    ):
        settings.check(processes.count)
        self.model, self.stage, self.settings = model, stage, settings
        self.data, self.tokens, self.starts, self.processes = data, tokens, starts, processes

    def run(
        self,
        state: State,
        stop: int,
        keep: Callable[[State, Row], object],
        progress: Callable[[int, float], object] = lambda *_: None,
    ) -> State:
        """Train until ``stop`` steps are done.

        Args:
            state: where to go on.
            stop: how many steps, at most all of the schedule's.
            keep: is called in every process with each state that is validated, and the row of the log.
            progress: is called with the steps that are done, and the last one's loss.

        Raises:
            LossError: the loss or a gradient is no number; the state before that step is lost, but not the kept ones.
            DuoError: another process is lost.
        """
        losses: list[float] = []
        since = time.perf_counter()
        while state.step < stop:
            rate = self.settings.schedule.rate(state.step)
            state, loss = self.step(state)
            losses.append(loss)
            progress(state.step, loss)
            if state.step % self.settings.every == 0 or state.step == stop:
                tokens = self.settings.batch * self.settings.length
                speed = len(losses) * tokens / (time.perf_counter() - since)
                row = {"step": str(state.step), "tokens": str(state.step * tokens), "lr": f"{rate:.3g}"}
                row |= {"train_loss": f"{sum(losses) / len(losses):.4f}"}
                found = self.validate(state.moments.learned, self.spread(self.settings.windows))
                row |= {name: f"{value:.4f}" for name, value in found.items()} | {"tokens_per_s": f"{speed:.0f}"}
                keep(state, row)
                losses, since = [], time.perf_counter()
        return state

    @property
    def columns(self) -> list[str]:
        """Of the rows."""
        return ["step", "tokens", "lr", "train_loss", *self.stage.columns, "tokens_per_s"]

    def step(self, state: State) -> tuple[State, float]:
        """The state after one step of AdamW, and the step's loss, the mean over all its sequences.

        Raises:
            LossError: the loss or a gradient is no number.
        """
        windows, drawn = self.batch(state.step)
        loss, gradients = self.gradients(state.moments.learned, windows, drawn)
        size = norm(gradients)
        with in_touch():
            mx.eval(loss, size)
        found, length = float(np.array(loss)), float(np.array(size))
        for what, number in (("loss", found), ("norm of the gradients", length)):
            if not math.isfinite(number):
                raise LossError(f"step {state.step + 1}: the {what} is {number}")
        moments = adamw(
            state.moments, gradients, state.step, self.settings.schedule.rate(state.step), self.settings.decay,
            clipping(length, self.settings.clip),
        )  # fmt: skip
        mx.eval(moments.arrays())
        return replace(state, step=state.step + 1, moments=moments), found

    def batch(self, step: int) -> tuple[NDArray[np.int32], Drawn]:
        """This process's windows of a step ``[sequences, length + 1]``, and what is drawn for them."""
        of, length, share = self.settings, self.settings.length, self.settings.batch // self.processes.count
        own = range(self.processes.rank * share, (self.processes.rank + 1) * share)
        starts, drawn = [], []
        for row in range(of.batch):
            if self.data is None and row not in own:
                continue
            random = randomness(of.seed, TRAINING, step, row)
            starts.append(int(random.integers(self.tokens - length)))
            if row in own:
                drawn.append(self.stage.draw(random, length, step))
        whole = np.stack([self.data.window(start, length) for start in starts]) if self.data else None
        windows = parallel.shared(self.processes, whole, (of.batch, length + 1))
        return windows[own.start : own.stop], {name: np.stack([each[name] for each in drawn]) for name in drawn[0]}

    def gradients(self, learned: Arrays, windows: NDArray[np.int32], drawn: Drawn) -> tuple[mx.array, Arrays]:
        """The loss of all processes' windows and its gradients, unevaluated where other processes take part."""

        def loss_of(learned: Arrays, part: slice) -> mx.array:
            self.use(learned)
            these = {name: each[part] for name, each in drawn.items()}
            return self.stage.loss(self.model, mx.array(windows[part]), these).sum() / len(windows)

        size = len(windows) // self.settings.accumulate
        summed: Arrays = {}
        for start in range(0, len(windows), size):
            loss, found = mx.value_and_grad(loss_of)(learned, slice(start, start + size))
            found[LOSS] = loss
            summed = {name: summed[name] + each for name, each in found.items()} if summed else found
            mx.eval(summed)  # so that one part's pass is gone before the next one's comes
        gradients = parallel.averaged(self.processes, summed)
        return gradients.pop(LOSS), gradients

    def validate(self, learned: Arrays, starts: NDArray[np.int64]) -> dict[str, float]:
        """The mean of what the stage measures over the windows that begin there, by name; in all processes."""
        self.use(learned)
        length, rank, count = self.settings.length, self.processes.rank, self.processes.count
        sums = np.zeros(len(self.stage.columns))
        for first in range(0, len(starts), ROWS * count):
            these = starts[first : first + ROWS * count]
            held_out = None if self.data is None else self.data.held_out
            whole = None if held_out is None else np.stack([held_out[at : at + length + 1] for at in these])
            windows = parallel.shared(self.processes, whole, (len(these), length + 1))
            if len(own := windows[rank * ROWS : (rank + 1) * ROWS]):
                found = self.stage.measure(self.model, mx.array(own), first + rank * ROWS)
                sums += [np.array(found[name].astype(mx.float32)).sum(dtype=np.float64) for name in self.stage.columns]
        gathered = [np.frombuffer(each) for each in self.processes.gather(sums.tobytes())]
        means = np.sum(gathered, axis=0) / len(starts)
        return dict(zip(self.stage.columns, means.tolist(), strict=True))

    def spread(self, count: int) -> NDArray[np.int64]:
        """``count`` validation windows at equal distances, or all if there are fewer."""
        return spread(self.starts, count)

    def use(self, learned: Arrays) -> None:
        """Hand the parameters to the model, in the type of the passes."""
        self.model.update(tree_unflatten([(name, each.astype(self.settings.dtype)) for name, each in learned.items()]))
