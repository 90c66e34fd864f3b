"""The controls of an oracle: each is what brute force makes of the same losses, and noise is as large as was asked."""

import tracemalloc
from itertools import combinations, product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.study import controls, oracle, tree
from duo_mlx.study.limits import parse_limit
from duo_mlx.study.losses import token_losses

TOKENS = 10
IDS = np.random.default_rng(5).integers(0, 32, TOKENS + 1)
RANDOM = np.random.default_rng(6)
TABLE = RANDOM.permutation(7 * 5).reshape(7, 5).astype(np.float32) // 2  # losses of 7 patterns, with ties
ALLOWED = {
    "everything": None,
    "the same": np.array([[True], [False], [True], [True], [False], [True], [True]]),
    "by token": np.array([[n % (token + 1) == 0 for token in range(5)] for n in range(7)]),  # 7, 4, 3, 2 and 2
}


def may(allowed):
    return np.broadcast_to(True if allowed is None else allowed, TABLE.shape)


def every_choice(losses, size):
    """The mean of the minimum of all choices, by making them all."""
    found = [min(each) for each in combinations(losses.tolist(), size)]
    return np.mean(found) if found else np.nan


def losses_of(model, inputs, targets, pattern):
    return token_losses(model(mx.array(inputs[None]), routes=pattern), targets)[0]


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_expected_minimum_is_the_mean_over_all_choices(size, allowed):
    found = controls.expected_minimum(TABLE, size, allowed)
    expected = [every_choice(TABLE[may(allowed)[:, token], token], size) for token in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32


def test_the_expected_minimum_of_many_candidates_is_exact():
    ranks = np.random.default_rng(0).permutation(np.arange(1, 4097, dtype=np.float32))[:, None]
    for size in (1, 66, 4096):
        assert controls.expected_minimum(ranks, size)[0] == pytest.approx(4097 / (size + 1), rel=1e-6)


@pytest.mark.parametrize("allowed", [ALLOWED["the same"], ALLOWED["by token"]], ids=["the same", "by token"])
def test_equally_many_candidates_of_a_budget(monkeypatch, allowed):
    monkeypatch.setattr(controls, "SIZES", (2, 3))
    found = controls.equal_n(TABLE, allowed)
    assert found.keys() == {"mean_loss", "best_of_2", "best_of_3"}
    for token in range(5):
        losses = TABLE[may(allowed)[:, token], token]
        assert found["mean_loss"][token] == pytest.approx(losses.mean(), rel=1e-6)
        for size in (2, 3):
            assert found[f"best_of_{size}"][token] == pytest.approx(every_choice(losses, size), rel=1e-6, nan_ok=True)
    if allowed.shape[1] > 1:
        assert np.isnan(found["best_of_3"]).tolist() == [False, False, False, True, True]


@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED)
def test_the_worst_pattern_has_the_highest_loss_and_ties_go_to_the_lower_rank(allowed):
    ranks = np.array([3, 6, 0, 2, 5, 1, 4])
    space = SimpleNamespace(ranks=ranks, patterns=np.arange(14, dtype=np.uint8).reshape(7, 2))
    found = controls.worst(TABLE, may(allowed), space)
    for token in range(5):
        candidates = [(-TABLE[n, token], ranks[n], n) for n in range(7) if may(allowed)[n, token]]
        assert found[token].tolist() == space.patterns[min(candidates)[2]].tolist()


@pytest.fixture
def noisy(tiny_model):
    """``noisy(rows=4)``: noise over a text whose next tokens are all big's own, so that noise can only do harm."""
    model = tiny_model()
    logits = np.array(model(mx.array(IDS[None]), routes=np.full(4, Route.BIG)))[0]

    def make(rows=4):
        return controls.Noise(model, IDS, logits.argmax(axis=-1), rows)

    make.big = token_losses(mx.array(logits[None]), logits.argmax(axis=-1))[0]
    return make


