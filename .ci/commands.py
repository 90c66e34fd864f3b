"""Writes docs/commands.md from the ``--help`` of every command; with ``--check``, fails when the file is another."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from duo_mlx.cli import main

FILE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """# Commands

What `--help` says; `python .ci/commands.py` writes this file.
"""
WIDTH = 100


def helps(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Path and help of a command and all commands below it."""
    with command.make_context(name, [], parent, resilient_parsing=True, terminal_width=WIDTH) as context:
        yield context.command_path, command.get_help(context)
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                found = command.get_command(context, below)
                assert found is not None, f"{context.command_path} lists {below} and has no such command"
                yield from helps(found, below, context)


def reference() -> str:
    """The text of docs/commands.md."""
    return HEAD + "".join(f"\n## {path}\n\n```text\n{text}\n```\n" for path, text in helps(main, "duo-mlx"))


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        if not FILE.is_file() or FILE.read_text(encoding="utf-8") != reference():
            sys.exit("docs/commands.md is not what --help says; run python .ci/commands.py and commit the file")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        FILE.write_text(reference(), encoding="utf-8")
