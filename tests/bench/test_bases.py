"""The benchmarks' main paths on bases other than Llama."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.bench import doctor, engine, parts, peer, quality
from duo_mlx.bench.interleave import interleave
from duo_mlx.bench.subject import Subject
from duo_mlx.bench.variants import of_model
from duo_mlx.generation import policy_of
from duo_mlx.open_layers import OpenLayers

LAYERS = 3
SHAPE = {
    "num_hidden_layers": LAYERS,
    "head_dim": 8,
    "intermediate_size": 32,
    "router_choices": "-sB",
    "max_position_embeddings": 64,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
BASES = {
    "qwen3": {"base_model_type": "qwen3"},
    "gemma2": {"base_model_type": "gemma2", "small_activation": "gelu_tanh"},
    "olmoe": {"base_model_type": "olmoe", "num_experts": 4, "num_experts_per_tok": 2},
}
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(params=BASES)
def base(request, saved):
    """The directory of a tiny Duo, and the model in it."""
    return saved(**SHAPE | BASES[request.param])


@pytest.mark.parametrize("route", ["big", "Bs-", "router"])
def test_a_subject_decodes_in_the_engine_as_it_was_built(base, route):
    directory, model = base
    loaded = Subject(str(directory), None).model("float32")
    policies = [policy_of(each, route) for each in (model, loaded)]
    runs = []
    for each, policy in zip((model, loaded), policies, strict=True):
        generator = engine.routed(each, policy, "auto", [], 1)
        generator.prefill([PROMPT])
        generator.decode(5)
        runs.append(generator.routes()[:, 0])
    np.testing.assert_array_equal(*runs)
    assert runs[0].shape == (4, LAYERS)  # the first of five tokens is the prefill's
    expected = {"big": [2, 2, 2], "Bs-": [2, 1, 0]}
    assert route not in expected or (runs[0] == expected[route]).all()
    assert engine.strategy_ran(loaded, policies[1], "auto", 1) == ("sync" if route == "router" else "planned")


def test_a_subject_counts_the_files_parameters(base):
    directory, _ = base
    found = Subject(str(directory), None)
    weights = mx.load(str(directory / "model.safetensors"))
    assert found.stored == "float32" and found.window is None
    assert found.record["parameters"] == sum(array.size for array in weights.values())


def test_all_big_and_the_peer_decode_the_same(base):
    _, model = base
    twin = peer.base_twin(model)
    assert type(twin).__module__ == f"mlx_lm.models.{model.kind}"
    assert mx.array_equal(twin(mx.array([PROMPT])), model(mx.array([PROMPT]), routes=[2] * LAYERS)).item()
    cases = peer.decoders(model, twin, context=5)
    assert cases["mlx-lm"](6) == cases["all-big"](6)
    assert peer.step_bytes(model, np.full(LAYERS, 2), 7) > peer.step_bytes(model, np.full(LAYERS, 0), 7)


def test_quality_is_measured_in_its_parts(base):
    _, model = base
    windows = np.array([[*PROMPT, 9, 2, 6]], np.int32)
    policies = {route: policy_of(model, route) for route in ("big", "small", "router")}
    found, samples = quality.measure(model, policies, windows, lambda _: None)
    assert found["big"]["kl"] == pytest.approx(0, abs=1e-6) and found["small"]["kl"] > 0
    loss = -mx.log(mx.softmax(model(mx.array(windows[:, :-1]), routes=[2] * LAYERS), axis=-1))[0]
    expected = [loss[at, token].item() for at, token in enumerate(windows[0, 1:].tolist())]
    np.testing.assert_allclose(samples["big"]["loss"], expected, atol=1e-5)


def test_the_parts_of_a_step(base):
    _, model = base
    assert parts.possible(model)
    cases = peer.decoders(model, None, context=5)
    cache = cases["all-big"].cache
    built = parts.parts(model, cache)
    timed = interleave(parts.calls(built, cache, 5, cases, tokens=1), rounds=1, warm_up=1)
    found = parts.summary(timed, tokens=1)
    assert set(found["parts"]) == {*built} >= {"attention", "big", "small", "head", "router"}
    assert set(found["steps"]) == set(peer.PATTERNS)
    mx.eval(built["attention"]())  # one position more in each layer's cache
    assert [layer.offset for layer in cache] == [6] * LAYERS


def test_attention_is_a_block_without_its_ffn(base):
    _, model = base
    layers = OpenLayers(model, mx.array([[1]]), model.make_cache())
    h = mx.random.normal((1, 1, model.config.hidden_size))
    seen = []
    layers.open(0, h, lambda ffn, x: seen.append(ffn) or x)
    assert seen == [model.ffns[0]]


@pytest.mark.usefixtures("emulated")
def test_the_doctor_says_what_an_ffn_takes_that_the_kernels_do_not_know(saved):
    _, model = saved(**SHAPE | BASES["olmoe"])
    [case] = [case for case, _ in of_model(model)]
    assert case.shape == "16/OlmoeSparseMoeBlock/8" and case.weights == "unknown/float"
    said = {each.situation: each for each in doctor.decisions([case])}
    one = said["device knows the route, 1 token"]
    assert one.strategy == "sync" and said["device knows the routes, 8 tokens"].strategy == "sorted"
    assert set(one.passed_over) == {"fused", "masked"}
    assert all("OlmoeSparseMoeBlock is not known as a gated FFN" in reason for reason in one.passed_over.values())
