"""Speculation: the text of plain decoding whatever drafts, one cache, exact work, one wait a round, honest counts."""

from collections import Counter
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ConcatenateKVCache, QuantizedKVCache
from mlx_lm.sample_utils import make_logits_processors

import duo_mlx
from duo_mlx import cost, drafting
from duo_mlx.errors import DuoError
from duo_mlx.generation import policy_of
from duo_mlx.policies import RandomPolicy, parse_route
from duo_mlx.router import Router
from duo_mlx.speculation import speculate

LAYERS = 4
PROMPT = [3, 4, 5, 9, 8, 7]
NEAR = 1e-4  # logits of a verifying pass and of single steps differ by up to 1e-5; what is so near counts as a tie


def route(spec, seed=0):
    return parse_route(spec, LAYERS, seed)


def patterns(policy, start, stop):
    routes = policy.routes(start, stop)
    return np.broadcast_to(routes, (1, stop - start, routes.shape[-1]))


def logits(model, tokens, routes):
    """Of one pass over everything, without a cache: ``[tokens, vocab]``."""
    return np.array(model(mx.array([tokens]), routes=routes, strategy="dense"))[0]


def shortfalls(model, policy, prompt, tokens):
    """How far each generated token's logit is below the largest."""
    whole = [*prompt, *tokens[:-1]]
    found = logits(model, whole, patterns(policy, 0, len(whole)))[len(prompt) - 1 :]
    return found.max(axis=1) - found[np.arange(len(tokens)), tokens]


def speculated(model, verify, draft, count=12, prompt=PROMPT, **options):
    return list(speculate(model, prompt, verify, draft, max_tokens=count, **options))


def ids(tokens):
    return [token.token for token in tokens]


@pytest.fixture
def loaded(saved):
    """``loaded(**changes)``: a model and a tokenizer without a stop token."""

    def make(**changes):
        model, tokenizer = duo_mlx.load(saved(**changes)[0])
        tokenizer.eos_token_ids = set()
        return model, tokenizer

    return make


# --- the text -------------------------------------------------------------------------------------------------------

MODELS = [
    {},
    {"skip_scope": "layer"},
    {"small_layers": [1, 2]},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 16},
    {"draft_vocabulary": 16},
]
SPECS = st.one_of(
    st.text("Bs-", min_size=LAYERS, max_size=LAYERS),
    st.sampled_from(["big", "small", "random", "random:.4,.3,.3", "random:.1,.1,.8"]),
)
CASES = st.fixed_dictionaries(
    {
        "changes": st.integers(0, len(MODELS) - 1),
        "seed": st.integers(0, 3),
        "specs": st.tuples(SPECS, SPECS),
        "prompt": st.lists(st.integers(0, 31), min_size=1, max_size=5),
        "count": st.integers(1, 6),
        "options": st.fixed_dictionaries(
            {
                "draft_tokens": st.sampled_from([0, 1, 2, 3, 4, 7, "auto"]),
                "prefill_step_size": st.sampled_from([1, 2, 3, 99]),
                "strategy": st.sampled_from(["auto", "auto", "auto", "planned", "sorted", "sync", "dense"]),
            }
        ),
    }
)


def test_greedy_tokens_are_those_of_the_verifying_route(tiny_model):
    """Each has the largest logit of a whole pass by the verifying routes, or is so near that it counts as a tie."""
    counts = Counter()

    @cache
    def dearness(changes, spec, seed):
        model = tiny_model(**MODELS[changes])
        many = patterns(route(spec, seed), 0, 1024)
        return cost.weight_bytes(model).of(model.config.realised(many)).mean()

    @settings(max_examples=1000, deadline=None, derandomize=True)
    @given(CASES)
    def check(case):
        model = tiny_model(**MODELS[case["changes"]])
        cheap, dear = sorted(case["specs"], key=lambda spec: dearness(case["changes"], spec, case["seed"]))
        draft, verify = route(cheap, case["seed"]), route(dear, case["seed"])
        found = speculated(model, verify, draft, case["count"], case["prompt"], **case["options"])
        assert len(found) == case["count"]
        short = shortfalls(model, verify, case["prompt"], ids(found))
        assert (short < NEAR).all()
        counts.update(cases=1, tokens=len(found), ties=(short > 0).sum(), accepted=sum(t.from_draft for t in found))

    check()
    assert counts["cases"] >= 1000 and counts["accepted"] > 500
    assert counts["ties"] <= counts["tokens"] / 1000


