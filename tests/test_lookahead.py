"""Routers that look ahead: the PyTorch reference's routes, in any cuts, with one read a token."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

import duo_mlx
from duo_mlx import conditional
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.errors import DuoError
from duo_mlx.generation import policy_of
from duo_mlx.rounds import Rounds
from duo_mlx.routed import RoutedModel, ask
from duo_mlx.routes import format_pattern
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import speculate

LAYERS, TOKENS = 4, 9
AHEAD = {"router_looks_ahead": True, "router_bias": True}
IDS = np.random.default_rng(3).integers(0, 32, (2, TOKENS))


@pytest.fixture
def made(tiny_model):
    """``made(choices, **changes)``: a model whose routers look ahead."""
    return lambda choices="-sB", **changes: tiny_model(seed=2, router_choices=choices, **AHEAD, **changes)


@pytest.fixture
def in_pytorch(tiny_config):
    """``in_pytorch(model, ids)``: the reference's logits and routes."""

    def run(model, ids, **changes):
        reference = DuoModel(
            DuoConfig.from_dict(tiny_config(router_choices=model.config.router_choices, **AHEAD, **changes))
        )
        weights = {name: torch.tensor(np.array(each)) for name, each in tree_flatten(model.parameters())}
        reference.load_state_dict(weights, strict=False)
        with torch.no_grad():
            logits, routes = reference.routed(torch.tensor(ids))
        return logits.numpy(), routes.numpy()

    return run


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("choices", ["sB", "-B", "Bs-"])
def test_routes_and_logits_are_the_references_however_a_text_is_cut(made, in_pytorch, choices, skip_scope):
    model = made(choices, skip_scope=skip_scope)
    logits, routes = in_pytorch(model, IDS, skip_scope=skip_scope)
    assert len(np.unique(routes)) == len(choices)
    for cuts in ((TOKENS,), (5, 1, 1, 1, 1), (3, 3, 3)):
        routed, cache, start, found = RoutedModel(model, model.router()), model.make_cache(), 0, []
        for cut in cuts:
            found.append(np.array(routed(mx.array(IDS[:, start : start + cut]), cache=cache)))
            start += cut
        np.testing.assert_array_equal(routed.taken(0, TOKENS, 2), routes)
        np.testing.assert_allclose(np.concatenate(found, axis=1), logits, atol=1e-4)


def test_a_pass_without_a_cache_is_a_text_of_its_own(made):
    model = made()
    routed = RoutedModel(model, model.router())
    first = np.array(routed(mx.array(IDS[:1])))
    np.testing.assert_array_equal(np.array(routed(mx.array(IDS[:1]))), first)
    np.testing.assert_array_equal(routed.taken(TOKENS, 2 * TOKENS), routed.taken(0, TOKENS))


def test_what_it_would_have_said_names_the_routes_that_it_took(made):
    model = made()
    routed = RoutedModel(model, model.router())
    logits = routed(mx.array(IDS))
    taken = routed.taken(0, TOKENS, 2)
    again, said = ask(model, mx.array(IDS), taken)
    np.testing.assert_allclose(np.array(again), np.array(logits), atol=1e-4)
    np.testing.assert_array_equal(np.array(said).argmax(axis=-1), taken)  # of choices in the order of routes


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_a_prompt_takes_the_default_route_and_each_token_after_it_one_read(saved_ahead, chunk):
    model, tokenizer = saved_ahead
    prompt, args = [3, 9, 14, 7, 21], model.config
    expected, cache = [], model.make_cache()
    planned = conditional.plan(args.default_pattern, 1, len(prompt) - 1, LAYERS, "auto")
    final = model.states(mx.array([prompt[:-1]]), cache, planned, "auto")[:, -1]
    token = prompt[-1]
    for _ in range(6):
        inputs = mx.array([[token]])
        routes = model.router().read(model.embedding(inputs)[:, 0], final)
        out = model.states(inputs, cache, conditional.plan(routes[:, None], 1, 1, LAYERS, "auto"), "auto")
        final, token = out[:, -1], int(mx.argmax(model.head(out)[0, -1]))
        expected.append((token, routes[0].tolist()))
    before = conditional.host_reads()
    responses = duo_mlx.stream_generate(model, tokenizer, prompt, route="router", max_tokens=6, prefill_step_size=chunk)
    assert [(response.token, response.routes.tolist()) for response in responses] == expected
    assert conditional.host_reads() - before <= 7  # mlx-lm may start one step more
    assert len({str(routes) for _, routes in expected}) > 1


@pytest.fixture
def saved_ahead(saved):
    directory, _ = saved(router_choices="-sB", default_route="Bs-B", **AHEAD)
    return duo_mlx.load(directory)


def test_a_threshold_moves_it(made):
    model = made("sB")
    model.config.__dict__["router_offsets"] = ((0.1, -9.0), (0.9, 9.0))
    try:
        shares = []
        for spec in ("router:0.1", "router:0.5", "router:0.9"):
            routed = RoutedModel(model, policy_of(model, spec))
            mx.eval(routed(mx.array(IDS)))
            shares.append((routed.taken(0, TOKENS, 2) == 2).mean())
    finally:
        model.config.__dict__["router_offsets"] = ()
    assert shares[0] == 0 and 0 < shares[1] < 1 and shares[2] == 1


def test_it_cannot_verify(made):
    model = made()
    steps = speculate(model, [1, 2], model.router(), policy_of(model, "small"))
    with pytest.raises(DuoError, match="a router cannot verify"):
        next(steps)


# --- as a draft --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 3])
def test_drafts_take_the_routes_foreseen_after_the_verified_text(made, length):
    model, prompt = made("-sB"), [3, 4, 5, 9, 8, 7]
    router, big = model.router(), policy_of(model, "big")
    rounds = Rounds(model, big, router, "auto", model.make_cache(), Sampling())
    rounds.read(prompt[:-1], 2048)
    history, seen = list(prompt), []
    for number in range(8):
        done = rounds.run(history, length)
        assert done.drafted == (length if number else 0)
        history += done.tokens
        planned = conditional.plan([2] * LAYERS, 1, len(history) - 1, LAYERS, "auto")
        final = model.states(mx.array([history[:-1]]), None, planned, "auto")
        expected = router.read(model.embedding(mx.array(history[-1:])), final[:, -1])[0]
        np.testing.assert_array_equal(rounds.foreseen, expected)
        seen.append(format_pattern(expected))
    assert len(set(seen)) > 1
    plain = speculate(
        model, prompt, big, policy_of(model, "small"), draft_tokens=0, max_tokens=len(history) - len(prompt)
    )
    assert [step.token for step in plain] == history[len(prompt) :]


def test_a_draft_that_looks_ahead_costs_no_wait_of_its_own(made, monkeypatch):
    model, waits = made("sB"), []
    monkeypatch.setattr(mx.array, "tolist", lambda array, real=mx.array.tolist: waits.append("") or real(array))
    before = conditional.host_reads()
    steps = list(speculate(model, [1, 2, 3], policy_of(model, "big"), model.router(), draft_tokens=2, max_tokens=9))
    assert len(steps) == 9 and len(waits) == steps[-1].speculation.verifications
    assert conditional.host_reads() == before
