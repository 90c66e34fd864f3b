"""Runs the examples in Markdown files, or prints one of them.

Fenced ``bash`` and ``python`` blocks of a file run from top to bottom in one new directory, in which ``examples`` is
the checkout's. A program is looked for beside the Python that runs this script first. An HTML comment on the line
before a block changes that:

    <!-- ci: skip, REASON -->    the block does not run
    <!-- ci: NAME -->            the block does not run here; ``show FILE NAME`` prints it for another program

    python .ci/examples.py run FILE...
    python .ci/examples.py show FILE NAME
"""

import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT

ROOT = Path(__file__).resolve().parent.parent
RUNNERS = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
MISTAKEN = {"sh", "shell", "console", "zsh", "py", "python3", "pycon"}  # would look like an example and never run
FENCE = re.compile(r"^ *(`{3,}|~{3,}) *([\w-]*)")
MARK = re.compile(r"^ *<!-- *ci: *(.*?) *-->$")
TIME_LIMIT = 2400  # seconds; a graft takes minutes, on a slow machine twenty


@dataclass(frozen=True)
class Block:
    """A fenced block: where it starts, its language, its text, and what the comment before it says."""

    file: Path
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} ({self.language})"


def blocks(file: Path) -> Iterator[Block]:
    """The fenced blocks of a Markdown file.

    Raises:
        SystemExit: a block that would never run by mistake: an unknown name for bash or Python, a comment that belongs
            to no block, a skip without a reason, a fence that is not closed.
    """
    lines = iter(enumerate(file.read_text(encoding="utf-8").splitlines(), 1))
    mark = ""
    for number, line in lines:
        if found := MARK.match(line):
            mark = found[1]
            continue
        opening = FENCE.match(line)
        if opening:
            fence, language = opening[1], opening[2]
            if language in MISTAKEN:
                sys.exit(f"{file}:{number}: say bash or python, not {language}; else the block never runs")
            if re.match(r"skip\b", mark) and not re.match(r"skip, *\w", mark):
                sys.exit(f"{file}:{number}: write <!-- ci: skip, REASON -->")
            inside = []
            for _, inner in lines:
                if inner.strip().startswith(fence) and not inner.strip().strip(fence[0]):
                    break
                inside.append(inner)
            else:
                sys.exit(f"{file}:{number}: the block is not closed")
            yield Block(file, number, language, textwrap.dedent("\n".join(inside)) + "\n", mark)
        elif mark and line.strip():
            sys.exit(f"{file}:{number}: the comment before this line belongs to no block")
        mark = "" if line.strip() else mark


def run(file: Path) -> int:
    """Run the file's blocks and return how many ran.

    Raises:
        SystemExit: a block failed.
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    ran = 0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "examples").symlink_to(ROOT / "examples")
        for block in blocks(file):
            if block.language not in RUNNERS:
                continue
            if block.mark:
                print(f"-- {block}: not run here: {block.mark.removeprefix('skip, ')}", flush=True)
                continue
            print(f"-- {block}\n{textwrap.indent(block.text, '   | ')}", end="", flush=True)
            start = time.monotonic()
            command = [*RUNNERS[block.language], block.text]
            try:
                subprocess.run(
                    command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=True, timeout=TIME_LIMIT
                )
            except subprocess.CalledProcessError as error:
                sys.exit(f"{block}: the example failed with exit code {error.returncode}")
            except subprocess.TimeoutExpired:
                sys.exit(f"{block}: the example took more than {TIME_LIMIT} s")
            print(f"   took {time.monotonic() - start:.1f} s", flush=True)
            ran += 1
    return ran


def run_all(files: list[str]) -> None:
    """Run each file by itself, as many at once as there are cores, with a BLAS thread each.

    What they print comes file by file.

    Raises:
        SystemExit: a block failed.
    """

    environment = {"OPENBLAS_NUM_THREADS": "1"} | os.environ

    def one(file: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, __file__, "run", file]
        return subprocess.run(command, stdout=PIPE, stderr=STDOUT, text=True, check=False, env=environment)

    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        for file, done in zip(files, pool.map(one, files), strict=True):
            print(done.stdout, end="", flush=True)
            if done.returncode:
                pool.shutdown(cancel_futures=True)
                sys.exit(f"{file}: an example failed, see above")


def show(file: Path, name: str) -> str:
    """The text of the one block that the comment before it calls ``name``."""
    named = [block.text for block in blocks(file) if block.mark == name]
    if len(named) != 1:
        sys.exit(f"{file}: there must be one block after <!-- ci: {name} -->, not {len(named)}")
    return named[0]


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["run", file]:
            print(f"{run(Path(file))} examples ran")
        case ["run", *files] if files:
            run_all(files)
        case ["show", file, name]:
            print(show(Path(file), name), end="")
        case _:
            sys.exit(__doc__)
