"""``duo-mlx train routes`` as a user runs it: what it writes, going on bit for bit, and mistakes in one line."""

import csv
import json
import random
import shlex
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.training import plot
from duo_mlx.training.trainer import Trainer

TEXT = "".join(
    f"The {who} sat on the {what}, and was {how}.\n\n"
    for who in ("cat", "dog", "old man")
    for what in ("mat", "log", "wall", "hat", "stone")
    for how in ("glad", "sad", "so very tired", "cold")
)
SIZES = shlex.split("--vocab 300 --layers 2 --hidden 16 --heads 2 --kv-heads 1 --big 32 --small 8")
STEPS = shlex.split("--length 16 --batch 2 --tokens 192 --warmup 2 --eval-every 2 --whole-big 0.2")  # 6 steps
QUIET = """
import sys
sys.modules["torch"] = None  # so that transformers does not import it, which would take longest of all
from duo_mlx.cli import main
main(sys.argv[1:], prog_name="duo-mlx")
"""


def train(*arguments):
    return CliRunner().invoke(main, ["train", "routes", *map(str, arguments)], prog_name="duo-mlx")


def trained(*arguments):
    done = train(*arguments)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "cats.txt"
    file.write_text(TEXT * 2)
    return file


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory):
    """The folder of six steps in one go, and what was printed."""
    out = tmp_path_factory.mktemp("straight") / "run"
    return out, trained(text, "--out", out, *SIZES, *STEPS)


def rows(out):
    with (out / "log.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in csv.DictReader(file)]


def assert_same(out, other):
    """Two finished folders are equal bit for bit, but for times and what was typed."""
    for name in ("model.safetensors", "checkpoint/state.safetensors", "config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    assert (out / "tokens" / "train.npy").read_bytes() == (other / "tokens" / "train.npy").read_bytes()
    assert rows(out) == rows(other)
    records = [json.loads((each / "training.json").read_text()) for each in (out, other)]
    assert all(records[0][key] == records[1][key] for key in records[0] if key != "command")


def test_it_writes_a_model_directory_and_a_record(straight):
    out, done = straight
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint", "config.json", "duo_model.py", "log.csv", "loss.svg", "model.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "tokens", "training.json",
    ]  # fmt: skip
    model, tokenizer = duo_mlx.load(out)
    assert model.config.vocab_size == 300 and model.config.max_position_embeddings == 16
    assert tokenizer.decode(tokenizer.encode("The old man sat", add_special_tokens=False)) == "The old man sat"
    record = json.loads((out / "training.json").read_text())
    assert record["steps"] == 6 and record["tokens"] == 192 and record["recipe"]["whole_big"] == 0.2
    assert (
        record["learned_parameters"]
        == record["parameters"]
        == sum(each.size for each in checkpoint.parameters(model).values())
    )
    assert [row["step"] for row in rows(out)] == ["2", "4", "6"]
    for name, value in record["validation"].items():
        bits = record["validation_bits_per_byte"][name]
        assert 0 < bits < value / 0.69 and value < 7
        assert f"held out, {name}: {value:.4f} nats a token, {bits:.4f} bits a byte\n" in done.stdout


def test_the_losses_are_those_of_the_model_that_was_written(straight):
    out, _ = straight
    model, _ = duo_mlx.load(out)
    held_out = np.load(out / "tokens" / "held_out.npy").astype(np.int64)
    losses = []
    for start in range(0, len(held_out) - 16, 16):
        window = held_out[start : start + 17]
        logits = np.array(model(mx.array(window[None, :-1]), routes=[1, 1]))[0].astype(np.float64)
        losses += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), window[1:]]).tolist()
    record = json.loads((out / "training.json").read_text())
    assert record["validation"]["small"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert record["validation_windows"] == len(losses) // 16
    text = (TEXT * 2)[round(len(TEXT * 2) * 0.95) :]
    assert record["held_out_bytes_per_token"] == pytest.approx(len(text) / len(held_out))


def test_it_stops_and_goes_on_bit_for_bit(straight, text, tmp_path):
    out = tmp_path / "run"
    options = [text, "--out", out, *SIZES, *STEPS]
    assert "stopped at step 2 of 6; --resume goes on" in trained(*options, "--stop-at", "2").stderr
    assert not (out / "model.safetensors").exists()
    trained(*options, "--stop-at", "4", "--resume")
    trained(*options, "--resume")
    assert_same(out, straight[0])


def test_kills_at_any_moment_change_nothing(text, tmp_path):
    """Some at any time, some soon after a checkpoint was announced, which is when the next one is on its way.

    So many steps that a fast machine is not done before it is killed.
    """
    out, draw = tmp_path / "run", random.Random(5)
    many = ["--tokens", "9600", "--eval-every", "3"]  # 300 steps
    options = ["train", "routes", str(text), "--out", str(out), *SIZES, *STEPS, *many]
    killed = []
    for after in (0, 1, None, 2, 3):
        resume = ["--resume"] if out.exists() else []
        began = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", QUIET, *options, *resume], stderr=subprocess.PIPE, text=True
        ) as run:
            if after is None:
                time.sleep(draw.uniform(0.3, 2.5))
            else:
                announced = 0
                while announced < after and (line := run.stderr.readline()):
                    announced += line.startswith("step ")
                time.sleep(draw.uniform(0, 0.02) if after else draw.uniform(1.0, 2.0))
            run.kill()
        killed.append((run.returncode, time.monotonic() - began))
        if (out / "training.json").exists():
            break
    assert [code for code, _ in killed].count(-signal.SIGKILL) >= 3
    if not (out / "training.json").exists():
        trained(*options[2:], *(["--resume"] if out.exists() else []))
    trained(text, "--out", tmp_path / "straight", *SIZES, *STEPS, *many)
    assert_same(out, tmp_path / "straight")
    assert not list(out.rglob(".*"))


