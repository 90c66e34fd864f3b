"""The small FFNs of a graft alone: what else stays, and distilling all big into a draft, against NumPy."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import checkpoint
from duo_mlx.training.distill import Distill
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


def distributions(model, windows, pattern=PATTERN):
    """Log-probabilities ``[windows, tokens, vocab]`` of all big, and of a draft after each prefix that big has read."""
    tokens = mx.array(windows[:, :-1])
    drafted = []
    for place in range(tokens.shape[1]):
        cache = model.make_cache()
        if place:
            model(tokens[:, :place], cache, routes=[2] * LAYERS)
        drafted.append(np.array(model(tokens[:, place : place + 1], cache, routes=list(pattern))[:, 0]))
    return log_softmax(np.array(model(tokens, routes=[2] * LAYERS))), log_softmax(np.stack(drafted, axis=1))


def divergences(big, draft):
    """KL(big || draft) of each token."""
    return (np.exp(big) * (big - draft)).sum(-1)


@pytest.mark.parametrize("stage", [SmallLearns(LAYERS), Distill(LAYERS), DRAFT], ids=["lm", "distill", "draft"])
def test_nothing_but_small_changes(trainer, stage):
    trained, state = trainer(stage, small_layers=[1, 2], small_bias=True)
    before = {name: np.array(each) for name, each in checkpoint.parameters(trained.model).items()}
    assert len(state.moments.learned) == 2 * 3 * 2
    for _ in range(3):
        state, _ = trained.step(state)
    trained.validate(state.moments.learned, trained.spread(1))
    for name, each in checkpoint.parameters(trained.model).items():
        assert np.array_equal(np.array(each), before[name]) != (".mlp.small." in name), name


@pytest.mark.parametrize("passes", [Passes(), Passes(recompute=True)], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "config", [{}, {"skip_scope": "layer"}, {"draft_vocabulary": 9}], ids=["ffn", "layer", "vocabulary"]
)
def test_the_loss_is_the_divergence_of_drafts_after_each_prefix(trainer, passes, config):
    trained, _ = trainer(Draft(LAYERS, pattern=PATTERN, passes=passes), **config)
    windows, drawn = trained.batch(1)
    known = trained.model.config.draft_vocabulary
    big, draft = (log_softmax(each[..., :known]) for each in distributions(trained.model, windows))
    expected = divergences(big, draft).mean(-1)
    found = np.array(trained.stage.loss(trained.model, mx.array(windows), drawn))
    assert found == pytest.approx(expected, abs=1e-5)
    assert min(expected) > 0.01


def test_gradients_are_of_the_draft_alone(trainer):
    """All big is what is learnt from: nothing flows through it; against differences."""
    trained, _ = trainer(DRAFT)
    windows, drawn = trained.batch(0)
    big, _ = distributions(trained.model, windows)
    norm = trained.model.model.norm

    def divergence(weight):
        norm.weight = weight
        return divergences(big, distributions(trained.model, windows)[1]).mean()

    def loss(weight):
        norm.weight = weight
        return DRAFT.loss(trained.model, mx.array(windows), drawn).mean()

    weight, unit = norm.weight, mx.zeros_like(norm.weight).at[3].add(1e-2)
    expected = (divergence(weight + unit) - divergence(weight - unit)) / 2e-2
    assert abs(expected) > 1e-3
    assert float(mx.grad(loss)(weight)[3]) == pytest.approx(expected, rel=0.02)


def test_validation_finds_divergence_and_acceptance(trainer):
    """The probability of acceptance is the overlap of both distributions."""
    trained, state = trainer(DRAFT)
    found = trained.validate(state.moments.learned, trained.starts)
    assert list(found) == ["big", "random", "small", "skip", "kl", "accepted", "greedy"] == list(DRAFT.columns)
    trained.validate(state.moments.learned, trained.starts[:1])
    windows = np.stack([trained.data.held_out[at : at + 13] for at in trained.starts])
    big, draft = distributions(trained.model, windows)
    assert found["kl"] == pytest.approx(divergences(big, draft).mean(), abs=1e-5)
    assert found["accepted"] == pytest.approx(np.minimum(np.exp(big), np.exp(draft)).sum(-1).mean(), abs=1e-5)
    assert found["greedy"] == pytest.approx((big.argmax(-1) == draft.argmax(-1)).mean(), abs=1e-6)
    same = Draft(LAYERS, pattern=(2,) * LAYERS).measure(trained.model, mx.array(windows[:1]), 4)
    assert float(same["accepted"][0]) == pytest.approx(1, abs=1e-5)
    assert float(same["kl"][0]) == pytest.approx(0, abs=1e-5)


def test_validation_knows_the_tokens_that_drafts_choose_from(trainer):
    """None of the others is drafted, so all of their probability is never accepted."""
    trained, _ = trainer(DRAFT, draft_vocabulary=9)
    windows = np.stack([trained.data.held_out[at : at + 13] for at in trained.starts])
    found = DRAFT.measure(trained.model, mx.array(windows), 0)
    big, draft = distributions(trained.model, windows)
    known = log_softmax(big[..., :9]), log_softmax(draft[..., :9])
    np.testing.assert_allclose(found["kl"], divergences(*known).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["greedy"], (big.argmax(-1) == known[1].argmax(-1)).mean(-1), atol=1e-6)
    overlap = np.minimum(np.exp(big[..., :9]), np.exp(known[1])).sum(-1)
    np.testing.assert_allclose(found["accepted"], overlap.mean(-1), atol=1e-5)


def test_distilling_brings_the_draft_closer(trainer, settings):
    trained, state = trainer(Draft(LAYERS, pattern=(1,) * LAYERS, passes=Passes(recompute=True)), settings(batch=8))
    before = trained.validate(state.moments.learned, trained.starts)
    for _ in range(20):
        state, _ = trained.step(state)
    after = trained.validate(state.moments.learned, trained.starts)
    assert after["kl"] < 0.8 * before["kl"] and after["accepted"] > before["accepted"]
    assert after["big"] == before["big"] and after["small"] != before["small"]


@pytest.mark.parametrize("passes", [Passes(), Passes(recompute=True)], ids=["kept", "recomputed"])
def test_distilling_takes_the_divergence_of_routed_passes_from_all_big(trainer, passes):
    trained, _ = trainer(Distill(LAYERS, passes=passes))
    windows, drawn = trained.batch(1)
    tokens = mx.array(windows[:, :-1])
    big = log_softmax(trained.model(tokens, routes=[2] * LAYERS))
    expected = divergences(big, log_softmax(trained.model(tokens, routes=drawn["routes"]))).mean(axis=1)
    found = trained.stage.loss(trained.model, mx.array(windows), drawn)
    np.testing.assert_allclose(np.array(found), expected, rtol=1e-4, atol=1e-6)


def test_what_is_distilled_nears_all_big(trainer):
    trained, state = trainer(Distill(LAYERS, big=0.25, small=0.75))
    starts = trained.spread(8)
    before = trained.validate(state.moments.learned, starts)
    for _ in range(30):
        state, _ = trained.step(state)
    after = trained.validate(state.moments.learned, starts)
    assert after["kl"] < 0.9 * before["kl"]
    assert after["big"] == before["big"]


def test_every_sequence_draws_its_share_of_big_and_every_other_one_pattern():
    stage = Distill(LAYERS, big=0.3, small=0.6, skip=0.1)
    drawn = [stage.draw(np.random.default_rng(seed), 64, 0)["routes"] for seed in range(400)]
    shares = np.array([(each == 2).mean() for each in drawn])
    fixed = np.array([(each == each[:1]).all() for each in drawn])
    assert 0.4 < fixed.mean() < 0.6
    assert abs(shares.mean() - 0.3) < 0.03 and shares[~fixed].max() < 0.75 and shares[~fixed].min() < 0.05
    rest = np.concatenate([each[each != 2] for each in drawn])
    assert abs((rest == 1).mean() - 6 / 7) < 0.03
