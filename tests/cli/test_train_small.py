"""``duo-mlx train small``: better small FFNs beside a model that stays as it is, bit for bit."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.cli import main

STEPS = "--length 16 --batch 4 --tokens 1920 --warmup 2 --eval-every 10 --lr 0.01"  # 30 steps


def train(*arguments):
    return CliRunner().invoke(main, ["train", "small", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture
def run(text, tmp_path):
    """``run(directory, *options)``: the folder, training.json and what was printed."""

    def make(directory, *options, out="out"):
        done = train(text, "--model", directory, "--out", tmp_path / out, *STEPS.split(), *options)
        assert done.exit_code == 0, done.output
        return tmp_path / out, json.loads((tmp_path / out / "training.json").read_text()), done

    return make


@pytest.fixture
def grafted(saved, tmp_path):
    """A grafted model's directory in bfloat16, with small FFNs in two layers, and patterns that were measured."""
    directory, model = saved(small_layers=[1, 2], small_bias=True)
    other = tmp_path / "grafted"
    other.mkdir()
    config = json.loads((directory / "config.json").read_text())
    config |= {"best_patterns": [{"pattern": "BBBB", "loss": 1.0}], "default_route": "BsBB", "default_draft": "BssB"}
    weights = {name: each.astype(mx.bfloat16) for name, each in checkpoint.parameters(model).items()}
    checkpoint.save(other, config, weights)
    for file in directory.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    return other


@pytest.mark.parametrize("objective", ["lm", "draft"])
def test_small_gets_better_and_all_else_stays_as_it_was(grafted, run, objective):
    out, record, done = run(grafted, "--objective", objective)
    before, after = (mx.load(str(each / "model.safetensors")) for each in (grafted, out))
    assert before.keys() == after.keys() and {each.dtype for each in after.values()} == {mx.bfloat16}
    for name, each in before.items():
        assert mx.array_equal(each, after[name]) != (".mlp.small." in name), name
    assert record["before"]["big"] == record["validation"]["big"]
    better = "small" if objective == "lm" else "kl"
    assert record["validation"][better] < record["before"][better] - 0.01
    shown = f"held out, {better}: {record['validation'][better]:.4f}"
    assert any(line.startswith(shown) and f"(before: {record['before'][better]:.4f})" in line
               for line in done.stdout.splitlines())  # fmt: skip
    assert record["recipe"]["objective"] == objective and record["method"] == "small"
    assert 0 < record["learned_parameters"] < record["parameters"] / 4


def test_the_model_is_there_to_be_used(grafted, run):
    out, record, _ = run(grafted)
    config = json.loads((out / "config.json").read_text())
    assert config["default_draft"] == "BssB"
    assert config["default_route"] == "BsBB" and config["small_layers"] == [1, 2] and "best_patterns" not in config
    model, tokenizer = duo_mlx.load(out)
    held_out = np.load(out / "tokens" / "held_out.npy").astype(np.int64)
    losses = []
    for start in range(0, len(held_out) - 16, 16):
        window = held_out[start : start + 17]
        logits = np.array(model(mx.array(window[None, :-1]), routes=[2, 1, 1, 2]))[0].astype(np.float64)
        losses += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(16), window[1:]]).tolist()
    assert record["validation_windows"] == len(losses) // 16 > 1
    assert record["validation"]["small"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert duo_mlx.generate(model, tokenizer, "w1 w2", max_tokens=2) is not None


def test_a_draft_s_pattern_is_learnt_where_it_is_small(grafted, run):
    out, record, _ = run(grafted, "--objective", "draft", "--route", "BBsB")
    before, after = (mx.load(str(each / "model.safetensors")) for each in (grafted, out))
    changed = {name.split(".")[2] for name, each in before.items() if not mx.array_equal(each, after[name])}
    assert changed == {"2"} and record["recipe"]["route"] == "BBsB"
    assert record["validation"]["greedy"] > record["before"]["greedy"]


def test_it_stops_and_goes_on_bit_for_bit(grafted, run, text):
    options = ["--objective", "draft", "--tokens", "512"]  # 8 steps
    whole, record, _ = run(grafted, *options)
    parts = whole.with_name("parts")
    for more in (["--stop-at", "3"], ["--resume", "--stop-at", "5"], ["--resume"]):
        done = train(text, "--model", grafted, "--out", parts, *STEPS.split(), *options, *more)
        assert done.exit_code == 0, done.output
    for name in ("model.safetensors", "checkpoint/state.safetensors"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    again = json.loads((parts / "training.json").read_text())
    assert again["before"] == record["before"] and again["validation"] == record["validation"]


def test_mistakes_are_one_line(grafted, saved, text, tmp_path):
    plain, _ = saved(small_layers=[])
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    config = json.loads((grafted / "config.json").read_text())
    checkpoint.save_config(quantised, config | {"quantization": {"bits": 4, "group_size": 32}})
    for arguments, said in (
        (["--model", plain], f"{plain}: has nothing that learns here, such as small FFNs"),
        (["--model", quantised], "quantised: is quantised; train the model in floating point and quantise the result"),
        (["--model", tmp_path / "absent"], "there is no such directory"),
        (["--model", grafted, "--route", "BBBs"], "--route does not go with --objective lm"),
        (["--model", grafted, "--draft-vocabulary", 8], "--draft-vocabulary does not go with --objective lm"),
        (
            ["--model", grafted, "--objective", "draft", "--draft-vocabulary", 99],
            "--draft-vocabulary 99: the model's vocabulary has 32 tokens",
        ),
        (["--model", grafted, "--objective", "draft", "--p-big", "0.5"], "--p-big does not go with --objective draft"),
        (
            ["--model", grafted, "--objective", "draft", "--route", "BBB"],
            "has 3 characters, but the model has 4 layers",
        ),
        (["--model", grafted, "--p-small", "0", "--p-big", "1"], "--p-small 0: no token would come to a small FFN"),
        (["--model", grafted, "--p-small", "0.9"], "sum to 1.4, not to 1"),
    ):
        done = train(text, "--out", tmp_path / "out", *STEPS.split(), *arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert said in done.stderr and not (tmp_path / "out").exists()
