"""Token difficulty: figures of brute force, planted effects that are found, and true examples."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from duo_mlx import checkpoint
from duo_mlx.study import difficulty
from duo_mlx.study.difficulty import (
    CLASSES,
    by_position,
    correlation,
    gaps_of,
    means,
    pieces,
    ranks,
    study,
    token_classes,
)

SEQUENCES, LENGTH, LAYERS = 20, 24, 5


def made(sequences=SEQUENCES, length=LENGTH, seed=0, controls=True):
    """A table in which difficulty has nothing to do with the loss, and the gap to big is half of it and noise."""
    random = np.random.default_rng(seed)
    shape = (sequences, length)
    small = random.gamma(4.0, 1.0, shape) + 3
    gap = random.uniform(0, 2, shape)
    arrays = {
        "loss_small": small,
        "oracle_loss": small - gap,
        "loss_big": small - gap / 2 + random.normal(0, 0.3, shape),
        "entropy_small": small + random.normal(0, 1, shape),
    }
    if controls:
        arrays |= {"best_of_66": small - gap / 1.5, "noise_66": small - small / 4}
    routes = random.integers(0, 3, (*shape, LAYERS)).astype(np.uint8)
    return {name: each.astype(np.float32) for name, each in arrays.items()} | {"oracle_routes": routes}


def words(table, seed=0):
    """Texts of a table: each token is a word of a few, in which its sequence and place can be read."""
    choices = np.array([" the", " house", " London", "s", " 12", ",", "\n"])
    sequences, length = table["loss_small"].shape
    return np.random.default_rng(seed).choice(choices, (sequences, length + 1)).tolist()


# --- figures -------------------------------------------------------------------------------------------------------


def test_ranks_are_counts_of_what_is_lower_and_half_of_what_is_equal():
    values = np.random.default_rng(0).integers(0, 9, (4, 6)).astype(float)
    expected = [
        (values < each).sum() + ((values == each).sum() + 1) / 2  # itself is among the equal ones
        for each in values.ravel()
    ]
    assert ranks(values).shape == values.shape
    np.testing.assert_array_equal(ranks(values).ravel(), expected)


def test_a_correlation_is_that_of_all_tokens_and_its_interval_that_of_resampled_sequences():
    random = np.random.default_rng(1)
    shared = random.normal(0, 1, (30, 1))  # tokens of a sequence are alike: resampling tokens would be too sure
    a, b = (1000 + shared + random.normal(0, 0.5, (30, 12)) for _ in range(2))
    found = correlation(a, b)
    assert found.median == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-9)
    drawn = []
    for _ in range(1500):
        rows = random.integers(0, 30, 30)
        drawn.append(np.corrcoef(a[rows].ravel(), b[rows].ravel())[0, 1])
    assert (found.low, found.high) == pytest.approx(np.quantile(drawn, (0.025, 0.975)), abs=0.02)


def test_spearman_does_not_see_how_much_only_which():
    a = np.random.default_rng(2).normal(size=(6, 8))
    rises, falls = np.exp(3 * a), -(a**3)
    assert correlation(ranks(a), ranks(rises)) == pytest.approx((1.0, 1.0, 1.0))
    assert correlation(ranks(a), ranks(falls)).median == pytest.approx(-1.0)
    assert correlation(a, rises).median < 0.9


def test_what_does_not_vary_has_no_correlation():
    a = np.random.default_rng(2).normal(size=(3, 6))
    assert np.isnan(correlation(a, np.full((3, 6), 0.1))).all()
    lone = np.full((3, 6), 0.1)
    lone[0] = a[0]  # varies in one sequence: draws without it are left out, and rounding is no correlation
    found = correlation(a, lone)
    draws = ([0, *others] for others in itertools.product(range(3), repeat=2))
    of_draws = [np.corrcoef(a[rows].ravel(), lone[rows].ravel())[0, 1] for rows in draws]
    assert min(of_draws) - 1e-9 <= found.low <= found.median <= found.high <= max(of_draws) + 1e-9


def test_a_mean_is_over_tokens_not_over_sequences():
    values = np.array([[1.0, 1.0, 1.0], [4.0, 7.0, 7.0], [0.0, 0.0, 0.0]])
    among = np.array([[True, True, True], [True, False, False], [False, False, False]])
    found = means({"x": values}, among)["x"]
    assert found.median == pytest.approx(7 / 4) and (found.low, found.high) == (1.0, 4.0)


# --- a study -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied():
    """A table, its texts and its study."""
    table = made(seed=1)
    texts = words(table)
    return table, texts, study(table, texts)


def test_gaps_are_those_of_the_table_and_go_as_they_were_made(studied):
    table, _, found = studied
    assert list(found.high_but_easy) == ["difficulty", "gap_to_big", "gap_to_best_of_66", "gap_to_noise_66"]
    of = {(each.a, each.b): each for each in found.correlations}
    assert len(of) == 15 == len(found.correlations)
    exact = {
        "difficulty": table["loss_small"] - table["oracle_loss"],
        "gap_to_big": table["loss_small"] - table["loss_big"],
        "gap_to_best_of_66": table["loss_small"] - table["best_of_66"],
        "gap_to_noise_66": table["loss_small"] - table["noise_66"],
        "loss_small": table["loss_small"],
        "entropy_small": table["entropy_small"],
    }
    for (a, b), each in of.items():
        x, y = (exact[name].ravel().astype(np.float64) for name in (a, b))
        assert each.pearson.median == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
        assert each.spearman.median == pytest.approx(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1],
                                                     abs=1e-3)  # fmt: skip
        assert each.pearson.low <= each.pearson.median <= each.pearson.high
    # what was made: difficulty without the loss, luck with it
    assert of["difficulty", "loss_small"].pearson.low < 0 < of["difficulty", "loss_small"].pearson.high
    assert of["gap_to_noise_66", "loss_small"].spearman.low > 0.99
    whole = found.whole.means
    for name in ("difficulty", "gap_to_big", "gap_to_noise_66"):
        assert whole[name].median == pytest.approx(exact[name].mean(), abs=1e-5)
    assert whole["big_layers"].median == pytest.approx((table["oracle_routes"] == 2).sum(axis=-1).mean())


def test_a_high_loss_without_difficulty_is_counted(studied):
    table, _, whole = studied
    found = whole.high_but_easy
    small, gap = table["loss_small"], table["loss_small"] - table["oracle_loss"]
    high = small >= np.quantile(small, 0.9)
    assert found["difficulty"].median == pytest.approx((gap < np.median(gap))[high].mean())
    assert found["difficulty"].low < 0.5 < found["difficulty"].high + 1e-9  # planted: nothing to do with one another
    assert found["gap_to_noise_66"] == (0.0, 0.0, 0.0)  # planted: a quarter of the loss


@pytest.mark.parametrize(("missing", "left"), [
    ((), ["difficulty", "gap_to_big", "gap_to_best_of_66", "gap_to_noise_66"]),
    (("noise_66",), ["difficulty", "gap_to_big", "gap_to_best_of_66"]),
    (("best_of_66", "noise_66"), ["difficulty", "gap_to_big"]),
])  # fmt: skip
@pytest.mark.parametrize("how", ["no array", "NaN"])
def test_controls_that_a_budget_does_not_have_are_left_out(missing, left, how):
    table = made()
    for name in missing:
        if how == "NaN":  # as a schedule's
            table[name] = np.full_like(table[name], np.nan)
        else:
            del table[name]
    assert list(gaps_of(table)) == left


def test_a_gap_of_rounding_is_none():
    table = made(controls=False)
    table["oracle_loss"] = table["loss_small"] + np.float32(2e-6)
    table["oracle_loss"][0, 0] = table["loss_small"][0, 0] - 2e-3
    gap = gaps_of(table)["difficulty"]
    assert gap[0, 0] == pytest.approx(2e-3, abs=1e-5) and np.count_nonzero(gap) == 1


@pytest.mark.parametrize(("length", "names"), [
    (24, ["0-2", "3-5", "6-8", "9-11", "12-14", "15-17", "18-20", "21-23"]),
    (9, ["0-1", "2-2", "3-3", "4-4", "5-5", "6-6", "7-7", "8-8"]),
    (3, ["0-0", "1-1", "2-2"]),
])  # fmt: skip
def test_positions_are_bins_of_neighbours(length, names):
    table = made(length=length)
    table["gap"] = table["loss_small"] - table["loss_big"]
    found = by_position({name: table[name].astype(np.float64) for name in ("oracle_loss", "gap")})
    assert [each.name for each in found] == names
    for each in found:
        first, last = map(int, each.name.split("-"))
        part = np.s_[:, first : last + 1]
        assert each.tokens == SEQUENCES * (last + 1 - first)
        by_sequence = table["oracle_loss"][part].mean(axis=1)
        assert each.means["oracle_loss"].median == pytest.approx(by_sequence.mean(), abs=1e-5)
        width = each.means["oracle_loss"].high - each.means["oracle_loss"].low
        error = by_sequence.std() / np.sqrt(SEQUENCES)
        assert 3.2 < width / error < 4.6  # 3.92 for many sequences
        assert each.means["gap"].median == pytest.approx(table["gap"][part].mean(), abs=1e-5)


def test_classes_are_of_the_token_that_is_predicted(studied):
    table, texts, whole = studied
    found = {each.name: each for each in whole.classes}
    assert sum(each.tokens for each in found.values()) == SEQUENCES * LENGTH
    targets = np.array(texts)[:, 1:]
    of = {"capitalised word": " London", "punctuation": ",", "other": "\n", "number": " 12"}
    for name, text in of.items():
        its = targets == text
        assert found[name].tokens == its.sum()
        difference = table["loss_small"] - table["oracle_loss"]
        assert found[name].means["difficulty"].median == pytest.approx(difference[its].mean(), abs=1e-5)
        big = (table["oracle_routes"] == 2).sum(axis=-1)
        assert found[name].means["big_layers"].median == pytest.approx(big[its].mean())
    assert [name for name in CLASSES if name in found] == list(found)


def test_a_class_of_no_token_is_not_shown():
    table = made(2, 4, controls=False)
    assert [each.name for each in study(table, [[","] * 5] * 2).classes] == ["punctuation"]


def test_examples_are_what_they_say():
    table = made()
    texts = [[f"<{row}.{at}>" for at in range(LENGTH + 1)] for row in range(SEQUENCES)]
    found = study(table, texts)
    small, gap = (table[name].astype(np.float64) for name in ("loss_small", "oracle_loss"))
    gap = small - gap
    high, middle = small >= np.quantile(small, 0.9), np.abs(ranks(small) / small.size - 0.5) <= 0.101
    for examples, among, sign in (
        (found.high_and_easy_examples, high & (gap < np.median(gap)), 1),
        (found.middling_but_difficult_examples, middle, -1),
    ):
        assert len(examples) == 6 and len({each.sequence for each in examples}) == 6
        scores = [sign * each.difficulty for each in examples]
        assert scores == sorted(scores)
        best_of_sequences = sorted((sign * gap)[row][among[row]].min() for row in range(SEQUENCES) if among[row].any())
        assert scores == pytest.approx(best_of_sequences[:6])
        for each in examples:
            row, at = each.sequence, each.position
            assert among[row, at] and each.target == f"<{row}.{at + 1}>"
            assert each.context == "".join(texts[row][max(0, at - 9) : at + 1])
            assert each.pattern == "".join("-sB"[route] for route in table["oracle_routes"][row, at])
            assert (each.loss_small, each.loss_big, each.oracle_loss) == pytest.approx(
                [table[name][row, at] for name in ("loss_small", "loss_big", "oracle_loss")]
            )


def test_no_example_where_every_high_loss_is_difficult():
    table = made(10, 12, controls=False)
    table["oracle_loss"] = table["loss_small"] / 2
    found = study(table, words(table))
    assert found.high_and_easy_examples == [] and found.high_but_easy["difficulty"].median == 0
    assert len(found.middling_but_difficult_examples) == 6


@pytest.mark.parametrize("sequences", [1, 4])
def test_a_budget_of_one_pattern_is_no_number_but_null(sequences):
    table = made(sequences, 6, controls=False)
    table["oracle_loss"] = table["loss_small"]  # all small is the only pattern
    record = study(table, words(table)).record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    null = [each for each in record["correlations"] if each["pearson"] is None and each["spearman"] is None]
    assert [(each["a"], each["b"]) for each in null] == [
        ("difficulty", other) for other in ("gap_to_big", "loss_small", "entropy_small")
    ]
    assert record["whole"]["means"]["difficulty"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert record["whole"]["tokens"] == sequences * 6 and len(record["positions"]) == 6


# --- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("texts", "expected"), [
    ([" the", " house"], ["function word", "lower-case word"]),
    (["The", " I", "am", " I"], ["function word", "capitalised word", "continuation", "function word"]),
    ([" in", "dividual"], ["lower-case word", "continuation"]),
    ([" in", " deed", ","], ["function word", "lower-case word", "punctuation"]),
    ([" in,", "deed"], ["function word", "lower-case word"]),
    ([" London", "er"], ["capitalised word", "continuation"]),
    ([' "', "She", " w", "ept"], ["punctuation", "function word", "lower-case word", "continuation"]),
    ([' "We', "pt", ' "ho'], ["capitalised word", "continuation", "lower-case word"]),
    ([" don", "'", "t"], ["lower-case word", "punctuation", "continuation"]),
    ([" Emma", "\u2019s", " '", "tis"], ["capitalised word", "continuation", "punctuation", "lower-case word"]),
    ([" well", "-", "bred"], ["lower-case word", "punctuation", "continuation"]),
    ([" well", "-", "-", "the"], ["lower-case word", "punctuation", "punctuation", "function word"]),
    ([" well", "--bred", "--", "so"], ["lower-case word", "lower-case word", "punctuation", "function word"]),
    ([" _", "her", "_"], ["punctuation", "function word", "punctuation"]),
    ([" 18", "17", "th", " ½", " x2"], ["number", "number", "continuation", "number", "lower-case word"]),
    ([" ", "\n\n", "", "\ufffd", "\u200b"], ["other"] * 5),
    (["\n", "Élan", " été"], ["other", "capitalised word", "lower-case word"]),
    (["word\n", "next"], ["lower-case word", "lower-case word"]),
    ([" —", "…", " +=", "😀"], ["punctuation"] * 4),
])  # fmt: skip
def test_every_token_has_the_class_of_what_it_adds(texts, expected):
    assert token_classes(texts) == expected and set(expected) <= set(CLASSES)


def test_function_words_are_lower_case_words():
    assert all(word.isalpha() and word.islower() for word in difficulty.FUNCTION_WORDS)
    assert {"the", "of", "she", "and", "not", "between"} <= difficulty.FUNCTION_WORDS


@pytest.fixture(scope="module")
def tokenizer():
    return checkpoint.read_tokenizer(checkpoint.EMBEDDED, checkpoint.read_config(checkpoint.EMBEDDED))


@pytest.mark.parametrize("text", [
    'He said, "Emma--well-bred Emma--was\nnot at home."',
    "été 漢字漢字漢字 😀😀 naïve",
    "x",
])  # fmt: skip
def test_pieces_are_the_text(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(found)


def test_a_character_of_several_tokens_is_the_last_ones(tokenizer):
    ids = tokenizer.encode("a 漢漢漢漢漢漢 b", add_special_tokens=False)
    counts = Counter(pieces(tokenizer, ids))
    assert counts["漢"] == 6 and counts[""] == 12  # three bytes each
    start = [piece for piece in pieces(tokenizer, ids) if piece == "漢"]
    assert token_classes(["", "", *start[:1]]) == ["other", "other", "lower-case word"]


def test_bytes_that_never_become_a_character_do_not_hide_what_follows(tokenizer):
    broken = tokenizer.convert_tokens_to_ids(["<0xE6>"])
    ids = [*broken * 9, *tokenizer.encode("home again", add_special_tokens=False)]
    found = pieces(tokenizer, ids)
    assert "".join(found).endswith("home again") and found[:9] == [""] * 9 and found[-1] == " again"


def test_special_tokens_are_no_text(tokenizer):
    ids = [
        *tokenizer.encode("at home", add_special_tokens=False),
        2,
        *tokenizer.encode("She", add_special_tokens=False),
    ]
    found = pieces(tokenizer, ids)
    assert found[-2] == "" and token_classes(found)[-2] == "other" and "</s>" not in "".join(found)
