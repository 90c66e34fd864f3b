"""What every benchmark writes: its result with the system that it was measured on, whole or not at all."""

import csv
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.files import output_file, refuse_output

HELD_OUT = 0.05  # share at the end of a text that nothing is fitted to
LENGTH = 512  # tokens of a held-out window


def check_output(path: Path, force: bool) -> None:
    """Refuse a file that cannot be written as asked, before anything is measured."""
    refuse_output(path, force, {".json": "everything", ".csv": "the raw runs"})


def write_output(path: Path, record: dict[str, Any], column: str = "pass") -> None:
    """Write the record whole or not at all: all of it as JSON, or its runs as CSV ``COLUMN,run,seconds``."""
    text = io.StringIO(newline="")
    if path.suffix == ".json":
        json.dump(record, text, indent=1)
        text.write("\n")
    else:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([column, "run", "seconds"])
        writer.writerows(
            (name, run, value) for name, runs in record["runs_s"].items() for run, value in enumerate(runs)
        )
    with output_file(path, force=True) as file:
        file.write_text(text.getvalue(), encoding="utf-8")


def write_runs(
    path: Path,
    command: str,
    before: dict[str, Any],
    runs: Mapping[str, Sequence[float]],
    column: str = "pass",
    **found: Any,
) -> None:
    """Write what a program that times found, as `write_output` does.

    Args:
        path: of the file.
        command: what to type for the same again.
        before: the system as it was before anything was timed.
        runs: seconds, by what was timed.
        column: what the first column of a CSV file is called.
        found: everything else, by its key.
    """
    record = {"command": command, "system": before, "load_average_after": os.getloadavg(), **found, "runs_s": runs}
    write_output(path, record, column)


def held_out_windows(texts: Sequence[Path], ids: Sequence[NDArray[np.int32]], tokens: int) -> NDArray[np.int32]:
    """Windows ``[windows, LENGTH + 1]`` of the ends of texts whose token ids are ``ids``, ``tokens`` in all.

    Raises:
        DuoError: an end is too short.
    """
    each = max(1, tokens // LENGTH // len(texts))
    windows = []
    for text, found in zip(texts, ids, strict=True):
        start = round(len(found) * (1 - HELD_OUT))
        if len(found) - start < each * LENGTH + 1:
            left = len(found) - start
            raise DuoError(f"{text}: its last {HELD_OUT:.0%} has {left} tokens; {each * LENGTH + 1} are needed")
        windows += [found[start + n * LENGTH : start + (n + 1) * LENGTH + 1] for n in range(each)]
    return np.stack(windows)


def run(command: click.Command, name: str) -> None:
    """Run a benchmark's command line; bad input is one line on stderr and exit code 2."""
    try:
        command.main(standalone_mode=False)
    except (click.ClickException, DuoError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"{name}: error: {' '.join(message.split())}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
