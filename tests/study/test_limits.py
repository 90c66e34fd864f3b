"""What a token may spend: each limit allows what its words say, and a wrong one is refused in one line."""

from itertools import product

import numpy as np
import pytest

from duo_mlx import cost
from duo_mlx.errors import DuoError
from duo_mlx.flops import flops
from duo_mlx.routes import Route
from duo_mlx.study.limits import parse_limit

LAYERS, TOKENS, CONTEXT = 4, 5, 16


def every(layers):
    """All patterns of big, small and skip."""
    return np.array(list(product(Route, repeat=layers)), np.uint8)


PATTERNS = every(LAYERS)
BIGS = (PATTERNS == Route.BIG).sum(axis=1)


@pytest.mark.parametrize(
    ("spec", "allowed"),
    [
        ("none", BIGS >= 0),
        ("0", BIGS == 0),
        ("3", BIGS == 3),
        ("at-most:1", BIGS <= 1),
        ("at-most:4", BIGS <= 4),
    ],
)
def test_numbers_of_big_layers(tiny_model, spec, allowed):
    limit = parse_limit(spec, tiny_model(), CONTEXT)
    np.testing.assert_array_equal(limit.allows(PATTERNS, TOKENS), allowed[:, None])
    for token in (0, TOKENS - 1):
        np.testing.assert_array_equal(limit.at(PATTERNS, token, TOKENS), allowed)


@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_shares_of_bytes_and_flops(tiny_model, share):
    model = tiny_model()
    for kind, table in (("bytes", cost.weight_bytes(model)), ("flops", flops(model)(CONTEXT))):
        prices = table.of(PATTERNS)
        found = parse_limit(f"{kind}:{share}", model, CONTEXT).allows(PATTERNS, TOKENS)[:, 0]
        np.testing.assert_array_equal(found, prices <= share * prices.max())
        assert found.any() and (found.all() == (share == 1.0))


def test_a_schedule_goes_from_token_to_token(tiny_model):
    falling = parse_limit("4..2", tiny_model(), CONTEXT)
    found = falling.allows(PATTERNS, TOKENS)
    assert [set(BIGS[found[:, token]].tolist()) for token in range(TOKENS)] == [{4}, {4}, {3}, {2}, {2}]
    for token in range(TOKENS):
        np.testing.assert_array_equal(falling.at(PATTERNS, token, TOKENS), found[:, token])
    assert parse_limit("2..4", tiny_model(), CONTEXT).at(PATTERNS, 0, 1).sum() == (BIGS == 2).sum()


@pytest.mark.parametrize("spec", ["none", "2", "at-most:1", "3..1", "bytes:0.7"])
def test_no_beginning_of_an_allowed_pattern_is_lost_and_few_others_go_on(tiny_model, spec):
    limit = parse_limit(spec, tiny_model(), CONTEXT)
    for token in range(TOKENS):
        allowed = PATTERNS[limit.at(PATTERNS, token, TOKENS)]
        for depth in range(1, LAYERS + 1):
            beginnings = every(depth)
            needed = {pattern[:depth].tobytes() for pattern in allowed}
            kept = {each.tobytes() for each in beginnings[limit.reaches(beginnings, LAYERS, token, TOKENS)]}
            assert kept >= needed
            assert kept == needed or (spec.startswith("bytes") and depth < LAYERS)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("5", "the model has 4 layers, so no token can have 5 big ones"),
        ("at-most:9", "no token can have 9"),
        ("6..2", "no token can have 6"),
        ("bytes:0", "a share lies between 0 and 1, such as bytes:0.6"),
        ("flops:1.5", "such as flops:0.6"),
        ("bytes:1.2.3", "such as bytes:0.6"),
        ("half", "give none, a number of big layers"),
        ("-1", "give none"),
        ("", "give none"),
        ("9" * 5000, "give none"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tiny_model, spec, line):
    with pytest.raises(DuoError) as caught:
        parse_limit(spec, tiny_model(), CONTEXT)
    assert line in str(caught.value) and "\n" not in str(caught.value)
