"""Policies: routes depend on row, position and seed alone; files replay as written; errors name what is wrong."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duo_mlx.errors import DuoError
from duo_mlx.policies import FixedPolicy, RandomPolicy, ReplayPolicy, parse_route
from duo_mlx.routes import Route, format_pattern

LAYERS = 6
shares = st.sampled_from([(0.5, 0.5, 0.0), (0.3, 0.3, 0.4), (0.0, 0.5, 0.5), (1.0, 0.0, 0.0), (0.25, 0.0, 0.75)])


def test_a_pattern_is_one_for_all_tokens():
    policy = parse_route("BBss--", LAYERS)
    assert isinstance(policy, FixedPolicy) and policy.length is None
    assert policy.routes(0, 9, batch=3).tolist() == policy.routes(100, 101).tolist() == [2, 2, 1, 1, 0, 0]


@given(
    shares,
    st.integers(0, 2**63),
    st.integers(1, 13),
    st.integers(1, 3),
    st.lists(st.integers(0, 30), max_size=5).map(sorted),
)
def test_random_routes_do_not_depend_on_the_chunks(probabilities, seed, layers, batch, cuts):
    policy = RandomPolicy(layers, *probabilities, seed=seed)
    edges = [0, *cuts, 30]
    chunks = [policy.routes(start, stop, batch) for start, stop in itertools.pairwise(edges)]
    whole = policy.routes(0, 30, batch)
    assert whole.shape == (batch, 30, layers) and whole.dtype == np.uint8
    assert np.concatenate(chunks, axis=1).tolist() == whole.tolist()
    assert RandomPolicy(layers, *probabilities, seed=seed).routes(0, 30, 1).tolist() == whole[:1].tolist()


def test_random_rows_seeds_positions_and_layers_differ():
    routes = parse_route("random", LAYERS, seed=1).routes(0, 64, batch=2)
    other = parse_route("random", LAYERS, seed=2).routes(0, 64, batch=2)
    for a, b in [
        (routes[0], routes[1]),
        (routes, other),
        (routes[0, :32], routes[0, 32:]),
        (routes[..., 0], routes[..., 1]),
    ]:
        assert 0.3 < (a != b).mean() < 0.7  # independent fair coins differ half the time


@given(shares, st.integers(0, 1000))
@settings(max_examples=25)
def test_random_routes_keep_their_probabilities(probabilities, seed):
    routes = RandomPolicy(LAYERS, *probabilities, seed=seed).routes(0, 4000)
    for route, share in zip((Route.BIG, Route.SMALL, Route.SKIP), probabilities, strict=True):
        found = (routes == route).mean()
        assert abs(found - share) < 0.02  # over six standard deviations of 24,000 draws
        assert found == 0 if share == 0 else found > 0


@pytest.mark.parametrize(("spec", "expected"), [("random", (0.5, 0.5, 0.0)), ("random:.2,0.3,5e-1", (0.2, 0.3, 0.5))])
def test_random_specs(spec, expected):
    policy = parse_route(spec, LAYERS, seed=7)
    assert isinstance(policy, RandomPolicy) and policy.length is None
    assert (policy.big, policy.small, policy.skip, policy.seed) == (*expected, 7)


@pytest.mark.parametrize("spec", ["random:", "random:0.5", "random:.5,.5", "random:a,b,c", "random:.2,.2,.2,.4"])
def test_random_needs_three_numbers(spec):
    with pytest.raises(DuoError, match="random:BIG,SMALL,SKIP"):
        parse_route(spec, LAYERS)


@pytest.mark.parametrize(
    "spec", ["random:.5,.5,.5", "random:-1,1,1", "random:nan,1,0", "random:inf,0,0", "random:0,0,0"]
)
def test_random_probabilities_must_sum_to_one(spec):
    with pytest.raises(DuoError, match="must sum to 1"):
        parse_route(spec, LAYERS)


# --- replay ------------------------------------------------------------------------------------------------------

recordings = st.integers(1, 3).flatmap(
    lambda count: st.lists(
        st.lists(st.lists(st.integers(0, 2), min_size=LAYERS, max_size=LAYERS), min_size=4, max_size=4),
        min_size=count,
        max_size=count,
    )
)


@given(recordings, st.integers(0, 4), st.integers(0, 4), st.integers(1, 3))
def test_npz_replays_each_sequence(tmp_path_factory, recorded, start, stop, batch):
    start, stop = sorted((start, stop))
    file = tmp_path_factory.mktemp("replay") / "tokens.npz"
    np.savez(file, oracle_routes=np.array(recorded, np.uint8))
    for sequence, rows in enumerate(recorded):
        policy = parse_route(f"{file}:{sequence}", LAYERS)
        assert policy.length == 4
        assert policy.routes(start, stop, batch).tolist() == [rows[start:stop]] * batch
    assert parse_route(str(file), LAYERS).routes(0, 4).tolist() == [recorded[0]]


@given(st.lists(st.lists(st.integers(0, 2), min_size=LAYERS, max_size=LAYERS), min_size=1, max_size=9))
def test_text_replays_line_by_line(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("replay") / "routes.txt"
    file.write_text("".join(format_pattern(row) + "\n" for row in rows))
    policy = parse_route(str(file), LAYERS)
    assert isinstance(policy, ReplayPolicy)
    assert policy.routes(0, len(rows)).tolist() == [rows]


def test_replay_ends_where_the_recording_ends(tmp_path):
    file = tmp_path / "routes.txt"
    file.write_text("BBssBB\nssssss\n")
    policy = parse_route(str(file), LAYERS)
    with pytest.raises(DuoError, match=r"routes\.txt: holds routes for 2 positions, position 2 has none"):
        policy.routes(1, 3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 5), np.uint8), "with the model's 6 layers"),
        (np.zeros((4, 6), np.uint8), "with the model's 6 layers"),
        (np.full((2, 4, 6), 3, np.uint8), r"0 \(skip\), 1 \(small\) or 2 \(big\)"),
        (np.zeros((2, 4, 6)), "must be integers"),
        (np.full((1, 1, 6), None), "cannot be read"),
    ],
)
def test_npz_with_an_array_of_another_kind(tmp_path, array, message):
    file = tmp_path / "tokens.npz"
    np.savez(file, oracle_routes=array)
    with pytest.raises(DuoError, match=rf"tokens\.npz: .*{message}"):
        parse_route(str(file), LAYERS)


def test_npz_without_routes_and_without_that_sequence(tmp_path):
    file = tmp_path / "tokens.npz"
    np.savez(file, losses=np.zeros(3))
    with pytest.raises(DuoError, match="holds no array named oracle_routes"):
        parse_route(str(file), LAYERS)
    np.savez(file, oracle_routes=np.zeros((2, 4, 6), np.uint8))
    with pytest.raises(DuoError, match="has 2 sequences, so there is no sequence 2"):
        parse_route(f"{file}:2", LAYERS)


@given(st.data())
@settings(max_examples=60)
def test_a_damaged_npz_is_a_clear_error(tmp_path_factory, data):
    file: Path = tmp_path_factory.mktemp("replay") / "tokens.npz"
    np.savez(file, oracle_routes=np.ones((2, 4, 6), np.uint8))
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(2, len(content) - 1))]
    else:
        for place in data.draw(st.lists(st.integers(2, len(content) - 1), min_size=1, max_size=4)):
            content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile and numpy warn about some kinds of damage before they raise
        try:
            routes = parse_route(str(file), LAYERS).routes(0, 1)
        except DuoError as error:
            assert "tokens.npz" in str(error)
        else:  # the damage hit a byte that carries nothing: a date, an attribute
            assert routes.tolist() == [[[1] * LAYERS]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "one pattern of 6 characters a line"),
        (b"\n \n", "one pattern of 6 characters a line"),
        (b"BBssBB\nBBs\n", "has 3 characters, but the model has 6 layers"),
        (b"BBssBB\nBBsxBB\n", "each of the 6 layers"),
        (b"\xff\xfe\x00", "neither an npz file nor text"),
    ],
)
def test_text_that_holds_no_patterns(tmp_path, content, message):
    file = tmp_path / "routes.txt"
    file.write_bytes(content)
    with pytest.raises(DuoError, match=rf"routes\.txt: .*{message}"):
        parse_route(str(file), LAYERS)


@pytest.mark.parametrize("spec", ["none.npz", "none.txt", "runs/oracle", "none.npz:3", "."])
def test_a_file_that_is_not_there(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DuoError, match=r"no such file|each of the 6 layers"):
        parse_route(spec, LAYERS)
