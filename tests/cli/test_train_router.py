"""``duo-mlx train router``: a router beside a model that stays as it is, and its use by share."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.study import search
from duo_mlx.study.sequence import Question

STEPS = "--length 16 --batch 4 --tokens 1280 --warmup 2 --eval-every 10 --lr 0.02 --final-windows 4"  # 20 steps


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="duo-mlx")


def refused(line, *arguments):
    done = run("train", "router", *arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr
    return done


@pytest.fixture
def directory(saved, tmp_path):
    """A model's directory with patterns that were measured."""
    made, model = saved()
    other = tmp_path / "model"
    other.mkdir()
    config = json.loads((made / "config.json").read_text()) | {"best_patterns": [{"pattern": "BBBB", "loss": 1.0}]}
    checkpoint.save(other, config, checkpoint.parameters(model))
    for file in made.glob("tokenizer*"):
        (other / file.name).write_bytes(file.read_bytes())
    return other


@pytest.fixture
def train(text, directory, tmp_path):
    """``train(*options)``: the folder and what was printed."""

    def make(*options, out="out", model=directory):
        done = run("train", "router", text, "--model", model, "--out", tmp_path / out, *STEPS.split(), *options)
        assert done.exit_code == 0, done.output
        return tmp_path / out, done

    return make


@pytest.fixture
def oracle(directory, tmp_path):
    """The folder of an oracle of the model, with budgets none and 2."""
    _, model = checkpoint.load(directory)[1], checkpoint.load(directory)[0]
    windows = np.random.default_rng(0).integers(2, 32, (5, 17))
    named = {"name": "model", "sha256": checkpoint.fingerprint(directory)}
    asked = Question(choices="sB", prefix="shared", budgets=("none", "2"), seed=0, text={"source": "made"}, model=named)
    search.run(model, windows, asked, tmp_path / "oracle", "typed", 1 << 24)
    return tmp_path / "oracle"


@pytest.mark.parametrize(
    "options",
    [
        ("--choices", "-sB"),
        ("--weights", "gumbel", "--budget", "0.3"),
        ("--objective", "gains", "--target", "big", "--choices", "-B"),
        ("--objective", "labels"),
        ("--objective", "gains", "--look-ahead"),
        ("--objective", "labels", "--look-ahead", "--choices", "-sB"),
    ],
    ids=["mixture", "gumbel", "gains", "labels", "ahead", "labels ahead"],
)
def test_a_router_is_added_and_all_else_stays_as_it_was(directory, train, request, options):
    if "labels" in options:
        options += ("--oracle", request.getfixturevalue("oracle"))
    out, done = train(*options)
    before, after = (mx.load(str(each / "model.safetensors")) for each in (directory, out))
    config, record = (json.loads((out / name).read_text()) for name in ("config.json", "training.json"))
    routers = {name for name in after if ".mlp.router." in name}
    assert set(after) - routers == set(before) and len(routers) == 2 * 4
    assert all(mx.array_equal(each, after[name]) for name, each in before.items())
    assert any(np.array(after[name]).any() for name in routers)
    assert config["router_looks_ahead"] is ("--look-ahead" in options)
    assert checkpoint.fingerprint(out) == checkpoint.fingerprint(directory)
    assert config["best_patterns"] and config["router_bias"] is True and len(config["router_offsets"]) > 3
    assert record["method"] == "router" and record["recipe"]["choices"] == config["router_choices"]
    assert 0 <= record["validation"]["share"] <= 1
    assert f"held out, hard: {record['validation']['hard']:.4f} nats a token" in done.stdout
    model, tokenizer = duo_mlx.load(out)
    share = float(np.mean([pair[0] for pair in config["router_offsets"]]))
    for route in ("router", f"router:{share:.3f}"):
        made = run("generate", "--model", out, "--route", route, "--max-tokens", 3, "--json", "w1 w2")
        assert made.exit_code == 0, made.output
        assert json.loads(made.stdout)["generation_tokens"] > 0
        assert list(duo_mlx.stream_generate(model, tokenizer, "w1 w2", route=route, max_tokens=2))


def test_a_router_begins_anew_where_there_is_one(train):
    options = ("--objective", "gains")
    first, _ = train(*options, out="first")
    second, _ = train(*options, out="second", model=first)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_gains_meet_the_budget_without_a_share(train):
    out, _ = train("--objective", "gains", "--budget", "0.7")
    found = json.loads((out / "training.json").read_text())["validation"]
    assert found["share"] == pytest.approx(0.7, abs=0.1)


def test_a_folder_for_each_of_several_budgets(train, tmp_path):
    train("--objective", "gains", "--budget", "0.3", "--budget", "0.6")
    found = {each.name: json.loads((each / "training.json").read_text()) for each in (tmp_path / "out").iterdir()}
    assert {name: each["recipe"]["budget"] for name, each in found.items()} == {"0.3": 0.3, "0.6": 0.6}
    assert found["0.3"]["validation"]["share"] < found["0.6"]["validation"]["share"]


def test_another_router_takes_the_place_of_one(train):
    first, _ = train("--objective", "gains", "--choices", "-sB", out="first")
    second, _ = train("--objective", "gains", out="second", model=first)
    weights = mx.load(str(second / "model.safetensors"))
    assert weights["model.layers.0.mlp.router.weight"].shape[0] == 2
    assert json.loads((second / "config.json").read_text())["router_choices"] == "sB"


def test_it_goes_on_bit_for_bit(train, tmp_path):
    whole, _ = train("--weights", "gumbel", out="whole")
    train("--weights", "gumbel", "--stop-at", "10", out="cut")
    train("--weights", "gumbel", "--resume", out="cut")
    one, other = (mx.load(str(tmp_path / name / "model.safetensors")) for name in ("whole", "cut"))
    assert all(mx.array_equal(each, other[name]) for name, each in one.items())
    assert whole.joinpath("config.json").read_bytes() == (tmp_path / "cut" / "config.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--objective", "gains", "--alpha", "2"), "--alpha goes with --objective mixture, not gains"),
        (("--target", "big"), "--target goes with --objective gains, not mixture"),
        (("--look-ahead",), "--look-ahead goes with --objective gains or labels, not mixture"),
        (("--oracle", "x"), "--oracle goes with --objective labels, not mixture"),
        (("--objective", "labels"), "--objective labels needs --oracle DIR"),
        (("--budget", "1.5"), "'--budget'"),
        (("--choices", "B"), "'--choices'"),
    ],
)
def test_options_that_do_not_go_together(text, directory, tmp_path, options, line):
    refused(line, text, "--model", directory, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_oracles_that_are_of_no_use(text, directory, saved, oracle, tmp_path):
    labels = (text, "--out", tmp_path / "out", "--objective", "labels", "--oracle")
    refused("has no budget 1; its budgets are none, 2, and --oracle-budget names one",
            *labels, oracle, "--model", directory, "--budget", "0.25")  # fmt: skip
    refused("is of another model, model", *labels, oracle, "--model", saved(small_intermediate_size=6)[0])
    refused("cannot be read; give the folder of a finished duo-mlx oracle",
            *labels, tmp_path / "nothing", "--model", directory)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_shares_without_a_measured_router(directory):
    done = run("generate", "--model", directory, "--route", "router:0.5", "w1")
    assert done.exit_code == 2 and "has no router_offsets; train its router with duo-mlx train router" in done.stderr
