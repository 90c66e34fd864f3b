"""bench run end to end on a tiny model: a sound result, what goes on after an interruption, what is refused."""

import copy
import csv
import json
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from duo_mlx.bench import figures, folder, parts, quality, results, suite, touched
from duo_mlx.bench.figures import Effort
from duo_mlx.bench.grid import Grid
from duo_mlx.bench.meters import Meter, Rail, Reading
from duo_mlx.bench.meters.none import NoMeter
from duo_mlx.bench.rounds import Settings
from duo_mlx.bench.subject import Subject
from duo_mlx.bench.suite import Question
from duo_mlx.bench.system import Conditions
from duo_mlx.errors import DuoError

COMMAND = "duo-mlx bench run --tokens 3"
GRID = Grid(("big", "Bs-B"), prompts=(4,), generated=(3,), contexts=(0, 6), deep_routes=("big", "Bs-B"))
SETTINGS = Settings(
    preset="quick", least_rounds=2, most_rounds=3, minutes=1.0, precision=1e-9, window=0.02, cool_down=0.0,
    quality_tokens=32, quality_length=16, seed=0,
)  # fmt: skip
CELLS = 3  # a group: two routes and mlx-lm
WATTS = 5.0


class Steady(Meter):
    """The same watts whatever is done."""

    name, scope, label, rails = "steady", "soc", "steady (soc)", {"soc": Rail()}

    def read(self):
        now = time.monotonic()
        return Reading(now, {"soc": WATTS * now})


def no_parts(_model, _context):
    each = dict.fromkeys(("embedding", "attention", "big", "small", "head", "sampling"), 0.001)
    return {"seconds": each, "whole": {}}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "effort", lambda: Effort(2, 3, 1 << 22))
        patched.setattr(parts, "measure", no_parts)
        patched.setattr(suite, "IDLE", 0.01)
        yield


@pytest.fixture(scope="module")
def directory(saved):
    return saved(max_position_embeddings=64)[0]


@pytest.fixture(scope="module")
def subject(directory):
    return Subject(str(directory), None)


@pytest.fixture(scope="module")
def question(tmp_path_factory):
    """``question(settings={}, **changes)``: one that the tiny model answers in two groups of three cells."""
    text = tmp_path_factory.mktemp("texts") / "text.txt"
    text.write_text("\n\n".join(" ".join(f"w{number * row % 29}" for number in range(9)) for row in range(12)))

    def make(settings=None, **changes):
        asked = Question(GRID, "mlx-lm", text, text, replace(SETTINGS, **(settings or {})), COMMAND)
        return replace(asked, **changes)

    return make


@pytest.fixture
def run(subject, question, tmp_path):
    """``run(meter=None, settings={}, question={}, **more)``: into ``tmp_path/"out"``."""

    def go(meter=None, settings=None, asked=None, **more):
        whole = question(settings, **(asked or {}))
        return suite.run(whole, subject, tmp_path / "out", meter or NoMeter({}), look=calm, **more)

    return go


def calm():
    return Conditions(None, "AC Power", {}, (0.0, 0.0, 0.0), None)


class Looks:
    """Conditions that raise ``error`` at a look; each session has one, and each run two."""

    def __init__(self, at, error=KeyboardInterrupt):
        self.at, self.error, self.seen = at, error, 0

    def __call__(self):
        if self.seen == self.at:
            raise self.error
        self.seen += 1
        return calm()


def in_round(number, run=0):
    """The look in the middle of a run of the first group."""
    return 1 + 2 * (2 * CELLS * number + run) + 1


@pytest.fixture(scope="module")
def whole(subject, question, tmp_path_factory):
    """A finished result with energy, its folder, and what progress was told."""
    out, told = tmp_path_factory.mktemp("whole") / "out", []
    meter = Steady()
    result = suite.run(question(), subject, out, meter, look=calm, progress=lambda *each: told.append(each))
    return out, result, told


