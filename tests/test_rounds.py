"""Rounds of speculation against their definition: what is drafted and stands, what is computed, read, waited for."""

import io
import re
from collections import Counter

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from duo_mlx import checkpoint, conditional, cost
from duo_mlx.cpu import llama as llama_parts
from duo_mlx.ffn import nbytes
from duo_mlx.policies import FixedPolicy, ReplayPolicy, parse_route
from duo_mlx.rounds import Rounds
from duo_mlx.routed import RoutedModel
from duo_mlx.routes import Route, parse_pattern
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import speculate

LAYERS = 4
PROMPT = [3, 4, 5, 9, 8, 7]


def route(spec, seed=0):
    return parse_route(spec, LAYERS, seed)


def patterns(policy, start, stop):
    return np.broadcast_to(policy.routes(start, stop), (1, stop - start, LAYERS))


def logits(model, tokens, routes):
    """Of one pass over everything, without a cache: ``[tokens, vocab]``."""
    return np.array(model(mx.array([tokens]), routes=routes, strategy="dense"))[0]


def speculated(model, verify, draft, count, **options):
    return list(speculate(model, PROMPT, verify, draft, max_tokens=count, **options))


def ids(tokens):
    return [token.token for token in tokens]


def by_definition(model, verify, draft, count, length):
    """Tokens with their marks, and drafted and accepted by round, from passes without a cache.

    A drafted token is the likeliest after a pass in which everything known has the verifying routes, and what comes
    after it the draft's.
    """
    history, rounds = list(PROMPT), []
    while (left := len(PROMPT) + count - len(history)) > 0:
        known = len(history) - 1
        drafted = []
        for number in range(min(length, left - 1) if rounds else 0):
            routes = np.concatenate([patterns(verify, 0, known), patterns(draft, known, known + number + 1)], axis=1)
            known_to_drafts = logits(model, history + drafted, routes)[-1][: model.config.draft_vocabulary]
            drafted.append(int(known_to_drafts.argmax()))
        whole = history + drafted
        likeliest = logits(model, whole, patterns(verify, 0, len(whole)))[known:].argmax(axis=1).tolist()
        accepted = next((place for place, token in enumerate(drafted) if token != likeliest[place]), len(drafted))
        rounds.append((len(drafted), accepted))
        history += likeliest[: accepted + 1]
    return history[len(PROMPT) :], rounds


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("changes", [{}, {"skip_scope": "layer"}, {"draft_vocabulary": 20}], ids=str)
@pytest.mark.parametrize(
    ("verify", "draft"),
    [("big", "small"), ("big", "BBs-"), ("big", "BBBB"), ("BsBB", "Bs-s"), ("random:.8,.1,.1", "random:.3,.4,.3")],
)
def test_rounds_are_those_of_the_definition(tiny_model, verify, draft, changes, length):
    model = tiny_model(**changes)
    verify, draft = route(verify), route(draft, seed=1)
    tokens, rounds = by_definition(model, verify, draft, 11, length)
    found = speculated(model, verify, draft, 11, draft_tokens=length)
    assert ids(found) == tokens
    marks = [
        (place < accepted, place == accepted < drafted) for drafted, accepted in rounds for place in range(accepted + 1)
    ]
    assert [(token.from_draft, token.corrected) for token in found] == marks
    counts = found[-1].speculation
    assert counts.verifications == len(rounds) and counts.tokens == len(tokens)
    longest = max(drafted for drafted, _ in rounds)
    assert counts.drafted == tuple(sum(drafted > place for drafted, _ in rounds) for place in range(longest))
    assert counts.accepted == tuple(sum(accepted > place for _, accepted in rounds) for place in range(longest))
    assert counts.acceptance == [a / d for a, d in zip(counts.accepted, counts.drafted, strict=True)]
    if isinstance(draft, FixedPolicy) and isinstance(verify, FixedPolicy):
        step, verified = cost.draft_bytes(model).of(draft.pattern), cost.weight_bytes(model).of(verify.pattern)
        drafts = sum(drafted for drafted, _ in rounds)
        assert counts.weight_bytes == drafts * step + len(rounds) * verified


