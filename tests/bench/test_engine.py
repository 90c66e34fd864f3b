"""The engine of bench run: mlx-lm's own tokens, batches like their sequences alone, runs that repeat, exact times."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step

from duo_mlx import conditional
from duo_mlx.bench import engine, peer
from duo_mlx.errors import DuoError
from duo_mlx.generation import policy_of
from duo_mlx.policies import FixedPolicy, ReplayPolicy
from duo_mlx.routed import RoutedModel
from duo_mlx.router import Recorder

# its routers' weights are random, too; with a tied head it would repeat one token
ROUTED = {"router_choices": "-sB", "tie_word_embeddings": False, "seed": 2}
CONTEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
PROMPTS = [[8, 9, 7, 9, 3], [2, 3, 8, 4, 6], [2, 6, 4, 3, 3]]
TOKENS = 7
ROUTES = ("big", "Bs-B", "random:0.4,0.3,0.3", "router")


@pytest.fixture
def seen(monkeypatch):
    """Inputs and logits of every pass that the engine makes of a Duo."""
    passes = []

    class Seen(RoutedModel):
        def __call__(self, inputs, cache=None):
            logits = super().__call__(inputs, cache)
            passes.append((inputs, logits))
            return logits

    monkeypatch.setattr(engine, "RoutedModel", Seen)
    return passes


def run(generator, seen, prompts, tokens=TOKENS):
    """Tokens ``[batch, tokens]`` and their logits ``[tokens, batch, vocab]`` of one run."""
    seen.clear()
    generator.prefill(prompts)
    before = len(seen)
    generator.decode(tokens)
    logits = np.stack([np.array(logits[:, -1]) for _, logits in seen[before - 1 :]])
    found = logits.argmax(axis=-1).T
    inputs = np.concatenate([np.array(inputs) for inputs, _ in seen[before:]], axis=1)
    np.testing.assert_array_equal(inputs, found[:, :-1])  # each step is given the token before it
    return found.tolist(), logits


def by_mlx_lm(model, ids, tokens=TOKENS):
    """The same of mlx-lm's own loop after ``ids``, for one sequence."""
    steps = list(generate_step(mx.array(ids), model, max_tokens=tokens))
    return [token for token, _ in steps], np.stack([np.array(logprobs) for _, logprobs in steps])


def log_softmax(logits):
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("context", [[], CONTEXT], ids=["no context", "context"])
@pytest.mark.parametrize("route", ROUTES)
def test_tokens_and_logits_are_those_of_mlx_lm(tiny_model, seen, route, context):
    model = tiny_model(**ROUTED)
    policy = policy_of(model, route, seed=3)
    found, logits = run(engine.routed(model, policy, "auto", context, 1), seen, PROMPTS[:1])
    expected, logprobs = by_mlx_lm(RoutedModel(model, policy), context + PROMPTS[0])
    assert found == [expected]
    np.testing.assert_allclose(log_softmax(logits[:, 0]), logprobs, atol=2e-5)


def test_routes_change_the_tokens(tiny_model, seen):
    """Or the other tests could not tell them apart."""
    model = tiny_model(**ROUTED)
    runs = [
        run(engine.routed(model, policy_of(model, route, 3), "auto", CONTEXT, 1), seen, PROMPTS[:1]) for route in ROUTES
    ]
    assert len({str(tokens) for tokens, _ in runs}) == len(ROUTES)


