"""What ``auto`` takes in every situation, by device, self-checks and the doctor's figures."""

import itertools
import warnings

import mlx.core as mx
import mlx.nn as nn
import pytest

from duo_mlx import auto
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN, GatedFFN
from duo_mlx.kernels import launch, selfcheck, verdicts
from duo_mlx.kernels.verdicts import Figures, Verdict

NO_GPU = "Metal kernels need an Apple GPU, and MLX finds none here"
FIGURES = Figures(bandwidth_bytes_s=1e11, dispatch_s=5e-6, read_back_s=3e-4, crossing_s=1e-4)
PASSED, FAILED = Verdict(True), Verdict(False, "wrong")
BIG = 3 * 64 * 96 * 4  # bytes of the FFNs' big in float32


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path))
    verdicts.record.cache_clear()
    yield
    verdicts.record.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    """``machine(gpu, fused, masked, figures)``: what it has, and what self-checks find there."""

    def make(gpu=True, fused=PASSED, masked=PASSED, figures=None):
        monkeypatch.setattr(launch, "unavailable", lambda: None if gpu else NO_GPU)
        found = {"fused": fused, "masked": masked}
        monkeypatch.setattr(selfcheck, "check", lambda strategy, *_: found[strategy])
        if figures:
            verdicts.record().store(figures=figures)

    return make


@pytest.fixture(scope="module")
def ffns():
    return make_ffns()


def make_ffns(small=True, bits=0, dtype=mx.float32):
    made = DuoFFN(GatedFFN(64, 96), GatedFFN(64, 32) if small else None, None, 0)
    made.set_dtype(dtype)
    if bits:
        nn.quantize(made, 32, bits)
    return made


CHECKS = {
    "both pass": (PASSED, PASSED),
    "fused fails": (FAILED, PASSED),
    "masked fails": (PASSED, FAILED),
    "both fail": (FAILED, FAILED),
}
# on a GPU, by who knows the routes and the number of tokens: under each of CHECKS
ON_GPU = {
    ("host", 1): ("sorted", "sorted", "sorted", "sorted"),
    ("host", 2): ("fused", "sorted", "fused", "sorted"),
    ("host", 8): ("fused", "sorted", "fused", "sorted"),
    ("host", 9): ("sorted", "sorted", "sorted", "sorted"),
    ("host", 512): ("sorted", "sorted", "sorted", "sorted"),
    ("device", 1): ("fused", "masked", "fused", "sync"),
    ("device", 2): ("fused", "masked", "fused", "sorted"),
    ("device", 8): ("fused", "masked", "fused", "sorted"),
    ("device", 9): ("sorted", "sorted", "sorted", "sorted"),
    ("device", 512): ("sorted", "sorted", "sorted", "sorted"),
}


@pytest.mark.filterwarnings("ignore:strategy .* failed its self-check:RuntimeWarning")
@pytest.mark.parametrize(("known_by", "rows"), ON_GPU)
@pytest.mark.parametrize("checks", CHECKS)
@pytest.mark.parametrize("figures", [None, FIGURES], ids=["no figures", "figures"])
def test_on_a_gpu(machine, ffns, known_by, rows, checks, figures):
    fused, masked = CHECKS[checks]
    machine(fused=fused, masked=masked, figures=figures)
    expected = ON_GPU[known_by, rows][list(CHECKS).index(checks)]
    for _ in range(2):
        assert auto.choose(ffns, rows, mx.float32, known_by) == expected


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 512])
@pytest.mark.parametrize("known_by", ["host", "device"])
def test_on_a_cpu(machine, ffns, known_by, rows):
    machine(gpu=False, figures=FIGURES)
    expected = "sync" if (known_by, rows) == ("device", 1) else "sorted"
    assert auto.choose(ffns, rows, mx.float32, known_by) == expected


