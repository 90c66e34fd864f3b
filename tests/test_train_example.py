"""Stage 1 in PyTorch as a user runs it: what it writes, resuming bit for bit, and mistakes in one line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from duo_mlx.convert.reference import DuoConfig, DuoModel

SCRIPT = Path(__file__).parent.parent / "examples" / "train_pytorch.py"
TEXT = "".join(
    f"The {who} sat on the {what}, and was {how}.\n\n"
    for who in ("cat", "dog", "old man")
    for what in ("mat", "log", "wall", "hat", "stone")
    for how in ("glad", "sad", "so very tired", "cold")
)
SIZES = "--vocab 300 --layers 2 --hidden 16 --heads 2 --kv-heads 1 --big 32 --small 8 --length 16 --batch 2"
BIG_FIRST = f"{SIZES} --tokens 224 --warmup 2 --eval-every 2 --big-first 0.4".split()  # 3 steps, then 4
STEPS = f"{SIZES} --tokens 192 --warmup 2 --eval-every 3 --whole-big 0.2".split()  # 6 steps


def train(*arguments, script=SCRIPT):
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=120)


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


@pytest.fixture(scope="module")
def big_first(text, tmp_path_factory):
    """The output of three steps with big everywhere and four of the small FFNs alone, in one go."""
    out = tmp_path_factory.mktemp("big_first") / "run"
    done = train(text, "--out", str(out), *BIG_FIRST)
    assert done.returncode == 0, done.stderr
    return out


def state(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


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


@pytest.mark.parametrize("stop", ["2", "3", "4", "5"])  # before, at and after the switch, and between validations
def test_big_first_resumes_bit_for_bit_across_the_switch(big_first, text, tmp_path, stop):
    out = tmp_path / "run"
    assert train(text, "--out", str(out), *BIG_FIRST, "--stop-at", stop).returncode == 0
    assert state(out)["step"] == int(stop)
    assert train(text, "--out", str(out), *BIG_FIRST, "--resume").returncode == 0
    one, two = state(big_first), state(out)
    assert one["step"] == two["step"] == 7
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
    assert all(
        torch.equal(moments[key], two["optimizer"]["state"][index][key])
        for index, moments in one["optimizer"]["state"].items()
        for key in ("step", "exp_avg", "exp_avg_sq")
    )
    rows = {row["step"]: row for row in log(out)}
    assert all(
        rows[row["step"]]["big"] == row["big"] and rows[row["step"]]["lr"] == row["lr"] for row in log(big_first)
    )


def test_big_first_trains_all_but_small_and_then_small_alone(big_first, text, tmp_path):
    """Weight decay and gradient clipping included, the other half does not change by a bit."""
    weights = [state(big_first)["model"]]
    for stop in ("3", "1"):
        out = tmp_path / stop
        assert train(text, "--out", str(out), *BIG_FIRST, "--stop-at", stop).returncode == 0
        weights.insert(0, state(out)["model"])
    for before, after, small_learns in zip(weights, weights[1:], (False, True), strict=False):
        for name, value in before.items():
            assert torch.equal(value, after[name]) != (small_learns == (".mlp.small." in name)), name
    small = [name for name in weights[0] if ".mlp.small." in name]
    parts = json.loads((big_first / "training.json").read_text())["parts"]
    assert [part["steps"] for part in parts] == [3, 4]
    assert sorted(parts[1]["learns"]) == sorted(small) and len(small) == 6
    assert sorted(parts[0]["learns"] + small) == sorted(weights[0])


def test_each_part_of_big_first_has_its_warm_up_and_cosine_and_its_rows(big_first):
    rows = log(big_first)
    assert [(row["step"], row["lr"]) for row in rows] == [  # 2e-3, two steps of warm-up, cosine to a fiftieth
        ("2", "0.002"), ("3", "0.002"), ("4", "0.001"), ("6", "0.002"), ("7", "0.00102"),
    ]  # fmt: skip
    assert len({row["big"] for row in rows[1:]}) == 1 and len({row["small"] for row in rows[1:]}) > 1


def test_the_first_part_of_big_first_is_training_with_big_alone(text, tmp_path):
    first, alone = tmp_path / "first", tmp_path / "alone"
    assert train(text, "--out", str(first), *BIG_FIRST, "--stop-at", "3").returncode == 0
    options = f"{SIZES} --tokens 96 --warmup 2 --eval-every 2 --p-big 1 --p-small 0 --p-skip 0".split()
    assert train(text, "--out", str(alone), *options).returncode == 0
    assert all(torch.equal(value, state(alone)["model"][name]) for name, value in state(first)["model"].items())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--p-big", "0.9"], "sum to 1.4, not to 1"),
        (["--resume"], "holds no checkpoint.pt to resume"),
        (["absent.txt"], "absent.txt: no such text file"),
        (["--big-first", "1"], "--big-first 1 of 2442 steps leaves one of the two parts without a step"),
        (["--big-first", "-0.5"], "--big-first -0.5 of 2442 steps leaves one of the two parts without a step"),
        (["--big-first", "0.5", "--whole-big", "0.1"], "--big-first needs --p-small above 0 and no --whole-big"),
        (["--big-first", "0.5", "--p-small", "0", "--p-skip", "0.5"], "--big-first needs --p-small above 0"),
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


def test_the_comparison_of_both_ways_measures_mixed_patterns_and_goes_on_where_it_was(text, tmp_path):
    script, out = SCRIPT.with_name("compare_stage1.py"), tmp_path / "stage1"
    options = f"{SIZES} --p-big 0.5 --p-small 0.5 --p-skip 0 --warmup 2 --eval-every 2"
    question = [text, "--out", str(out), "--seeds", "1", "--options", options]
    done = train(*question, "--tokens", "192", script=script)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "runs.json").read_text())
    assert [(run["method"], run["tokens"], run["part_steps"]) for run in record["runs"]] == [
        ("big_then_small", 384, [6, 6]),
        ("random", 192, [6]),
        ("big_then_small", 192, [3, 3]),
    ]
    for run, folder in zip(
        record["runs"], ("big_then_small-384-seed0", "random-192-seed0", "big_then_small-192-seed0"), strict=True
    ):
        assert run["recipe"]["big_first"] == run["big_first"] == (0.5 if run["method"] == "big_then_small" else 0)
        model = DuoModel(DuoConfig.from_file(out / folder / "config.json"))
        model.load_state_dict(torch.load(out / folder / "pytorch_model.bin", weights_only=True))
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(out / folder / "tokenizer.model"))
        whole = Path(text).read_text()
        tokens = torch.tensor(tokenizer.encode(whole[round(len(whole) * 0.95) :]))
        patterns = {"big": [2, 2], "small": [1, 1], "first_half": [2, 1], "alternating": [2, 1]}  # of two layers
        for name, pattern in patterns.items():
            losses = []
            for start in range(0, len(tokens) - 16, 16):
                window = tokens[start : start + 17]
                with torch.no_grad():
                    logits = model.eval()(window[None, :-1], torch.tensor(pattern))[0]
                losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
            assert run["validation_tokens"] == len(losses)
            expected = sum(losses) / len(losses)
            assert run["validation_nats_per_token"][name] == pytest.approx(expected, abs=1e-5), (folder, name)

    other = train(*question, "--tokens", "384", script=script)
    assert other.returncode == 2 and "runs of another question" in other.stderr.splitlines()[-1]
    kept, redone = (out / f"{method}-192-seed0" / "training.json" for method in ("random", "big_then_small"))
    before = kept.stat().st_mtime_ns
    redone.unlink()  # as if it had been interrupted at the end
    again = train(*question, "--tokens", "192", script=script)
    assert again.returncode == 0 and again.stderr.splitlines() == ["big_then_small-192-seed0: goes on"]
    assert kept.stat().st_mtime_ns == before and json.loads(redone.read_text())["steps"] == 6
    fresh = json.loads((out / "runs.json").read_text())
    assert [run["validation_nats_per_token"] for run in fresh["runs"]] == [
        run["validation_nats_per_token"] for run in record["runs"]
    ]
