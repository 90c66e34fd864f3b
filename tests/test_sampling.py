"""Sampling: mlx-lm's sampler with its distribution known, and speculative sampling that leaves it as it is."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs
from duo_mlx.policies import parse_route
from duo_mlx.sampling import Sampling, known
from duo_mlx.speculation import speculate

VOCABULARY = 8
FALSE_ALARM = 1e-4  # of a test of a distribution; the seeds are fixed
# few settings, since MLX compiles mlx-lm's filters for each
SAMPLERS = [
    Sampling(1.0),
    Sampling(0.6, top_p=0.7),
    Sampling(1.0, min_p=0.15),
    Sampling(1.0, top_k=3),
    Sampling(0.6, top_p=0.7, min_p=0.15, top_k=5),
]


DRAWS = 40_000


def chance(statistic, freedom):
    """The probability that a chi-square variable is larger: the regularised incomplete gamma function Q."""
    a, x = freedom / 2, statistic / 2
    if x == 0:
        return 1.0
    scale = math.exp(a * math.log(x) - x - math.lgamma(a))
    if x < a + 1:  # by the series of P
        term = total = 1 / a
        for step in range(1, 2000):
            term *= x / (a + step)
            total += term
        return 1 - scale * total
    b, fraction = x + 1 - a, 0.0  # by the continued fraction, from its end
    for step in range(2000, 0, -1):
        fraction = step * (a - step) / (b + 2 * step + fraction)
    return scale / (b + fraction)


def chance_of_counts(counts, probabilities):
    """Of counts ``[rows, outcomes]`` so far from ``probabilities``; 0 where something impossible was drawn.

    Of a row's outcomes those that are expected less than five times are one.
    """
    if counts[probabilities == 0].any():
        return 0.0
    statistic, freedom = 0.0, 0
    for row, expected in zip(counts, probabilities * counts.sum(axis=1, keepdims=True), strict=True):
        rare = expected < 5
        found, wanted = (np.array([*each[~rare], each[rare].sum()]) for each in (row, expected))
        kept = wanted > 1
        statistic += ((found - wanted)[kept] ** 2 / wanted[kept]).sum()
        freedom += kept.sum() - 1
    return chance(statistic, freedom)


def by_definition(sampling, logprobs):
    """The distribution ``[rows, vocab]`` from which a sampler draws, by what its settings say."""
    p = np.exp(np.array(logprobs, np.float64))
    order = np.argsort(-p, axis=1)
    ranks = np.argsort(order, axis=1)
    likelier = np.take_along_axis(np.cumsum(np.take_along_axis(p, order, 1), 1), ranks, 1) - p  # mass above each token
    kept = likelier < (sampling.top_p or 1)
    kept &= p >= sampling.min_p * p.max(axis=1, keepdims=True)
    kept &= ranks < (sampling.top_k or VOCABULARY)
    weights = np.where(kept, p ** (1 / sampling.temp), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def test_the_chance_is_the_known_one():
    # 95 % and 99.9 % points of tables, and one degree of two, where it is exp(-x / 2)
    for freedom, point, expected in ((1, 3.841459, 0.05), (10, 18.307038, 0.05), (60, 99.607, 0.001)):
        assert chance(point, freedom) == pytest.approx(expected, rel=1e-3)
    for x in (0.1, 1.0, 3.0, 20.0):
        assert chance(x, 2) == pytest.approx(math.exp(-x / 2), rel=1e-9)


def distributions(seed, rows):
    random = np.random.default_rng(seed)
    raw = mx.array(random.standard_normal((rows, VOCABULARY)).astype(np.float32) * 1.5)
    return raw - mx.logsumexp(raw, axis=-1, keepdims=True)


# --- mlx-lm's sampler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [Sampling(), *SAMPLERS])
def test_it_draws_what_mlx_lms_sampler_draws(sampling):
    theirs = make_sampler(sampling.temp, sampling.top_p, sampling.min_p, top_k=sampling.top_k)
    drawn = []
    for sampler in (sampling, theirs):
        mx.random.seed(7)
        drawn.append([sampler(distributions(seed, 1)).item() for seed in range(100)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_its_probabilities_are_those_of_the_definition(sampling):
    logprobs = distributions(1, 50)
    np.testing.assert_allclose(np.array(sampling.probabilities(logprobs)), by_definition(sampling, logprobs), atol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_its_draws_follow_them(sampling):
    mx.random.seed(5)
    logprobs = distributions(1, 1)
    drawn = np.array(sampling(mx.broadcast_to(logprobs, (DRAWS, VOCABULARY))))
    counts = np.bincount(drawn, minlength=VOCABULARY)[None]
    assert chance_of_counts(counts, by_definition(sampling, logprobs)) > FALSE_ALARM


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_acceptance_is_the_probability_with_which_a_drafted_token_stands(sampling):
    """Of each token that may be drafted, min(1, p / q), by the probability with which it is."""
    drafted, verified = distributions(1, 50), distributions(2, 50)
    q, p = (by_definition(sampling, each) for each in (drafted, verified))
    stands = np.minimum(1, np.divide(p, q, out=np.zeros_like(p), where=q > 0))
    np.testing.assert_allclose(np.array(sampling.acceptance(drafted, verified)), (q * stands).sum(axis=1), atol=1e-5)


def test_acceptance_without_a_temperature_is_what_judge_says():
    drafted, verified = distributions(1, 50), distributions(2, 51)
    tokens = mx.argmax(drafted, axis=-1)
    stands, _ = Sampling().judge(drafted, tokens, verified)
    found = np.array(Sampling().acceptance(drafted, verified[:-1]))
    assert found.tolist() == np.array(stands).tolist() and 0 < found.mean() < 1


def test_all_tokens_are_few_enough_for_any_top_k():
    logprobs = distributions(1, 2)
    np.testing.assert_allclose(
        np.array(Sampling(1.0, top_k=99).probabilities(logprobs)), np.exp(np.array(logprobs)), atol=1e-6
    )


def test_the_likeliest_is_known_without_a_name():
    assert known(None) == known(make_sampler(0.0)) == Sampling()
    assert known(SAMPLERS[2]) is SAMPLERS[2]


class Mine:
    def __call__(self, logprobs):
        return mx.argmax(logprobs, axis=-1)


@pytest.mark.parametrize(("sampler", "name"), [(make_sampler(0.7), "make_sampler.*sampler"), (Mine(), "Mine")])
def test_a_sampler_of_unknown_distribution_is_named(sampler, name):
    with pytest.raises(DuoError, match=f"sampler {name}: speculation must know the distribution .* give duo_mlx.samp"):
        known(sampler)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"temp": -1.0}, "temp is -1; it must be a number from 0"),
        ({"temp": math.nan}, "temp is nan"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be between 0 and 1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be between 0 and 1"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number from 0"),
        ({"top_k": -2}, "top_k is -2; it must be a whole number from 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, line):
    with pytest.raises(DuoError, match=line):
        Sampling(**settings)


# --- speculative sampling -------------------------------------------------------------------------------------------


def judged(sampling, p, q, draws=DRAWS):
    """What comes at a place with log-probabilities ``p`` where ``q`` drafts, so many times, and whether it stood."""
    mx.random.seed(12)
    drafted = mx.broadcast_to(q, (draws, VOCABULARY))
    tokens = sampling(drafted)
    stands, instead = sampling.judge(drafted, tokens, mx.broadcast_to(p, (draws + 1, VOCABULARY)))
    assert stands.shape == (draws,) and instead.shape == (draws + 1,)
    return np.array(mx.where(stands, tokens, instead[:-1])), np.array(stands), int(instead[-1].item())


@pytest.mark.parametrize("sampling", SAMPLERS)
def test_what_stands_or_comes_instead_is_distributed_as_verified(sampling):
    p, q = distributions(2, 1), distributions(3, 1)
    tokens, stands, _ = judged(sampling, p, q)
    of_p, of_q = (by_definition(sampling, each) for each in (p, q))
    counts = np.bincount(tokens, minlength=VOCABULARY)[None]
    assert chance_of_counts(counts, of_p) > FALSE_ALARM > chance_of_counts(counts, of_q)
    standing = np.minimum(of_p, of_q).sum()
    assert (
        chance_of_counts(np.array([[stands.sum(), (~stands).sum()]]), np.array([[standing, 1 - standing]]))
        > FALSE_ALARM
    )


def test_what_comes_after_all_is_drawn_as_verified():
    p, q, sampling = distributions(2, 1), distributions(3, 1), Sampling(1.0)
    mx.random.seed(2)
    last = [int(sampling.judge(q, sampling(q), mx.concatenate([q, p]))[1][-1].item()) for _ in range(500)]
    counts = np.bincount(last, minlength=VOCABULARY)[None]
    assert (
        chance_of_counts(counts, by_definition(sampling, p))
        > FALSE_ALARM
        > chance_of_counts(counts, by_definition(sampling, q))
    )


def test_where_both_agree_all_stand():
    p = distributions(4, 1)
    assert judged(Sampling(0.9, top_p=0.8), p, p)[1].all()


def test_where_nothing_is_common_none_stands():
    p, q = mx.full((1, VOCABULARY), -math.inf), mx.full((1, VOCABULARY), -math.inf)
    p[0, 2], q[0, 5] = 0.0, 0.0
    tokens, stands, last = judged(Sampling(1.0), p, q, draws=50)
    assert not stands.any() and (tokens == 2).all() and last == 2


def test_the_likeliest_stands_or_comes_instead():
    p = distributions(6, 5)
    likeliest = mx.argmax(p, axis=-1)
    tokens = mx.array([*likeliest[:2].tolist(), (likeliest[2].item() + 1) % VOCABULARY, likeliest[3].item()])
    stands, instead = Sampling().judge(p[:4], tokens, p)
    assert stands.tolist() == [True, True, False, True] and instead.tolist() == likeliest.tolist()


# --- whole generations ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chain():
    """A Duo whose next token depends on the last one alone, since attention gives nothing."""
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "small_intermediate_size": 8}
    model = Model(
        ModelArgs.from_dict(shape | {"num_attention_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY})
    )
    random = np.random.default_rng(8)
    weights = [
        (name, mx.array(random.standard_normal(value.shape).astype(np.float32) * (0 if "o_proj" in name else 0.3)))
        for name, value in tree_flatten(model.parameters())
        if "norm" not in name
    ]
    model.load_weights(weights, strict=False)
    return model


@pytest.mark.parametrize(
    ("sampling", "draft", "draft_tokens", "biased", "vocabulary"),
    [
        (SAMPLERS[0], "ss", 3, False, 0),
        (SAMPLERS[1], "Bs", 2, False, 0),
        (SAMPLERS[3], "--", 1, True, 0),
        (SAMPLERS[0], "ss", 3, False, 5),
        (SAMPLERS[3], "ss", 2, True, 5),
    ],
)
def test_tokens_follow_the_verifying_routes_distribution(
    chain, monkeypatch, sampling, draft, draft_tokens, biased, vocabulary
):
    """Each of a long text's tokens follows the one before as a pass of that one alone says."""
    monkeypatch.setattr(chain, "config", replace(chain.config, draft_vocabulary=vocabulary))
    mx.random.seed(3)
    verify, draft = (parse_route(spec, 2) for spec in ("BB", draft))
    processors = make_logits_processors(logit_bias={1: 1.0, 4: -1.0}) if biased else []
    options = {"draft_tokens": draft_tokens, "sampler": sampling, "logits_processors": processors}
    found = list(speculate(chain, [0], verify, draft, max_tokens=600, **options))
    accepted = sum(found[-1].speculation.accepted) / sum(found[-1].speculation.drafted)
    assert 0.1 < accepted < 0.9
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, ([0, *(token.token for token in found[:-1])], [token.token for token in found]), 1)
    chances = []
    for policy in (verify, draft):
        logits = chain(mx.arange(VOCABULARY)[:, None], routes=policy.pattern)[:, 0]
        logits = logits + mx.array([0, biased, 0, 0, -int(biased), 0, 0, 0])
        table = by_definition(sampling, logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        chances.append(chance_of_counts(counts, table))
    assert chances[0] > FALSE_ALARM > chances[1]


def test_a_seed_and_a_number_of_drafts_fix_the_text(chain):
    def text(seed, draft_tokens=3):
        mx.random.seed(seed)
        verify, draft = (parse_route(spec, 2) for spec in ("BB", "ss"))
        options = {"draft_tokens": draft_tokens, "sampler": Sampling(1.0), "max_tokens": 30}
        return [token.token for token in speculate(chain, [0], verify, draft, **options)]

    assert text(1) == text(1) != text(2)
