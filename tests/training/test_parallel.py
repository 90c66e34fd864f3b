"""Training by two processes: the losses of one, a first that alone reads and writes, and a second that is lost."""

import importlib.util
import json
import shlex
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.cli import main
from duo_mlx.training.trainer import Trainer

TEXT = "".join(
    f"The {who} sat on the {what}, and was {how}.\n\n"
    for who in ("cat", "dog", "old man")
    for what in ("mat", "log", "wall", "hat", "stone")
    for how in ("glad", "sad", "so very tired", "cold")
)
OPTIONS = shlex.split(
    "--vocab 300 --layers 2 --hidden 16 --heads 2 --kv-heads 1 --big 32 --small 8 --length 16 --batch 4 --tokens 1280 "
    "--warmup 2 --eval-every 5 --dropout 0.1"
)  # 20 steps
PROGRAM = """
import json, os, signal, sys

sys.modules["torch"] = None  # so that transformers does not import it, which would take longest of all
from duo_mlx.cli import main
from duo_mlx.training.trainer import Trainer

take = Trainer.step

def step(trainer, state):
    if "lost" in arguments and trainer.processes.rank == 1 and state.step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    after, loss = take(trainer, state)
    rows = [row.tobytes().hex() for row in trainer.batch(state.step)[0]]
    print("step", json.dumps([loss, rows]), flush=True)
    return after, loss

Trainer.step = step
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments, prog_name="duo-mlx")
    except SystemExit as end:
        print("exit", end.code, flush=True)
"""


def run_together(*arguments):
    """As in tests/test_processes.py."""
    file = Path(__file__).parents[1] / "test_processes.py"
    spec = importlib.util.spec_from_file_location("test_processes", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    return module.run_together(*arguments)


def train(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What two processes print and write, and what a single one does; the text is only where the first is."""
    root = tmp_path_factory.mktemp("trained")
    ranks = [root / "rank0", root / "rank1"]
    for each in ranks:
        each.mkdir()
    (ranks[0] / "cats.txt").write_text(TEXT * 2)
    (ranks[0] / "blank.txt").write_text("\n")
    question = ["train", "routes", "cats.txt", *OPTIONS]
    single, losses = root / "one", []
    take = Trainer.step

    def step(trainer, state):
        after, loss = take(trainer, state)
        losses.append((loss, [row.tobytes().hex() for row in trainer.batch(state.step)[0]]))
        return after, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        done = train("routes", ranks[0] / "cats.txt", *OPTIONS, "--out", single)
    assert done.exit_code == 0, done.output
    small = ["train", "small", "cats.txt", "--model", str(single), *OPTIONS[14:], "--objective", "draft"]
    commands = [
        [*question, "--out", "two"],
        ["train", "routes", "blank.txt", *OPTIONS, "--out", "blank"],
        ["train", "routes", "cats.txt", *OPTIONS, "--batch", "5", "--out", "odd"],
        [*small, "--out", "small"],
        [*question, "--out", "lost"],
    ]
    ended = run_together(PROGRAM, ranks, json.dumps(commands))
    steps = [[json.loads(line[5:]) for line in each.out if line.startswith("step ")] for each in ended]
    return SimpleNamespace(ranks=ranks, single=single, losses=losses, ended=ended, steps=steps, small=small)


def test_two_processes_have_the_losses_of_one(trained):
    assert len(trained.losses) == 20
    for steps in trained.steps:
        assert [loss for loss, _ in steps[:20]] == pytest.approx([loss for loss, _ in trained.losses], abs=1e-5)
    assert trained.losses[-1][0] < trained.losses[0][0] - 0.1


def test_each_has_half_of_a_batch(trained):
    for (_, whole), *halves in zip(trained.losses, *(steps[:20] for steps in trained.steps), strict=True):
        assert [row for _, rows in halves for row in rows] == whole


def test_what_two_write_is_what_one_writes(trained):
    two, one = (json.loads((each / "training.json").read_text()) for each in (trained.ranks[0] / "two", trained.single))
    assert (two["processes"], one["processes"]) == (2, 1) and two["recipe"] == one["recipe"]
    assert two["validation"] == pytest.approx(one["validation"], abs=1e-5)
    for name in ("tokenizer.json", "tokens/train.npy"):
        assert (trained.ranks[0] / "two" / name).read_bytes() == (trained.single / name).read_bytes()


def test_only_the_first_reads_writes_and_speaks(trained):
    first, second = trained.ended
    assert not list(trained.ranks[1].iterdir())
    assert [line for line in second.out if not line.startswith("step ")] == ["exit 0", "exit 2", "exit 2", "exit 0"]
    assert second.said == [
        "duo-mlx: error: the first process gave up, and says why",
        "duo-mlx: error: --batch 5: must be a multiple of processes x --accumulate, 2 x 1",
    ]
    exits = [line for line in first.out if line.startswith("exit ")]
    assert exits == ["exit 0", "exit 2", "exit 2", "exit 0", "exit 2"]
    assert "duo-mlx: error: blank.txt: holds no text" in first.said and not (trained.ranks[0] / "blank").exists()


def test_a_model_that_the_first_alone_has_is_trained_by_both(trained):
    two = json.loads((trained.ranks[0] / "small" / "training.json").read_text())
    done = train("small", trained.ranks[0] / "cats.txt", *trained.small[3:], "--out", trained.ranks[0].parent / "alone")
    assert done.exit_code == 0, done.output
    one = json.loads((trained.ranks[0].parent / "alone" / "training.json").read_text())
    for when in ("before", "validation"):
        assert two[when] == pytest.approx(one[when], abs=1e-5)


def test_a_process_that_is_lost_ends_the_other_and_training_goes_on_later(trained):
    first, second = trained.ended
    assert second.code == -signal.SIGKILL
    assert first.said[-1] == (
        "duo-mlx: error: another process of this run ended before its time, and says why unless it was killed"
    )
    lost = trained.ranks[0] / "lost"
    done = train("routes", trained.ranks[0] / "cats.txt", *OPTIONS, "--out", lost, "--resume")
    assert done.exit_code == 0 and done.stderr.splitlines()[1].startswith("step 15 "), done.output
    found, expected = (json.loads((each / "training.json").read_text()) for each in (lost, trained.single))
    assert found["validation"] == pytest.approx(expected["validation"], abs=1e-5)
    assert np.load(lost / "tokens" / "train.npy").size == np.load(trained.single / "tokens" / "train.npy").size