def test_no_noise_is_all_big(noisy):
    found = noisy().losses(0.0, 6, np.random.default_rng(0))
    assert found.shape == (6, TOKENS + 1)
    np.testing.assert_allclose(found, np.repeat(noisy.big[None], 6, axis=0), rtol=0, atol=2e-6)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_noise_has_the_size_of_what_it_is_added_to(monkeypatch, scale):
    states = mx.array([[[3.0] * 400, [-0.5] * 400]])
    layers = SimpleNamespace(  # of which the one gives the same, whatever comes in
        root=mx.zeros_like(states),
        run=lambda _, h, __: mx.broadcast_to(states, h.shape),
        logits=lambda h: h,
    )
    monkeypatch.setattr(controls, "OpenLayers", lambda *_: layers)
    monkeypatch.setattr(controls, "token_losses", lambda h, _: np.array(mx.sqrt(mx.mean(mx.square(h - states), -1))))
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1))
    found = controls.Noise(model, IDS[:2], IDS[:2], 2).losses(scale, 5, np.random.default_rng(0))
    np.testing.assert_allclose(found, np.tile([3.0 * scale, 0.5 * scale], (5, 1)), rtol=0.15)


def test_loss_rises_with_noise(noisy):
    means = [noisy(60).losses(scale, 60, np.random.default_rng(1)).mean() for scale in (0.0, 0.05, 0.1, 0.3, 1.0)]
    assert means == sorted(means) and means[0] < means[1] - 0.005 and means[-1] > means[0] + 0.5


def test_noise_of_a_mean_lies_between_that_of_two_scales(noisy):
    passes = noisy(64)
    means = [float(passes.at(place)["noise_mean"].mean()) for place in range(len(controls.SCALES))]
    assert means[0] == pytest.approx(noisy.big.mean(), abs=1e-6)
    place = len(means) - 3
    below, above = passes.at(place), passes.at(place + 1)
    assert means[place] < means[place + 1] and means[place] > max(means[:place])
    for share in (0.25, 1.0):
        found = passes.of_mean(means[place] + share * (means[place + 1] - means[place]))
        for name in ("noise_mean", "noise_12", "noise_66"):
            np.testing.assert_allclose(found[name], below[name] + share * (above[name] - below[name]), atol=1e-5)


def test_noise_stays_within_the_scales(noisy):
    passes = noisy()
    for name, losses in passes.of_mean(float(noisy.big.mean()) - 0.1).items():
        np.testing.assert_allclose(losses, noisy.big, rtol=0, atol=2e-6, err_msg=name)
    for name, losses in passes.of_mean(1e3).items():
        np.testing.assert_array_equal(losses, passes.at(len(controls.SCALES) - 1)[name])


def test_means_that_dip_by_chance_do_not_matter(noisy, monkeypatch):
    means = {0.0: 1.0, 1.0: 0.8, 2.0: 2.0, 3.0: 1.9}
    monkeypatch.setattr(controls, "SCALES", tuple(means))
    monkeypatch.setattr(controls.Noise, "losses", lambda _, scale, count, __: np.full((count, 1), means[scale]))
    found = [float(noisy().of_mean(loss)["noise_mean"][0]) for loss in (0.9, 1.5, 1.95, 2.5)]
    assert found == pytest.approx([1.0, 1.5, 1.95, 1.9])  # 1.0 is without noise, 1.9 with all there is


def test_noise_follows_the_seed_and_not_the_batch(noisy):
    found = {rows: noisy(rows).losses(0.3, 7, np.random.default_rng((1, 2))) for rows in (1, 3, 64)}
    for rows in (1, 3):
        np.testing.assert_allclose(found[rows], found[64], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found[3], noisy(3).losses(0.3, 7, np.random.default_rng((1, 2))))
    other = noisy(3).losses(0.3, 7, np.random.default_rng((1, 3)))
    passes = np.concatenate([found[3], other])
    apart = np.abs(passes[:, None] - passes[None]).max(axis=-1)
    assert (apart[~np.eye(14, dtype=bool)] > 1e-3).all()  # no two passes have the same noise


