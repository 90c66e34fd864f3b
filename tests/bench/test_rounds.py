"""Rounds on a machine whose clock, joules and condition are scripted: order, ends, interruptions, what is invalid."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from duo_mlx.bench import energy, rounds
from duo_mlx.bench.grid import DUO, PEER, Cell
from duo_mlx.bench.meters import Meter, Rail, Reading
from duo_mlx.bench.meters.none import NoMeter
from duo_mlx.bench.meters.window import Window, measure_idle
from duo_mlx.bench.rounds import Case, Prompts, Session, Settings
from duo_mlx.bench.system import Conditions
from duo_mlx.generation import policy_of
from duo_mlx.policies import FixedPolicy
from duo_mlx.router import Router

TOKENS, PREFILL_J, TOKEN_J = 5, 0.25, 3.0  # tokens a generation; joules of a prompt token and of a decoded one
PROMPTS = Prompts([[number] * 9 for number in range(40)], None)
SETTINGS = Settings(
    preset="quick", least_rounds=2, most_rounds=4, minutes=1.0, precision=0.02, window=5.0, cool_down=0.0,
    quality_tokens=1, quality_length=1, seed=0,
)  # fmt: skip
REASON = "the power source changed from AC Power to Battery Power"


class Machine:
    """A clock, a counter of joules and conditions; ``script(n)`` is called before piece of work n."""

    def __init__(self):
        self.now, self.joules, self.done = 0.0, 0.0, 0
        self.level, self.source, self.load = 0, "AC Power", 0.1
        self.order, self.slept = [], []
        self.script = lambda _: None

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept.append(seconds)

    def look(self):
        return Conditions(self.level, self.source, {}, (self.load,) * 3, 0)

    def work(self, seconds, joules):
        self.now += seconds
        self.joules += joules


class Counter(Meter):
    """The machine's joules, as they are now."""

    name, scope, label, rails = "counter", "soc", "counter (soc)", {"soc": Rail()}

    def __init__(self, machine):
        self.machine = machine

    def read(self):
        return Reading(self.machine.now, {"soc": self.machine.joules})


class Worker:
    """A generator that takes ``seconds(n)`` a token in its n-th decoding, and as long a prompt token."""

    def __init__(self, machine, name, seconds, batch):
        self.machine, self.name, self.seconds, self.batch = machine, name, seconds, batch
        self.prompts, self.decoded = [], 0

    def prefill(self, prompts):
        self.machine.order.append(f"{self.name}>")
        self.prompts.append(prompts)
        took = len(prompts[0]) * self.seconds(self.decoded)
        self.machine.work(took, PREFILL_J * sum(map(len, prompts)))
        return took

    def decode(self, tokens, after_each):
        self.machine.script(self.machine.done)
        self.machine.done += 1
        self.machine.order.append(self.name)
        took = self.seconds(self.decoded)
        for _ in range(tokens - 1):
            self.machine.work(took, TOKEN_J * self.batch)
            after_each(1)
        self.decoded += 1
        return [took] * (tokens - 1)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    clocks = {"clock": machine.clock, "wall": machine.clock, "sleep": machine.sleep}
    monkeypatch.setattr(energy, "Window", partial(Window, **clocks))
    return machine


@pytest.fixture
def session(machine):
    """``session(meter=None, number=0)``: a session that begins now; without a meter if none is given."""

    def make(meter=None, number=0, idle=None):
        meter = meter or NoMeter({}, machine.clock)
        return Session(number, meter, idle, machine.look(), machine.look, machine.sleep, machine.clock)

    return make


@pytest.fixture
def make_cases(machine):
    """``make_cases(*seconds, batch=1)``: cells a, b, ... that take so long a token, as a number or by decoding."""

    def make(*seconds, batch=1):
        made = []
        for name, each in zip("abc", seconds, strict=False):
            of = each if callable(each) else lambda _, each=each: each
            cell = Cell(DUO, name, "auto", "float32", 3, TOKENS, batch, 0)
            made.append(Case(cell, {"runs": []}, Worker(machine, name, of, batch), "planned"))
        return made

    return make


def go(cases, session, until=1e9, **settings):
    """All rounds; what each said."""
    return list(rounds.rounds(cases, session, replace(SETTINGS, **settings), PROMPTS, until))


def numbers(case):
    return [run["round"] for run in case.record["runs"]]


def decoded(machine):
    return "".join(name for name in machine.order if name.isalpha())