def test_every_situation_has_preferences():
    assert set(auto.PREFERENCES) == set(itertools.product(("host", "device"), ("one", "few", "many"), ("cpu", "gpu")))
    for known_by, tokens, device in auto.PREFERENCES:
        last = auto.PREFERENCES[known_by, tokens, device][-1]
        assert last in ("sync", "sorted"), "what runs everywhere comes last"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_leave_masked_out(machine, bits):
    quantised = make_ffns(bits=bits)
    machine()
    assert auto.choose(quantised, 1, mx.float32, "device") == "fused"
    machine(fused=FAILED)
    verdicts.record.cache_clear()
    verdicts.cache_file().unlink()
    with pytest.warns(RuntimeWarning, match="'fused' failed"):
        assert auto.choose(quantised, 1, mx.float32, "device") == "sync"


def test_what_the_kernels_refuse_needs_no_check(machine, monkeypatch):
    machine()
    monkeypatch.setattr(selfcheck, "check", lambda *_: pytest.fail("it was launched"))
    assert auto.choose(make_ffns(bits=3), 1, mx.float32, "device") == "sync"
    assert auto.choose(make_ffns(bits=3), 2, mx.float32, "device") == "sorted"
    assert auto.choose(make_ffns(dtype=mx.float16), 1, mx.float32, "device") == "sync"


def test_a_layer_without_a_small_ffn(machine):
    machine()
    assert auto.choose(make_ffns(small=False), 1, mx.float32, "device") == "fused"


@pytest.mark.parametrize(
    ("slowdowns", "bandwidth", "expected"),
    [
        ((1.0, 1.0), 1e11, "fused"),  # equal: in the order of the table
        ((1.5, 1.2), 1e11, "masked"),
        ((None, 1.2), 1e11, "fused"),  # not timed: taken to be as fast as planned
        ((1.5, 1.2), BIG / 1e-4, "masked"),  # big takes 0.1 ms and a read-back 0.3 ms
        ((1.5, 1.6), BIG / 1e-3, "sync"),  # big takes 1 ms: half of it is more than the wait
        ((1.2, 1.6), BIG / 1e-3, "fused"),
        ((3.0, 3.0), 1e11, "fused"),  # small modules: nothing is as slow as a wait
    ],
)
def test_figures_and_slowdowns_order_what_is_usable(machine, ffns, slowdowns, bandwidth, expected):
    figures = Figures(bandwidth, dispatch_s=5e-6, read_back_s=3e-4, crossing_s=1e-4)
    fused, masked = (Verdict(True, slowdown=slowdown) for slowdown in slowdowns)
    machine(fused=fused, masked=masked, figures=figures)
    assert auto.choose(ffns, 1, mx.float32, "device") == expected
    instead = {"sync": "sorted"}.get(expected, expected)
    assert auto.choose(ffns, 4, mx.float32, "device") == instead
    assert auto.choose(ffns, 4, mx.float32, "host") == "fused"  # no wait is saved there


def test_slowdowns_without_figures_change_nothing(machine, ffns):
    machine(fused=Verdict(True, slowdown=9.0), masked=Verdict(True, slowdown=1.0))
    assert auto.choose(ffns, 1, mx.float32, "device") == "fused"


def test_a_refusal_has_its_reason(machine, ffns):
    machine(gpu=False)
    assert auto.refusal("fused", ffns, 1, mx.float32) == NO_GPU
    assert auto.refusal("masked", ffns, 1, mx.float32) is None
    machine(fused=FAILED)
    with pytest.warns(RuntimeWarning):
        assert auto.refusal("fused", ffns, 1, mx.float32) == "its self-check failed on this machine: wrong"
    for strategy in ("planned", "sorted", "sync", "dense"):
        assert auto.refusal(strategy, ffns, 1, mx.float32) is None
    line = "strategy 'fused' cannot run here: .* failed .*: wrong; use auto, sync, sorted or dense"
    with pytest.warns(RuntimeWarning), pytest.raises(DuoError, match=line):
        auto.require("fused", ffns, 1, mx.float32)
    auto.require("masked", ffns, 1, mx.float32)


def test_a_passed_check_is_quiet_and_made_once(machine, ffns, monkeypatch):
    machine()
    made = []
    monkeypatch.setattr(selfcheck, "check", lambda strategy, *_: made.append(strategy) or PASSED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            auto.choose(ffns, 1, mx.float32, "device")
    assert "fused" in made and len(made) == len(set(made))
