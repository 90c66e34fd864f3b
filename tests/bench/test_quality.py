"""Quality in bench run: cross-entropy, divergence and agreement as NumPy finds them from a model's logits."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.bench import quality
from duo_mlx.errors import DuoError
from duo_mlx.generation import policy_of
from duo_mlx.policies import ReplayPolicy
from duo_mlx.router import Recorder
from duo_mlx.routes import LETTERS

ROUTED = {"router_choices": "-sB"}  # its routers' weights are random, too
WINDOWS = np.random.default_rng(0).integers(0, 32, (3, 11)).astype(np.int32)
TOKENS = WINDOWS.shape[1] - 1
NAMES = ("big", "Bs-B", "random:0.4,0.3,0.3", "router")


@pytest.fixture(params=[None, [1, 2]], ids=["all small", "two small"])
def model(tiny_model, request):
    return tiny_model(**ROUTED, small_layers=request.param)


@pytest.fixture
def policies(model):
    return {name: policy_of(model, name, seed=3) for name in NAMES}


def log_probabilities(model, routes, window):
    logits = np.array(model(mx.array(window[None, :-1]), routes=routes))[0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def routes_of(model, policy, name, window, number):
    """Routes ``[tokens, layers]`` as realised."""
    if name == "router":
        recorder = Recorder(policy)
        model(mx.array(window[None, :-1]), routes=recorder)
        routes = np.stack([np.array(taken)[0] for taken in recorder.taken], axis=-1)
    else:
        routes = np.broadcast_to(policy.routes(number * TOKENS, (number + 1) * TOKENS), (1, TOKENS, 4))[0]
    has_small = np.array([model.config.has_small(layer) for layer in range(4)])
    return np.where((routes == 1) & ~has_small, 2, routes)


@pytest.fixture
def expected(model, policies):
    """Log-probabilities ``[windows, tokens, vocab]`` of plain passes with the policies' routes, and those routes."""
    found = {}
    for name, policy in policies.items():
        routes = [routes_of(model, policy, name, window, number) for number, window in enumerate(WINDOWS)]
        parts = [log_probabilities(model, each[None], window) for each, window in zip(routes, WINDOWS, strict=True)]
        found[name] = np.stack(parts), np.stack(routes)
    return found


def test_the_figures_are_numpys(model, policies, expected):
    done = []
    found, _ = quality.measure(model, policies, WINDOWS, done.append)
    assert done == [1 / 3, 2 / 3, 1.0] and list(found) == list(NAMES)
    big = expected["big"][0]
    for name, (logs, _) in expected.items():
        each = -np.take_along_axis(logs, WINDOWS[:, 1:, None], axis=-1)[..., 0]
        record = found[name]
        assert record["loss"]["median"] == pytest.approx(each.mean(), rel=1e-5)
        assert each.mean(axis=1).min() - 1e-5 <= record["loss"]["low"] <= record["loss"]["median"]
        assert record["loss"]["median"] <= record["loss"]["high"] <= each.mean(axis=1).max() + 1e-5
        assert record["perplexity"] == pytest.approx(np.exp(each.mean()), rel=1e-5)
        assert record["kl"] == pytest.approx((np.exp(big) * (big - logs)).sum(axis=-1).mean(), rel=1e-4, abs=1e-6)
        assert record["argmax_agreement"] == pytest.approx((logs.argmax(-1) == big.argmax(-1)).mean())
        assert record["tokens"] == WINDOWS[:, 1:].size


def test_big_is_itself_and_others_are_not(model, policies):
    found, _ = quality.measure(model, policies, WINDOWS)
    assert found["big"]["kl"] == pytest.approx(0, abs=1e-6) and found["big"]["argmax_agreement"] == 1
    for name in NAMES[1:]:
        assert found[name]["kl"] > 1e-3 and found[name]["argmax_agreement"] < 1


def test_samples_are_the_first_windows_tokens_one_by_one(model, policies, expected):
    _, samples = quality.measure(model, policies, WINDOWS)
    for name, (logs, routes) in expected.items():
        each = -np.take_along_axis(logs[0], WINDOWS[0, 1:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(samples[name]["loss"], each, rtol=1e-5)
        letters = ["".join(LETTERS[route] for route in pattern) for pattern in routes[0]]
        assert samples[name]["patterns"] == letters and all(type(loss) is float for loss in samples[name]["loss"])
    assert len(set(samples["router"]["patterns"])) > 1


@pytest.mark.parametrize("number", [0, 2])
def test_random_routes_go_on_from_window_to_window(tiny_model, number):
    model = tiny_model()
    policy = policy_of(model, "random:0.4,0.3,0.3", seed=3)
    found, routes = quality.log_probabilities(model, policy, WINDOWS[0], number)
    drawn = policy.routes(0, 3 * TOKENS)[0]
    np.testing.assert_array_equal(routes, drawn[number * TOKENS : (number + 1) * TOKENS])
    assert routes.dtype == np.uint8
    np.testing.assert_allclose(np.array(found), log_probabilities(model, routes[None], WINDOWS[0]), atol=1e-5)


def test_recorded_routes_begin_anew_in_each_window(tiny_model):
    model = tiny_model()
    recorded = policy_of(model, "random", 3).routes(0, TOKENS)[0]
    for number in range(3):
        _, routes = quality.log_probabilities(model, ReplayPolicy(recorded), WINDOWS[number], number)
        np.testing.assert_array_equal(routes, recorded)
    found, _ = quality.measure(model, {"replay": ReplayPolicy(recorded)}, WINDOWS)
    losses = [
        -np.take_along_axis(log_probabilities(model, recorded[None], window), window[1:, None], axis=-1).mean()
        for window in WINDOWS
    ]
    assert found["replay"]["loss"]["median"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_recorded_routes_that_end_within_a_window_are_refused(tiny_model):
    model = tiny_model()
    policy = ReplayPolicy(policy_of(model, "random", 3).routes(0, TOKENS - 1)[0], "mine.npz")
    with pytest.raises(DuoError, match=rf"^mine\.npz: holds routes for {TOKENS - 1} positions"):
        quality.measure(model, {"mine": policy}, WINDOWS)
