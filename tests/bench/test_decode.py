"""The benchmarks of decoding: both sides compute the same, ratios and parts are what they say. Nothing is timed."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten

from duo_mlx import dispatches
from duo_mlx.bench import decode, parts, peer
from duo_mlx.bench.interleave import Timings
from duo_mlx.errors import DuoError
from duo_mlx.policies import ReplayPolicy
from duo_mlx.router import LinearRouter
from duo_mlx.routes import FEW

LAYERS = 4
ROUTED = {"router_choices": "-sB"}  # its routers' weights are random, too


CASES = {
    "plain": {},
    "biases, untied": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "quantised": {"hidden_size": 64, "intermediate_size": 96, "small_intermediate_size": 32},
}


@pytest.mark.parametrize("case", CASES)
def test_the_twin_is_stock_has_the_very_weights_and_gives_the_same_logits(tiny_model, case):
    model = tiny_model(**ROUTED, seed=len(case), **CASES[case])  # a seed of its own: quantising changes the model
    if case == "quantised":
        nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith(("gate_proj", "o_proj")))
    twin = peer.base_twin(model)
    assert all(type(module).__module__.startswith(("mlx.", "mlx_lm.")) for module in twin.modules())
    ours = {id(value) for _, value in tree_flatten(model.parameters())}
    assert all(id(value) in ours for _, value in tree_flatten(twin.parameters()))
    assert isinstance(twin.layers[0].mlp.gate_proj, nn.QuantizedLinear) == (case == "quantised")
    tokens = mx.arange(FEW + 1)[None]  # fewer take another way, in which numbers are rounded otherwise
    assert mx.array_equal(model(tokens, routes=[2] * LAYERS), twin(tokens)).item()


def test_decoders_start_from_the_same_cache_every_time_and_agree(tiny_model):
    model = tiny_model()
    cases = peer.decoders(model, peer.base_twin(model), context=5)
    first = {name: case(6) for name, case in cases.items()}
    assert {name: case(6) for name, case in cases.items()} == first
    assert first["mlx-lm"] == first["all-big"] and len(first["all-big"]) == 6
    assert cases["all-big"].cache[0].offset == 5 + 6 + 1
    cases["all-big"].rewind()
    assert [layer.offset for layer in cases["all-big"].cache] == [5] * LAYERS


def test_counting_primitives_leaves_a_decoder_as_it_was(tiny_model):
    model = tiny_model()
    cases = peer.decoders(model, None, context=5)
    expected = {name: case(4) for name, case in cases.items()}
    counts = {name: case.primitives() for name, case in cases.items()}
    assert counts["all-big"] == counts["all-small"] > counts["all-skip"] > 0
    assert {name: case(4) for name, case in cases.items()} == expected


def test_the_recorded_routes_are_the_routers_and_replaying_them_decodes_the_same_tokens(tiny_model):
    model = tiny_model(**ROUTED)
    taken = decode.routes_taken(model, context=5, tokens=6, strategy="sync")
    assert taken.shape == (5 + 6 + 1, LAYERS) and (taken[:5] == 2).all()
    by_router = peer.routed(model, model.router(), 5, "sync")(6)
    assert peer.routed(model, ReplayPolicy(taken), 5)(6) == by_router
    # a router that always says small is recorded as such
    model_router, always = model.router, LinearRouter(model.router().weights, (0, 1, 2), mx.array([0.0, 1e9, 0.0]))
    model.router = lambda: always
    try:
        assert (decode.routes_taken(model, 5, 3, "sync")[5:] == 1).all()
    finally:
        model.router = model_router


def test_a_sliding_model_and_too_long_a_context_are_refused(tiny_model):
    sliding = tiny_model(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=8)
    with pytest.raises(DuoError, match="attention slides"):
        peer.filled_cache(sliding, 5, 0)
    limited = tiny_model(max_position_embeddings=40)
    peer.check_context(limited, 40)
    with pytest.raises(DuoError, match="come to 41 positions; the model has 40"):
        peer.check_context(limited, 41)


def test_the_bytes_of_a_step(tiny_model):
    model = tiny_model(**ROUTED)
    big, small = (peer.step_bytes(model, np.full(LAYERS, route), 7) for route in (2, 1))
    assert big - small == LAYERS * 3 * 16 * (24 - 8) * 4
    by_router = peer.step_bytes(model, np.array([[2] * LAYERS, [1] * LAYERS]), 7, by_router=True)
    assert by_router == (big + small) / 2 + LAYERS * 3 * 16 * 4
    assert peer.step_bytes(model, np.full(LAYERS, 0), 9) - peer.step_bytes(model, np.full(LAYERS, 0), 7) == (
        LAYERS * 2 * 2 * (2 * 4) * 4
    )


def test_the_median_lies_in_its_interval_and_equal_ratios_have_none():
    assert peer.spread([1.5] * 7)["interval_95"] == [1.5, 1.5]
    found = peer.spread([1.0, 1.1, 1.2, 5.0])
    assert found["median"] == pytest.approx(1.15) and found["interval_95"] == [1.0, 5.0]


def test_ratios_and_shares_of_the_byte_ratio():
    seconds = {"mlx-lm": 12.0, "all-big": 10.0, "all-small": 5.0, "all-skip": 4.0, "mlx-lm again": 12.0}
    runs = {name: [value, value] for name, value in (seconds | {"router": 6.0, "plan": 5.0}).items()}
    touched = {"all-big": 400.0, "all-small": 160.0, "all-skip": 100.0}
    result = decode.summary(Timings(runs), 4, touched, {"all-big": 9})
    medians = {name: of["median"] for name, of in result.items() if "interval_95" in of}
    assert medians == pytest.approx(
        {
            "noise: mlx-lm / itself": 1,
            "mlx-lm / all-big": 1.2,
            "all-big / all-small": 2,
            "share of the byte ratio, all-small": 2 / 2.5,
            "all-big / all-skip": 2.5,
            "share of the byte ratio, all-skip": 2.5 / 4,
            "router / its routes as a plan": 1.2,
        }
    )
    assert result["median_s"]["all-big"] == 2.5
    text = decode.table(result)
    assert "share of the byte ratio, all-skip: 0.625 (0.625 to 0.625), goal: >= 0.85" in text
    assert "router / its routes as a plan: 1.200 (1.200 to 1.200), goal: <= 1.03" in text


def run(command, *options):
    done = CliRunner().invoke(command, [str(option) for option in options])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_record_of_decoding(saved, tmp_path):
    directory, model = saved(**ROUTED)
    out = tmp_path / "out.json"
    options = ["--model", directory, "--rounds", 2, "--tokens", 3, "--context", 5, "--prefill", 6]
    printed = run(decode.command, *options, "--out", out)
    record = json.loads(out.read_text())
    cases = ["mlx-lm", "all-big", "all-small", "all-skip", "mlx-lm again", "router", "plan"]
    assert list(record["runs_s"]) == [*cases, "prefill mlx-lm", "prefill all-big"]
    assert all(len(runs) == 4 for runs in record["runs_s"].values())
    summary = record["summary"]
    assert summary["primitives"]["mlx-lm"] > summary["primitives"]["all-big"]
    assert summary["bytes"]["mlx-lm"] == summary["bytes"]["all-big"] == peer.step_bytes(model, np.full(LAYERS, 2), 7)
    assert sum(record["routes_of_router"].values()) == (3 + 1) * LAYERS
    assert "prefill mlx-lm / all-big:" in printed and "router / its routes as a plan:" in printed
    table = run(decode.command, *options, "--out", tmp_path / "out.csv")
    assert "mlx-lm again" in table and (tmp_path / "out.csv").read_text().startswith("pass,run,seconds\nmlx-lm,0,")


def test_without_a_peer_or_a_router_their_cases_are_left_out(saved, tmp_path):
    directory, _ = saved()
    out = tmp_path / "out.json"
    run(decode.command, "--model", directory, "--against", "none", "--rounds", 1, "--tokens", 2, "--out", out)
    record = json.loads(out.read_text())
    assert list(record["runs_s"]) == ["all-big", "all-small", "all-skip"] and record["routes_of_router"] is None


# --- parts -------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(tiny_model):
    """The calls of the parts' benchmark on a tiny model, its parts, its decoders and the parts' cache."""
    model = tiny_model(**ROUTED)
    cases = peer.decoders(model, peer.base_twin(model), context=5)
    cache = cases["all-big"].cache
    built = parts.parts(model, cache)
    return parts.calls(built, cache, 5, cases, 3), built, cases, cache


def test_building_a_part_or_a_step_leaves_its_cache_alone(timed):
    calls, built, cases, _ = timed
    expected = {name: case(4) for name, case in cases.items()}
    for name in [*built, *cases]:
        calls[f"{name}: graph"]()
        for case in cases.values():
            assert not any(peer.primitives(array) for layer in case.cache for array in (layer.keys, layer.values))
    for name in [*built, *cases]:
        calls[f"{name}: all"]()
    assert {name: case(4) for name, case in cases.items()} == expected


def test_the_parts_hold_what_a_step_computes(timed):
    _, built, cases, cache = timed
    counts = {}
    for name, build in built.items():
        output = build()
        counts[name] = dispatches.kernels([output])
        mx.eval(output)
        cases["all-big"].rewind()
    assert counts["big"] == counts["small"] and counts["router, read by the host"] < counts["router"]
    of_parts = sum(counts[part] for part in ("embedding", "attention", "big", "head"))
    case, last_norm = cases["all-big"], 3
    case.rewind()
    assert of_parts + last_norm == pytest.approx(
        dispatches.kernels([case.bind()(mx.array([[1]]), cache=case.cache)]), abs=8
    )
    assert all(layer.offset == 6 for layer in cache)


def test_the_rest_is_a_step_without_its_parts():
    graphs = {"embedding": 1, "attention": 2, "head": 1, "sampling": 1, "big": 3, "small": 2, "router": 1}
    runs = {}
    for name, built in (graphs | {"mlx-lm": 9, "all-big": 8, "all-small": 8, "all-skip": 5}).items():
        runs[f"{name}: graph"] = [built / 1e3] * 2
        runs[f"{name}: all"] = [(11 * built) / 1e3] * 2  # running takes ten times as long as building
        if name in ("mlx-lm", *peer.PATTERNS):
            runs[f"{name}: decoding"] = [0.4] * 2
    result = parts.summary(Timings(runs), tokens=3)
    assert result["parts"]["attention"] == pytest.approx({"graph_ms": 2, "run_ms": 20})
    assert result["steps"]["all-big"] == pytest.approx(
        {"graph_ms": 8, "run_ms": 80, "all_ms": 88, "decoding_ms": 100, "rest_ms": 80 - 10 * (1 + 2 + 1 + 1 + 3)}
    )
    assert result["steps"]["all-skip"]["rest_ms"] == pytest.approx(0) and "rest_ms" not in result["steps"]["mlx-lm"]


def test_the_record_of_parts(saved, tmp_path):
    directory, _ = saved(**ROUTED)
    out = tmp_path / "out.json"
    options = ["--model", directory, "--rounds", 1, "--tokens", 2, "--context", 5, "--out", out]
    printed = run(parts.command, *options)
    record = json.loads(out.read_text())
    assert set(record["summary"]["parts"]) >= {"attention", "big", "small", "head", "sampling", "router"}
    assert set(record["summary"]["steps"]) == {"mlx-lm", "all-big", "all-small", "all-skip"}
    assert "router, read by the host" in printed
    refused = CliRunner().invoke(parts.command, [str(option) for option in options])
    assert isinstance(refused.exception, DuoError) and "exists already" in str(refused.exception)
