"""Nested small FFNs in closed form, against brute force on the tokens themselves, and a graft that makes them."""

import itertools
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.convert.graft import LEAST, Graft, graft, nested
from duo_mlx.convert.graft.nested import divide, rank, ridge, solve_down
from duo_mlx.convert.graft.solve import Moments
from duo_mlx.convert.sorting import in_order, sort_neurons
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from tests.convert.test_graft import COPIED, StopError, dense, distances, ids  # noqa: F401

NEURONS, OUTPUTS, TOKENS = 12, 5, 400


class Problem:
    """What big's neurons say of some tokens; some neurons say nearly the same."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        some = random.standard_normal((TOKENS, NEURONS)) * np.linspace(0.2, 2, NEURONS)
        some[:, 3] = some[:, 4] + 0.05 * some[:, 3]
        self.said = (some + 0.3).astype(np.float32)
        self.down = random.standard_normal((OUTPUTS, NEURONS))
        self.metric = np.eye(OUTPUTS) + 0.3
        self.moments = Moments.empty(0, NEURONS, OUTPUTS)
        target = mx.array((self.said @ self.down.T).astype(np.float32))
        self.moments.add(mx.zeros((TOKENS, 0)), mx.array(self.said), target, mx.ones((TOKENS, 1)))

    def error(self, chosen):
        """The least error of a ridge regression on these neurons and a constant, its penalty included."""
        chosen = list(chosen)
        features = np.concatenate([np.ones((TOKENS, 1)), self.said[:, chosen]], axis=1)
        target = self.said.astype(np.float64) @ self.down.T @ self.metric
        gram = features.T @ features + ridge(self.moments.gram) * np.eye(len(chosen) + 1)
        found = np.linalg.solve(gram, features.T @ target)
        return float(np.square(target).sum() - np.sum(found * (features.T @ target)))


def test_the_errors_are_those_of_regressions_on_the_first_neurons():
    problem = Problem()
    found = rank(problem.moments.gram, problem.down, problem.metric)
    assert sorted(found.order) == list(range(NEURONS))
    expected = [problem.error(found.order[:count]) for count in range(NEURONS + 1)]
    np.testing.assert_allclose(found.errors, expected, rtol=1e-3, atol=1e-3 * expected[0])


def test_one_after_the_other_the_neuron_goes_that_costs_least(monkeypatch):
    monkeypatch.setattr(nested, "ROUND", 1e-9)
    for seed in range(5):
        problem = Problem(seed)
        order, kept = rank(problem.moments.gram, problem.down, problem.metric).order, list(range(NEURONS))
        for place in range(NEURONS - 1, 1, -1):
            costs = {neuron: problem.error(other for other in kept if other != neuron) for neuron in kept}
            assert costs[order[place]] <= min(costs.values()) * (1 + 1e-3)
            kept.remove(order[place])


def test_rounds_of_many_find_nearly_as_good_neurons():
    for problem in map(Problem, range(5)):
        found = rank(problem.moments.gram, problem.down, problem.metric)
        every = min(problem.error(chosen) for chosen in itertools.combinations(range(NEURONS), NEURONS // 2))
        assert found.errors[NEURONS // 2] < 1.3 * every


def test_the_down_projection_is_the_regression():
    problem = Problem()
    order = np.arange(NEURONS)[::-1]
    down, bias = solve_down(problem.moments, order, 7)
    features = np.concatenate([np.ones((TOKENS, 1)), problem.said[:, order[:7]]], axis=1).astype(np.float64)
    penalty = np.diag(np.r_[1e-6 * TOKENS, np.full(7, ridge(problem.moments.gram))])
    expected = np.linalg.solve(features.T @ features + penalty, features.T @ (problem.said @ problem.down.T))
    np.testing.assert_allclose(np.c_[bias, down], expected.T, rtol=1e-3, atol=1e-4)


def test_widths_are_the_best_of_all():
    random = np.random.default_rng(0)
    for _ in range(20):
        errors = np.sort(random.random((4, 6)), axis=1)[:, ::-1].copy()
        errors[:, 0] = np.inf
        total = int(random.integers(4, 21))
        found = divide(errors, total)
        every = [each for each in itertools.product(range(6), repeat=4) if sum(each) <= total]
        best = min(sum(errors[row, units] for row, units in enumerate(each)) for each in every)
        assert sum(found) <= total and errors[range(4), found].sum() == pytest.approx(best)


def written(model, made):
    """The Duo that convert would write."""
    keys = {key: value for key, value in model.config.to_dict().items() if not key.startswith("small_")}
    duo = Model(Config.from_dict(keys | made.config))
    whole = {name: Tensor.of(value) for name, value in tree_flatten(model.parameters())}
    weights = in_order(whole, model, made.orders) | made.tensors
    duo.load_weights([(name, tensor.load()) for name, tensor in weights.items()])
    return duo


@pytest.mark.parametrize("kind", [kind for kind in COPIED if kind != "phi3"])
def test_big_stays_and_small_is_near_it_on_any_base(kind, ids, tmp_path):  # noqa: F811
    model = dense(kind)
    tokens = mx.array(ids[None, :64])
    before = model(tokens)
    errors = {}
    for ratio in (2, 4):
        made = graft(model, ids, Graft("nested", small_ratio=ratio, tokens=LEAST), tmp_path / str(ratio))
        assert made.config["small_kind"] == "nested"
        widths = made.config["small_intermediate_size"]
        widths = [widths] * 3 if isinstance(widths, int) else widths
        wide = 64 if kind == "gpt2" else 48
        assert sum(width or wide for width in widths) <= 3 * wide / ratio
        duo = written(model, made)
        assert mx.allclose(duo(tokens), before, atol=1e-4).item()
        errors[ratio] = np.mean(distances(duo, ids, 16))
    assert errors[2] < 0.75 * errors[4] and errors[4] < 0.9


def test_the_best_neurons_and_their_regression_beat_the_first_ones_as_they_are(ids, tmp_path):  # noqa: F811
    model = dense()
    made = graft(model, ids, Graft("nested", small_ratio=2, tokens=LEAST), tmp_path / "state")
    duo = written(model, made)
    error = np.mean(distances(duo, ids, 16))
    for ffn in duo.ffns:
        width = ffn["small"].width
        ffn["small"].down_proj.weight = ffn.big.down_proj.weight[:, :width]
        ffn["small"].down_proj.bias = mx.zeros(16)
    chosen = np.mean(distances(duo, ids, 16))
    plain = dense()
    errors = []
    for ffn in plain.ffns:
        x = mx.random.normal((400, 16), key=mx.random.key(ffn.index))
        inner = (nn.silu(ffn.big.gate_proj(x)) * ffn.big.up_proj(x))[:, :24]
        big = ffn.big(x)
        errors.append(
            (mx.square(inner @ ffn.big.down_proj.weight[:, :24].T - big).mean() / mx.square(big).mean()).item()
        )
    assert error < chosen < np.mean(errors)


@pytest.mark.parametrize("after", [1, 7, 9, 11])
def test_an_interrupted_graft_goes_on(ids, tmp_path, after):  # noqa: F811
    model, settings = dense(), Graft("nested", small_ratio=2, tokens=LEAST)
    whole = graft(model, ids, settings, tmp_path / "whole")

    def stop(done, total):
        assert total == 12
        if done == after:
            raise StopError

    with pytest.raises(StopError):
        graft(model, ids, settings, tmp_path / "state", stop)
    steps = []
    again = graft(model, ids, settings, tmp_path / "state", lambda done, _: steps.append(done))
    assert steps[-1] == 12 and steps == sorted(steps)
    assert again.config == whole.config
    for name, tensor in whole.tensors.items():
        assert mx.array_equal(tensor.load(), again.tensors[name].load()).item(), name


def test_layers_that_stay_big_have_no_width(ids, tmp_path):  # noqa: F811
    made = graft(dense(), ids, Graft("nested", small_ratio=2, tokens=LEAST, small_layers=(2, 0)), tmp_path / "state")
    assert made.config["small_intermediate_size"][1] == 0 and 1 not in made.orders
    assert {name.split(".")[2] for name in made.tensors} <= {"0", "2"}


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "phi3"])
def test_what_cannot_be_sorted_is_refused_by_name(kind, ids, tmp_path):  # noqa: F811
    model = dense(kind, **({"hidden_size": 64, "intermediate_size": 64} if kind == "llama" else {}))
    if kind == "llama":
        nn.quantize(model, 32, 8, class_predicate=lambda path, _: ".big." in path)
    said = "is quantised, so its neurons cannot be sorted" if kind == "llama" else "is not known as a gated FFN"
    with pytest.raises(DuoError, match=f"--small-kind nested: layer 0.*{said}.*use --small-kind own"):
        graft(model, ids, Graft("nested", tokens=LEAST), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_written_models_neurons_are_sorted_in_place(tmp_path):
    model = dense("gpt2")
    checkpoint.save(tmp_path, model.config.to_dict(), checkpoint.parameters(model), limit=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    order = np.random.default_rng(0).permutation(64)
    sort_neurons(tmp_path, model, {1: order})
    sorted_model = checkpoint.read_model(tmp_path)
    changed = model.ffns[1].big, sorted_model.ffns[1].big
    assert mx.array_equal(changed[0].c_fc.weight[mx.array(order)], changed[1].c_fc.weight)
    assert mx.array_equal(changed[0].c_fc.bias[mx.array(order)], changed[1].c_fc.bias)
    assert mx.array_equal(changed[0].c_proj.weight[:, mx.array(order)], changed[1].c_proj.weight)
    assert mx.array_equal(model.ffns[0].big.c_fc.weight, sorted_model.ffns[0].big.c_fc.weight)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == checkpoint.parameters(model).keys()
    assert {file.name for file in tmp_path.glob("*.safetensors")} == set(index.values())
    tokens = mx.array([[3, 4, 5, 6]])
    assert mx.allclose(sorted_model(tokens), model(tokens), atol=1e-5).item()
