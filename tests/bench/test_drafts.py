"""Drafts that pay: acceptance against drafting token by token, costs against counted bytes, the search, the timing."""

from itertools import product
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import cost
from duo_mlx.bench import draft_timing, drafts
from duo_mlx.bench.acceptance import Acceptance, by_position
from duo_mlx.bench.drafts import AS_BYTES, Candidate, Costs
from duo_mlx.drafting import LONGEST
from duo_mlx.errors import DuoError
from duo_mlx.policies import FixedPolicy
from duo_mlx.routes import Route, format_pattern, parse_pattern
from duo_mlx.sampling import Sampling
from duo_mlx.speculation import speculate

LAYERS = 4
GREEDY = (Sampling(), Sampling(0.7))


def pattern(text):
    return parse_pattern(text, LAYERS)


def windows(count, length, seed=0):
    return np.random.default_rng(seed).integers(0, 32, (count, length)).astype(np.int32)


# --- acceptance -----------------------------------------------------------------------------------------------------


def drafted_after_every_prefix(model, row, verify, draft):
    """Logits ``[tokens, vocab]`` of really drafting one token: all before it read by one route, it by another."""
    found = []
    tokens = mx.array(row[None])
    for place in range(len(row)):
        cache = model.make_cache()
        if place:
            mx.eval(model(tokens[:, :place], cache, routes=verify))
        found.append(np.array(model(tokens[:, place : place + 1], cache, routes=draft))[0, 0])
    return np.stack(found)


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skip_scope": "layer"},
        {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 4},
        {"small_layers": [1, 3]},
        {"draft_vocabulary": 20},
    ],
    ids=["plain", "skipping attention", "sliding", "few small", "few tokens"],
)
@pytest.mark.parametrize(("verify", "draft"), [("big", "small"), ("BBsB", "B-s-"), ("big", "BBs-")])
def test_one_pass_is_a_draft_after_every_prefix(tiny_model, verify, draft, changes):
    model, rows = tiny_model(**changes), windows(2, 11)
    verify, draft = pattern(verify), pattern(draft)
    found = Acceptance(model, verify, rows, GREEDY).of(draft)
    for number, row in enumerate(rows):
        q = drafted_after_every_prefix(model, row, verify, draft)
        p = drafted_after_every_prefix(model, row, verify, verify)
        q[:, model.config.draft_vocabulary :] = -np.inf
        assert found[0, number].tolist() == (q.argmax(axis=-1) == p.argmax(axis=-1)).tolist()
        shared = np.minimum(softmax(q / 0.7), softmax(p / 0.7)).sum(axis=-1)
        np.testing.assert_allclose(found[1, number], shared, atol=2e-5)
    assert found.shape == (2, 2, 11) and found[1].max() < 1 - 1e-4


def test_the_verifying_pattern_is_always_accepted(tiny_model):
    found = Acceptance(tiny_model(), pattern("BsB-"), windows(1, 9), GREEDY).of(pattern("BsB-"))
    np.testing.assert_allclose(found, 1, atol=1e-5)


def test_positions_are_counted_over_all_rounds_of_a_window():
    accepted = np.random.default_rng(1).random((3, 20))
    stood = np.zeros(5)
    for row in accepted:
        for start in range(20 - 4):
            for drafted in range(5):
                stood[drafted] += row[start : start + drafted + 1].prod()
    expected = np.array([stood[0] / 48, *(stood[1:] / stood[:-1])])
    np.testing.assert_allclose(by_position(accepted, 5), expected)
    assert by_position(np.array([[1.0, 0.0] * 8]), 3).tolist() == [0.5, 0, 0]  # never two in a row


# --- costs ----------------------------------------------------------------------------------------------------------


def of(model, verify, growth=AS_BYTES):
    return Costs(cost.weight_bytes(model), cost.draft_bytes(model), verify, growth)


@pytest.mark.parametrize("vocabulary", [0, 5])
@pytest.mark.parametrize("draft", ["ssss", "BBss", "B--B", "BBBs"])
def test_a_round_costs_the_bytes_that_speculation_counts(tiny_model, draft, vocabulary):
    model = tiny_model(small_layers=[0, 2, 3], draft_vocabulary=vocabulary)
    verify, draft = pattern("big"), model.config.realised(pattern(draft))
    costs = of(model, verify)
    assert costs.rounds(draft)[0] == 1
    steps = speculate(model, [3, 4, 5], FixedPolicy(verify), FixedPolicy(draft), draft_tokens=3, max_tokens=12)
    first, *rest = dict.fromkeys(token.speculation for token in steps)
    second = rest[0]
    assert second.drafted == (1, 1, 1)
    assert (second.weight_bytes - first.weight_bytes) / first.weight_bytes == pytest.approx(costs.rounds(draft)[3])


