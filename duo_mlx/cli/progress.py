"""How far a long command is, on standard error: bars on a terminal, and elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

Progress = Callable[[str, float, float], object]  # stage, what is done and what is to be

BYTES = ("writing", "quantising")  # stages that count them
FIRST, EVERY = 5, 30  # seconds of a stage before its first line, and between lines


def amount(stage: str, done: float, total: float) -> str:
    """What is done of what is to be: bytes, or the share."""
    if stage in BYTES:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
    return f"{done / total if total else 1:.0%}"


class Lines:
    """Progress in lines, for logs: each stage's first says how long it will take, and short stages say nothing.

    Args:
        clock: gives seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._stage: str | None = None
        self._share = self._start = self._began = self._next = 0.0

    def __call__(self, stage: str, done: float, total: float) -> None:
        now, share = self._clock(), done / total if total else 1.0
        if stage != self._stage or share < self._share:
            self._stage, self._start, self._began, self._next = stage, share, now, now + FIRST
        self._share = share
        if now < self._next or share <= self._start:
            return
        self._next = now + EVERY
        left = (now - self._began) / (share - self._start) * (1 - share)
        click.echo(f"duo-mlx: {stage}: {amount(stage, done, total)}, {about(left)}", err=True)


def about(seconds: float) -> str:
    """A time that is left, in words."""
    if seconds < 90:
        return f"about {max(round(seconds / 5) * 5, 1)} s left"
    return f"about {round(seconds / 60)} min left"


@contextmanager
def shown() -> Iterator[Progress]:
    """A function that shows progress."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(stage: str, done: float, total: float) -> None:
            said = amount(stage, done, total)
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, amount=said)
            bars.update(tasks[stage], completed=done, total=total, amount=said)

        yield show
