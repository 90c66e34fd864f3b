"""How many tokens to draft: the choice against simulated rounds, and what it learns of times and acceptance."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from duo_mlx import drafting
from duo_mlx.drafting import Auto, Fixed, best_length, round_seconds, tokens_expected
from duo_mlx.errors import DuoError


def rounds(acceptance, length, count, seed=0):
    """Tokens accepted in simulated rounds, ``[count]``."""
    draws = np.random.default_rng(seed).random((count, length)) < np.asarray(acceptance)[:length]
    return np.cumprod(draws, axis=1).sum(axis=1)


def test_the_tokens_expected_are_the_mean_of_rounds():
    acceptance = [0.9, 0.6, 0.7, 0.2]
    expected = tokens_expected(acceptance)
    assert expected[0] == 1
    for length in range(1, 5):
        assert 1 + rounds(acceptance, length, 200_000).mean() == pytest.approx(expected[length], abs=0.01)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8).flatmap(
        lambda acceptance: st.tuples(
            st.just(acceptance),
            st.lists(st.floats(0.1, 9), min_size=len(acceptance) + 1, max_size=len(acceptance) + 1),
        )
    )
)
def test_the_best_length_gives_the_most_tokens_a_second(case):
    acceptance, seconds = case
    rates = []
    for length in range(len(seconds)):
        tokens = 1.0  # and each drafted one with the probability that it and all before it stand
        for place in range(length):
            tokens += float(np.prod(acceptance[: place + 1]))
        rates.append(tokens / seconds[length])
    assert rates[best_length(acceptance, seconds)] == pytest.approx(max(rates))


@pytest.mark.parametrize(
    ("acceptance", "draft", "best"),
    [
        ([0.8] * 4, 0.1, 4),  # a cheap draft, and a verification that costs no more than a step
        ([0.8] * 4, 0.9, 0),  # a draft as dear as what it saves
        ([0.9, 0.9, 0.0, 0.9], 0.2, 2),  # the third never stands
        ([0.0] * 4, 0.01, 0),
        ([1.0] * 4, 0.0, 4),
        ([0.5] * 4, 0.5, 0),  # 1 / 1 = 1.5 / 1.5: of equals, the least
    ],
)
def test_what_drafts_cost_decides(acceptance, draft, best):
    assert best_length(acceptance, round_seconds(draft, {1: 1.0, 8: 1.0}, longest=4)) == best


def test_the_time_of_a_round_is_its_drafts_and_its_pass():
    found = round_seconds(0.5, {1: 1.0, 2: 1.2, 4: 1.6, 8: 3.2}, longest=7)
    np.testing.assert_allclose(found, [1.0, 0.5 + 1.2, 1 + 1.4, 1.5 + 1.6, 2 + 2.0, 2.5 + 2.4, 3 + 2.8, 3.5 + 3.2])


@pytest.mark.parametrize("known", [{}, {2: 1.0, 8: 2.0}, {1: 1.0, 7: 2.0}])
def test_times_must_reach_from_one_token_to_the_longest_draft(known):
    with pytest.raises(DuoError, match="verifying passes must be of 1 to at least 8 tokens"):
        round_seconds(0.5, known, longest=7)


def play(chooser, acceptance, draft, verify, count, seed=0):
    """So many rounds in a world with these acceptances and times: the lengths chosen, tokens and seconds of each."""
    random, lengths, tokens, seconds = np.random.default_rng(seed), [], [], []
    for _ in range(count):
        lengths.append(chooser.choose())
        accepted = int(np.cumprod(random.random(lengths[-1]) < acceptance[: lengths[-1]]).sum())
        tokens.append(accepted + 1)
        seconds.append(lengths[-1] * draft + verify[lengths[-1]])
        chooser.observe(lengths[-1], accepted, seconds[-1])
    return np.array(lengths), np.array(tokens), np.array(seconds)


FLAT, STEEP = np.linspace(1, 1.3, 8), np.linspace(1, 8, 8)  # seconds of a verifying pass over 1 to 8 tokens


@pytest.mark.parametrize(
    ("acceptance", "draft", "verify"),
    [([0.85] * 7, 0.2, FLAT), ([0.4] * 7, 0.4, FLAT), ([0.95] * 7, 0.3, STEEP), ([0.9, 0.9, *[0.05] * 5], 0.2, FLAT)],
)
def test_auto_finds_what_pays(acceptance, draft, verify):
    times = np.arange(8) * draft + verify
    rates = tokens_expected(acceptance) / times
    lengths, tokens, seconds = play(Auto(), np.array(acceptance), draft, verify, 1000)
    assert tokens[100:].sum() / seconds[100:].sum() > 0.93 * rates.max()
    if rates.argmax() == 0:
        assert (lengths[100:] == 0).mean() > 0.9


def test_the_first_rounds_measure():
    assert play(Auto(), np.ones(7), 0.2, FLAT, 4)[0].tolist() == [0, 1, 3, 7]
    assert play(Auto(longest=3), np.ones(3), 0.2, FLAT, 3)[0].tolist() == [0, 1, 3]
    falls = play(Auto(), np.array([1.0, 0, 1, 1, 1, 1, 1]), 0.2, FLAT, 4)[0].tolist()
    assert falls[:3] == [0, 1, 3] and falls[3] != 7  # what is no longer than what fell is measured


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=7, max_size=7),
    st.floats(0.05, 1.5),
    st.lists(st.floats(0, 1), min_size=7, max_size=7).map(lambda more: 1 + np.cumsum([0, *more])),
    st.integers(0, 9),
)
def test_tries_lose_no_more_than_their_share(acceptance, draft, verify, seed):
    """Where no length comes near to paying: the opening, twice a hundredth of all time, and a last try."""
    times = np.arange(8) * draft + verify
    assume((tokens_expected(acceptance) / times)[1:].max() < 0.9)  # else luck makes it look as if it paid
    _, tokens, seconds = play(Auto(), np.array(acceptance), draft, verify, 800, seed)
    lost = seconds.sum() - tokens.sum() * times[0]
    assert lost < times[[1, 3, 7]].sum() + 2 * drafting.SHARE * seconds.sum() + times[1]


def test_where_drafting_does_not_pay_it_is_tried_as_its_share_allows():
    chooser, often = Auto(), drafting.PROBE
    lengths, _, seconds = play(chooser, np.zeros(7), 0.6, FLAT, 3000)
    (tried,) = lengths.nonzero()
    loss = 0.6 + FLAT[1] - FLAT[0]
    assert set(lengths.tolist()) == {0, 1} and lengths[1] == 1
    assert ((tried[1:] - 1) % often == 0).all()
    assert len(tried) * loss == pytest.approx(drafting.SHARE * seconds.sum(), rel=0.1)
    # the text becomes easy, and a step faster: drafting comes back
    assert play(chooser, np.ones(7), 0.1, FLAT, 60 * often)[0][-200:].mean() > 5


def test_a_try_that_costs_little_is_made_every_time():
    often = drafting.PROBE
    lengths = play(Auto(), np.zeros(7), 0.3, np.ones(8), 2 + 5 * often)[0][2:]
    assert lengths[often:].nonzero()[0].tolist() == [often - 1, 2 * often - 1, 3 * often - 1, 4 * often - 1]


def test_lengths_between_measured_ones_are_on_lines():
    chooser = Auto()
    for length, seconds in ((0, 1.0), (1, 1.5), (3, 2.0)):
        chooser.observe(length, length, seconds)
    np.testing.assert_allclose(chooser.seconds(), [1.0, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0])


def test_where_drafting_pays_another_length_is_tried_now_and_then():
    often = drafting.PROBE
    lengths = play(Auto(), np.array([1.0, 1.0, 0, 0, 0, 0, 0]), 0.1, FLAT, 3 + 40 * often)[0][3:]
    others = lengths[often - 1 :: often]
    assert {0, 3} <= set(others.tolist()) <= {0, 2, 3}
    assert (np.delete(lengths, np.arange(often - 1, len(lengths), often))[often:] == 2).all()


def test_a_slow_moment_is_forgotten():
    chooser = Auto()
    for length, seconds in ((1, 9.0), (3, 1.9), (7, 3.0), (0, 1.0), (1, 1.2)):
        chooser.observe(length, length, seconds)
    assert chooser.seconds()[1] == 1.2
    for _ in range(drafting.KEPT):
        chooser.observe(1, 1, 1.5)
    assert chooser.seconds()[1] == 1.5
    np.testing.assert_allclose(chooser.seconds()[[0, 2, 4]], [1.0, 1.7, 1.9 + 1.1 / 4])


def test_acceptance_is_counted_where_all_before_stood():
    chooser = Auto(longest=4)
    for _ in range(300):
        chooser.observe(4, 2, 1.0)  # the third falls, of the fourth nothing is known
    found = chooser.acceptance()
    assert found[0] == found[1] > 0.9 and found[2] < 0.15
    assert found[3] == pytest.approx(2 / 3, abs=0.05)  # what all positions tell


@pytest.mark.parametrize(("text", "tokens"), [(3, 3), ("5", 5), (0, 0)])
def test_a_number_is_always_that(text, tokens):
    chosen = drafting.lengths(text)
    assert isinstance(chosen, Fixed) and [chosen.choose() for _ in range(3)] == [tokens] * 3


def test_auto_and_ones_own_are_taken():
    mine = Fixed(2)
    assert isinstance(drafting.lengths("auto"), Auto) and drafting.lengths(mine) is mine


@pytest.mark.parametrize("given", [-1, "-1", "x", "", "1.5", "9" * 5000, True])
def test_anything_else_is_one_line(given):
    with pytest.raises(DuoError, match="it must be auto or a whole number from 0"):
        drafting.lengths(given)
