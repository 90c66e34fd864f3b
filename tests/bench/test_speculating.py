"""Speculation in bench run: plain decoding's tokens, whole rounds, exact counts of work, times and joules of tokens."""

from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.bench import energy, engine, rounds, speculating, summary, touched
from duo_mlx.bench.grid import DUO, Cell
from duo_mlx.bench.meters import Meter, Rail, Reading
from duo_mlx.bench.meters.window import Window
from duo_mlx.bench.rounds import Case, Prompts, Session, Settings
from duo_mlx.bench.speculating import Speculating
from duo_mlx.bench.system import Conditions
from duo_mlx.flops import flops
from duo_mlx.generation import policy_of
from duo_mlx.rounds import Round, Rounds, patterns
from duo_mlx.speculation import Speculation, run_rounds, speculate

ROUTED = {"tie_word_embeddings": False, "seed": 2}  # with a tied head it would repeat one token
AHEAD = {"router_choices": "-sB", "router_looks_ahead": True}
CONTEXT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
PROMPTS = [[8, 9, 7, 9, 3], [2, 3, 8, 4, 6], [7]]
LAYERS = 4
PAIRS = [("big", "BBs-"), ("big", "BBBs"), ("BsBB", "Bs-s"), ("random:.8,.1,.1", "random:.3,.4,.3")]


@pytest.fixture
def done(monkeypatch):
    """Every round that decoding runs: where it began, after which token, what it came to, and its drafts' routes."""
    found, nothing = [], np.zeros((0, LAYERS), np.uint8)

    class Seen(Rounds):
        drafting = nothing

        def _drafts(self, before, last, drafting, shared):
            self.drafting = drafting
            return super()._drafts(before, last, drafting, shared)

    def seen(rounds, history, *more, **named):
        first = rounds._cache[0].offset - len(history)
        for each in run_rounds(rounds, history, *more, **named):
            found.append((first + len(history), history[-1], each, rounds.drafting))
            rounds.drafting = nothing
            yield each

    monkeypatch.setattr(speculating, "Rounds", Seen)
    monkeypatch.setattr(speculating, "run_rounds", seen)
    return found


def policies(model, pair):
    return [policy_of(model, spec, seed) for seed, spec in enumerate(pair)]


def plain(model, policy, context, prompt, tokens):
    """The tokens of the engine's plain decoding."""
    generator = engine.routed(model, policy, "auto", context, 1)
    generator.prefill([prompt])
    found, step = [generator._first.item()], generator._step

    def noted(ids):
        following = step(ids)
        found.append(following.item())
        return following

    generator._step = noted
    generator.decode(tokens)
    return found


@pytest.mark.parametrize(
    ("changes", "context", "many"),
    [({}, CONTEXT, "auto"), ({"skip_scope": "layer"}, CONTEXT, "5"), ({}, [], "1")],
    ids=["auto", "skips attention", "no context"],
)
@pytest.mark.parametrize("pair", PAIRS)
def test_tokens_are_those_of_plain_decoding(tiny_model, done, pair, changes, context, many):
    model = tiny_model(**ROUTED, **changes)
    verify, draft = policies(model, pair)
    generator = Speculating(model, verify, draft, "auto", context, many)
    for prompt in PROMPTS:  # the cache is rewound between them
        generator.prefill([prompt])
        for tokens in (9, 2, 14):  # and between decodings after one prompt
            expected = plain(model, verify, context, prompt, tokens)
            done.clear()
            came = []
            seconds = generator.decode(tokens, came.append)
            assert [done[0][1], *(token for _, _, each, _ in done for token in each.tokens)] == expected
            assert len(seconds) == sum(came) == tokens - 1 and came == [len(each.tokens) for _, _, each, _ in done]
            assert [layer.offset for layer in generator._cache] == [len(context) + len(prompt) + tokens - 1] * LAYERS
            first = len(context) + len(prompt)
            routes = np.broadcast_to(
                model.config.realised(verify.routes(first, first + tokens - 1)), (1, tokens - 1, 4)
            )
            np.testing.assert_array_equal(generator.routes(), routes.swapaxes(0, 1))


