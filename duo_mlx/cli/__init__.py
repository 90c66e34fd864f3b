"""The command line ``duo-mlx``: a group whose commands are imported only when they are called.

The command NAME is the attribute ``command`` of ``duo_mlx/cli/NAME.py``; that of two words, ``FIRST SECOND``, is in
``FIRST_SECOND.py``, and ``FIRST`` may be a command, too, or not. Exit codes: 0 done; 2 wrong use or bad input,
with one line on stderr; 130 after Ctrl-C or SIGTERM. Every other exception is a defect and keeps its traceback.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from duo_mlx import __version__
from duo_mlx.errors import DuoError

COMMANDS = {
    "bench compare": "Compare two results of bench run, B against A, and fail where B is worse",
    "bench draft": "Find the pattern that drafts best for --verify, by what TEXT has it accept and by what it costs",
    "bench report": "Show results of bench run: one page that opens offline, and plots",
    "bench run": "Measure what big, small and skip trade between latency, energy and quality, on this machine",
    "bench project": "Project what routing should bring on Apple chips, by strategy, size and quantisation",
    "bench doctor": "Check this machine: versions, meters, kernels and speed, and what --strategy auto does here",
    "convert": "Turn a checkpoint into a model directory, or a model directory into a PyTorch checkpoint",
    "convert inspect": "Say what a checkpoint is and what can be made of it, without loading it",
    "oracle": "Find, for each token of a text, the pattern with the lowest loss on the true next token",
    "oracle claims": "Judge Duo-LLM's ten claims by an oracle, as the paper reads them and with a control",
    "oracle difficulty": "Study which tokens gain from more compute, in a finished oracle's table",
    "oracle plot": "Draw what an oracle found, as SVG and PNG with captions",
    "oracle routers": "Measure trained routers on an oracle's text, at its budgets",
    "train router": "Train a router, beside everything else as it is (stage 3)",
    "train routes": "Train a model with random routing (stage 1): a new one, or go on with one that is there",
    "train small": "Train the small FFNs of a grafted model, beside everything else as it is",
    "train texts": "Let a model go on with windows of TEXT, for its drafts to learn from",
    "generate": "Generate text after PROMPT, or after standard input where PROMPT is - or left out",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and one line of help until one is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f"{__name__}.{cmd_name.replace(' ', '_')}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, two_words = args[0], " ".join(args[:2])
        if two_words in COMMANDS:
            return two_words, self.get_command(ctx, two_words), args[2:]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from difflib import get_close_matches

            if below := [known for known in sorted(COMMANDS) if known.startswith(f"{name} ")]:
                ctx.fail(f"{name} needs one more word; there are {', '.join(below)}")
            close = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(COMMANDS))}"
            ctx.fail(f"no command {name!r}; {hint}")
        return super().resolve_command(ctx, args)

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run the command line; see the module for its exit codes. Errors pass through without ``standalone_mode``."""
        run: Callable[..., Any] = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **kwargs)
        try:
            with _sigterm_as_ctrl_c():
                result = run(*args, standalone_mode=False, **kwargs)
        except click.Abort as abort:
            if isinstance(abort.__cause__, EOFError):  # click takes it for the end of a dialogue; there is none here
                raise abort.__cause__ from None
            sys.exit(130)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
            _fail(error.format_message().rstrip(".") + hint)
        except click.ClickException as error:
            _fail(error.format_message())
        except DuoError as error:
            _fail(str(error))
        sys.exit(result if isinstance(result, int) else 0)


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that a command cleans up."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers in the main thread alone
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> None:
    click.echo(f"duo-mlx: error: {' '.join(message.splitlines())}", err=True)
    sys.exit(2)


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="duo-mlx")
def main() -> None:
    """Duo-LLM with MLX: every token meets a big FFN, a small one or neither, and what its route leaves out is not
    computed.

    \b
    Examples:
      duo-mlx generate "It is a truth universally acknowledged"
      duo-mlx generate --route BBBBBBssssss --show-routes "Emma was"
    """
