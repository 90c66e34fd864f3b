"""A dense model that transformers made, grafted, measured, generated from; nothing here is a fake."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM

import duo_mlx
from duo_mlx import budget, checkpoint
from duo_mlx.cli import main
from duo_mlx.convert import graft as grafting
from duo_mlx.routes import parse_pattern

OPTIONS = ("--graft", "--small-ratio", 4, "--calibration-tokens", 4096, "--measure-tokens", 256)


@pytest.fixture(scope="module")
def source(tmp_path_factory, write_tokenizer):
    """A dense model's directory as transformers writes it, a text, and the model."""
    directory = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        rope_theta=100.0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    write_tokenizer(directory)
    walk = np.cumsum(np.random.default_rng(0).choice([1, 1, 2, 5], 5000)) % 30
    (directory / "text.txt").write_text(" ".join(f"w{word}" for word in walk))
    return directory, model


@pytest.fixture(scope="module")
def grafted(source, tmp_path_factory):
    """The Duo of that model, verified on the way."""
    directory, _ = source
    target = tmp_path_factory.mktemp("duo") / "model"
    command = ["convert", directory, target, *OPTIONS, "--calibrate", directory / "text.txt", "--verify"]
    done = CliRunner().invoke(main, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    return target


def test_all_big_is_the_model_that_transformers_runs(source, grafted):
    _, dense = source
    model, _ = duo_mlx.load(grafted)
    tokens = np.random.default_rng(1).integers(0, 32, (3, 70))
    with torch.no_grad():
        theirs = dense(torch.from_numpy(tokens)).logits.numpy()
    ours = np.array(model(mx.array(tokens), routes=[2] * 4))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))


def test_what_was_measured_is_in_the_directory_and_budgets_pick_from_it(grafted):
    model, _ = duo_mlx.load(grafted)
    record = json.loads((grafted / "patterns.json").read_text())
    known = [(found["pattern"], found["loss"]) for found in record["patterns"]]
    assert known == [(found["pattern"], found["loss"]) for found in model.config.best_patterns]
    assert known[0][0] == "BBBB" and not any("B" in pattern for pattern, _ in known[-1:])
    assert len(record["loss"]["small_in_one_layer"]) == len(record["loss"]["skip_in_one_layer"]) == 4
    for big in range(5):
        pattern = budget.best_pattern(model, f"budget:{big}")
        within = [loss for text, loss in known if text.count("B") <= big]
        assert dict(known)["".join("-sB"[route] for route in pattern)] == min(within)
    done = CliRunner().invoke(main, ["generate", "w1 w2", "--model", str(grafted), "--route", "budget:2", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["routes_per_layer"]


def test_an_interrupted_command_leaves_nothing_and_goes_on(source, grafted, tmp_path, monkeypatch):
    directory, _ = source
    command = [str(word) for word in ("convert", directory, tmp_path / "model", *OPTIONS)]
    command += ["--calibrate", str(directory / "text.txt")]
    real, done_layers = grafting._Layer.graft, []

    def interrupted(layer):
        if len(done_layers) == 2:
            raise KeyboardInterrupt
        real(layer)
        done_layers.append(layer.index)

    monkeypatch.setattr(grafting._Layer, "graft", interrupted)
    stopped = CliRunner().invoke(main, command)
    assert stopped.exit_code == 130 and "same command" in stopped.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".model.graft"]

    def counted(layer):
        real(layer)
        done_layers.append(layer.index)

    monkeypatch.setattr(grafting._Layer, "graft", counted)
    finished = CliRunner().invoke(main, command)
    assert finished.exit_code == 0, finished.output
    assert "at layer 2 of 4" in finished.stderr and done_layers == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    ours, whole = (checkpoint.parameters(duo_mlx.load(path)[0]) for path in (tmp_path / "model", grafted))
    assert all(mx.array_equal(value, whole[name]).item() for name, value in ours.items())


def test_a_pattern_of_small_is_nearer_to_the_dense_model_than_skip(grafted):
    model, _ = duo_mlx.load(grafted)
    tokens = mx.array(np.random.default_rng(2).integers(0, 32, (2, 60)))
    big = model(tokens, routes=parse_pattern("big", 4))
    small, skip = (mx.square(model(tokens, routes=parse_pattern(word, 4)) - big).mean() for word in ("small", "skip"))
    assert (small < 0.7 * skip).item()