def test_the_counts_at_a_token_are_those_up_to_its_round(tiny_model):
    found = speculated(tiny_model(), route("big"), route("Bsss"), 20, draft_tokens=3)
    for place, token in enumerate(found):
        ended = place + 1 == len(found) or found[place + 1].speculation is not token.speculation
        assert (token.speculation.tokens == place + 1) == ended
        assert ended != token.from_draft


def test_where_the_draft_ends_nothing_is_drafted(tiny_model):
    model = tiny_model()
    draft = ReplayPolicy(np.full((9, LAYERS), Route.SMALL, np.uint8))
    found = speculated(model, route("big"), draft, 12, draft_tokens=5)
    assert ids(found) == ids(speculated(model, route("big"), route("big"), 12, draft_tokens=0))
    assert 0 < sum(found[-1].speculation.drafted) <= 6  # at positions 6 to 8, in three rounds at most


def test_bytes_are_those_of_each_pass(tiny_model):
    """Routes that change with the position, and are the same in the first two layers."""
    model = tiny_model(skip_scope="layer")
    verifying = np.stack([parse_pattern("BsBB" if place % 2 else "sBBs", LAYERS) for place in range(12)])
    drafting = np.concatenate([verifying[:, :2], np.full((12, 2), Route.SKIP, np.uint8)], axis=1)
    steps = speculate(model, PROMPT, ReplayPolicy(verifying), ReplayPolicy(drafting), max_tokens=5, draft_tokens=3)
    first, then = next(steps).speculation, next(steps).speculation
    last = cost.weight_bytes(model), cost.cache_bytes(model, 6)
    assert (first.weight_bytes, first.cache_bytes) == tuple(table.of(verifying[5]) for table in last)
    # positions 6, 7 and 8 draft; 9 alone passes the shared layers; all four pass the others, in which both s and B read
    of = cost.weight_bytes(model)
    weights = of.of(drafting[6:9]).sum() + of.fixed + of.by_route[[0, 1], verifying[9, :2]].sum()
    weights += of.by_route[2, Route.BIG] + of.by_route[3, Route.BIG] + nbytes(model.layers[3].mlp.small)
    assert then.weight_bytes - first.weight_bytes == weights
    of = cost.cache_bytes(model, 8)
    assert then.cache_bytes - first.cache_bytes == of.of(drafting[6:9]).sum() + of.of(verifying[9])


def test_a_pass_over_several_tokens_reads_each_module_once(tiny_model):
    model = tiny_model(small_layers=[1, 2, 3])
    sizes = {name: value.nbytes for name, value in checkpoint.parameters(model).items()}
    routes = np.stack([parse_pattern(text, LAYERS) for text in ("BB-s", "Bs-s", "BB-s")])
    unread = [".layers.2.mlp.", ".layers.2.post_", ".layers.3.mlp.big."]
    read = sum(size for name, size in sizes.items() if not any(part in name for part in unread))
    row = sizes["model.embed_tokens.weight"] // model.config.vocab_size
    assert cost.pass_bytes(model)(routes) == read + row
    table = cost.weight_bytes(model)
    assert [cost.pass_bytes(model)(each[None]) for each in routes] == table.of(routes).tolist()


