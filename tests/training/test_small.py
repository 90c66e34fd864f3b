"""The small FFNs of a graft alone: what else stays, and distilling all big into a draft, against NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import checkpoint
from duo_mlx.training.passes import Passes
from duo_mlx.training.small import Draft, SmallLearns

LAYERS = 4
PATTERN = (2, 1, 1, 0)
DRAFT = Draft(LAYERS, pattern=PATTERN)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def distributions(model, windows, drawn):
    """Log-probabilities of all big and of the draft."""
    tokens = mx.array(windows[:, :-1])
    return [log_softmax(np.array(model(tokens, routes=routes))) for routes in ([2] * LAYERS, drawn["routes"])]


@pytest.mark.parametrize("stage", [SmallLearns(LAYERS), DRAFT], ids=["lm", "draft"])
def test_nothing_but_small_changes(trainer, stage):
    trained, state = trainer(stage, small_layers=[1, 2], small_bias=True)
    before = {name: np.array(each) for name, each in checkpoint.parameters(trained.model).items()}
    assert len(state.moments.learned) == 2 * 3 * 2
    for _ in range(3):
        state, _ = trained.step(state)
    trained.validate(state.moments.learned, trained.spread(1))
    for name, each in checkpoint.parameters(trained.model).items():
        assert np.array_equal(np.array(each), before[name]) != (".mlp.small." in name), name


def test_a_draft_follows_a_text_that_took_big(trainer):
    _, drawn = trainer(DRAFT)[0].batch(2)
    assert len({int(row.sum()) for row in drawn["drafted"]}) > 1
    for routes, drafted in zip(drawn["routes"], drawn["drafted"], strict=True):
        assert drafted[-1] and (np.diff(drafted.astype(int)) >= 0).all()
        assert (routes[~drafted] == 2).all() and (routes[drafted] == PATTERN).all()
    random = np.random.default_rng(0)
    lengths = [int(DRAFT.draw(random, 6, 0)["drafted"].sum()) for _ in range(600)]
    assert sorted(set(lengths)) == [1, 2, 3, 4, 5, 6]
    assert min(lengths.count(each) for each in range(1, 7)) > 70


def test_the_loss_is_the_divergence_from_all_big(trainer):
    trained, _ = trainer(DRAFT)
    windows, drawn = trained.batch(1)
    big, draft = distributions(trained.model, windows, drawn)
    each = (np.exp(big) * (big - draft)).sum(-1)
    expected = [row[where].mean() for row, where in zip(each, drawn["drafted"], strict=True)]
    assert np.array(DRAFT.loss(trained.model, mx.array(windows), drawn)) == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 0.01


def test_gradients_are_of_the_draft_alone(trainer):
    """All big is what is learnt from: nothing flows through it; against differences."""
    trained, _ = trainer(DRAFT)
    windows, drawn = trained.batch(0)
    big, _ = distributions(trained.model, windows, drawn)
    norm = trained.model.model.norm

    def divergence(weight):
        norm.weight = weight
        _, draft = distributions(trained.model, windows, drawn)
        each = (np.exp(big) * (big - draft)).sum(-1)
        return np.mean([row[where].mean() for row, where in zip(each, drawn["drafted"], strict=True)])

    def loss(weight):
        norm.weight = weight
        return DRAFT.loss(trained.model, mx.array(windows), drawn).mean()

    weight, unit = norm.weight, mx.zeros_like(norm.weight).at[3].add(1e-2)
    expected = (divergence(weight + unit) - divergence(weight - unit)) / 2e-2
    assert abs(expected) > 1e-3
    assert float(mx.grad(loss)(weight)[3]) == pytest.approx(expected, rel=0.02)


def test_validation_finds_divergence_and_acceptance(trainer):
    trained, state = trainer(DRAFT)
    found = trained.validate(state.moments.learned, trained.starts)
    assert list(found) == ["big", "random", "small", "skip", "kl", "accepted"] == list(DRAFT.columns)
    trained.validate(state.moments.learned, trained.starts[:1])
    windows = np.stack([trained.data.held_out[at : at + 13] for at in trained.starts])
    kl, accepted = [], []
    for number, window in enumerate(windows):
        measured = DRAFT.measure(trained.model, mx.array(window[None]), number)
        kl.append(float(measured["kl"][0]))
        accepted.append(float(measured["accepted"][0]))
    assert found["kl"] == pytest.approx(np.mean(kl), abs=1e-5)
    assert found["accepted"] == pytest.approx(np.mean(accepted), abs=1e-5)
    alone = Draft(LAYERS, pattern=(1,) * LAYERS).measure(trained.model, mx.array(windows[:1]), 4)
    assert 0 < float(alone["accepted"][0]) < 1
    same = Draft(LAYERS, pattern=(2,) * LAYERS).measure(trained.model, mx.array(windows[:1]), 4)
    assert float(same["accepted"][0]) == pytest.approx(1, abs=1e-5)
    assert float(same["kl"][0]) == pytest.approx(0, abs=1e-5)


def test_acceptance_is_the_overlap_of_both_distributions(trainer, monkeypatch):
    trained, _ = trainer(DRAFT)
    windows, drawn = trained.batch(3)
    rows = iter([{name: each[row] for name, each in drawn.items()} for row in range(len(windows))])
    monkeypatch.setattr(Draft, "draw", lambda *_: next(rows))
    found = np.array(DRAFT.measure(trained.model, mx.array(windows), 0)["accepted"])
    big, draft = distributions(trained.model, windows, drawn)
    shared = np.minimum(np.exp(big), np.exp(draft)).sum(-1)
    assert found == pytest.approx(
        [row[where].mean() for row, where in zip(shared, drawn["drafted"], strict=True)], abs=1e-5
    )


def test_distilling_brings_the_draft_closer(trainer, settings):
    trained, state = trainer(Draft(LAYERS, pattern=(1,) * LAYERS, passes=Passes(recompute=True)), settings(batch=8))
    before = trained.validate(state.moments.learned, trained.starts)
    for _ in range(20):
        state, _ = trained.step(state)
    after = trained.validate(state.moments.learned, trained.starts)
    assert after["kl"] < 0.8 * before["kl"] and after["accepted"] > before["accepted"]
    assert after["big"] == before["big"] and after["small"] != before["small"]
