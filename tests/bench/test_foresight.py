"""What can be foreseen: made pairs whose gains are known, and the program on a tiny model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.bench import foresight as bench

LAYERS, HIDDEN, LENGTH = 3, 5, 32


def made(gains, rows=4096, noise=0.0, seed=0):
    """Pairs in which big gains ``gains(inputs)`` nats ``[rows, layers]``."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((rows, LAYERS, HIDDEN)).astype(np.float16)
    one, other = random.integers(0, 2, (2, rows, LAYERS))
    contrast = (one - other).astype(np.float32)
    worth = (contrast * gains(inputs.astype(np.float32))).sum(-1)
    text = worth + noise * random.standard_normal(rows)
    return SimpleNamespace(
        contrast=contrast, inputs=inputs, worth={"text": text.astype(np.float32), "big": worth}, length=LENGTH
    )


CONSTANT = np.array([0.5, -0.2, 0.1])
WEIGHTS = np.random.default_rng(7).standard_normal((LAYERS, HIDDEN))


def straight(inputs):
    return np.einsum("rlh,lh->rl", inputs, WEIGHTS) + CONSTANT


def bent(inputs):
    return np.abs(inputs[..., 0]) - 0.8 + CONSTANT


@pytest.mark.parametrize("target", ["text", "big"])
def test_constants_and_linear_gains_are_found(target):
    pairs = made(lambda inputs: np.broadcast_to(CONSTANT, inputs.shape[:2]), noise=0.1)
    assert bench.constants(pairs, target)(pairs.inputs)[0] == pytest.approx(CONSTANT, abs=0.01)
    pairs = made(straight, noise=0.1)
    unseen = made(straight, seed=1).inputs
    assert np.corrcoef(bench.linear(pairs, target)(unseen).ravel(), straight(unseen).ravel())[0, 1] > 0.99


@pytest.mark.parametrize("name", ["mlp", "joint"])
def test_networks_see_what_linear_maps_do_not(name):
    """Gains that are no linear function of the inputs."""
    pairs, unseen = made(bent, rows=1 << 14), made(bent, seed=1)
    scored = {each: bench.score(bench.fit(each, pairs, "big", 0), 0.0, unseen)["big"] for each in ("linear", name)}
    assert scored[name]["explained"]["low"] > scored["linear"]["explained"]["high"] + 0.1
    assert scored[name]["worth"]["median"] > scored["linear"]["worth"]["median"]


def test_the_worth_of_choices_is_that_of_the_gains_they_get():
    """Unbiased: with the true gains as predictor it is the mean of the gains above the threshold less half of all."""
    pairs = made(straight, rows=1 << 15)
    true = straight(pairs.inputs.astype(np.float32))
    found = bench.score(lambda _: true, 0.3, pairs)["big"]
    expected = (((true > 0.3) - 0.5) * true).sum(-1).mean()
    assert found["worth"]["low"] < expected < found["worth"]["high"]
    assert found["explained"]["median"] == pytest.approx(1, abs=1e-5)


def test_pairs_are_what_passes_say(tiny_model):
    model, windows = tiny_model(), np.random.default_rng(0).integers(0, 32, (3, 9)).astype(np.int32)
    pairs = bench.Pairs(model, windows, 5, lambda _: None)
    routes = np.random.default_rng(5).integers(1, 3, (2, 3, 8, 4)).astype(np.uint8)
    losses = []
    for each in routes:
        logits = np.array(model(windows_of(windows), routes=each), np.float64)
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-np.take_along_axis(logits, windows[:, 1:, None], -1).ravel())
    np.testing.assert_allclose(pairs.worth["text"], losses[1] - losses[0], atol=1e-4)
    assert (pairs.contrast == (routes[0].astype(int) - routes[1]).reshape(-1, 4)).all()
    assert pairs.inputs.shape == (24, 4, 16) and pairs.length == 8
    assert np.abs(pairs.worth["big"]).max() > 0


def windows_of(windows):
    import mlx.core as mx

    return mx.array(windows[:, :-1])


def test_the_program_writes_what_it_found(saved, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number * number % 29}" for number in range(1500)))
    out = tmp_path / "out.json"
    arguments = [
        text,
        "--model",
        saved()[0],
        "--windows",
        "40",
        "--held-out-windows",
        "4",
        "--length",
        "16",
        "--out",
        out,
    ]
    done = CliRunner().invoke(bench.command, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["summary"]
    assert set(found["predictors"]) == {
        f"{name}, fitted to {target}" for name in bench.PREDICTORS for target in ("text", "big")
    }
    for name, of in found["predictors"].items():
        assert name in done.stdout and 0 < of["share"] < 1
        for figures in of["scored"].values():
            assert figures["worth"]["low"] <= figures["worth"]["median"] <= figures["worth"]["high"]