# --- work and waits -------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(monkeypatch):
    """Tokens that each attention and each FFN was evaluated on, by (layer, name)."""
    counts = Counter()
    names = {}

    def count(kind):
        original = kind.__call__

        def call(self, x, *args, **kwargs):
            counts[names[id(self)]] += x.size // x.shape[-1]
            return original(self, x, *args, **kwargs)

        monkeypatch.setattr(kind, "__call__", call)

    def watch(model):
        for number, layer in enumerate(model.layers):
            names.update({id(layer.mlp.big): (number, "B"), id(layer.mlp.small): (number, "s")})
            names[id(layer.self_attn)] = (number, "attention")
        count(llama_parts.MLP)
        count(llama_parts.Attention)
        return counts

    return watch


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize(
    ("verify", "draft", "shared"),
    [("BBBB", "BBs-", 2), ("BBBB", "sBBB", 0), ("BsBB", "BsBs", 3), ("Bs-B", "Bs-s", 3), ("BBBB", "BBBB", 3)],
)
def test_shared_layers_are_computed_once(tiny_model, evaluated, verify, draft, shared, skip_scope):
    model = tiny_model(skip_scope=skip_scope)
    steps = speculate(model, PROMPT, route(verify), route(draft), max_tokens=9, draft_tokens=3)
    next(steps)
    counts = evaluated(model)
    next(steps)  # a round of three drafted tokens, verified with the one before them
    expected = Counter()
    for layer in range(LAYERS):
        # of four tokens, the last is not drafted from: its shared layers come with the verification
        for letter, tokens in ((draft[layer], 0 if layer < shared else 3), (verify[layer], 4)):
            expected[layer, letter] += tokens if letter != "-" else 0
            expected[layer, "attention"] += 0 if letter == "-" and skip_scope == "layer" else tokens
    assert +counts == +expected


def primitives(*outputs):
    file = io.StringIO()
    mx.export_to_dot(file, *outputs)
    return Counter(re.findall(r'label ="([^"]+)", shape=rectangle', file.getvalue()))


@pytest.mark.parametrize("pattern", ["BBBB", "Bs-B"])
def test_a_step_without_drafts_is_a_step_of_plain_decoding(tiny_model, monkeypatch, pattern):
    model = tiny_model()
    plain, ours = model.make_cache(), model.make_cache()
    for cache in (plain, ours):
        mx.eval(model(mx.array([PROMPT]), cache), [layer.state for layer in cache])
    logits = RoutedModel(model, route(pattern), start=len(PROMPT))(mx.array([[3]]), cache=plain)[:, -1]
    logprobs = logits - mx.logsumexp(logits, keepdims=True)  # as in mlx-lm's `generate_step`
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)
    step = Rounds(model, route(pattern), route("small"), "auto", ours, Sampling()).step([*PROMPT, 3])
    assert primitives(step.token, step.logprobs) == primitives(Sampling()(logprobs), logprobs)
    assert "LogSumExp" in primitives(step.logprobs) and "LogSumExp" not in primitives(step.token)  # if asked for


WAITS = ("item", "tolist", "__array__", "__bool__", "__int__", "__float__", "__index__", "__iter__")


@pytest.mark.parametrize("options", [{}, {"sampler": Sampling(0.6, top_p=0.7)}, {"processed": True}])
@pytest.mark.parametrize("draft", ["small", "BBs-", "random:.2,.5,.3"])
def test_the_host_waits_once_a_verification(tiny_model, monkeypatch, draft, options):
    waits = Counter()

    def counted(name, function):
        def call(*args, **kwargs):
            waits[name] += 1
            return function(*args, **kwargs)

        return call

    if options.get("processed"):
        options = {"logits_processors": make_logits_processors(repetition_penalty=1.2)}
    steps = speculate(tiny_model(), PROMPT, route("big"), route(draft), max_tokens=24, draft_tokens=3, **options)
    next(steps)
    for name in WAITS:
        if hasattr(mx.array, name):
            monkeypatch.setattr(mx.array, name, counted(name, getattr(mx.array, name)))
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, counted(name, getattr(mx, name)))
    read = conditional.host_reads()
    counts = [token.speculation for token in steps][-1]
    assert waits == {"tolist": counts.verifications - 1}  # the first gave the first token
    assert sum(counts.drafted) > counts.verifications and conditional.host_reads() == read


def test_rounds_leave_no_growing_graph(tiny_model):
    model = tiny_model(skip_scope="layer")
    cache = model.make_cache()
    steps = speculate(model, PROMPT, route("BB-B"), route("B---"), draft_tokens=3, prompt_cache=cache)
    for _ in range(8):
        next(steps)
    file = io.StringIO()
    mx.export_to_dot(file, *[array for layer in cache for array in (layer.keys, layer.values)])
    assert "shape=rectangle" not in file.getvalue()
