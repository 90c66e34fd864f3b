"""Generation: the routes of each token, one host sync a token, limits, and mlx-lm's own arguments."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import duo_mlx
from duo_mlx import checkpoint, conditional
from duo_mlx.errors import DuoError
from duo_mlx.generation import encode, policy_of, room
from duo_mlx.policies import FixedPolicy, RandomPolicy, ReplayPolicy, parse_route
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Route, format_pattern
from duo_mlx.sampling import Sampling

PROMPT = [3, 4, 5, 9, 8, 7]
SPECS = ["big", "small", "skip", "Bs-B", "big@1,3", "random", "random:0.3,0.3,0.4"]


@pytest.fixture
def loaded(saved):
    """``loaded(**changes)``: a model and a tokenizer without a stop token."""

    def make(**changes):
        model, tokenizer = duo_mlx.load(saved(**changes)[0])
        tokenizer.eos_token_ids = set()
        return model, tokenizer

    return make


def by_definition(model, policy, count):
    """Greedy tokens and their routes, from one whole pass without a cache for each token."""
    tokens, chosen = list(PROMPT), []
    for _ in range(count):
        routes = np.broadcast_to(policy.routes(0, len(tokens)), (1, len(tokens), model.config.num_hidden_layers))
        logits = model(mx.array([tokens]), routes=routes, strategy="dense")
        tokens.append(int(logits[0, -1].argmax().item()))
        chosen.append(routes[0, -1])
    return tokens[len(PROMPT) :], np.stack(chosen)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.usefixtures("emulated")  # for strategy fused
def test_tokens_and_routes_are_those_of_the_definition(loaded, spec, skip_scope):
    model, tokenizer = loaded(skip_scope=skip_scope)
    tokens, routes = by_definition(model, parse_route(spec, 4, seed=7), 8)
    for strategy in conditional.STRATEGIES:
        for chunk in (2, 512):
            responses = list(
                duo_mlx.stream_generate(
                    model,
                    tokenizer,
                    PROMPT,
                    route=spec,
                    seed=7,
                    strategy=strategy,
                    max_tokens=8,
                    prefill_step_size=chunk,
                )
            )
            assert [response.token for response in responses] == tokens
            np.testing.assert_array_equal(np.stack([response.routes for response in responses]), routes)
            assert responses[-1].finish_reason == "length" and responses[-1].prompt_tokens == len(PROMPT)


@pytest.mark.parametrize("spec", SPECS)
def test_a_host_known_route_waits_once_a_token(loaded, spec, monkeypatch):
    model, tokenizer = loaded()
    waits = []
    for name in ("item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__"):
        monkeypatch.setattr(mx.array, name, counted(getattr(mx.array, name), waits, name))
    monkeypatch.setattr(mx, "eval", counted(mx.eval, waits, "eval"))
    responses = duo_mlx.stream_generate(model, tokenizer, PROMPT, route=spec, max_tokens=10)
    before = [len(waits) for _ in responses]
    assert waits[before[0] :] == ["item"] * 9, "after the first token: one wait for each of the nine others"


def counted(function, calls, name):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    return call


def test_default_route_is_the_models_own(loaded):
    model, tokenizer = loaded(default_route="Bs-B")
    (response,) = duo_mlx.stream_generate(model, tokenizer, PROMPT, max_tokens=1)
    assert response.routes.tolist() == [2, 1, 0, 2]


KNOWN = [
    {"pattern": "BBBB", "loss": 3.0},
    {"pattern": "BsBB", "loss": 3.1},
    {"pattern": "BssB", "loss": 3.2},
    {"pattern": "B--s", "loss": 3.9},
]


@pytest.mark.parametrize(
    ("spec", "pattern"), [("budget:2", "BssB"), ("budget:3", "BsBB"), ("budget:1.0", "BBBB"), ("budget:0.75", "B--s")]
)
def test_a_budget_is_its_pattern(loaded, spec, pattern):
    model, tokenizer = loaded(best_patterns=KNOWN)
    policy = policy_of(model, spec)
    assert isinstance(policy, FixedPolicy) and format_pattern(policy.pattern) == pattern
    ours, theirs = (
        list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=route, max_tokens=8)) for route in (spec, pattern)
    )
    assert [response.token for response in ours] == [response.token for response in theirs]
    assert {format_pattern(response.routes) for response in ours} == {pattern}


def test_a_policy_without_a_spec_is_the_models_own(loaded):
    model, _ = loaded(default_route="Bs-B")
    assert format_pattern(policy_of(model, None).pattern) == "Bs-B"
    assert policy_of(model, "random", seed=4) == RandomPolicy(4, seed=4)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("spec", SPECS)
def test_routes_are_told_as_they_are_realised(loaded, spec, skip_scope):
    model, tokenizer = loaded(small_layers=[1, 3], skip_scope=skip_scope)
    policy = parse_route(spec, 4, seed=7)
    tokens, asked = by_definition(model, policy, 8)
    responses = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=spec, seed=7, max_tokens=8))
    assert [response.token for response in responses] == tokens
    told = np.stack([response.routes for response in responses])
    assert not (told[:, [0, 2]] == Route.SMALL).any()
    expected = asked.copy()
    expected[:, [0, 2]] = np.where(asked[:, [0, 2]] == Route.SMALL, Route.BIG, asked[:, [0, 2]])
    np.testing.assert_array_equal(told, expected)


def test_a_step_after_the_end_of_a_replay_skips(loaded):
    model, _ = loaded(small_layers=[1])
    routed = RoutedModel(model, ReplayPolicy(np.ones((8, 4), np.uint8)))
    assert routed.routes(0, 8).tolist() == [[[2, 1, 2, 2]] * 8]
    assert routed.routes(8, 9).tolist() == [0, 0, 0, 0]


def test_a_policy_object_and_its_spec_say_the_same(loaded):
    model, tokenizer = loaded()
    by_spec = duo_mlx.generate(model, tokenizer, PROMPT, route="random:0.5,0.5,0", seed=3, max_tokens=8)
    by_policy = duo_mlx.generate(model, tokenizer, PROMPT, route=RandomPolicy(4, 0.5, 0.5, seed=3), max_tokens=8)
    assert by_spec == by_policy
    assert by_spec == "".join(
        response.text
        for response in duo_mlx.stream_generate(model, tokenizer, PROMPT, route="random", seed=3, max_tokens=8)
    )


def test_a_recorded_generation_is_replayed_exactly(loaded, tmp_path):
    model, tokenizer = loaded()
    policy = parse_route("random:0.4,0.3,0.3", 4, seed=11)
    first = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=policy, max_tokens=10))
    np.savez(tmp_path / "tokens.npz", oracle_routes=policy.routes(0, len(PROMPT) + 9))
    again = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=str(tmp_path / "tokens.npz"), max_tokens=99))
    assert [response.token for response in again] == [response.token for response in first]
    assert all((a.routes == b.routes).all() for a, b in zip(again, first, strict=True))
    assert again[-1].finish_reason == "length" and len(again) == 10


def test_a_prompt_cache_goes_on_at_its_position(loaded):
    model, tokenizer = loaded()
    policy = parse_route("random:0.4,0.3,0.3", 4, seed=5)
    whole = [r.token for r in duo_mlx.stream_generate(model, tokenizer, PROMPT, route=policy, max_tokens=6)]
    cache = make_prompt_cache(model)
    model(mx.array([PROMPT[:4]]), cache=cache, routes=policy.routes(0, 4))
    rest = duo_mlx.stream_generate(model, tokenizer, PROMPT[4:], route=policy, max_tokens=6, prompt_cache=cache)
    assert [response.token for response in rest] == whole


def test_mlx_lms_sampler_and_processors_work(loaded):
    model, tokenizer = loaded()

    def sampled(seed):
        mx.random.seed(seed)
        processors = make_logits_processors(logit_bias={3: -1000.0}, repetition_penalty=1.2)
        return [
            response.token
            for response in duo_mlx.stream_generate(
                model,
                tokenizer,
                PROMPT,
                route="Bs-B",
                max_tokens=24,
                sampler=make_sampler(temp=1.5, top_p=0.95),
                logits_processors=processors,
            )
        ]

    assert sampled(1) == sampled(1) != sampled(2)
    assert 3 not in sampled(1)


def test_a_stop_token_ends_the_text(loaded):
    model, tokenizer = loaded()
    tokens, _ = by_definition(model, parse_route("big", 4), 8)
    tokenizer.eos_token_ids = {tokens[5]}
    stop = tokens.index(tokens[5])
    responses = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route="big", max_tokens=8))
    assert [response.token for response in responses] == tokens[: stop + 1]
    assert responses[-1].finish_reason == "stop"


def test_generation_ends_where_the_context_ends(loaded):
    model, tokenizer = loaded(max_position_embeddings=9)
    assert room(model, FixedPolicy(model.config.default_pattern), len(PROMPT)) == 4
    assert len(list(duo_mlx.stream_generate(model, tokenizer, PROMPT, max_tokens=50))) == 4
    with pytest.raises(DuoError, match="prompt has 10 tokens, but the model's context is 9"):
        list(duo_mlx.stream_generate(model, tokenizer, [3] * 10))


def test_no_more_is_generated_than_is_recorded(loaded):
    model, tokenizer = loaded()
    policy = ReplayPolicy(np.full((8, 4), 2, np.uint8))
    assert len(list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=policy, max_tokens=50))) == 3
    with pytest.raises(DuoError, match="prompt has 9 tokens, but the routes to replay end after 8"):
        list(duo_mlx.stream_generate(model, tokenizer, [3] * 9, route=policy))


def test_nothing_limits_a_model_without_a_context(loaded):
    model, _ = loaded()
    assert room(model, FixedPolicy(model.config.default_pattern), 10_000) is None


@pytest.mark.parametrize("prompt", ["", "  \n", []])
def test_an_empty_prompt_is_refused(loaded, prompt):
    with pytest.raises(DuoError, match="the prompt is empty"):
        encode(loaded()[1], prompt)


def test_text_is_encoded_as_mlx_lm_does(loaded):
    assert encode(loaded()[1], "w1 w2") == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"route": "BBB"}, "has 3 characters, but the model has 4 layers"),
        ({"route": "huge"}, "neither big, small, skip"),
        ({"route": "budget:2"}, "this model's config.json has no best_patterns"),
        ({"strategy": "fast"}, "strategy 'fast' does not exist; there are auto, dense"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_wrong_arguments_are_named(loaded, arguments, line):
    model, tokenizer = loaded()
    with pytest.raises(DuoError, match=line):
        list(duo_mlx.stream_generate(model, tokenizer, PROMPT, **arguments))


@pytest.fixture
def padded(tiny_model, tiny_config, write_tokenizer, tmp_path):
    """A model of 48 embeddings, whose tokenizer has 32 tokens."""
    model = tiny_model(vocab_size=48)
    checkpoint.save(tmp_path, tiny_config(vocab_size=48), checkpoint.parameters(model))
    write_tokenizer(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("sampler", "speculate"),
    [
        *((Sampling(temp=50.0), spec) for spec in (None, "small")),
        *((None, spec) for spec in (None, "small")),
        (make_sampler(50.0), None),
    ],
)
def test_rows_that_pad_the_embedding_are_never_generated(padded, sampler, speculate):
    model, tokenizer = duo_mlx.load(padded)
    tokenizer.eos_token_ids = set()
    mx.random.seed(0)
    options = {"sampler": sampler, "speculate": speculate, "max_tokens": 40}
    responses = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, **options))
    assert len(responses) == 40 and all(response.token < 32 for response in responses)


def test_a_token_without_an_embedding_is_refused(padded):
    model, tokenizer = duo_mlx.load(padded)
    with pytest.raises(DuoError, match="the prompt has the token id 48, but the model has embeddings for 0 to 47"):
        duo_mlx.generate(model, tokenizer, [3, 48])


@pytest.mark.parametrize(
    ("said", "ids"),
    [({"eos_token_id": [4, 5]}, {4, 5}), ({"eos_token_id": 0}, {0}), ({}, {7}), ({"eos_token_id": None}, {7})],
)
def test_generation_config_says_what_ends_a_text(padded, said, ids):
    config = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    (padded / "generation_config.json").write_text(json.dumps(said))
    assert duo_mlx.load(padded)[1].eos_token_ids == ids | {1}  # and the tokenizer's own


def test_a_dense_model_is_shown_the_way(padded):
    (padded / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(DuoError, match="model_type is 'qwen2', so it is a dense model, .*--graft --calibrate TEXT"):
        duo_mlx.load(padded)
