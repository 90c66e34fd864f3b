"""The group: light to import and to ask for help, and the one place that turns errors into exit codes."""

import json
import pkgutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import import_module

import click
import pytest
from click.testing import CliRunner, Result

import duo_mlx
from duo_mlx import cli
from duo_mlx.cli import COMMANDS, main
from duo_mlx.errors import DuoError

HEAVY = {"mlx", "mlx_lm", "numpy", "safetensors", "sentencepiece", "tokenizers", "torch", "transformers"}


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], Result]:
    """``run_command(function)``: ``duo-mlx fake``, a command that calls it."""

    def run(function: Callable[[], None]) -> Result:
        module = types.ModuleType("duo_mlx.cli.fake")
        module.command = click.command(name="fake")(lambda: function())
        monkeypatch.setitem(sys.modules, "duo_mlx.cli.fake", module)
        monkeypatch.setitem(COMMANDS, "fake", "A fake")
        return CliRunner().invoke(main, ["fake"], prog_name="duo-mlx")

    return run


def invoke(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="duo-mlx")


def module(name: str) -> str:
    """The module of a command, in which two words are one."""
    return name.replace(" ", "_")


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command(option):
    result = invoke(option)
    assert result.exit_code == 0
    lines = " ".join(result.stdout.split())
    for name, line in COMMANDS.items():
        assert f"{name} {line}" in lines


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_line_of_a_command_is_the_first_of_its_own_help(name):
    command = import_module(f"duo_mlx.cli.{module(name)}").command
    assert command.name in (name, "command")
    assert command.get_short_help_str(limit=1000).rstrip(".") == COMMANDS[name]


def test_every_command_is_in_the_group():
    modules = {found.name: import_module(f"duo_mlx.cli.{found.name}") for found in pkgutil.iter_modules(cli.__path__)}
    with_command = {name for name in modules if isinstance(getattr(modules[name], "command", None), click.Command)}
    assert with_command == set(map(module, COMMANDS))


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([*name.split(), "--help"] for name in sorted(COMMANDS))])
def test_help_imports_nothing_heavy_and_no_other_command(args):
    code = (
        "import json, sys\nfrom duo_mlx.cli import main\n"
        "assert main(sys.argv[1:], standalone_mode=False) == 0\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert "duo_mlx.cli" in loaded
    assert not {name.partition(".")[0] for name in loaded} & HEAVY
    assert {name for name in COMMANDS if f"duo_mlx.cli.{module(name)}" in loaded} == {" ".join(args[:-1])} & {*COMMANDS}


@pytest.fixture
def two_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """``duo-mlx paint`` and ``duo-mlx paint walls``, and ``duo-mlx sing loudly`` without ``duo-mlx sing``."""
    for name in ("paint", "paint walls", "sing loudly"):
        fake = types.ModuleType(f"duo_mlx.cli.{module(name)}")
        argument = click.argument("words", nargs=-1)
        fake.command = click.command(name="command")(argument(lambda words, name=name: click.echo((name, words))))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
        monkeypatch.setitem(COMMANDS, name, f"To {name}")


@pytest.mark.usefixtures("two_words")
@pytest.mark.parametrize(
    ("args", "called"),
    [
        (["paint"], ("paint", ())),
        (["paint", "doors"], ("paint", ("doors",))),
        (["paint", "./walls"], ("paint", ("./walls",))),
        (["paint", "--", "walls"], ("paint", ("walls",))),
        (["paint", "walls"], ("paint walls", ())),
        (["paint", "walls", "walls"], ("paint walls", ("walls",))),
        (["sing", "loudly", "now"], ("sing loudly", ("now",))),
    ],
)
def test_a_command_of_two_words_goes_before_one_of_one(args, called):
    result = invoke(*args)
    assert (result.exit_code, result.output) == (0, f"{called}\n")


@pytest.mark.usefixtures("two_words")
def test_help_and_errors_know_commands_of_two_words():
    assert "paint walls" in invoke("--help").stdout
    assert invoke("paint", "walls", "--help").stdout.startswith("Usage: duo-mlx paint walls [OPTIONS] [WORDS]...")
    assert invoke("paint", "--help").stdout.startswith("Usage: duo-mlx paint [OPTIONS] [WORDS]...")
    assert "(see duo-mlx paint walls --help)" in invoke("paint", "walls", "--colour").stderr
    for args in (["sing"], ["sing", "softly"]):
        result = invoke(*args)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "error: sing needs one more word; there are sing loudly (see duo-mlx --help)\n" in result.stderr


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"duo-mlx, version {duo_mlx.__version__}\n")


def test_without_a_command_the_help_is_shown():
    result = invoke()
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == invoke("--help").stdout


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["genrate"], "no command 'genrate'; did you mean generate? (see duo-mlx --help)"),
        (["xyzzy"], f"no command 'xyzzy'; there are {', '.join(sorted(COMMANDS))} (see duo-mlx --help)"),
        (["generate", "--strategy", "fast", "A"], "'fast' is not one of"),
        (["generate", "--colour"], "(see duo-mlx generate --help)"),
        (["--colour"], "(see duo-mlx --help)"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(args, line):
    result = invoke(*args)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith("duo-mlx: error: ")
    assert line in result.stderr


@pytest.mark.parametrize("error", [DuoError("a.txt: is empty"), click.ClickException("a.txt: is empty")], ids=type)
def test_bad_input_is_one_line_and_exit_code_2(run_command, error):
    def fail() -> None:
        raise error

    result = run_command(fail)
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "duo-mlx: error: a.txt: is empty\n")


def test_a_message_of_several_lines_becomes_one(run_command):
    def fail() -> None:
        raise DuoError("config.json:\nis no JSON")

    assert run_command(fail).stderr == "duo-mlx: error: config.json: is no JSON\n"


@pytest.mark.parametrize("error", [KeyError("w"), ValueError("x"), EOFError("y"), OSError("z")], ids=type)
def test_a_defect_is_not_swallowed(run_command, error):
    def fail() -> None:
        raise error

    assert run_command(fail).exception is error


@pytest.mark.parametrize("code", [0, 3, 130])
def test_a_command_may_choose_its_exit_code(run_command, code):
    assert run_command(lambda: sys.exit(code)).exit_code == code
    assert run_command(lambda: click.get_current_context().exit(code)).exit_code == code


def test_without_standalone_mode_errors_pass_through():
    with pytest.raises(click.UsageError, match="did you mean generate"):
        main(["genrate"], standalone_mode=False)


ENDLESS = """
import sys, types
import click
from duo_mlx import cli
@click.command()
def command():
    while True:
        click.echo("line")
cli.COMMANDS["fake"] = "A fake"
module = sys.modules["duo_mlx.cli.fake"] = types.ModuleType("duo_mlx.cli.fake")
module.command = command
cli.main(["fake"])
"""


@pytest.fixture
def endless():
    """A process whose command writes lines without end."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "line\n"
        yield process
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_end_without_a_traceback(endless, number):
    endless.send_signal(number)
    _, errors = endless.communicate(timeout=20)
    assert (endless.returncode, errors.strip()) == (130, "")


def test_a_reader_that_leaves_ends_it_without_a_traceback(endless):
    endless.stdout.close()
    assert (endless.stderr.read(), endless.wait(timeout=20)) == ("", 1)


def test_python_m_is_the_same_program():
    done = subprocess.run([sys.executable, "-m", "duo_mlx", "genrate"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, invoke("genrate").stderr)