def test_cells_go_there_and_back(machine, session, make_cases):
    cases = make_cases(1.0, 2.0, 3.0)
    assert go(cases, session()) == [False, True]
    assert decoded(machine) == "abccba" * 2
    assert machine.order[:4] == ["a>", "a", "b>", "b"]  # decoding is after the run's own prefill
    assert [numbers(case) for case in cases] == [[0, 0, 1, 1]] * 3


@pytest.mark.parametrize("batch", [1, 3])
def test_prompts_are_others_in_each_run_and_the_same_for_each_cell(session, make_cases, batch):
    cases = make_cases(1.0, 2.0, batch=batch)
    go(cases, session())
    first, second = (case.generator.prompts for case in cases)
    assert first == second == [[[batch * run + row] * 3 for row in range(batch)] for run in range(4)]


def test_prefills_of_a_window_go_on_through_the_prompts(machine, session, make_cases):
    (case,) = make_cases(1.0)
    go([case], session(Counter(machine)), window=8.0, most_rounds=1)
    assert case.generator.prompts == [[[number] * 3] for number in (0, 1, 2, 1, 2, 3)]


def test_prompts_begin_a_text_only_where_there_is_no_context():
    prompts = Prompts([[7, 8], [9]], 1)
    cell = Cell(DUO, "big", "auto", "float32", 4, 2, 2, 0)
    assert prompts.of(cell, 0) == [[1, 7, 8, 9], [1, 9, 7, 8]] and prompts.context(cell) == []
    deeper = replace(cell, context=5)
    assert prompts.of(deeper, 0) == [[7, 8, 9, 7], [9, 7, 8, 9]] and prompts.context(deeper) == [1, 9, 7, 8, 9]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [8, 11], ids=["there", "the last way back"])
def test_an_interrupted_round_leaves_nothing_and_those_before_stay(machine, session, make_cases, error, at):
    cases, kept = make_cases(1.0, 2.0, 3.0), []

    def script(number):
        if number == 6:  # the first round is over
            kept.extend([*case.record["runs"]] for case in cases)
        if number == at:
            raise error

    machine.script = script
    with pytest.raises(error):
        go(cases, session())
    assert [case.record["runs"] for case in cases] == kept and [numbers(case) for case in cases] == [[0, 0]] * 3


def test_a_later_session_goes_on_with_the_next_round(session, make_cases):
    cases = make_cases(1.0, 2.0)
    go(cases, session(), most_rounds=1, least_rounds=1)
    before = [[*case.record["runs"]] for case in cases]
    assert go(cases, session(number=1), most_rounds=3, least_rounds=3) == [False, True]
    for case, runs in zip(cases, before, strict=True):
        assert case.record["runs"][:2] == runs and numbers(case) == [0, 0, 1, 1, 2, 2]
        assert [run["session"] for run in case.record["runs"]] == [0, 0, 1, 1, 1, 1]
        assert case.generator.prompts == [[[number] * 3] for number in range(6)]


def test_it_ends_when_ratios_are_precise_but_not_before_the_least_rounds(session, make_cases):
    assert go(make_cases(1.0, 2.0), session(), least_rounds=3, most_rounds=9) == [False, False, True]


def test_it_goes_on_while_a_ratio_is_not_precise(session, make_cases):
    def unsteady(number):
        return 2.0 + number // 2 % 2  # from round to round

    assert go(make_cases(1.0, 1.0, unsteady), session(), most_rounds=7) == [False] * 6 + [True]
    assert go(make_cases(unsteady, unsteady), session(), most_rounds=7) == [False, True]  # a drift that both share
    assert go(make_cases(1.0, unsteady), session(), most_rounds=7, precision=0.5) == [False, True]


@pytest.mark.parametrize("seconds", [(1.0,), (1.0, 2.0)])
def test_a_lost_round_is_not_one_of_the_least(machine, session, make_cases, seconds):
    """One valid round would be its own interval, and look as precise as can be."""

    def script(number):
        machine.source = "AC Power" if number else "Battery Power"

    cases, began = make_cases(*seconds), session()
    machine.script = script
    assert go(cases, began) == [False, False, True]
    assert cases[0].record["runs"][0]["invalid_why"]