@pytest.mark.parametrize("strategy", ["auto", "dense"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_sequences_of_a_batch_are_generated_as_each_alone(tiny_model, seen, route, strategy):
    model = tiny_model(**ROUTED)
    policy = policy_of(model, route, seed=3)
    together, logits = run(engine.routed(model, policy, strategy, CONTEXT, 3), seen, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        if route.startswith("random"):  # whose routes are others in each row
            policy = ReplayPolicy(policy_of(model, route, seed=3).routes(0, 40, 3)[row])
        tokens, alone = by_mlx_lm(RoutedModel(model, policy), CONTEXT + prompt)
        assert together[row] == tokens
        np.testing.assert_allclose(log_softmax(logits[:, row]), alone, atol=2e-5)


POSITIONS = len(CONTEXT) + len(PROMPTS[0]) + TOKENS
SLIDING = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": POSITIONS}  # just enough


@pytest.mark.parametrize("changes", [{}, {"skip_scope": "layer"}, SLIDING], ids=["plain", "skips attention", "sliding"])
@pytest.mark.parametrize("route", ROUTES)
def test_runs_repeat_whatever_was_generated_between(tiny_model, seen, route, changes):
    model = tiny_model(**ROUTED, **changes)
    generator = engine.routed(model, policy_of(model, route, seed=3), "auto", CONTEXT, 1)
    first, logits = run(generator, seen, PROMPTS[:1])
    generator.decode(3)
    for prompt in ([PROMPTS[1][:3]], PROMPTS[:1]):  # another length, and the same
        tokens, again = run(generator, seen, prompt)
    assert tokens == first and np.array_equal(again, logits)
    steps = len(seen)
    generator.decode(TOKENS)  # again after the same prompt
    assert [np.array(ids).tolist() for ids, _ in seen[steps:]] == [[[token]] for token in first[0][:-1]]
    assert [layer.offset for layer in generator._cache] == [POSITIONS - 1] * 4


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("route", ROUTES)
def test_a_long_prompt_is_read_in_chunks(tiny_model, seen, monkeypatch, route, chunk):
    model = tiny_model(**ROUTED)
    policy = policy_of(model, route, seed=3)
    whole = run(engine.routed(model, policy, "auto", CONTEXT, 2), seen, PROMPTS[:2])
    monkeypatch.setattr(engine, "CHUNK", chunk)
    found = run(engine.routed(model, policy, "auto", CONTEXT, 2), seen, PROMPTS[:2])
    lengths = [ids.shape[1] for ids, _ in seen]
    assert sum(lengths[:-TOKENS]) == 4 and max(lengths) == chunk and lengths[-TOKENS:] == [1] * TOKENS
    assert found[0] == whole[0]
    np.testing.assert_allclose(found[1], whole[1], atol=1e-4)


def test_a_prompt_of_one_token(tiny_model, seen):
    model = tiny_model()
    policy = policy_of(model, "big")
    for context in ([], CONTEXT):
        found, _ = run(engine.routed(model, policy, "auto", context, 1), seen, [[7]])
        assert found == [by_mlx_lm(RoutedModel(model, policy), [*context, 7])[0]]


@pytest.mark.parametrize("context", [[], CONTEXT], ids=["no context", "context"])
def test_stock_mlx_lm_generates_what_all_big_does(tiny_model, context):
    model = tiny_model(**ROUTED)
    twin = peer.base_twin(model)
    passes = []

    class Twin:
        layers = twin.layers

        def __call__(self, inputs, cache):
            passes.append((inputs, twin(inputs, cache=cache)))
            return passes[-1][1]

    generator = engine.stock(Twin(), context, 2)
    for _ in range(2):
        found, _ = run(generator, passes, PROMPTS[:2])
        expected = [
            by_mlx_lm(RoutedModel(model, policy_of(model, "big")), context + prompt)[0] for prompt in PROMPTS[:2]
        ]
        assert found == expected


def test_times_are_those_of_the_clock(tiny_model):
    model = tiny_model()
    clock = iter([10.0, 12.5, 20.0, 21.0, 23.0, 26.0]).__next__
    after = []
    generator = engine.routed(model, policy_of(model, "big"), "auto", [], 1, clock)
    assert generator.prefill(PROMPTS[:1]) == 2.5
    assert generator.decode(4, after_each=after.append) == [1.0, 2.0, 3.0]
    assert after == [1, 1, 1]


def test_all_the_work_of_a_run_is_timed_even_if_it_is_done_while_a_step_is_made(tiny_model):
    """As by a router's routes that are read layer by layer."""
    model, now = tiny_model(), [0.0]

    def bind(start, _):
        routed = RoutedModel(model, policy_of(model, "big"), start=start)

        def call(tokens, cache):
            now[0] += tokens.shape[1]
            return routed(tokens, cache)

        return call

    generator = engine.Generator(bind, model.make_cache(), CONTEXT, 1, lambda: now[0])
    assert generator.prefill(PROMPTS[:1]) == 5
    assert sum(generator.decode(6)) == 5


def test_a_router_that_looks_ahead_goes_on_from_the_prompt(tiny_model, seen):
    model, whole = tiny_model(**ROUTED, router_looks_ahead=True), CONTEXT + PROMPTS[0]
    routed = RoutedModel(model, model.router(), prompt=len(whole) - 1)
    expected, _ = by_mlx_lm(routed, whole)
    generator = engine.routed(model, model.router(), "auto", CONTEXT, 1)
    for _ in range(2):
        assert run(generator, seen, PROMPTS[:1])[0] == [expected]
        found = generator.routes()[:, 0]
        np.testing.assert_array_equal(found, routed.routes(len(whole), len(whole) + TOKENS - 1)[0])
    assert len({str(routes) for routes in found}) > 1


def test_the_real_clock_gives_a_positive_time_for_each_token_after_the_first(tiny_model):
    model = tiny_model()
    generator = engine.routed(model, policy_of(model, "big"), "auto", CONTEXT, 2)
    assert generator.prefill(PROMPTS[:2]) > 0
    seconds = generator.decode(TOKENS)
    assert len(seconds) == TOKENS - 1 and min(seconds) > 0


@pytest.mark.parametrize("small_layers", [None, [1, 2]])
@pytest.mark.parametrize("route", ROUTES)
def test_routes_are_what_the_steps_realised(tiny_model, seen, route, small_layers):
    model, batch = tiny_model(**ROUTED, small_layers=small_layers), 3
    policy = policy_of(model, route, seed=3)
    generator = engine.routed(model, policy, "auto", CONTEXT, batch)
    tokens, _ = run(generator, seen, PROMPTS)
    start = len(CONTEXT) + len(PROMPTS[0])
    whole = [CONTEXT + prompt + generated for prompt, generated in zip(PROMPTS, tokens, strict=True)]
    if route == "router":
        recorder = Recorder(policy)
        model(mx.array(whole), routes=recorder)
        expected = np.stack([np.array(taken) for taken in recorder.taken], axis=-1)
    else:
        expected = np.broadcast_to(policy.routes(0, len(whole[0]), batch), (batch, len(whole[0]), 4))
    expected = expected[:, start : start + TOKENS - 1].swapaxes(0, 1)
    if small_layers:
        expected = np.where((expected == 1) & np.array([True, False, False, True]), 2, expected)
    found = generator.routes()
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


STRATEGIES = ("auto", "dense", "planned", "sorted", "sync", "masked")


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("route", ["big", "random", "router", "replay"])
def test_the_strategy_that_ran_is_the_one_that_a_layer_was_carried_out_by(tiny_model, monkeypatch, route, batch):
    model = tiny_model(**ROUTED)
    replay = ReplayPolicy(policy_of(model, "random", 5).routes(0, 60)[0])
    policy = replay if route == "replay" else policy_of(model, route, seed=3)
    ran, decide = [], conditional.decide

    def noted(*args):
        found = decide(*args)
        if args[1] == 0:
            ran.append(found[1])
        return found

    monkeypatch.setattr(conditional, "decide", noted)
    for strategy in STRATEGIES:
        if (route, strategy) == ("router", "planned"):
            continue  # is refused
        generator = engine.routed(model, policy, strategy, CONTEXT, batch)
        generator.prefill([PROMPTS[0]] * batch)
        ran.clear()
        generator.decode(20)
        told = engine.strategy_ran(model, policy, strategy, batch)
        by_chance = {"planned"} if route == "random" and strategy != "dense" else set()  # all drew the same
        assert told in ran and set(ran) <= {told} | by_chance


def test_a_strategy_that_cannot_run_is_refused(tiny_model):
    with pytest.raises(DuoError, match="strategy 'fused' cannot run here"):
        engine.strategy_ran(tiny_model(**ROUTED), tiny_model(**ROUTED).router(), "fused", 1)


def test_shares():
    routes = np.array([[[2, 2, 1, 0]], [[2, 1, 1, 0]]], np.uint8)
    assert engine.shares(routes) == {"big": 3 / 8, "small": 3 / 8, "skip": 2 / 8}
    assert engine.shares(FixedPolicy(np.full(4, 2, np.uint8)).pattern) == {"big": 1.0, "small": 0.0, "skip": 0.0}