def test_what_both_patterns_begin_with_is_verified_once(tiny_model):
    model, verify = tiny_model(), pattern("big")
    table = cost.weight_bytes(model)
    growth = {1: 1.0, LONGEST + 1: 1.0 + LONGEST}  # each token as dear as the first
    rounds = of(model, verify, growth).rounds(pattern("BBss"))
    begin = table.by_route[:2, Route.BIG].sum()
    whole, step = table.of(verify), table.of(pattern("BBss"))
    for drafted in range(LONGEST + 1):
        read = drafted * step + begin + (drafted + 1) * (whole - begin)
        assert rounds[drafted] == pytest.approx(read / whole)


def test_the_best_length_is_at_least_one(tiny_model):
    costs = of(tiny_model(), pattern("big"))
    draft = pattern("ssss")
    tokens, speed_up = costs.best(draft, np.zeros(LONGEST))
    assert tokens == 1 and speed_up == pytest.approx(1 / costs.rounds(draft)[1]) and speed_up < 1
    tokens, speed_up = costs.best(draft, np.full(LONGEST, 0.5))
    by_hand = [sum(0.5**each for each in range(k + 1)) / costs.rounds(draft)[k] for k in range(1, LONGEST + 1)]
    assert speed_up == pytest.approx(max(by_hand)) and tokens == 1 + by_hand.index(max(by_hand))
    assert costs.bound(draft) == pytest.approx((LONGEST + 1) / costs.rounds(draft)[LONGEST])


# --- the search -----------------------------------------------------------------------------------------------------


def judged(costs, accepted):
    """A judge by ``accepted(pattern)``, the acceptance at every position, and the patterns that it was asked."""
    asked = []

    def judge(pattern):
        asked.append(format_pattern(pattern))
        share = accepted(pattern)
        best = costs.best(pattern, np.full(LONGEST, share))
        return Candidate(asked[-1], costs.share(pattern), share, share, (share,) * LONGEST, *best)

    return judge, asked


def test_the_search_finds_what_trying_all_patterns_finds(tiny_model):
    model = tiny_model(best_patterns=[{"pattern": "BB-s", "loss": 3.0}, {"pattern": "B-ss", "loss": 3.2}])
    costs = of(model, pattern("big"))
    worth = np.array([[0.0, 0.10, 0.30], [0.0, 0.24, 0.25], [0.0, 0.02, 0.03], [0.0, 0.18, 0.40]])
    judge, asked = judged(costs, lambda routes: float(worth[np.arange(LAYERS), routes].sum()))
    found = drafts.search(judge, costs, drafts.starts(model, "-sB"), drafts.options(model, "-sB"), 999)
    assert asked[0] == "ssss" and len(set(asked)) == len(asked) == len(found)
    all_of_them = [np.array(routes, np.uint8) for routes in product(range(3), repeat=LAYERS)]
    best = max((judge(routes) for routes in all_of_them if costs.share(routes) < 1), key=lambda each: each.speed_up)
    assert found[0] == best and best.pattern not in {format_pattern(each) for each in drafts.starts(model, "-sB")}
    assert found == sorted(found, key=lambda each: -each.speed_up)


def test_no_more_passes_than_are_given(tiny_model):
    model = tiny_model()
    costs = of(model, pattern("big"))
    judge, asked = judged(costs, lambda _: 0.5)
    numbers = []
    found = drafts.search(
        judge, costs, drafts.starts(model, "sB"), drafts.options(model, "sB"), 5, lambda done: numbers.append(done)
    )
    assert len(asked) == len(found) == 5 and numbers == [1, 2, 3, 4, 5] and not any("-" in each for each in asked)


def test_what_cannot_be_the_best_is_not_tried(tiny_model):
    model = tiny_model()
    costs = of(model, pattern("big"))
    judge, asked = judged(costs, lambda routes: float((routes == Route.SMALL).all()))  # all small is never refused
    drafts.search(judge, costs, drafts.starts(model, "sB"), drafts.options(model, "sB"), 999)
    assert asked == ["ssss"]  # all others read more


