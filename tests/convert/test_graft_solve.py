"""A small FFN in closed form against plain regressions on the tokens themselves."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duo_mlx.convert.graft.kinds import OwnSmall
from duo_mlx.convert.graft.neurons import Projection
from duo_mlx.convert.graft.solve import COPIED_RIDGE, Copyable, Moments, _pick, solve

INPUTS, NEURONS, OUTPUTS, TOKENS = 6, 20, 5, 4000


def silu(x):
    return x / (1 + np.exp(-x))


class Problem:
    """Tokens, and a big FFN."""

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        self.x = random.standard_normal((TOKENS, INPUTS)).astype(np.float32)
        self.gate, self.up = (
            Projection(
                random.standard_normal((NEURONS, INPUTS)).astype(np.float32),
                random.standard_normal(NEURONS).astype(np.float32),
            )
            for _ in range(2)
        )
        self.down = random.standard_normal((OUTPUTS, NEURONS)).astype(np.float32)
        gate, up = (self.x @ part.weight.T + part.bias for part in (self.gate, self.up))
        self.neurons = silu(gate) * up
        self.features = np.concatenate([self.x, np.ones((TOKENS, 1), np.float32), self.neurons], axis=1)

    def solve(self, target, width, linear, metric=None, batches=3):
        moments = Moments.empty(INPUTS, NEURONS, OUTPUTS)
        for features, part in zip(np.array_split(self.features, batches), np.array_split(target, batches), strict=True):
            x, said = mx.array(features[:, :INPUTS]), mx.array(features[:, INPUTS + 1 :])
            moments.add(x, said, mx.array(part), mx.ones((len(part), 1)))
        metric = np.eye(OUTPUTS) if metric is None else metric
        big = Copyable(self.gate.weight, self.gate.bias, self.up.weight, self.up.bias)
        return solve(moments, big, metric, width, linear)

    def error(self, small, target):
        """Share of the target that is not said."""
        said = np.array(OwnSmall(small, "silu")(mx.array(self.x)))
        return np.square(said - target).sum() / np.square(target).sum()


def test_all_neurons_say_all():
    problem = Problem()
    target = problem.neurons @ problem.down.T + 3
    assert problem.error(problem.solve(target, NEURONS, 0), target) < 1e-4


def test_linear_neurons_say_a_linear_map_of_their_rank():
    problem = Problem()
    random = np.random.default_rng(1)
    target = problem.x @ random.standard_normal((INPUTS, 2)) @ random.standard_normal((2, OUTPUTS)) + 0.5
    assert problem.error(problem.solve(target, 4, 2), target) < 1e-4
    assert problem.error(problem.solve(target, 2, 2), target) < 1e-4
    assert problem.error(problem.solve(target, 1, 1), target) > 0.01


def test_copied_neurons_are_bigs_own_with_their_biases():
    problem = Problem()
    small = problem.solve(problem.neurons @ problem.down.T, 8, 3)
    rows = [np.flatnonzero((problem.gate.weight == row).all(axis=1)) for row in small.gate[3:]]
    assert all(len(row) == 1 for row in rows) and len({int(row[0]) for row in rows}) == 5
    picked = np.concatenate(rows)
    np.testing.assert_array_equal(small.gate_bias[3:], problem.gate.bias[picked])
    np.testing.assert_array_equal(small.up[3:], problem.up.weight[picked])
    np.testing.assert_array_equal(small.up_bias[3:], problem.up.bias[picked])
    assert not small.gate[:3].any() and np.allclose(silu(small.gate_bias[:3]), 1)
    assert {value.dtype for value in vars(small).values()} == {np.dtype(np.float32)}


def test_neurons_that_matter_are_found_and_loud_ones_that_do_not_are_not():
    problem = Problem()
    few = [3, 8, 15]
    target = problem.neurons[:, few] @ problem.down[:, few].T
    problem.neurons[:, 0] *= 5  # loud, and of no use
    problem.features[:, INPUTS + 1] *= 5
    small = problem.solve(target, 3, 0)
    assert sorted(np.flatnonzero((problem.gate.weight == row).all(axis=1))[0] for row in small.gate) == few


def test_the_metric_decides_what_few_neurons_are_spent_on():
    problem = Problem()
    target = problem.neurons[:, :2] @ np.array([[10, 0, 0, 0, 0], [0, 1, 0, 0, 0]], np.float32)
    for metric, channel in ((np.eye(5), 0), (np.diag([1e-3, 1, 1, 1, 1]), 1)):
        small = problem.solve(target, 1, 0, metric)
        np.testing.assert_array_equal(small.gate[0], problem.gate.weight[channel])


@given(st.integers(0, 10_000), st.integers(0, 3), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_each_pick_is_the_best_one_there_is(seed, linear, count):
    """Brute force: at each step every neuron's regression is solved, and the one of the least error wins."""
    random = np.random.default_rng(seed)
    there, neurons = random.standard_normal((60, linear + 1)), random.standard_normal((60, 9))
    target = random.standard_normal((60, 2))
    ridge = COPIED_RIDGE * np.square(neurons).sum(axis=0).mean()
    cross = np.concatenate([there, neurons], axis=1).T @ target
    picked = _pick(there.T @ there, there.T @ neurons, neurons.T @ neurons, cross, count, ridge)

    def error(chosen):
        features = np.concatenate([there, neurons[:, chosen]], axis=1)
        penalty = np.sqrt(np.r_[np.full(linear + 1, 1e-12), np.full(len(chosen), ridge)])
        stacked = np.concatenate([features, np.diag(penalty)])
        wanted = np.concatenate([target, np.zeros((len(penalty), 2))])
        return np.square(wanted - stacked @ np.linalg.lstsq(stacked, wanted, rcond=None)[0]).sum()

    chosen = []
    for pick in picked.tolist():
        errors = {neuron: error([*chosen, neuron]) for neuron in range(9) if neuron not in chosen}
        assert errors[pick] == pytest.approx(min(errors.values()), rel=1e-5)
        chosen.append(pick)
    assert len(set(chosen)) == count


def test_neurons_that_never_speak_do_no_harm():
    problem = Problem()
    problem.neurons[:, 5:] = 0
    problem.features[:, INPUTS + 1 + 5 :] = 0
    target = problem.neurons @ problem.down.T
    small = problem.solve(target, 12, 2)
    assert all(np.isfinite(value).all() for value in vars(small).values())
