"""The figures that decide between strategies: what each call's time comes to, and that they can be taken here."""

import subprocess

import mlx.core as mx
import pytest

from duo_mlx.bench import figures
from duo_mlx.bench.figures import Effort, Figure
from duo_mlx.bench.interleave import Timings

TINY = Effort(rounds=2, steps=4, weights=1 << 16)


def test_a_figure_is_a_median_with_quartiles():
    assert Figure.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Figure(3.0, 2.0, 4.0)


def test_each_figure_is_a_difference_or_ratio_within_rounds(monkeypatch):
    taken = {"short": 10.0, "long": 14.0, "unread": 3.0, "read": 11.0, "products": 2.0, "crossing": 9.0, "staying": 5.0}

    def fake(calls, rounds, *, after_round, clock):
        assert list(calls) == list(taken) and rounds == 2 and clock is next
        after_round(2)
        # whatever slows a round slows all of it
        return Timings({name: [value, value, 3 * value, 3 * value] for name, value in taken.items()})

    monkeypatch.setattr(figures, "interleave", fake)
    done = []
    found = figures.measure(TINY, done.append, next)
    assert done == [2]
    medians = {name: figure.median for name, figure in found.items()}
    # 4 steps; rounds of 1 and 3 times the duration
    assert medians == {"bandwidth_bytes_s": (32768 + 32768 / 3) / 2, "dispatch_s": 2, "read_back_s": 4, "crossing_s": 2}


def test_the_calls_do_what_is_timed(monkeypatch):
    evaluated = []
    monkeypatch.setattr(figures, "interleave", lambda calls, *_, **__: evaluated.append(calls) or Timings({}))
    monkeypatch.setattr(figures.Figure, "of", classmethod(lambda *_: None))
    monkeypatch.setattr(figures.Timings, "rounds", lambda *_: [])
    figures.measure(TINY)
    (calls,) = evaluated
    for name in ("short", "long"):
        for _ in range(2 * TINY.rounds + 1):  # as many as interleave calls, with its warm-up
            calls[name]()
        with pytest.raises(IndexError):
            calls[name]()
    for call in ("unread", "read", "products", "crossing", "staying"):
        calls[call]()


def test_chains_have_as_many_steps_as_they_say(tmp_path):
    for steps in (1, 5):
        chain = figures._chain(steps)
        mx.export_to_dot(str(tmp_path / "graph"), chain)
        assert (tmp_path / "graph").read_text().count("Add") == steps
        assert chain.item() == steps


@pytest.mark.parametrize("weights", [1 << 16, 130 << 20])
def test_the_products_read_what_was_asked_for(weights):
    chain, read = figures._products(weights)
    assert weights * 0.9 < read <= weights
    assert 0.1 < mx.linalg.norm(chain()).item() / read**0.25 < 10  # neither grows nor fades


def test_they_can_be_measured_here():
    found = figures.measure(TINY)
    assert list(found) == ["bandwidth_bytes_s", "dispatch_s", "read_back_s", "crossing_s"]
    assert found["bandwidth_bytes_s"].median > 0
    assert all(figure.low <= figure.median <= figure.high for figure in found.values())


def test_another_process_measures_the_fast_crossing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: seen.append(rest) or run(command, **rest))
    figure, why = figures.fast_crossing()
    assert why == "" and figure.low <= figure.median <= figure.high
    assert seen[0]["env"]["MLX_METAL_FAST_SYNCH"] == "1" and seen[0]["timeout"] == figures.PATIENCE


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (subprocess.TimeoutExpired("python", 1), "no answer in 120 s"),
        (subprocess.CalledProcessError(-11, "python", stderr=""), "exit code -11"),
        (subprocess.CalledProcessError(1, "python", stderr="Traceback\nRuntimeError: no device\n"), "no device"),
        (OSError("no python"), "no python"),
        ("", "Expecting value"),
        ('{"median": 1}', "missing 2 required"),
    ],
)
def test_a_process_that_fails_is_a_reason(monkeypatch, outcome, why):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return subprocess.CompletedProcess("python", 0, stdout=outcome)

    monkeypatch.setattr(subprocess, "run", run)
    figure, said = figures.fast_crossing()
    assert figure is None and why in said and "\n" not in said


def test_what_auto_gets_are_medians_and_never_noise():
    found = {name: Figure(2.0, 1.0, 3.0) for name in ("bandwidth_bytes_s", "dispatch_s", "read_back_s", "crossing_s")}
    chosen = figures.chosen(found)
    assert (chosen.bandwidth_bytes_s, chosen.read_back_s, chosen.fast_crossing_s) == (2.0, 2.0, None)
    assert figures.chosen(found | {"fast_crossing_s": Figure(1.5, 1.0, 3.0)}).fast_crossing_s == 1.5
    assert figures.chosen(found | {"dispatch_s": Figure(-1e-9, -1.0, 1.0)}) is None


def test_weights_fit_the_machine(monkeypatch):
    assert figures.effort().weights == 1 << 28
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    for memory, weights in ((8 << 30, 1 << 29), (512 << 30, 1 << 30)):
        monkeypatch.setattr(mx, "device_info", lambda memory=memory: {"memory_size": memory})
        assert figures.effort().weights == weights
