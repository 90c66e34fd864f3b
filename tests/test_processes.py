"""Several processes: they share what they give, make the table that one makes, and none waits for one that ended."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import zlib
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.cli import main
from duo_mlx.errors import DuoError
from duo_mlx.processes import Processes, in_touch
from duo_mlx.study import sequence

TIMEOUT = 120  # s; what hangs is ended, and fails

SHARE = """
import json, sys, zlib
from duo_mlx.errors import DuoError
from duo_mlx.processes import Processes

own = Processes()
gathered = [own.gather(b"ab" * size * own.rank) for size in (3, 0, 300_000)]
agreed = set(own.from_first(lambda: [7, 3, 7] if own.rank == 0 else [1]))

def give_up():
    raise DuoError("the first one's reason")

try:
    own.from_first(give_up)
    given_up = ""
except DuoError as error:
    given_up = str(error)
checked = [[[len(each), zlib.crc32(each)] for each in row] for row in gathered]
print(json.dumps([own.rank, own.count, checked, sorted(agreed), given_up]) + "\\n", end="")
"""

LOSE = """
import os, signal, sys
from duo_mlx.errors import DuoError
from duo_mlx.processes import Processes

own = Processes()
own.gather(b"all are there")
if own.rank == 1:
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[1] == "killed" else sys.exit(3)
try:
    own.gather(b"who is there")
except DuoError as error:
    sys.exit(f"duo-mlx: error: {error}")
"""

ORACLE = """
import json, os, signal, sys

sys.modules["torch"] = None  # so that transformers does not import it, which would take longest of all
from duo_mlx.cli import main
from duo_mlx.study import sequence

search_one = sequence.Searcher.sequence

def until_it_is_lost(one, window, number, progress):
    if "lost" in arguments and number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return search_one(one, window, number, progress)

sequence.Searcher.sequence = until_it_is_lost
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, prog_name="duo-mlx")
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def free_ports(count):
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def run_together(program, folders, *arguments, hosts=None):
    """The exit code and what was written by each process of a Python program, one in each folder, as mlx.launch would.

    What the network says of a lost process is left out of the errors.
    """
    if hosts is None:
        hosts = json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(len(folders))])
    (folders[0].parent / "hosts.json").write_text(hosts)
    at = {"MLX_HOSTFILE": str(folders[0].parent / "hosts.json")}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=os.environ | at | {"MLX_RANK": str(rank)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, folder in enumerate(folders)
    ]
    ended = []
    try:
        for process in started:
            out, err = process.communicate(timeout=TIMEOUT)
            said = [line for line in err.splitlines() if "[ring]" not in line]
            ended.append(SimpleNamespace(code=process.returncode, out=out.splitlines(), said=said))
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return ended


@pytest.fixture
def folders(tmp_path):
    """``folders(count)``: new ones."""

    def make(count):
        made = [tmp_path / f"rank{rank}" for rank in range(count)]
        for each in made:
            each.mkdir()
        return made

    return make


def check_shared(lines, count):
    """What the processes of `SHARE` print."""
    given_up = ["the first one's reason", *["the first process gave up, and says why"] * (count - 1)]
    found = sorted(json.loads(line) for line in lines)
    gathered = [[b"ab" * size * rank for rank in range(count)] for size in (3, 0, 300_000)]
    checked = [[[len(each), zlib.crc32(each)] for each in row] for row in gathered]
    assert found == [[rank, count, checked, [3, 7], given_up[rank]] for rank in range(count)]


def test_a_single_process_needs_no_network():
    own = Processes()
    assert (own.rank, own.count) == (0, 1)
    assert own.gather(b"mine") == [b"mine"]
    assert own.from_first(lambda: [2, 5]) == [2, 5] and own.from_first(list) == []


@pytest.mark.parametrize("count", [2, 3])
def test_each_process_has_what_all_give(folders, count):
    ended = run_together(SHARE, folders(count))
    assert [each.code for each in ended] == [0] * count, ended
    check_shared([line for each in ended for line in each.out], count)


def test_what_mlx_launch_starts(tmp_path):
    launch = shutil.which("mlx.launch", path=sysconfig.get_path("scripts"))
    port = str(free_ports(1)[0])
    done = subprocess.run(
        [launch, "-n", "2", "--backend", "ring", "-p", port, "--", sys.executable, "-c", SHARE],
        env=os.environ | {"TMPDIR": str(tmp_path)},  # which it does not clean up
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert "WARN" not in done.stderr, done.stderr
    check_shared(done.stdout.splitlines(), 2)


@pytest.mark.parametrize(("how", "code", "count"), [("killed", -signal.SIGKILL, 2), ("exits", 3, 3)])
def test_a_lost_process_ends_the_others_in_one_line(folders, how, code, count):
    ended = run_together(LOSE, folders(count), how)
    assert [each.code for each in ended] == [1, code, 1][:count], ended
    for each in ended[::2]:
        assert each.said == [
            "duo-mlx: error: another process of this run ended before its time, and says why unless it was killed"
        ]


def test_hosts_that_name_no_process(folders):
    (ended,) = run_together(LOSE, folders(1), "killed", hosts="\n")  # so it is after mlx.launch -n 1
    assert ended.code == 1 and "DuoError: MLX finds no other processes of this run (" in ended.said[-1]
    assert ended.said[-1].endswith("; a single process needs no mlx.launch")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="something else") as caught, in_touch():
        raise RuntimeError("something else")
    assert not isinstance(caught.value, DuoError)
    with pytest.raises(DuoError, match="another process of this run ended"), in_touch():
        raise RuntimeError("[ring] connection to a peer was lost")