def test_jsonl_and_token_files_give_the_model_of_the_text(straight, tmp_path):
    whole = TEXT * 2
    cut = round(len(whole) * 0.95)
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"body": part}) + "\n" for part in (whole[:cut], whole[cut:])))
    trained(many, "--out", tmp_path / "a", *SIZES, *STEPS, "--text-key", "body", "--held-out", "0.5")
    ids = tmp_path / "ids.npy"
    parts = [np.load(straight[0] / "tokens" / name) for name in ("train.npy", "held_out.npy")]
    np.save(ids, np.concatenate(parts))
    share = repr(len(parts[1]) / (len(parts[0]) + len(parts[1])))
    sizes = [word for word in SIZES if word not in ("--vocab", "300")]
    trained(ids, "--out", tmp_path / "b", "--tokenizer", straight[0], *sizes, *STEPS, "--held-out", share)
    for out in (tmp_path / "a", tmp_path / "b"):
        assert (out / "model.safetensors").read_bytes() == (straight[0] / "model.safetensors").read_bytes()
        assert (out / "tokenizer.json").read_bytes() == (straight[0] / "tokenizer.json").read_bytes()
    assert not list((tmp_path / "b" / "tokens").iterdir())
    assert json.loads((tmp_path / "b" / "training.json").read_text())["validation_bits_per_byte"] is None


def test_a_model_goes_on_learning(straight, text, tmp_path):
    out = tmp_path / "more"
    done = trained(text, "--out", out, "--model", straight[0], *STEPS, "--seed", "7")
    record, first = (json.loads((each / "training.json").read_text()) for each in (out, straight[0]))
    for name in ("big", "small", "skip"):  # random routes are other ones
        assert record["before"][name] == pytest.approx(first["validation"][name], abs=1e-6)
    assert record["validation"]["big"] < record["before"]["big"]
    assert f"(before: {record['before']['big']:.4f})" in done.stdout
    assert record["recipe"]["model"] == checkpoint.fingerprint(straight[0]) and "layers" not in record["recipe"]
    other = tmp_path / "stopped"
    trained(text, "--out", other, "--model", straight[0], *STEPS, "--seed", "7", "--stop-at", "4")
    trained(text, "--out", other, "--model", straight[0], *STEPS, "--seed", "7", "--resume")
    assert_same(other, out)


def test_halves_are_written_as_halves_and_measured_as_written(text, tmp_path):
    out = tmp_path / "halves"
    options = [*SIZES, *STEPS, "--dtype", "bfloat16", "--accumulate", "2", "--checkpoint-layers", "--dropout", "0"]
    trained(text, "--out", out, *options)
    weights = mx.load(str(out / "model.safetensors"))
    assert {each.dtype for each in weights.values()} == {mx.bfloat16}
    state = mx.load(str(out / "checkpoint" / "state.safetensors"))
    assert {each.dtype for each in state.values()} == {mx.float32}
    learned = {name: state[f"learned.{name}"].astype(mx.bfloat16) for name in weights}
    assert all(mx.array_equal(each, learned[name]) for name, each in weights.items())


def test_the_figure_is_the_log_s_and_an_extra(straight, text, tmp_path, monkeypatch):
    svg = (straight[0] / "loss.svg").read_text()
    assert svg.count("held out, ") == 4 and "loss (nats a token)" in svg
    monkeypatch.setattr(plot, "find_spec", lambda _: None)
    done = trained(text, "--out", tmp_path / "run", *SIZES, *STEPS)
    assert "no loss.svg without matplotlib: pip install 'duo-mlx[plot]'" in done.stderr
    assert not (tmp_path / "run" / "loss.svg").exists() and (tmp_path / "run" / "training.json").exists()


