"""The tree of patterns: the losses of plain passes, from as few evaluations as the tree has edges."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.cpu import llama
from duo_mlx.routes import Route
from duo_mlx.study import tree
from duo_mlx.study.oracle import Space

LAYERS, TOKENS = 4, 9
IDS = np.random.default_rng(0).integers(0, 32, TOKENS + 1)
BASES = {  # by the form of their blocks
    "llama": {},  # a norm before each branch
    "gemma2": {"base_model_type": "gemma2", "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 64},  # 4 norms
    "phi": {  # attention beside the FFN
        "base_model_type": "phi",
        "num_key_value_heads": 4,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
    },
}
CHOICES = {"sB": (Route.SMALL, Route.BIG), "-B": (Route.SKIP, Route.BIG), "-sB": tuple(Route)}


def by_passes(model, patterns):
    """Losses ``[n, tokens]`` by NumPy from a whole pass of the model for each pattern."""
    found = []
    for pattern in patterns:
        logits = np.array(model(mx.array(IDS[None, :-1]), routes=pattern, strategy="dense"))[0].astype(np.float64)
        found.append(np.log(np.exp(logits).sum(-1)) - logits[np.arange(TOKENS), IDS[1:]])
    return np.array(found)


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("scope", ["ffn", "layer"])
def test_losses_are_those_of_plain_passes(tiny_model, choices, scope, rows):
    model = tiny_model(skip_scope=scope)
    options = tree.layer_options(model, CHOICES[choices])
    walk = tree.Text(model, IDS[:-1], IDS[1:], options, rows)
    patterns, losses = (np.concatenate(each) for each in zip(*walk.losses(), strict=True))
    space = Space(model, options)
    np.testing.assert_array_equal(patterns[np.argsort(space.numbers(patterns))], space.patterns)
    np.testing.assert_allclose(losses, by_passes(model, patterns), rtol=0, atol=1e-5)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("base", BASES)
def test_bases_of_other_forms_have_the_losses_of_plain_passes(tiny_model, base, choices):
    model = tiny_model(**BASES[base])
    walk = tree.Text(model, IDS[:-1], IDS[1:], tree.layer_options(model, CHOICES[choices]), 5)
    patterns, losses = (np.concatenate(each) for each in zip(*walk.losses(), strict=True))
    assert len(patterns) == len(CHOICES[choices]) ** LAYERS
    np.testing.assert_allclose(losses, by_passes(model, patterns), rtol=0, atol=2e-5)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("base", BASES)
def test_what_patterns_share_is_computed_once(tiny_model, base, choices):
    model, count = tiny_model(**BASES[base]), len(CHOICES[choices])
    walk = tree.Text(model, IDS[:-1], IDS[1:], tree.layer_options(model, CHOICES[choices]))
    for _ in walk.losses():
        pass
    nodes = [count**depth for depth in range(LAYERS)]
    edges = sum(nodes) * (count - (choices[0] == "-"))  # a skip evaluates nothing
    assert (walk.work.attention, walk.work.ffn, walk.work.head) == (sum(nodes), edges, count**LAYERS)


def test_only_beginnings_that_are_wanted_go_on(tiny_model):
    model = tiny_model()
    options = tree.layer_options(model, CHOICES["-sB"])

    def wanted(patterns):
        return (patterns == Route.BIG).sum(axis=1) <= 1

    walk = tree.Text(model, IDS[:-1], IDS[1:], options, 7, wanted)
    patterns, losses = (np.concatenate(each) for each in zip(*walk.losses(), strict=True))
    every = Space(model, options).patterns
    assert {pattern.tobytes() for pattern in patterns} == {pattern.tobytes() for pattern in every[wanted(every)]}
    np.testing.assert_allclose(losses, by_passes(model, patterns), rtol=0, atol=1e-5)
    assert walk.work.head == len(patterns) == 2**4 + 4 * 2**3


def test_a_layer_without_a_small_ffn_has_no_small_beside_big(tiny_model):
    model = tiny_model(small_layers=[1, 3])
    options = tree.layer_options(model, (Route.BIG, Route.SMALL))
    assert options == [(Route.BIG,), (Route.SMALL, Route.BIG)] * 2
    assert len(Space(model, options).patterns) == 4
    assert tree.layer_options(model, (Route.SMALL,)) == [(Route.SMALL,)] * LAYERS


def test_a_sliding_window_is_kept(tiny_model):
    model = tiny_model(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=3)
    walk = tree.Text(model, IDS[:-1], IDS[1:], tree.layer_options(model, CHOICES["sB"]))
    patterns, losses = (np.concatenate(each) for each in zip(*walk.losses(), strict=True))
    np.testing.assert_allclose(losses, by_passes(model, patterns), rtol=0, atol=1e-5)


def test_gated_is_swiglu_at_any_size():
    gate = mx.array([-1e4, -200.0, -90.0, -12.0, -1.0, -0.0, 0.0, 0.5, 3.0, 60.0, 200.0, 1e4])
    exact = np.array(gate, np.float64)
    expected = exact * 0.7 / (1 + np.exp(np.minimum(-exact, 700)))
    np.testing.assert_allclose(np.array(llama.gated(gate, mx.full(gate.shape, 0.7))), expected, 3e-6, 1e-6)