@pytest.fixture(scope="module")
def searched(saved, tmp_path_factory):
    """What two processes and what a single one make of the same commands."""
    root = tmp_path_factory.mktemp("searched")
    words = np.random.default_rng(0).integers(0, 30, 400)
    (root / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    question = [
        *("oracle", "--model", str(saved()[0]), "--text", str(root / "text.txt"), "--sequences", "5", "--length", "8"),
        *("--budget", "2", "--budget", "none", "--budget", "3..1", "--controls"),
    ]
    ranks = [root / "rank0", root / "rank1"]
    for each in ranks:
        each.mkdir()

    def alone(out):
        return CliRunner().invoke(main, [*question, "--out", str(out)], prog_name="duo-mlx")

    def once(one, window, number, progress):
        if number == 1:
            raise KeyboardInterrupt
        return search_one(one, window, number, progress)

    search_one = sequence.Searcher.sequence
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence.Searcher, "sequence", once)
        assert alone(ranks[0] / "begun").exit_code == 130
    assert [file.name for file in (ranks[0] / "begun" / "sequences").iterdir()] == ["00000.npz"]
    outs = ("two", "two", "begun", "lost")  # relative, so that each process has a folder of its own
    ended = run_together(ORACLE, ranks, json.dumps([[*question, "--out", out] for out in outs]))
    kept = sorted(file.name for file in (ranks[0] / "lost" / "sequences").iterdir())
    single = alone(root / "one")
    assert single.exit_code == 0, single.output
    return SimpleNamespace(root=root, ranks=ranks, ended=ended, kept=kept, alone=alone, single=single)


def assert_same(folder: Path, other: Path):
    """Two finished oracles are equal bit for bit, but for what says how they were made."""
    files = sorted(file.name for file in other.iterdir())
    assert files == sorted(file.name for file in folder.iterdir())
    assert files == ["question.json", "summary.json", "tokens-2.npz", "tokens-3-to-1.npz", "tokens-none.npz"]
    for name in files[2:]:
        with np.load(folder / name) as these, np.load(other / name) as those:
            assert these.files == those.files and "noise_12" in these.files
            for array in these.files:
                np.testing.assert_array_equal(these[array], those[array], strict=True)
    made = ("seconds", "processes", "command", "peak_bytes")
    for file in files[:2]:
        these, those = (json.loads((each / file).read_text()) for each in (folder, other))
        assert these.keys() == those.keys()
        assert all(these[key] == those[key] for key in these if key not in made)


def test_two_processes_make_the_table_of_one(searched):
    assert_same(searched.ranks[0] / "two", searched.root / "one")
    assert json.loads((searched.ranks[0] / "two" / "summary.json").read_text())["processes"] == 2
    table = searched.single.stdout.splitlines()
    assert searched.ended[0].out[: len(table) + 1] == [*table, "exit 0"]


def test_only_the_first_process_reads_writes_and_prints(searched):
    assert not list(searched.ranks[1].iterdir())
    assert searched.ended[1].out == ["exit 0", "exit 2", "exit 0"]
    assert not [line for line in searched.ended[1].said if not line.startswith("duo-mlx: error: the first process")]


def test_a_folder_that_cannot_be_used_ends_all(searched):
    first, second = (each.said for each in searched.ended)
    assert [line for line in searched.ended[0].out if line.startswith("exit")][1] == "exit 2"
    assert first[1] == "duo-mlx: error: --out two: holds a finished oracle; give --force to replace it, or another name"
    assert second == ["duo-mlx: error: the first process gave up, and says why"]


def test_what_one_process_began_two_finish(searched):
    assert_same(searched.ranks[0] / "begun", searched.root / "one")
    summary = json.loads((searched.ranks[0] / "begun" / "summary.json").read_text())
    assert summary["seconds"]["of_sequences"] == 4


def test_a_process_that_is_lost_ends_the_search_which_goes_on_later(searched):
    first, second = searched.ended
    assert second.code == -signal.SIGKILL and first.code == 0
    assert first.out[-1] == "exit 2" and "another process of this run ended before its time" in first.said[-1]
    assert searched.kept == ["00000.npz", "00001.npz"]
    assert searched.alone(searched.ranks[0] / "lost").exit_code == 0
    assert_same(searched.ranks[0] / "lost", searched.root / "one")