@pytest.mark.parametrize(("draft", "draft_tokens"), [("small", 1), ("BBss", 4), ("random:.2,.5,.3", "auto")])
@pytest.mark.parametrize("spec", ["big", "random:.8,.2,0"])
def test_responses_are_those_of_plain_decoding(loaded, spec, draft, draft_tokens):
    model, tokenizer = loaded()
    plain = list(duo_mlx.stream_generate(model, tokenizer, PROMPT, route=spec, seed=3, max_tokens=16))
    tokenizer.eos_token_ids = {plain[10].token}
    options = {"route": spec, "seed": 3, "max_tokens": 16, "prefill_step_size": 4}
    expected, found = (
        list(duo_mlx.stream_generate(model, tokenizer, PROMPT, **options, **more))
        for more in ({}, {"speculate": draft, "draft_tokens": draft_tokens})
    )
    for name in ("token", "text", "finish_reason", "prompt_tokens", "generation_tokens"):
        assert [getattr(each, name) for each in found] == [getattr(each, name) for each in expected]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours.routes, theirs.routes)
        np.testing.assert_allclose(np.array(ours.logprobs), np.array(theirs.logprobs), atol=1e-5)
    assert expected[-1].finish_reason == "stop" and expected[0].speculation is None


@pytest.mark.parametrize("draft", ["small", "BBBBBBss----", "budget:6"])
def test_the_embedded_model_says_the_same(draft):
    model, tokenizer = duo_mlx.load(fuse=True)
    prompt = tokenizer.encode("It is a truth universally acknowledged, that")
    verify = policy_of(model, "big")
    found = speculated(model, verify, policy_of(model, draft), 24, prompt, draft_tokens=4)
    assert (shortfalls(model, verify, prompt, ids(found)) < NEAR).all()
    assert found[-1].speculation.tokens / found[-1].speculation.verifications > 1.3


@pytest.mark.parametrize("vocabulary", [0, 5])
def test_processors_see_what_was_drafted(loaded, vocabulary):
    model, tokenizer = loaded(draft_vocabulary=vocabulary)

    def texts(**options):
        processors = make_logits_processors(logit_bias={3: -1000.0, 7: 2.0}, repetition_penalty=1.7)
        return duo_mlx.generate(model, tokenizer, PROMPT, max_tokens=24, logits_processors=processors, **options)

    plain = texts()
    assert plain != duo_mlx.generate(model, tokenizer, PROMPT, max_tokens=24)
    for draft, draft_tokens in (("Bsss", 1), ("small", 4), ("BBBB", 7)):
        assert texts(speculate=draft, draft_tokens=draft_tokens) == plain


# --- the cache ------------------------------------------------------------------------------------------------------


def held(layer_cache):
    return [np.array(each[..., : layer_cache.offset, :]) for each in (layer_cache.keys, layer_cache.values)]


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize(("verify", "draft"), [("big", "small"), ("big", "BB-s"), ("BsBB", "Bs--")])
def test_the_cache_holds_what_plain_decoding_writes(tiny_model, verify, draft, skip_scope):
    model = tiny_model(skip_scope=skip_scope)
    verify, draft = route(verify), route(draft)
    for taken in range(1, 9):
        cache = model.make_cache()
        steps = speculate(model, PROMPT, verify, draft, max_tokens=12, draft_tokens=3, prompt_cache=cache)
        tokens = [next(steps).token for _ in range(taken)]
        steps.close()
        read = [*PROMPT, *tokens[:-1]]
        plain, drafts = model.make_cache(), model.make_cache()
        for routes, other in ((verify, plain), (draft, drafts)):
            model(mx.array([read]), cache=other, routes=routes.pattern)
        for ours, theirs in zip(cache, plain, strict=True):
            assert ours.offset == len(read)
            for found, expected in zip(held(ours), held(theirs), strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-5)
        assert np.abs(held(plain[-1])[0] - held(drafts[-1])[0]).max() > 0.01  # the comparison can fail