def test_the_result_is_sound_and_in_the_folder_with_its_tables(whole):
    out, result, _ = whole
    assert results.read(out) == json.loads(json.dumps(result)) and result["complete"]
    assert [cell["id"] for cell in csv.DictReader((out / "results.csv").read_text().splitlines())] == [
        cell["id"] for cell in result["cells"]
    ]
    assert "| Bs-B | duo-mlx | auto (planned) |" in (out / "results.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "results.json", "results.md"]


def test_it_says_what_was_asked_and_measured_on(whole, subject, directory):
    _, result, _ = whole
    assert result["command"] == COMMAND and result["settings"]["quality_tokens"] == 32
    assert result["model"] == subject.record and result["model"]["name"] == directory.name
    assert result["texts"]["prompts"] | {"sha256": ""} == {
        "source": "text.txt",
        "sha256": "",
        "tokens": 108,
        "count": 12,
    }
    assert (result["texts"]["held_out"]["tokens"], result["texts"]["held_out"]["count"]) == (32, 2)
    assert result["system"]["versions"]["duo-mlx"]
    assert [(each["quantisation"], each["context"]) for each in result["parts"]] == [("float32", 0), ("float32", 6)]


def test_every_cell_has_its_rounds(whole):
    _, result, _ = whole
    assert [(cell["engine"], cell["route"], cell["context"]) for cell in result["cells"]] == [
        (engine, route, context)
        for context in (0, 6)
        for engine, route in (("duo-mlx", "big"), ("duo-mlx", "Bs-B"), ("mlx-lm", "big"))
    ]
    for cell in result["cells"]:
        assert cell["valid"] and cell["done"] and not cell["invalid_why"]
        assert [run["round"] for run in cell["runs"]] == [0, 0, 1, 1, 2, 2] and cell["summary"]["rounds"] == 3
        assert all(len(each) == 2 for run in cell["runs"] for each in run["token_s"])


def test_routes_are_as_realised(whole):
    _, result, _ = whole
    mixed = {"big": 0.5, "small": 0.25, "skip": 0.25}
    all_big = {"big": 1.0, "small": 0.0, "skip": 0.0}
    for cell in result["cells"]:
        assert cell["summary"]["route_mix"] == (mixed if cell["route"] == "Bs-B" else all_big)
        assert cell["big_layers"] == (2 if cell["route"] == "Bs-B" else 4)


def test_the_peer_is_there_and_has_no_strategy_and_no_quality(whole):
    _, result, _ = whole
    peers = [cell for cell in result["cells"] if cell["engine"] == "mlx-lm"]
    assert len(peers) == 2
    for cell in peers:
        assert (cell["strategy_ran"], cell["quality"]) == ("", None)
        assert cell["summary"]["byte_ratio"] == pytest.approx(1.0) and cell["summary"]["speed_up"]["median"] > 0


def test_quality_is_that_of_the_route_in_all_groups(whole):
    _, result, _ = whole
    ours = [cell for cell in result["cells"] if cell["engine"] == "duo-mlx"]
    assert ours[0]["quality"] == ours[2]["quality"] and ours[1]["quality"] == ours[3]["quality"]
    assert ours[0]["quality"]["kl"] == pytest.approx(0.0, abs=1e-6) and ours[1]["quality"]["kl"] > 0.01
    assert [each["route"] for each in result["samples"]["policies"]] == ["big", "Bs-B"]
    ids = result["samples"]["ids"]
    for each in result["samples"]["policies"]:
        assert len(each["loss"]) == len(ids) == len(result["samples"]["tokens"]) and each["loss"][0] is None
        assert set(each["patterns"]) == {"BBBB" if each["route"] == "big" else "Bs-B"}


def test_energy_is_from_the_same_runs(whole):
    _, result, _ = whole
    assert result["meter"]["idle"]["mean_w"] == pytest.approx(WATTS)
    for cell in result["cells"]:
        found = cell["summary"]
        for energy in (found["prefill_energy"], found["decode_energy"]):
            assert energy["mean_w"]["median"] == pytest.approx(WATTS)
            assert energy["net_j_per_token"]["median"] == pytest.approx(0.0, abs=1e-9)
        for run in cell["runs"]:  # the window has the very tokens that were timed, and what was between them
            window = run["decode_energy"]
            timed = [second for each in run["token_s"] for second in each][: window["tokens"]]
            assert len(timed) == window["tokens"] and window["seconds"] >= max(0.02, sum(timed) - 1e-4)
        joules = found["decode_energy"]["j_per_token"]["median"]
        assert found["edp_js"] == pytest.approx(joules * found["tpot_s"]["median"])
        assert found["why_no_energy"] == ""


def test_the_roofline_is_bandwidth_over_what_is_read(whole, subject):
    _, result, _ = whole
    bandwidth = result["roofline"]["bandwidth_bytes_s"]
    assert 1e7 < bandwidth < 1e13
    for cell in result["cells"][:2]:
        routes = np.array([[[2, 2, 2, 2] if cell["route"] == "big" else [2, 1, 0, 2]]], np.uint8)
        read = touched.bytes_per_token(subject.model("float32"), routes, 4 + 3 // 2, "planned")
        found = cell["summary"]
        assert found["bytes_per_token"] == pytest.approx(read)
        assert found["roofline_share"] == pytest.approx(read / found["tpot_s"]["median"] / bandwidth)
    assert result["cells"][1]["summary"]["byte_ratio"] > 1 < result["cells"][1]["summary"]["flop_ratio"]


def test_the_noise_floor_is_measured_once_a_session(whole):
    (session,) = whole[1]["sessions"]
    floor = session["noise_floor"]
    assert floor["low"] <= floor["median"] <= floor["high"] and 0.01 < floor["median"] < 100
    assert session["conditions"]["power_source"] == "AC Power" and session["cautions"] == []


def test_progress_only_grows_to_the_end(whole):
    _, _, told = whole
    cells = [done for stage, done, total in told if stage == "cells" and total == 2]
    assert cells == sorted(cells) and cells[-1] == 2.0 and 1.0 in cells
    assert [done for stage, done, _ in told if stage == "quality"][-1] == 1.0


def test_without_a_meter_energy_is_null_with_the_word_why(run):
    result = run(NoMeter({"rapl": "no such processor"}), asked={"against": "none"})
    assert len(result["cells"]) == 4 and result["meter"]["idle"] is None
    for cell in result["cells"]:
        assert cell["summary"]["decode_energy"] is None and cell["summary"]["edp_js"] is None
        assert cell["summary"]["why_no_energy"] == "rapl: no such processor"
        assert len(cell["runs"][0]["ttft_s"]) == 1


def test_cells_that_are_disturbed_all_the_time_are_not_valid(subject, question, tmp_path):
    changing = iter(range(10**6))

    def look():
        return replace(calm(), power_source=("AC Power", "Battery Power")[next(changing) % 2])

    result = suite.run(question({"most_rounds": 9}), subject, tmp_path / "out", NoMeter({}), look=look)
    assert result["complete"]
    results.check(result, "the result")
    for cell in result["cells"]:
        assert len(cell["runs"]) == 6 and not cell["valid"] and cell["summary"] is None  # it gave up
        assert all("the power source changed from" in why for why in cell["invalid_why"]) and cell["invalid_why"]
    assert "Not valid, and in no table" in (tmp_path / "out" / "results.md").read_text()


@pytest.fixture
def measured(monkeypatch):
    """How often quality, parts and the bandwidth were measured."""
    count = Counter()

    def counted(key, real, *arguments):
        count[key] += 1
        return real(*arguments)

    for key, module, name in (
        ("quality", quality, "measure"),
        ("parts", parts, "measure"),
        ("bandwidth", figures, "bandwidth"),
    ):
        monkeypatch.setattr(module, name, partial(counted, key, getattr(module, name)))
    return count


def interrupted(question, subject, out, look, error=KeyboardInterrupt, **more):
    """The result in the folder after an interruption."""
    with pytest.raises(error):
        suite.run(question, subject, out, NoMeter({}), look=look, **more)
    return results.read(out)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interruption_keeps_the_rounds_that_are_done_and_the_same_question_goes_on(
    subject, question, tmp_path, measured, error
):
    out = tmp_path / "out"
    left = interrupted(question(), subject, out, Looks(in_round(1, run=4), error), error)
    assert not left["complete"] and "Not finished" in (out / "results.md").read_text()
    assert [[run["round"] for run in cell["runs"]] for cell in left["cells"]] == [[0, 0]] * 3 + [[]] * 3
    assert [cell["valid"] for cell in left["cells"]] == [True] * 3 + [False] * 3
    assert left["cells"][3]["invalid_why"] == ["not measured"] and not any(cell["done"] for cell in left["cells"])
    assert measured == {"quality": 1, "parts": 1, "bandwidth": 1}
    before = copy.deepcopy(left)

    later = suite.run(question(), subject, out, NoMeter({}), look=calm)
    results.check(later, "the result")
    assert later["complete"] and results.read(out) == json.loads(json.dumps(later))
    assert measured == {"quality": 1, "parts": 2, "bandwidth": 1}
    assert len(later["sessions"]) == 2 and all(session["noise_floor"] for session in later["sessions"])
    assert later["sessions"][0] == before["sessions"][0]
    for cell, was in zip(later["cells"], before["cells"], strict=True):
        assert cell["runs"][: len(was["runs"])] == was["runs"]
        assert [run["round"] for run in cell["runs"]] == [0, 0, 1, 1, 2, 2]
        assert [run["session"] for run in cell["runs"]] == [0] * len(was["runs"]) + [1] * (6 - len(was["runs"]))
        assert cell["valid"] and cell["done"]
    assert [cell["quality"] for cell in later["cells"][:3]] == [cell["quality"] for cell in before["cells"][:3]]
    assert later["samples"] == before["samples"] and later["roofline"] == before["roofline"]


def test_groups_that_are_done_are_not_run_again(subject, question, tmp_path, measured):
    out = tmp_path / "out"
    left = interrupted(question(), subject, out, Looks(in_round(3)))  # the first group has three rounds
    assert [cell["done"] for cell in left["cells"]] == [True] * 3 + [False] * 3
    measured.clear()
    later = suite.run(question(), subject, out, NoMeter({}), look=calm)
    assert later["complete"] and not measured["quality"]
    assert [cell["runs"] for cell in later["cells"][:3]] == [cell["runs"] for cell in left["cells"][:3]]
    assert {run["session"] for cell in later["cells"][3:] for run in cell["runs"]} == {1}
    assert all(session["noise_floor"] for session in later["sessions"])


@pytest.mark.parametrize("at", [0, in_round(0)], ids=["before all", "the first round"])
def test_an_early_interruption_leaves_what_goes_on(subject, question, tmp_path, at):
    left = interrupted(question(), subject, tmp_path / "out", Looks(at))
    assert not any(cell["runs"] for cell in left["cells"])
    assert suite.run(question(), subject, tmp_path / "out", NoMeter({}), look=calm)["complete"]


def unchanged(out, line, go):
    """The error with which a run is refused that leaves the folder as it is."""
    before = {path: path.read_bytes() for path in out.iterdir()} if out.exists() else None
    with pytest.raises(DuoError, match=line) as caught:
        go()
    assert "\n" not in str(caught.value)
    assert ({path: path.read_bytes() for path in out.iterdir()} if out.exists() else None) == before


def test_another_question_or_meter_cannot_go_on(subject, question, tmp_path):
    out = tmp_path / "out"
    interrupted(question(), subject, out, Looks(in_round(1)))
    for asked, meter, what in (
        (question({"seed": 1}), NoMeter({}), "settings"),
        (question(grid=replace(GRID, routes=("big", "small"))), NoMeter({}), "cells"),
        (question(against="none"), NoMeter({}), "cells"),
        (question(prompts=None), NoMeter({}), "texts"),
        (question(), Steady(), "meter"),
    ):
        unchanged(out, f"with other {what}, so", lambda asked=asked, meter=meter: suite.run(asked, subject, out, meter))


def test_a_finished_result_is_only_replaced_by_force(run, tmp_path):
    brief = {"settings": {"least_rounds": 1, "most_rounds": 1}, "asked": {"against": "none"}}
    first = run(**brief)
    unchanged(tmp_path / "out", "holds a finished result", lambda: run(**brief))
    again = run(**brief, force=True)
    assert again["complete"] and len(again["sessions"]) == 1
    assert again["cells"][0]["runs"] != first["cells"][0]["runs"]


@pytest.fixture(scope="module")
def drafted(subject, question, tmp_path_factory):
    """A finished result with drafts, its folder, and how often quality was measured."""
    out, real, measured = tmp_path_factory.mktemp("drafted") / "out", quality.measure, []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(quality, "measure", lambda *given: measured.append([*given[1]]) or real(*given))
        asked = replace(GRID, generated=(9,), drafts=("Bs-s", "small"))
        result = suite.run(question({"most_rounds": 2}, grid=asked), subject, out, Steady(), look=calm)
    return out, result, measured


def test_speculation_is_measured_beside_its_verifying_route(drafted):
    out, result, measured = drafted
    results.check(result, "the result")
    assert results.read(out) == json.loads(json.dumps(result)) and result["complete"]
    assert [(cell["route"], cell["speculate"], cell["draft_tokens"]) for cell in result["cells"][:5]] == [
        ("big", "", ""), ("Bs-B", "", ""), ("big", "Bs-s", "auto"), ("big", "small", "auto"), ("big", "", ""),
    ]  # fmt: skip
    assert measured == [["big", "Bs-B"]]  # once, though each group has them
    big, cell = result["cells"][0], result["cells"][2]
    assert cell["quality"] == big["quality"] and cell["big_layers"] == 4 and cell["strategy_ran"] == "planned"
    assert cell["summary"]["route_mix"] == big["summary"]["route_mix"]
    assert cell["gpu_work"] is None and big["gpu_work"] is not None and big["speculation"] is None
    assert "big, drafts by Bs-s" in (out / "results.md").read_text()


def test_speculations_figures_are_of_accepted_tokens(drafted):
    _, result, _ = drafted
    big = result["cells"][0]["summary"]
    for cell in result["cells"][2:4]:
        found, counts = cell["summary"], cell["speculation"]
        runs = cell["runs"]
        tokens = sum(len(each) for run in runs for each in run["token_s"])
        assert {len(each) for run in runs for each in run["token_s"]} == {8}
        assert counts["verifications"] + sum(counts["accepted"]) == tokens
        assert counts["verifications"] == sum(run["speculation"]["verifications"] for run in runs)
        assert counts["tokens_per_verification"] == pytest.approx(tokens / counts["verifications"])
        read = sum(run["speculation"][key] for run in runs for key in ("weight_bytes", "cache_bytes"))
        assert found["bytes_per_token"] == counts["bytes_per_token"] == pytest.approx(read / tokens)
        assert found["byte_ratio"] == pytest.approx(big["bytes_per_token"] / found["bytes_per_token"])
        assert found["flop_ratio"] == pytest.approx(big["flops_per_token"] / counts["flops_per_token"])
        for run in runs:
            timed = [second for each in run["token_s"] for second in each]
            window = run["decode_energy"]
            assert window["seconds"] >= max(0.02, sum(timed[: window["tokens"]]) - 1e-4)
            assert window["total_j"] == pytest.approx(WATTS * window["seconds"])


@pytest.mark.parametrize(("asked", "line"), [
    ({"drafts": ("router",)}, "--speculate router: "),
    ({"drafts": ("smaller",)}, "--speculate smaller: "),
    ({"drafts": ("small", "big"), "routes": ("Bs-B",), "deep_routes": ("Bs-B",)},
     "--speculate big: the draft's routes read "),
    ({"drafts": ("small",), "draft_tokens": "few"}, "--speculate small: draft_tokens is few; it must be auto or a"),
    ({"drafts": ("small",), "draft_tokens": "64"}, "--speculate small: draft_tokens is 64, but the model's context is"),
])  # fmt: skip
def test_drafts_that_cannot_be_are_refused_before_anything_is_measured(run, measured, tmp_path, asked, line):
    unchanged(tmp_path / "out", line, lambda: run(asked={"grid": replace(GRID, **asked)}))
    assert not measured and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("grid", "line"), [
    ({"routes": ("bigger",)}, "bigger"),
    ({"routes": ("router",)}, "router"),
    ({"bits": (8,)}, "--bits 8: the hidden size 16"),
    ({"prompts": (62,)}, "is 65 positions; the model has 64"),
    ({"routes": ("random",), "strategies": ("auto", "masked", "fused")}, "--route random: strategy 'fused' cannot run"),
])  # fmt: skip
def test_what_the_model_cannot_run_is_refused_before_anything_is_measured(run, measured, tmp_path, grid, line):
    out = tmp_path / "out"
    brief = {"settings": {"least_rounds": 1, "most_rounds": 1}}
    whole = replace(GRID, contexts=(0,))
    unchanged(out, line, lambda: run(asked={"grid": replace(whole, **grid)}))
    folder.save(out, run(**brief))
    measured.clear()
    unchanged(out, line, lambda: run(asked={"grid": replace(whole, **grid)}, force=True))
    assert not measured


def test_a_router_is_not_planned(saved, question, tmp_path):
    subject, out = Subject(str(saved(router_choices="-sB", seed=2)[0]), None), tmp_path / "out"
    routed = replace(GRID, routes=("router",), contexts=(0,), strategies=("sorted", "planned"))
    unchanged(out, "--route router: strategy 'planned' needs routes that are known",
              lambda: suite.run(question(grid=routed), subject, out, NoMeter({})))  # fmt: skip
    routed = replace(routed, strategies=("auto", "sorted"))
    result = suite.run(question(grid=routed), subject, out, NoMeter({}), look=calm)
    assert [cell["strategy_ran"] for cell in result["cells"]][1:] == ["sorted", ""]
    assert result["cells"][0]["strategy_ran"] not in ("", "auto", "planned")
    mix = result["cells"][0]["summary"]["route_mix"]
    assert sum(mix.values()) == pytest.approx(1.0) and result["cells"][0]["big_layers"] == pytest.approx(4 * mix["big"])


def test_quantised_cells_have_a_quality_of_their_own(saved, question, tmp_path):
    wide = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 64}
    subject = Subject(str(saved(**wide)[0]), None)
    grid = replace(GRID, bits=(0, 4), contexts=(0,), batches=(2,))
    brief = question({"least_rounds": 1, "most_rounds": 1}, grid=grid, against="none")
    result = suite.run(brief, subject, tmp_path / "out", NoMeter({}), look=calm)
    results.check(result, "the result")
    plain, four = result["cells"][0], result["cells"][2]
    assert (plain["quantisation"], four["quantisation"]) == ("float32", "4-bit")
    assert plain["quality"]["loss"] != four["quality"]["loss"] and four["quality"]["kl"] == pytest.approx(0, abs=1e-6)
    assert four["summary"]["bytes_per_token"] < plain["summary"]["bytes_per_token"] / 3
    assert len(result["samples"]["policies"]) == 4 and result["parts"] == []


def test_time_is_shared_by_the_groups(run):
    """On a clock that moves on by a second whenever it is read, each group has half of the minute."""
    now = iter(range(10**9))
    result = run(settings={"most_rounds": 1000}, asked={"against": "none"}, clock=lambda: next(now))
    first, second = (len(cell["runs"]) // 2 for cell in result["cells"][::2])
    assert result["complete"] and 10 <= first <= 20 and abs(first - second) <= 3