def test_noise_of_large_states_in_half_precision(tiny_model):
    model = tiny_model(tie_word_embeddings=False)
    half = Model(model.config)
    weights = {name: value.astype(mx.float16) for name, value in tree_flatten(model.parameters())}
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] * 2000  # whose squares overflow
    half.load_weights(list(weights.items()))
    passes = controls.Noise(half, IDS[:-1], IDS[1:], 4)
    big, found = (passes.losses(scale, 4, np.random.default_rng(0)) for scale in (0.0, 1.0))
    assert np.isfinite(found).all() and np.abs(found - big).mean() > 0.1


def test_noise_of_a_budget_is_the_minimum_of_as_many_passes(noisy, tiny_model):
    passes, limit, place = noisy(64), parse_limit("2", tiny_model(), TOKENS), len(controls.SCALES) - 2
    losses = passes.losses(controls.SCALES[place], 66, np.random.default_rng((0, place)))
    asked = float(losses.mean())
    found = controls.noise(passes, limit, np.array([asked - 0.1, asked + 0.1]), TOKENS + 1)
    np.testing.assert_allclose(found["noise_mean"], losses.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["noise_66"], losses.min(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["noise_12"], controls.expected_minimum(losses, 12), rtol=1e-5)


@pytest.mark.parametrize(("spec", "patterns"), [("3..1", 6), ("bytes:0.7", 6), ("4", 1)])
def test_no_noise_for_a_schedule_a_share_and_a_single_pattern(tiny_model, spec, patterns):
    found = controls.noise(None, parse_limit(spec, tiny_model(), TOKENS), np.ones(patterns), TOKENS)
    assert found.keys() == {"noise_mean", "noise_12", "noise_66"}
    assert all(losses.shape == (TOKENS,) and np.isnan(losses).all() for losses in found.values())


@pytest.mark.parametrize("spec", ["2", "3..1"])
def test_the_second_context_is_the_text_without_its_first_quarter(tiny_model, spec):
    model, inputs, targets = tiny_model(), IDS[:-1], IDS[1:]
    space = oracle.Space(model, tree.layer_options(model, (Route.SMALL, Route.BIG)))
    cut, half = 2, 5
    whole = np.stack([losses_of(model, inputs, targets, pattern) for pattern in space.patterns])
    short = np.stack([losses_of(model, inputs[cut:], targets[cut:], pattern) for pattern in space.patterns])
    allowed = parse_limit(spec, model, TOKENS).allows(space.patterns, TOKENS)
    of = np.broadcast_to(allowed, whole.shape)
    chosen = np.where(of, whole, np.inf).argmin(axis=0)

    second = controls.SecondContext(model, inputs, targets, space, 3, whole)
    found = second.compare(allowed, chosen)
    assert found.keys() == {"short_oracle", "to_short", "from_short"}
    assert all(losses.shape == (TOKENS,) and np.isnan(losses[:half]).all() for losses in found.values())
    for token in range(half, TOKENS):
        here = np.where(of[:, token], short[:, token - cut], np.inf)
        assert found["short_oracle"][token] == pytest.approx(here.min(), abs=1e-5)
        assert found["to_short"][token] == pytest.approx(short[chosen[token], token - cut], abs=1e-5)
        assert found["from_short"][token] == pytest.approx(whole[here.argmin(), token], abs=1e-5)
    for name, route in (("short_loss_big", Route.BIG), ("short_loss_small", Route.SMALL)):
        expected = losses_of(model, inputs[cut:], targets[cut:], np.full(4, route))[half - cut :]
        np.testing.assert_allclose(second.losses[name][half:], expected, rtol=0, atol=1e-5)
        assert np.isnan(second.losses[name][:half]).all()


def by_loops(tables, allowed, kinds, fewest):
    """What `split_by_kind` is to give, token by token."""
    sequences, tokens = kinds.shape
    losses = np.full(kinds.shape, np.nan)
    for sequence, token in product(range(sequences), range(tokens)):
        others = [(o, t) for o, t in product(range(sequences), range(tokens)) if o % 2 != sequence % 2]
        alike = [(o, t) for o, t in others if kinds[o, t] == kinds[sequence, token]]
        on = alike if len(alike) >= fewest else others
        if on:
            best = min(np.flatnonzero(allowed), key=lambda n: sum(float(tables[o][n, t]) for o, t in on))
            losses[sequence, token] = tables[sequence][best, token]
    return losses


@pytest.mark.parametrize("sequences", [1, 2, 5])
def test_one_pattern_for_each_kind_from_the_other_half_of_the_sequences(monkeypatch, sequences):
    monkeypatch.setattr(controls, "FEWEST", 3)
    random = np.random.default_rng(8)
    kinds = random.integers(0, 4, (sequences, 6)) * 2  # kinds without a token, and some with few
    tables = random.permutation(sequences * 9 * 6).reshape(sequences, 9, 6).astype(np.float32)
    allowed = random.random(9) < 0.6
    found = controls.split_by_kind([{"table": each} for each in tables], allowed[:, None], kinds)
    np.testing.assert_array_equal(found, by_loops(tables, allowed, kinds, 3))
    assert np.isnan(found).all() == (sequences == 1)


@pytest.mark.parametrize("fewest", [1, 1000])
def test_the_half_that_chooses_is_not_the_half_that_scores(monkeypatch, fewest):
    monkeypatch.setattr(controls, "FEWEST", fewest)
    even = np.array([[0.0], [5.0], [7.0]], np.float32).repeat(4, axis=1)  # pattern 0 is the best
    odd = even[[1, 0, 2]]  # pattern 1 is
    found = [{"table": table} for table in (even, odd, even, odd)]
    losses = controls.split_by_kind(found, np.ones((3, 1), bool), np.zeros((4, 4), int))
    np.testing.assert_array_equal(losses, np.full((4, 4), 5.0))


def test_kinds_are_the_token_and_how_unsure_all_small_is():
    random = np.random.default_rng(9)
    inputs, entropy = random.integers(100, 130, (6, 20)), random.random((6, 20)).astype(np.float32)
    found = controls.kinds_of([{"inputs": i, "entropy_small": e} for i, e in zip(inputs, entropy, strict=True)])
    by_input, by_entropy = found["split_by_input"], found["split_by_entropy"]
    assert by_input.shape == by_entropy.shape == (6, 20)
    pairs = set(zip(inputs.ravel().tolist(), by_input.ravel().tolist(), strict=True))
    assert len(pairs) == len(np.unique(inputs)) == len(np.unique(by_input)) and by_input.min() == 0
    assert np.bincount(by_entropy.ravel()).tolist() == [12] * controls.BINS  # of equal size
    assert (np.diff(by_entropy.ravel()[entropy.ravel().argsort()]) >= 0).all()


def test_the_controls_take_no_more_memory_than_they_say():
    patterns, tokens = 4096, 64
    table = np.random.default_rng(0).random((patterns, tokens), np.float32)
    space = SimpleNamespace(ranks=np.arange(patterns), patterns=np.zeros((patterns, 12), np.uint8))
    peaks = []
    for allowed in (np.ones((patterns, 1), bool), np.arange(patterns)[:, None] % 2 == np.arange(tokens) % 2):
        for at_work in (lambda of: controls.equal_n(table, of), lambda of: controls.worst(table, of, space)):
            at_work(allowed)
            tracemalloc.start()
            at_work(allowed)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    held = table.nbytes + table.nbytes * 3 // 4  # the losses of both contexts
    said = controls.memory(patterns, tokens)
    assert said / 1.25 < held + max(peaks) <= said