@pytest.mark.parametrize("taken", [1, 2, 3, 5, 8])
def test_a_cache_that_was_left_goes_on(tiny_model, taken):
    model = tiny_model()
    verify, draft = route("random:.8,.1,.1", seed=2), route("random:.3,.4,.3", seed=3)
    whole = ids(speculated(model, verify, draft, 12, draft_tokens=3))
    cache = model.make_cache()
    steps = speculate(model, PROMPT, verify, draft, max_tokens=12, draft_tokens=3, prompt_cache=cache)
    begun = [next(steps).token for _ in range(taken)]
    steps.close()
    rest = speculated(model, verify, draft, 12 - taken, begun[-1:], draft_tokens=2, prompt_cache=cache)
    assert begun + ids(rest) == whole


def test_a_quantised_cache_may_be_given(loaded):
    model, tokenizer = loaded(head_dim=32)

    def tokens(**options):
        cache = [QuantizedKVCache(group_size=32, bits=8) for _ in range(LAYERS)]
        stream = duo_mlx.stream_generate(model, tokenizer, PROMPT, prompt_cache=cache, max_tokens=16, **options)
        return [response.token for response in stream]

    assert tokens(speculate="small", draft_tokens=3) == tokens(speculate="BBs-", draft_tokens=6) == tokens()


def test_a_window_is_used_up_to_its_end(tiny_model):
    model = tiny_model(layer_types=["sliding_attention"] * LAYERS, sliding_window=16)
    found = speculated(model, route("big"), route("Bsss"), 11, draft_tokens=3)
    assert (shortfalls(model, route("big"), PROMPT, ids(found)) < NEAR).all()
    with pytest.raises(
        DuoError, match="RotatingKVCache cannot once it is full: its window is 16 tokens, .* come to 17"
    ):
        speculated(model, route("big"), route("Bsss"), 12, draft_tokens=3)


# --- what is refused ------------------------------------------------------------------------------------------------


class OneRoute(Router):
    def routes(self, _, x):
        return mx.zeros(x.shape[:-1], mx.uint32)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"speculate": OneRoute()}, "a router cannot draft: it decides within the pass"),
        ({"route": OneRoute()}, "a router cannot verify: it decides token by token"),
        ({"route": "small", "speculate": "big"}, "draft's routes read .* bytes of weights a token and the verifying"),
        ({"route": "BsBB", "speculate": RandomPolicy(LAYERS, 0.9, 0.1)}, "speculate by cheaper routes"),
        ({"speculate": "BBB"}, "has 3 characters, but the model has 4 layers"),
        ({"draft_tokens": -1}, "draft_tokens is -1; it must be auto or a whole number from 0"),
        ({"draft_tokens": "many"}, "draft_tokens is many; it must be auto"),
        ({"draft_tokens": True}, "draft_tokens is True; it must be auto"),
        ({"draft_tokens": 64}, "draft_tokens is 64, but the model's context is 64"),
        ({"speculate": None, "draft_tokens": 2}, "draft_tokens without speculate"),
        (
            {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)},
            "sampler .*lambda.*: speculation must know",
        ),
        ({"kv_bits": 8, "max_kv_size": 9}, "speculation does not know kv_bits, max_kv_size"),
        ({"prompt_cache": [ConcatenateKVCache()] * LAYERS}, "is not known of a ConcatenateKVCache"),
        ({"strategy": "fast"}, "strategy 'fast' does not exist"),
    ],
)
def test_what_cannot_speculate_is_one_line(loaded, options, line):
    model, tokenizer = loaded(max_position_embeddings=64)
    with pytest.raises(DuoError, match=line) as caught:
        list(duo_mlx.stream_generate(model, tokenizer, PROMPT, **{"speculate": "small"} | options))
    assert "\n" not in str(caught.value)


def test_a_choice_of_ones_own_is_asked_and_told(tiny_model):
    told = []

    class Mine(drafting.Fixed):
        def observe(self, drafted, accepted, seconds):
            told.append((drafted, accepted, seconds > 0))

    found = speculated(tiny_model(), route("big"), route("Bsss"), 10, draft_tokens=Mine(2))
    counts = found[-1].speculation
    assert len(told) == counts.verifications and all(timed for *_, timed in told)
    assert sum(accepted for _, accepted, _ in told) == sum(counts.accepted)
