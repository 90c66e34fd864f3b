"""Budgets: the best known pattern within a number of big layers or a share of bytes, and what is no budget."""

import itertools

import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import checkpoint
from duo_mlx.budget import best_pattern, shares_of_bytes
from duo_mlx.errors import DuoError
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import format_pattern, parse_pattern

KNOWN = {"BBBB": 3.0, "BBsB": 2.9, "BssB": 3.2, "sssB": 3.9, "-ssB": 3.8, "s-s-": 5.5}


@pytest.fixture(scope="module")
def measured(tiny_config):
    """``measured(known, **changes)``: a model whose config.json has the losses of the patterns ``known``."""

    def make(known=KNOWN, **changes):
        patterns = [{"pattern": pattern, "loss": loss} for pattern, loss in known.items()]
        return Model(ModelArgs.from_dict(tiny_config(best_patterns=patterns, **changes)))

    return make


def chosen(model, spec):
    return format_pattern(best_pattern(model, spec))


def share_by_names(model, pattern):
    """The share of all-big's bytes that a pattern reads, from the names of the arrays that the model holds."""
    sizes = {name: value.nbytes for name, value in checkpoint.parameters(model).items()}
    embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)

    def read(letters):
        # the head is read whole, and of the embedding a row
        head = 0 if model.args.tie_word_embeddings else -embedding
        total = sum(sizes.values()) + head + embedding // model.config.vocab_size
        for layer, letter in enumerate(letters):
            prefix = f"model.layers.{layer}."
            left_out = {"B": ["mlp.small."], "s": ["mlp.big."], "-": ["mlp.", "post_attention_layernorm."]}[letter]
            for start in left_out:
                total -= sum(size for name, size in sizes.items() if name.startswith(prefix + start))
        return total

    return read(pattern) / read("B" * len(pattern))


# --- what is chosen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("budget:12", "BBsB"),  # better than all big, which would be within
        ("budget:4", "BBsB"),
        ("budget:3", "BBsB"),
        ("budget:2", "BssB"),
        ("budget:1", "-ssB"),
        ("budget:0", "s-s-"),
        ("budget:1.0", "BBsB"),
        ("budget:1e0", "BBsB"),
        ("budget:" + "9" * 5000, "BBsB"),
    ],
)
def test_the_lowest_loss_within_the_budget(measured, spec, pattern):
    assert chosen(measured(), spec) == pattern


def test_one_is_a_layer_and_one_point_nought_is_all_bytes(measured):
    model = measured({"BBBB": 3.0, "sssB": 3.9})
    assert (chosen(model, "budget:1"), chosen(model, "budget:1.0")) == ("sssB", "BBBB")


@pytest.mark.parametrize("tied", [True, False])
def test_shares_are_those_of_the_arrays(measured, tied):
    model = measured(tie_word_embeddings=tied)
    every = ["".join(letters) for letters in itertools.product("Bs-", repeat=4)]
    found = shares_of_bytes(model, np.stack([parse_pattern(pattern, 4) for pattern in every]))
    assert found == pytest.approx([share_by_names(model, pattern) for pattern in every], rel=1e-12)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 64}


@pytest.mark.parametrize("quantised", ["the FFNs", "all but the FFNs"])
def test_the_choice_follows_the_weights_as_stored(measured, quantised):
    known = {"BBBB": 1.0, "BBss": 2.0, "s---": 3.0}
    plain, model = measured(known, **WIDE), measured(known, **WIDE)
    nn.quantize(
        model,
        group_size=32,
        bits=4,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized") and (".mlp." in path) == (quantised == "the FFNs")
        ),
    )
    before, after = (share_by_names(each, "BBss") for each in (plain, model))
    assert abs(before - after) > 0.05
    spec = f"budget:{(before + after) / 2:.4f}"
    within, beyond = (plain, model) if before < after else (model, plain)
    assert (chosen(within, spec), chosen(beyond, spec)) == ("BBss", "s---")


def test_small_counts_as_big_where_there_is_no_small(measured):
    model = measured({"BBBB": 1.0, "sBss": 2.0, "s--s": 3.0}, small_layers=[0, 1])
    assert chosen(model, "budget:3") == "sBBB"
    assert chosen(model, "budget:2") == "s--B"
    with pytest.raises(DuoError, match="has 1 big layer$"):
        best_pattern(model, "budget:0")


@given(
    known=st.dictionaries(st.text("Bs-", min_size=4, max_size=4), st.integers(0, 6), min_size=1, max_size=12),
    budget=st.one_of(st.integers(0, 5), st.floats(0.01, 1)),
)
def test_nothing_better_is_known_within_the_budget(measured, known, budget):
    model = measured(known)
    if isinstance(budget, int):
        within = {pattern for pattern in known if pattern.count("B") <= budget}
    else:
        within = {pattern for pattern in known if share_by_names(model, pattern) <= budget}
    if within:
        best = chosen(model, f"budget:{budget}")
        assert best in within and known[best] == min(known[pattern] for pattern in within)
    else:
        with pytest.raises(DuoError, match=r"^route 'budget:\S+': the cheapest known pattern of this model has "):
            best_pattern(model, f"budget:{budget}")


# --- what is no budget -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "0.0", "-0.5", "nan", "inf", "1e3", "2,3", "\u0663", "0.5 B"])
def test_no_number_says_what_one_is(measured, text):
    with pytest.raises(DuoError, match=r"budget: comes a number of big layers such as 12, or a share of bytes such as"):
        best_pattern(measured(), f"budget:{text}")


@given(st.text(st.sampled_from("0123456789.-+einfax_ \n\u0663"), max_size=6))
def test_any_text_is_a_known_pattern_or_one_line(measured, text):
    try:
        assert chosen(measured(), f"budget:{text}") in KNOWN
    except DuoError as error:
        assert "\n" not in str(error) and repr(f"budget:{text}") in str(error)


def test_a_model_without_measured_patterns_says_how_to_measure(measured):
    with pytest.raises(DuoError, match="no best_patterns; measure them with duo-mlx convert MODEL DST --calibrate"):
        best_pattern(measured({}), "budget:2")


@pytest.mark.parametrize(
    ("spec", "known", "least"), [("budget:0", "BsBs", "2 big layers"), ("budget:0", "sBss", "1 big layer")]
)
def test_too_few_layers_are_told_the_fewest(measured, spec, known, least):
    with pytest.raises(DuoError, match=f"^route '{spec}': the cheapest known pattern of this model has {least}$"):
        best_pattern(measured({"BBBB": 1.0, known: 2.0}), spec)


@pytest.mark.parametrize("known", ["BBBB", "BsBs", "BBss", "B---", "-sB-", "sssB"])
def test_the_share_in_the_message_is_one_that_works(measured, known):
    model = measured({"BBBB": 1.0, known: 2.0} if known != "BBBB" else {"BBBB": 1.0})
    with pytest.raises(DuoError, match="of the bytes$") as caught:
        best_pattern(model, "budget:0.05")
    share = str(caught.value).split()[-4]
    assert chosen(model, f"budget:{share}") == known
    assert float(share) == pytest.approx(share_by_names(model, known), abs=0.01)