def test_prefill_is_that_of_plain_decoding(tiny_model, monkeypatch):
    """The same passes over the same tokens, so that the time to the first token is comparable."""
    model = tiny_model(**ROUTED)
    monkeypatch.setattr(engine, "CHUNK", 2)
    passes = []

    class Noted(type(model.model)):
        def __call__(self, inputs, *more, **named):
            out = super().__call__(inputs, *more, **named)
            if more[:1] != (None,):  # it reads hidden states on, not only their head
                passes.append(inputs.shape)
            return out

    monkeypatch.setattr(model.model, "__class__", Noted)
    found = []
    for generator in (
        Speculating(model, *policies(model, ("big", "BBs-")), "auto", CONTEXT),
        engine.routed(model, policy_of(model, "big"), "auto", CONTEXT, 1),
    ):
        passes.clear()  # of those that only count what a pass reads
        generator.prefill(PROMPTS[:1])
        states = [np.array(each) for layer in generator._cache for each in layer.state[:2]]
        found.append(([*passes], generator._first.tolist(), states))
    assert found[0][0] == found[1][0] == [(1, 2)] * 2 + [(1, 1)] and found[0][1] == found[1][1]
    for one, other in zip(found[0][2], found[1][2], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


PAIRS_AND_AHEAD = [*PAIRS, ("big", "router")]  # a router that looks ahead may draft


@pytest.mark.parametrize("pair", PAIRS_AND_AHEAD)
def test_counts_are_those_of_speculation_itself(tiny_model, pair):
    """Of `duo_mlx.speculation.speculate` over the same text, less the first token, which is the prefill's."""
    model = tiny_model(**ROUTED, **AHEAD)
    verify, draft = policies(model, pair)
    generator = Speculating(model, verify, draft, "auto", CONTEXT, "3")
    generator.prefill(PROMPTS[:1])
    generator.decode(15)
    tokens = list(speculate(model, CONTEXT + PROMPTS[0], verify, draft, draft_tokens=3, max_tokens=15))
    first, counts = tokens[0].speculation, tokens[-1].speculation
    found = generator.record()
    assert (found["drafted"], found["accepted"]) == ([*counts.drafted], [*counts.accepted])
    assert found["verifications"] == counts.verifications - 1
    assert found["weight_bytes"] == counts.weight_bytes - first.weight_bytes
    assert found["cache_bytes"] == counts.cache_bytes - first.cache_bytes
    assert found["verifications"] + sum(found["accepted"]) == 14

    generator.decode(4)  # all decoding after a prompt counts together, and that after the next one anew
    both = generator.record()
    assert both["verifications"] + sum(both["accepted"]) == 14 + 3 and both["flops"] > found["flops"]
    generator.prefill(PROMPTS[:1])
    generator.decode(15)
    assert generator.record() == found


@pytest.mark.parametrize(
    "changes", [{}, {"skip_scope": "layer"}, {"small_layers": [1, 2]}, {"draft_vocabulary": 9}], ids=str
)
@pytest.mark.parametrize("pair", PAIRS_AND_AHEAD)
def test_flops_are_those_of_each_token_in_each_layer(tiny_model, done, pair, changes):
    """Token by token and layer by layer: a drafted one passes what the drafts share with the verification once."""
    model = tiny_model(**ROUTED, **AHEAD, **changes)
    verify, draft = policies(model, pair)
    generator = Speculating(model, verify, draft, "auto", CONTEXT, "3")
    generator.prefill(PROMPTS[:1])
    done.clear()
    generator.decode(15)
    expected, flops_at = 0, flops(model)
    for start, _, each, drafted in done:
        table = flops_at(start + 1 + each.drafted // 2)
        verified = patterns(model, verify, start, start + each.drafted + 1)
        alike = True
        for layer in range(LAYERS):
            alike = alike and layer < LAYERS - 1 and all(drafted[:, layer] == verified[:-1, layer])
            for place in range(each.drafted + 1):
                if place < each.drafted:
                    expected += table.by_route[layer, drafted[place, layer]]
                if place == each.drafted or not alike:
                    expected += table.by_route[layer, verified[place, layer]]
        of_draft = table.fixed * model.config.draft_vocabulary // model.config.vocab_size
        expected += (each.drafted + 1) * table.fixed + each.drafted * of_draft
    assert generator.record()["flops"] == expected


def test_without_drafts_the_work_is_that_of_plain_decoding(tiny_model):
    model = tiny_model(**ROUTED)
    verify, draft = policies(model, ("big", "BBs-"))
    generator = Speculating(model, verify, draft, "auto", [], "0")
    generator.prefill(PROMPTS[:1])
    generator.decode(2)
    found, position = generator.record(), len(PROMPTS[0])
    routes = generator.routes()
    read = touched.bytes_per_token(model, routes, position + 1, "planned")
    assert found["weight_bytes"] + found["cache_bytes"] == read
    assert found["flops"] == touched.flops_per_token(model.config, flops(model)(position + 1), routes, "planned")
    assert found["drafted"] == found["accepted"] == [] and found["verifications"] == 1


class Scripted:
    """Rounds that come to so many tokens of so many drafted, and take a second for each drafted one and two more."""

    def __init__(self, clock, script):
        self.clock, self.script, self.wanted = clock, iter(script), []
        self.foreseen, self.looks_ahead = None, False

    def run(self, _, wanted):
        self.wanted.append(wanted)
        drafted, tokens = next(self.script)
        self.clock.now += 2 + drafted
        self.clock.layer.offset += tokens
        return Round(list(range(tokens)), mx.zeros((drafted + 1, 1)), drafted, 100, 10)

    def step(self, history, _=None):
        return SimpleNamespace(read=lambda: self.run(history, 0))


class Clock:
    def __init__(self):
        self.now, self.joules = 0.0, 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def scripted(tiny_model):
    """``scripted(rounds, many)``: a generator whose rounds come to (drafted, tokens) each, and its clock."""

    def make(script, many="3"):
        clock, model = Clock(), tiny_model()
        generator = Speculating(model, *policies(model, ("big", "BBs-")), "auto", [], many, clock)
        generator.prefill(PROMPTS[:1])
        clock.layer = generator._cache[0]
        generator._rounds = Scripted(clock, script)
        return generator, clock

    return make


def test_the_tokens_of_a_round_share_its_time(scripted):
    generator, clock = scripted([(3, 2), (3, 4), (0, 1)])
    after = []

    def meter(came):
        after.append((came, clock.now))
        clock.now += 1  # the next tokens wait for it, as in plain decoding

    assert generator.decode(8, meter) == [2.5, 2.5, 1.5, 1.5, 1.5, 1.5, 3.0]
    assert after == [(2, 5.0), (4, 11.0), (1, 14.0)]
    assert generator._rounds.wanted == [3, 3, 0]  # no more than there is room for
    found = generator.record()
    assert (found["verifications"], found["drafted"], found["accepted"]) == (3, [2, 2, 2], [2, 1, 1])
    assert (found["weight_bytes"], found["cache_bytes"]) == (300, 30)


def test_what_auto_learns_stays_and_can_be_forgotten(scripted):
    generator, _ = scripted([(0, 1), (1, 2), (3, 4), (7, 1)] + [(0, 1)] * 40, "auto")
    generator.decode(24)
    wanted = generator._rounds.wanted
    assert wanted[:4] == [0, 1, 3, 7]  # what it tries first
    learned = len(wanted)
    generator.decode(4)
    assert wanted[learned:] == [1, 1, 0]  # it knows what pays, as far as there is room
    generator.forget()
    learned = len(wanted)
    generator.decode(14)
    assert wanted[learned : learned + 4] == [0, 1, 0, 0]  # here one draft could not pay


@pytest.fixture
def session(monkeypatch):
    """``session(clock)``: one whose meter counts a joule a second of the clock."""

    def make(clock):
        class Watt(Meter):
            name, scope, label, rails = "watt", "soc", "watt (soc)", {"soc": Rail()}

            def read(self):
                return Reading(clock.now, {"soc": clock.now})

        clocks = {"clock": clock, "wall": clock, "sleep": lambda _: None}
        monkeypatch.setattr(energy, "Window", partial(Window, **clocks))
        calm = Conditions(None, "AC Power", {}, (0.0, 0.0, 0.0), None)
        return Session(0, Watt(), None, calm, lambda: calm, lambda _: None, clock)

    return make


SETTINGS = Settings(
    preset="quick", least_rounds=1, most_rounds=1, minutes=1.0, precision=0.02, window=6.0, cool_down=0.0,
    quality_tokens=1, quality_length=1, seed=0,
)  # fmt: skip


def test_joules_are_of_accepted_tokens(scripted, session):
    """A window ends with a round, all of whose tokens count."""
    generator, clock = scripted([(0, 1), (3, 2), (3, 4), (0, 1)])  # the first is the prefill's
    real = generator.prefill

    def prefill(prompts):
        clock.now += 10
        return real(prompts)

    generator.prefill = prefill
    cell = Cell(DUO, "big", "auto", "float32", 5, 8, 1, 0, "BBs-", "3")
    case = Case(cell, {"runs": []}, generator, "planned")
    run = rounds.run(case, session(clock), SETTINGS, Prompts(PROMPTS[:1], None), 0, 0)
    window = run["decode_energy"]
    assert (window["total_j"], window["tokens"]) == (10.0, 6)  # two rounds: five seconds are less than the window's six
    assert run["token_s"] == [[2.5, 2.5, 1.25, 1.25, 1.25, 1.25, 2.0]]
    assert (run["speculation"]["verifications"], run["speculation"]["accepted"]) == (3, [2, 1, 1])


def run_of(number, counts, flops, why=()):
    found = asdict(Speculation(*counts)) | {"flops": flops} if counts else None
    return {"round": number, "invalid_why": [*why], "speculation": found}


def test_a_cells_counts_are_those_of_its_valid_runs():
    runs = [
        run_of(0, (4, (4, 2), (3, 1), 700, 70), 9),
        run_of(0, (2, (2, 2, 2), (2, 2, 0), 400, 40), 6),
        run_of(1, (9, (9,), (9,), 9000, 900), 90, ["it became hot"]),
        run_of(1, (9, (9,), (9,), 9000, 900), 90),
        run_of(2, (9, (9,), (9,), 9000, 900), 90),  # not back yet
    ]
    assert summary.speculation(runs) == {
        "drafted": [6, 4, 2],
        "accepted": [5, 3, 0],
        "verifications": 6,
        "tokens_per_verification": 14 / 6,
        "bytes_per_token": 1210 / 14,
        "flops_per_token": 15 / 14,
    }
    assert summary.speculation(runs[2:]) is None and summary.speculation([run_of(0, None, 0)] * 2) is None
    assert summary.speculation([{"round": 0, "invalid_why": []}] * 2) is None  # of a version that knew none


def test_a_case_speculates_and_has_learned_when_it_is_made(tiny_model):
    model = tiny_model(**ROUTED)
    prompts = Prompts([[3, 1, 4, 1, 5], [9, 2, 6]], None)
    group = [Cell(DUO, "big", "auto", "float32", 4, 9, 1, 6, *more) for more in ((), ("BBs-", "auto"), ("small", "2"))]
    records = [{"runs": []} for _ in group]
    made = rounds.cases(group, records, model, prompts, seed=0)
    assert [record["strategy_ran"] for record in records] == ["planned"] * 3
    assert [isinstance(case.generator, Speculating) for case in made] == [False, True, True]
    assert made[0].speculation() is None and made[1].generator._lengths._opening != [1, 3, 7, 0]
    assert max(len(made[2].speculation()[name]) for name in ("drafted", "accepted")) == 2
    for case in made:
        assert len(case.decode()) == 8
        case.note_routes(LAYERS)
        np.testing.assert_array_equal(case.routes, np.full((8, 1, LAYERS), 2))
