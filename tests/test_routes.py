"""Routes and patterns: the text form, its errors, shapes, histograms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx.errors import DuoError
from duo_mlx.routes import LETTERS, Route, check_routes, format_pattern, histogram, parse_pattern

patterns = st.lists(st.sampled_from([int(route) for route in Route]), min_size=1, max_size=40)


@given(patterns)
def test_text_and_back(pattern):
    text = format_pattern(pattern)
    assert len(text) == len(pattern)
    parsed = parse_pattern(text, len(pattern))
    assert parsed.dtype == np.uint8 and parsed.tolist() == pattern


@given(st.text(LETTERS, min_size=1, max_size=40))
def test_pattern_and_back(text):
    assert format_pattern(parse_pattern(text, len(text))) == text


def test_letters_are_the_documented_ones():
    assert parse_pattern("B-s", 3).tolist() == [Route.BIG, Route.SKIP, Route.SMALL] == [2, 0, 1]


@pytest.mark.parametrize(("word", "route"), [("big", 2), ("small", 1), ("skip", 0)])
def test_words_fill_every_layer(word, route):
    assert parse_pattern(word, 5).tolist() == [route] * 5


@given(st.data(), st.integers(1, 40))
def test_big_at_layers(data, layers):
    chosen = data.draw(st.lists(st.integers(0, layers - 1), min_size=1))
    pattern = parse_pattern("big@" + ",".join(map(str, chosen)), layers)
    assert {layer for layer in range(layers) if pattern[layer] == Route.BIG} == set(chosen)
    assert set(pattern.tolist()) <= {Route.SMALL, Route.BIG}


@given(patterns, st.integers(1, 40))
def test_a_wrong_length_names_both_lengths(pattern, layers):
    text = format_pattern(pattern)
    if len(text) == layers:
        assert parse_pattern(text, layers).tolist() == pattern
        return
    with pytest.raises(DuoError, match=f"has {len(text)} characters, but the model has {layers} layers"):
        parse_pattern(text, layers)


@given(st.text(max_size=12), st.integers(1, 12))
def test_any_other_text_is_refused_in_one_line_that_names_the_layers(text, layers):
    try:
        assert len(parse_pattern(text, layers)) == layers
    except DuoError as error:
        assert "\n" not in str(error)
        assert f"{layers} layers" in str(error) or text.startswith("big@")


@pytest.mark.parametrize("text", ["", "BBx", "bBB", "BB ", "BIG", "b", "router", "0,1,2"])
def test_unknown_characters(text):
    with pytest.raises(DuoError, match=r"each of the 3 layers"):
        parse_pattern(text, 3)


@pytest.mark.parametrize("text", ["big@", "big@,", "big@1,", "big@x", "big@-1", "big@1.0", "big@ 1", "big@\u0661"])
def test_big_at_no_layers(text):
    with pytest.raises(DuoError, match="come layer numbers with commas between"):
        parse_pattern(text, 3)


def test_big_at_a_layer_that_does_not_exist():
    with pytest.raises(DuoError, match="names layer 12, but the 12 layers are 0 to 11"):
        parse_pattern("big@0,12", 12)


@given(st.lists(patterns.filter(lambda pattern: len(pattern) >= 3).map(lambda pattern: pattern[:3]), max_size=20))
def test_histogram_counts_every_route_once(rows):
    routes = np.array(rows, np.uint8).reshape(-1, 3)
    flat = routes.ravel().tolist()
    assert histogram(routes) == {"big": flat.count(2), "small": flat.count(1), "skip": flat.count(0)}
    assert histogram(routes[None]) == histogram(routes)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int8])
def test_check_accepts_both_shapes_and_any_integers(shape, dtype):
    routes = np.resize(np.array([0, 1, 2], dtype), shape)
    checked = check_routes(routes, 2, 3, 4)
    assert checked.dtype == np.uint8 and checked.tolist() == routes.tolist()


@pytest.mark.parametrize("shape", [(), (3,), (5,), (3, 4), (2, 3), (1, 3, 4), (2, 4, 4), (2, 3, 3), (1, 2, 3, 4)])
def test_check_names_the_shapes_that_fit(shape):
    with pytest.raises(DuoError, match=r"must be \[4\] .* or \[2, 3, 4\]"):
        check_routes(np.zeros(shape, np.uint8), 2, 3, 4)


@pytest.mark.parametrize("routes", [[0, 1, 3], [0, -1, 2], [0.0, 1.0, 2.0], [True, False, True]])
def test_check_refuses_other_values(routes):
    with pytest.raises(DuoError, match=r"0 \(skip\), 1 \(small\) or 2 \(big\)"):
        check_routes(routes, 1, 1, 3)
