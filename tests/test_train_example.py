"""Stage 1 in PyTorch as a user runs it: what it writes, resuming bit for bit, and mistakes in one line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "train_pytorch.py"
TEXT = "".join(
    f"The {who} sat on the {what}, and was {how}.\n\n"
    for who in ("cat", "dog", "old man")
    for what in ("mat", "log", "wall", "hat", "stone")
    for how in ("glad", "sad", "so very tired", "cold")
)
SIZES = "--vocab 300 --layers 2 --hidden 16 --heads 2 --kv-heads 1 --big 32 --small 8 --length 16 --batch 2"
STEPS = f"{SIZES} --tokens 192 --warmup 2 --eval-every 3 --whole-big 0.2".split()  # 6 steps


def train(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "cats.txt"
    file.write_text(TEXT * 2)
    return str(file)


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The output of six steps in one go."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = train(text, "--out", str(out), *STEPS)
    assert done.returncode == 0, done.stderr
    return out


def log(out):
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def test_it_writes_what_convert_reads_and_a_record(straight):
    assert {path.name for path in straight.iterdir()} == {
        "config.json", "pytorch_model.bin", "tokenizer.model", "log.csv", "training.json", "checkpoint.pt"
    }  # fmt: skip
    record = json.loads((straight / "training.json").read_text())
    assert record["steps"] == 6 and record["recipe"]["whole_big"] == 0.2
    for routes in ("big", "random", "small", "skip"):
        nats, bits = record["validation_nats_per_token"][routes], record["validation_bits_per_byte"][routes]
        assert 0 < bits < nats / 0.69 and nats < 7
    state = torch.load(straight / "pytorch_model.bin", weights_only=True)
    assert record["parameters"] == sum(value.numel() for value in state.values())
    assert [row["step"] for row in log(straight)] == ["3", "6"]


def test_resuming_continues_bit_for_bit(straight, text, tmp_path):
    out = tmp_path / "run"
    assert train(text, "--out", str(out), *STEPS, "--stop-at", "3").returncode == 0
    assert not (out / "pytorch_model.bin").exists()
    assert train(text, "--out", str(out), *STEPS, "--resume").returncode == 0
    one, two = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (straight, out))
    assert one["step"] == two["step"] == 6
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert log(straight) == log(out)
    records = [json.loads((path / "training.json").read_text()) for path in (straight, out)]
    assert records[0]["validation_nats_per_token"] == records[1]["validation_nats_per_token"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--p-big", "0.9"], "sum to 1.4, not to 1"),
        (["--resume"], "holds no checkpoint.pt to resume"),
        (["absent.txt"], "absent.txt: no such text file"),
    ],
)
def test_mistakes_are_named(text, tmp_path, arguments, line):
    done = train(*arguments, text, "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and line in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_not_overwritten(straight, text):
    before = (straight / "checkpoint.pt").read_bytes()
    done = train(text, "--out", str(straight), *STEPS)
    assert done.returncode == 2 and "give --resume or another --out" in done.stderr
    assert (straight / "checkpoint.pt").read_bytes() == before