def test_a_loss_that_is_no_number_keeps_the_last_checkpoint(text, tmp_path, monkeypatch):
    out, step = tmp_path / "run", Trainer.batch

    def poisoned(trainer, number):
        if number == 4:
            norm = trainer.model.model.norm
            monkeypatch.setattr(type(norm), "__call__", lambda _, x: x * float("nan"))
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "batch", poisoned)
    done = train(text, "--out", out, *SIZES, *STEPS)
    assert done.exit_code == 2 and done.stdout == ""
    said = done.stderr.splitlines()[-1]
    assert said == f"duo-mlx: error: step 5: the loss is nan; {out} keeps step 4; try a lower --lr in another --out"
    monkeypatch.undo()
    trained(text, "--out", out, *SIZES, *STEPS, "--resume")


def test_ctrl_c_keeps_the_last_checkpoint(straight, text, tmp_path, monkeypatch):
    out, step = tmp_path / "run", Trainer.batch

    def interrupted(trainer, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "batch", interrupted)
    done = train(text, "--out", out, *SIZES, *STEPS)
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == f"interrupted; {out} keeps step 2; --resume goes on"
    monkeypatch.undo()
    trained(text, "--out", out, *SIZES, *STEPS, "--resume")
    assert_same(out, straight[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--p-big", "0.9"], "--p-big, --p-small and --p-skip sum to 1.4, not to 1"),
        (["--resume"], "holds no training to go on with; leave out --resume to begin"),
        (["absent.txt"], "absent.txt: there is no such file to train on"),
        (["--accumulate", "3"], "--batch 2: must be a multiple of processes x --accumulate, 1 x 3"),
        (["--heads", "3"], "hidden_size 16 is no multiple of num_attention_heads 3"),
        (["--vocab", "4000"], "--vocab 4000: sentencepiece cannot train on these texts: Vocabulary size too high"),
        (["--length", "300"], "no held-out text fills a window of 300 tokens"),
        (["--tokenizer", "."], "--vocab does not go with --tokenizer, which has its own"),
        (["--revision", "main"], "--revision goes with --model"),
        (["--model", "MODEL"], "--vocab does not go with --model, which has its own"),
    ],
)
def test_mistakes_are_one_line(text, straight, tmp_path, arguments, said):
    arguments = [str(straight[0]) if word == "MODEL" else word for word in arguments]
    done = train(text, "--out", tmp_path / "run", *SIZES, *STEPS, *arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert said in done.stderr and not (tmp_path / "run").exists()


def test_mistakes_with_token_files_models_and_texts(straight, text, saved, tmp_path):
    ids, empty = tmp_path / "ids.npy", tmp_path / "empty.txt"
    np.save(ids, np.full(3000, 300))
    empty.touch()
    sizes = [word for word in SIZES if word not in ("--vocab", "300")]
    few, _ = saved(max_position_embeddings=8)
    bare = tmp_path / "bare"
    bare.mkdir()
    for arguments, said in (
        ([ids, *sizes], "a token file needs the tokenizer that it was made with; give --tokenizer DIR"),
        ([ids, *sizes, "--tokenizer", straight[0]], "ids.npy: token 0 is 300, but the vocabulary's ids are 0 to 299"),
        ([text, ids, *sizes], "a token file is trained on alone"),
        ([empty, *SIZES], "empty.txt: holds no text"),
        ([text, *sizes, "--tokenizer", bare], "bare: holds neither a tokenizer.json nor a tokenizer.model"),
        ([text, "--model", few], "--length 16: the model's context is 8"),
    ):
        done = train(*arguments, "--out", tmp_path / "run", *STEPS)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1), done.output
        assert said in done.stderr and not (tmp_path / "run").exists()


def test_what_is_there_is_not_written_over(straight, text, tmp_path):
    out, _ = straight
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for more in ([], ["--resume"]):
        done = train(text, "--out", out, *SIZES, *STEPS, *more)
        assert done.exit_code == 2 and "holds a finished training; give another name" in done.stderr
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    begun = tmp_path / "begun"
    trained(text, "--out", begun, *SIZES, *STEPS, "--stop-at", "2")
    for more, said in (
        ([], "exists already; give --resume to go on with it, or another name"),
        (["--resume", "--lr", "0.1"], "was made with lr 0.002, not 0.1; resume with what it was made with"),
        (["--resume", "--layers", "3"], "was made with layers 2, not 3"),
        (["--resume", "--held-out", "0.1"], "was made with held_out 0.05, not 0.1"),
    ):
        done = train(text, "--out", begun, *SIZES, *STEPS, *more)
        assert (done.exit_code, done.stderr.count("\n")) == (2, 1) and said in done.stderr