def test_drafts_are_as_the_model_realises_them_and_cheaper_than_the_verifying_pattern(tiny_model):
    model = tiny_model(small_layers=[1, 2])
    assert drafts.options(model, "sB") == [(2,), (1, 2), (1, 2), (2,)]
    costs = of(model, pattern("BBsB"))
    judge, asked = judged(costs, lambda _: 0.9)
    drafts.search(judge, costs, drafts.starts(model, "sB"), drafts.options(model, "sB"), 999)
    assert asked[0] == "BssB" and set(asked) <= {"BssB", "BsBB"}


def test_starts_are_of_all_kinds(tiny_model):
    known = [{"pattern": "sB--", "loss": 2.0}, {"pattern": "BsB-", "loss": 1.9}]
    found = {format_pattern(each) for each in drafts.starts(tiny_model(best_patterns=known), "-sB")}
    assert found >= {"ssss", "----", "BBss", "BB--", "BssB", "B--B", "sB--", "BsB-"}
    assert not any("-" in format_pattern(each) for each in drafts.starts(tiny_model(), "sB"))


@pytest.mark.parametrize("choices", ["", "x", "big"])
def test_unknown_choices_are_refused(tiny_model, choices):
    with pytest.raises(DuoError, match=f"choices '{choices}': give letters of routes"):
        drafts.options(tiny_model(), choices)


# --- the timing -----------------------------------------------------------------------------------------------------


def test_speed_ups_are_paired_and_counts_are_those_of_speculation(tiny_model, monkeypatch):
    """The clock is made up: plain decoding takes 3 s, then 6 s; the draft 2 s, then 3 s; warming up does not count."""
    seconds, now = iter([50, 70, 3, 2, 2, 3, 6, 3, 3, 6]), [0.0]
    ends = [False]

    def clock():
        now[0] += next(seconds) if ends[0] else 0
        ends[0] = not ends[0]
        return now[0]

    monkeypatch.setattr(draft_timing, "time", SimpleNamespace(perf_counter=clock))
    model, prompts = tiny_model(), windows(3, 6).tolist()
    found, runs = draft_timing.measure(model, prompts, pattern("big"), {"BBBs": 2}, Sampling(), 15, 2, lambda *_: None)
    assert runs == {"plain": [3, 3, 6, 6], "BBBs": [2, 2, 3, 3]}
    assert found["BBBs"]["speed_up"] == {"median": 1.75, "low": 1.5, "high": 2.0}
    counts = []
    for number in range(5):  # a run for warming up, and two a round
        tokens = speculate(
            model, prompts[number % 3], FixedPolicy(pattern("big")), FixedPolicy(pattern("BBBs")),
            draft_tokens=2, max_tokens=16,
        )  # fmt: skip
        counts.append([token.speculation for token in tokens][-1])
    drafted, accepted = (np.sum([getattr(each, name) for each in counts], axis=0) for name in ("drafted", "accepted"))
    assert found["BBBs"]["drafted_by_position"] == drafted.tolist()
    assert found["BBBs"]["acceptance_by_position"] == pytest.approx(accepted / drafted)
    assert found["BBBs"]["tokens_per_verification"] == pytest.approx(80 / sum(each.verifications for each in counts))


def test_growth_is_over_one_token_and_leaves_the_cache_as_it_was(tiny_model, monkeypatch):
    model, offsets, made = tiny_model(), [], []

    def make():
        made.append(type(model).make_cache(model))
        return made[-1]

    def interleave(calls, rounds, after_round):
        for call in calls.values():
            call()
            offsets.append({layer.offset for layer in made[0]})
        after_round(rounds)
        return SimpleNamespace(ratios=lambda name, weights: [int(name), 3 * int(name), 0] if weights == {"1": 1} else 0)

    monkeypatch.setattr(model, "make_cache", make, raising=False)
    monkeypatch.setattr(draft_timing, "interleave", interleave)
    found = draft_timing.growth(model, pattern("big"), list(range(20)), lambda *_: None)
    assert found == {1: 1, 2: 2, 4: 4, LONGEST + 1: LONGEST + 1} and offsets == [{20}] * 4


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"max_position_embeddings": 50}, "the model's context of 50 is full"),
        ({"layer_types": ["sliding_attention"] * 4, "sliding_window": 48}, "the model's window of 48 is full"),
        ({"sliding_window": 48}, None),
        ({"max_position_embeddings": 52}, None),
    ],
)
def test_runs_fit_into_the_context(tiny_model, changes, refused):
    if refused is None:
        draft_timing.check_room(tiny_model(**changes), 20)
        return
    with pytest.raises(DuoError, match=f"--tokens 20: after prompts of 32 tokens {refused}"):
        draft_timing.check_room(tiny_model(**changes), 20)