def test_a_single_cell_ends_when_its_time_is_precise(session, make_cases):
    assert go(make_cases(1.0), session()) == [False, True]
    assert go(make_cases(lambda number: 1.0 + number // 2), session()) == [False, False, False, True]


def test_it_ends_with_the_time_after_a_whole_round(machine, session, make_cases):
    cases = make_cases(1.0, lambda number: 1.0 + number)
    assert go(cases, session(), until=50.0, most_rounds=99)[-1]
    lengths = [2 * (3 + TOKENS - 1) + (2 * (2 * number) + 3) * (3 + TOKENS - 1) for number in range(2)]
    assert machine.now == sum(lengths) > 50.0 > lengths[0] and [numbers(case) for case in cases] == [[0, 0, 1, 1]] * 2


def test_it_runs_one_round_even_without_time(session, make_cases):
    assert go(make_cases(1.0, 2.0), session(), until=-1.0) == [True]


def test_it_gives_up_after_rounds_of_which_nothing_is_valid(machine, session, make_cases):
    cases, began = make_cases(1.0, 2.0), session()
    machine.source = "Battery Power"
    assert go(cases, began, most_rounds=99) == [False, False, True]
    assert all(run["invalid_why"] == [REASON] for case in cases for run in case.record["runs"])


def test_a_valid_round_in_between_is_hope(machine, session, make_cases):
    def script(number):  # two runs a round
        machine.source = "AC Power" if number in (3, 4, 5) else "Battery Power"

    machine.script = script
    (case,) = make_cases(1.0)
    case.generator.seconds = lambda number: 1.0 + number  # never precise
    began = session()
    machine.source = "Battery Power"
    assert len(go([case], began, most_rounds=99)) == 6


@pytest.mark.parametrize(("change", "reason"), [
    ({"source": "Battery Power"}, REASON),
    ({"level": 2}, "the thermal pressure changed from 0 to 2"),
])  # fmt: skip
def test_a_change_during_a_run_makes_it_invalid(machine, session, make_cases, change, reason):
    """The third run of all, which is b's way back; then all is as it was."""

    def script(number):
        vars(machine).update(change if number == 2 else {"source": "AC Power", "level": 0})

    machine.script = script
    cases = make_cases(1.0, 2.0)
    go(cases, session(), least_rounds=1, most_rounds=1)
    assert [run["invalid_why"] for run in cases[1].record["runs"]] == [[], [reason]]


def test_a_source_that_changed_since_the_session_began_makes_later_runs_invalid(machine, session, make_cases):
    def script(number):
        if number == 2:
            machine.source = "Battery Power"

    machine.script = script
    cases = make_cases(1.0, 2.0)
    go(cases, session(), least_rounds=1, most_rounds=1)
    # the order is a b b a: it changed in b's second run, and stayed so in a's
    assert [[run["invalid_why"] for run in case.record["runs"]] for case in cases] == [[[], [REASON]]] * 2
    again = make_cases(1.0)  # a new session begins with what there is
    go(again, session())
    assert all(not run["invalid_why"] for run in again[0].record["runs"])


def test_a_machine_that_cools_down_is_from_then_on_what_runs_are_compared_with(machine, session, make_cases):
    machine.level = 1

    def script(number):
        machine.level = int(number == 0)

    machine.script = script
    cases = make_cases(1.0)
    go(cases, session(), least_rounds=2, most_rounds=2)
    cooled = "the thermal pressure changed from 1 to 0"
    assert [run["invalid_why"] for run in cases[0].record["runs"]] == [[], [cooled], [], []]


def test_load_makes_nothing_invalid(machine, session, make_cases):
    def script(number):
        machine.load = float(number)

    machine.script = script
    cases = make_cases(1.0, 2.0)
    go(cases, session())
    assert all(not run["invalid_why"] for case in cases for run in case.record["runs"])


def test_it_rests_between_runs(machine, session, make_cases):
    go(make_cases(1.0, 2.0), session(), least_rounds=1, most_rounds=1, cool_down=7.0)
    assert machine.slept == [7.0] * 4


@pytest.mark.parametrize(("cools_after", "waited"), [(35.0, 40.0), (1e9, rounds.PATIENCE)])
def test_a_hot_machine_is_waited_for_but_not_for_ever(machine, session, make_cases, cools_after, waited):
    (case,), began = make_cases(1.0), session()
    look = machine.look
    machine.level = 1

    def cooling():
        machine.level = int(machine.now < cools_after)
        return look()

    began.look = cooling
    found = rounds.run(case, began, SETTINGS, PROMPTS, 0, 0)
    assert sum(machine.slept) == waited
    assert found["invalid_why"] == ([] if cools_after < waited else ["the thermal pressure changed from 0 to 1"])


def test_a_machine_that_was_hot_or_is_unknown_is_not_waited_for(machine, session, make_cases):
    for level in (1, None):
        machine.level = level
        go(make_cases(1.0), session())
    assert machine.slept == []


@pytest.mark.parametrize("batch", [1, 4])
def test_the_same_runs_have_latency_and_energy(machine, session, make_cases, batch):
    """A meter whose joules are in proportion to tokens: every run's joules a token are these, and so are its times."""
    cases = make_cases(0.25, 0.5, batch=batch)
    go(cases, session(Counter(machine)))
    for case, seconds in zip(cases, (0.25, 0.5), strict=True):
        for run in case.record["runs"]:
            prefill, decode = run["prefill_energy"], run["decode_energy"]
            assert prefill["total_j"] / prefill["tokens"] == pytest.approx(PREFILL_J)
            assert decode["total_j"] / decode["tokens"] == pytest.approx(TOKEN_J)
            assert prefill["tokens"] == batch * 3 * len(run["ttft_s"])
            # the window ends in the middle of a generation, which goes on, and is in the times
            assert decode["seconds"] == pytest.approx(5.0) and decode["tokens"] == batch * 5.0 / seconds
            timed = sum(map(len, run["token_s"]))
            assert decode["tokens"] <= batch * timed < decode["tokens"] + batch * (TOKENS - 1)
            assert run["ttft_s"] == [3 * seconds] * len(run["ttft_s"])
            assert {second for each in run["token_s"] for second in each} == {seconds}
            assert decode["net_j"] is None


def test_net_joules_are_less_the_sessions_idle_ones(machine, session, make_cases):
    meter = Counter(machine)

    def idle_sleep(seconds):
        machine.work(seconds, 1.5 * seconds)

    idle = measure_idle(meter, 10.0, clock=machine.clock, wall=machine.clock, sleep=idle_sleep)
    cases = make_cases(0.5)
    go(cases, session(meter, idle=idle))
    for run in cases[0].record["runs"]:
        decode = run["decode_energy"]
        assert decode["net_j"] == pytest.approx(decode["total_j"] - 1.5 * decode["seconds"])


def test_without_a_meter_a_run_is_one_generation(session, make_cases):
    cases = make_cases(0.123456789)
    go(cases, session())
    for run in cases[0].record["runs"]:
        assert run["prefill_energy"] is None and run["decode_energy"] is None
        assert run["ttft_s"] == [0.3703704] and run["token_s"] == [[0.1234568] * (TOKENS - 1)]
        assert run["peak_bytes"] >= run["working_bytes"] >= 0


def test_the_noise_floor_is_one_where_there_is_no_noise(machine, make_cases):
    (case,) = make_cases(1.0)
    assert rounds.noise_floor(case, PROMPTS, 3) == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert decoded(machine) == "a" * 12  # there and back


def test_the_noise_floor_pairs_there_and_back(make_cases):
    """A steady drift cancels within a round, where a slow half does not."""
    (case,) = make_cases(lambda number: 10.0 + number)
    assert rounds.noise_floor(case, PROMPTS, 3) == pytest.approx({"median": 1.0, "low": 1.0, "high": 1.0})
    (case,) = make_cases(lambda number: 1.0 + (number % 4 in (1, 2)))
    assert rounds.noise_floor(case, PROMPTS, 3)["median"] == 2.0


def test_cases_run_what_their_cells_say(tiny_model):
    model = tiny_model(router_choices="-sB", seed=2)
    prompts = Prompts([[3, 1, 4, 1, 5], [9, 2, 6]], None)
    sizes = ("float32", 4, 3, 2, 6)
    asked = [(DUO, "big", "auto"), (DUO, "Bs-B", "dense"), (DUO, "router", "sorted"), (PEER, "big", "auto")]
    group = [Cell(*each, *sizes) for each in asked]
    records = [{"runs": []} for _ in group]
    made = rounds.cases(group, records, model, prompts, seed=0)
    assert [record["strategy_ran"] for record in records] == ["planned", "dense", "sorted", ""]
    assert [case.by_router for case in made] == [False, False, True, False]
    assert isinstance(policy_of(model, "big"), FixedPolicy) and isinstance(policy_of(model, "router"), Router)
    for case, pattern in zip(made, ([2, 2, 2, 2], [2, 1, 0, 2], None, [2, 2, 2, 2]), strict=True):
        assert case.routes.shape[1:] == (2, 4) and len(case.decode()) == 2
        if pattern:
            assert np.array_equal(case.routes, np.broadcast_to(pattern, case.routes.shape))
