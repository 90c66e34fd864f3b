"""How far a long command is, on standard error, while that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, float, float], object]  # stage, what is done and what is to be

BYTES = ("writing", "quantising")  # stages that count them


def amount(stage: str, done: float, total: float) -> str:
    """What is done of what is to be: bytes, or the share."""
    if stage in BYTES:
        return f"{done / 1e9:.2f} of {total / 1e9:.2f} GB"
    return f"{done / total if total else 1:.0%}"


@contextmanager
def shown() -> Iterator[Progress]:
    """A function that shows progress; it does nothing where standard error is no terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
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
