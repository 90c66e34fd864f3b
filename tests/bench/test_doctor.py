"""The doctor's logic on a device that is not there: what a kernel may do wrong, and what becomes of it."""

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from duo_mlx import _blas, auto, forms
from duo_mlx.bench import doctor, figures, meters, variants
from duo_mlx.bench.figures import Figure
from duo_mlx.bench.variants import Plan, Shape
from duo_mlx.errors import DuoError
from duo_mlx.kernels import fused, launch, selfcheck, verdicts
from duo_mlx.kernels.verdicts import Verdict

SHAPES = (Shape(32, 64, 32, 32, timed=True), Shape(33, 45, 1, 0, biases=True))
BRIEF = Plan(repeats=1, rounds=1, shapes=(Shape(32, 32, 32, 32),))
TIMED = Plan(repeats=2, rounds=2, shapes=SHAPES[:1], chain=1)
FIGURES = dict.fromkeys(("bandwidth_bytes_s", "dispatch_s", "read_back_s", "crossing_s"), Figure(1e-4, 1e-5, 1e-3))


@dataclass
class Device:
    """Runs a launch by MLX's own products; ``fault`` happens to the kernels that ``faulty`` says."""

    fault: str = ""
    faulty: Callable[[launch.Launch], bool] = lambda _: True
    seconds: float = 0.0  # that each launch takes, by `clock`
    launched: list[launch.Launch] = field(default_factory=list)
    now: float = 0.0

    def clock(self) -> float:
        self.now += 1e-3
        return self.now

    def execute(self, asked: launch.Launch) -> list[mx.array]:
        self.launched.append(asked)
        self.now += self.seconds
        given, template = dict(asked.inputs), dict(asked.template)
        *others, out = getattr(self, asked.kernel)(given, template)
        if self.fault and self.faulty(asked):
            out = getattr(self, self.fault)(out)
        return [*others, out]

    def up(self, given, template):
        inners = []
        for which in ("small", "big"):
            act = list(forms.ACTIVATIONS.values())[template[f"{which.upper()}_ACTIVATION"]]
            inner = linear(given, template, which, "up", given["x"])
            gated = template[f"{which.upper()}_GATED"]
            inners.append(act(linear(given, template, which, "gate", given["x"])) * inner if gated else act(inner))
        missing = inners[1].shape[-1] - inners[0].shape[-1]
        inners[0] = mx.pad(inners[0], [(0, 0), (0, missing)])
        return [chosen(given["route"], template, *inners)]

    def down(self, given, template):
        width = given["small_down"].shape[-1]
        small = given["inner"][..., : width * 32 // template["SMALL_BITS"] if template["SMALL_BITS"] else width]
        outs = [linear(given, template, which, "down", x) for which, x in (("small", small), ("big", given["inner"]))]
        return [chosen(given["route"], template, *outs)]

    def route(self, given, template):  # noqa: ARG002
        logits = (given["x"] @ given["weight"].T).astype(mx.float32) + given["offsets"]
        return [given["choices"][mx.argmax(logits, axis=-1)]]

    def wrong(self, out):
        return out + 1

    def unwritten(self, out):
        prefilled = launch._init_value
        last = mx.arange(out.shape[-1]) == out.shape[-1] - 1
        return out if prefilled is None else mx.where(last, mx.array(prefilled, out.dtype), out)

    def racing(self, out):
        return mx.where(len(self.launched) % 3 == 0, out * (1 + 2**-7), out)

    def uncompiled(self, out):  # noqa: ARG002
        raise RuntimeError(
            "[metal::Device] Unable to build metal library from source\nerror: no type\n    named 'half9'"
        )


def linear(given, template, which, kind, x):
    name = f"{which}_{kind}"
    bits, group, bias = (template[f"{which.upper()}_{part}"] for part in ("BITS", "GROUP", "BIAS"))
    if bits:
        out = mx.quantized_matmul(
            x, given[name], given[f"{name}_scales"], given[f"{name}_biases"], group_size=group, bits=bits
        )
    else:
        out = x @ given[name].T
    return out + given[f"{name}_bias"] if bias else out


def chosen(route, template, small, big):
    column = route[..., None]
    return mx.where((column == 2) | ((column == 1) & template["SHARED"]), big, mx.where(column == 1, small, 0))


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The file of verdicts, which is the test's own; little is measured."""
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path / "cache"))
    verdicts.record.cache_clear()
    monkeypatch.setattr(meters, "found", lambda: [meters.Found("rapl", "", "there is none")])
    monkeypatch.setattr(figures, "effort", lambda: figures.Effort(2, 3, 4096))
    monkeypatch.setattr(figures, "fast_crossing", lambda: (None, "no answer in 120 s"))
    monkeypatch.setattr(figures, "measure", lambda *_: dict(FIGURES))
    yield tmp_path / "cache" / "verdicts.json"
    verdicts.record.cache_clear()


@pytest.fixture
def device(monkeypatch):
    """A device without faults, and with fewer variants than the doctor tries: one of each kind."""
    device = Device()
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    monkeypatch.setattr(launch, "execute", device.execute)
    monkeypatch.setattr(variants, "ROWS", (1, 8))
    monkeypatch.setattr(variants, "BITS", (0, 4))
    monkeypatch.setattr(variants, "ROUTER_CHOICES", (2,))
    return device


def fresh():
    """The record as the next process reads it."""
    verdicts.record.cache_clear()
    return verdicts.record()


@pytest.mark.usefixtures("device")
def test_every_variant_is_checked_and_kept(monkeypatch):
    monkeypatch.setattr(variants, "ROWS", tuple(fused.COLUMNS))
    monkeypatch.setattr(variants, "BITS", (0, 4, 8))
    progress = []
    plan = Plan(repeats=1, rounds=0, shapes=SHAPES)
    report = doctor.examine(plan, progress=lambda *said: progress.append(said))
    assert report.failed == [] and report.no_kernels is None
    ran = {(c.what, c.weights, c.dtype, c.rows) for c in report.checks if not c.refused}
    dtypes, rows = ("float32", "float16", "bfloat16"), (1, 2, 4, 8)
    assert ran == (
        {("fused", weights, d, r) for weights in ("float", "4-bit", "8-bit") for d in dtypes for r in rows}
        | {("masked", "float", "float32", r) for r in rows}  # MLX's product takes no other on a CPU
        | {("router", "", d, r) for d in dtypes for r in rows}
    )
    assert {
        c.refused for c in report.checks if c.what == "masked" and c.weights == "4-bit" and c.dtype == "float32"
    } == {"MLX's masked product takes plain floats, and these weights are quantised"}
    assert progress[0][0] == "kernels" and progress[-1][1] < progress[-1][2]
    kept = fresh().verdicts
    assert len(kept) == len([c for c in report.checks if not c.refused])
    assert all(verdict == Verdict(True) for verdict in kept.values())
    ffns = variants.make(SHAPES[0], 4, mx.bfloat16)
    assert auto.choose(ffns, 1, mx.bfloat16, "device") == "fused"
    assert report.stored == str(verdicts.record().file)


FAULTS = {
    "wrong": "differs from the modules by",
    "unwritten": "an output was not written",
    "racing": "repeats do not agree",
    "uncompiled": "[metal::Device] Unable to build metal library from source error: no type named 'half9'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_verdict_shown_kept_and_heeded(device, fault):
    device.fault = fault
    device.faulty = lambda asked: asked.kernel == "down" and dict(asked.template)["T"] == mx.float32
    report = doctor.examine(Plan(repeats=3, rounds=0, shapes=SHAPES[:1]))
    failed = [check for check in report.checks if check.failed]
    assert {(check.what, check.dtype) for check in failed} == {("fused", "float32")}
    assert len(failed) == 4  # float and 4-bit, 1 and 8 rows
    assert all(FAULTS[fault] in check.failed for check in failed)
    assert report.failed[0].startswith("fused float float32 32/64/32 1 row: ")
    assert (
        fresh().verdicts[selfcheck.name("fused", variants.make(SHAPES[0], 0, mx.float32), 1, mx.float32)].passed
        is False
    )
    for bits, instead in ((0, "masked"), (4, "sync")):
        ffns = variants.make(SHAPES[0], bits, mx.float32)
        with pytest.warns(RuntimeWarning, match="'fused' failed its self-check on this machine and is not used"):
            assert auto.choose(ffns, 1, mx.float32, "device") == instead
    ffns = variants.make(SHAPES[0], 4, mx.float16)
    assert auto.choose(ffns, 1, mx.float16, "device") == "fused"


def test_where_masked_fails_too_the_host_reads(device, monkeypatch):
    device.fault = "wrong"
    monkeypatch.setitem(selfcheck.STRATEGIES, "masked", lambda ffns, x, route: mx.zeros_like(x))  # noqa: ARG005
    report = doctor.examine(Plan(repeats=1, rounds=0, shapes=SHAPES[:1]))
    assert {check.what for check in report.checks if check.failed} == {"fused", "masked", "router"}
    fresh()
    with pytest.warns(RuntimeWarning):
        assert auto.choose(variants.make(SHAPES[0], 0, mx.float32), 1, mx.float32, "device") == "sync"


@pytest.mark.parametrize("fault", FAULTS)
def test_the_routers_kernel_may_fail_alone(device, fault):
    device.fault, device.faulty = fault, lambda asked: asked.kernel == "route"
    report = doctor.examine(Plan(repeats=3, rounds=0, shapes=SHAPES[:1]))
    failed = {check.what for check in report.checks if check.failed}
    assert failed == {"router"}
    assert not fresh().verdicts[selfcheck.router_name(32, 2, 1, mx.float32)].passed


def test_what_is_slow_is_passed_over(device):
    device.seconds = 0.5
    report = doctor.examine(TIMED, clock=device.clock)
    assert report.failed == []
    ffns = variants.make(SHAPES[0], 0, mx.float32)
    record = fresh()
    assert record.verdicts[selfcheck.name("fused", ffns, 1, mx.float32)].slowdown == pytest.approx(1001)
    assert record.verdicts[selfcheck.name("masked", ffns, 1, mx.float32)].slowdown == pytest.approx(1)
    assert auto.choose(ffns, 1, mx.float32, "device") == "masked"
    timed = {check.what: check.times for check in report.checks if check.dtype == "float32"}
    assert list(timed["fused"]) == ["big", "small", "skip"] and timed["router"] == {}
    assert "slower by this machine's figures" in [decision.passed_over.get("fused") for decision in report.auto]


@pytest.mark.usefixtures("device")
def test_what_cannot_be_timed_is_shown(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(variants, "interleave", fail)
    report = doctor.examine(TIMED)
    assert "fused 4-bit float16 32/64/32 8 rows: cannot be timed: [malloc] Unable to allocate" in report.failed
    assert all(verdict.passed and verdict.slowdown is None for verdict in fresh().verdicts.values())


def test_what_is_refused_is_never_launched(device, saved):
    path, _ = saved(hidden_size=64, intermediate_size=64, small_intermediate_size=64)
    report = doctor.examine(Plan(repeats=1, rounds=0), str(path))
    assert device.launched and report.failed == []
    device.launched.clear()
    model = doctor.checkpoint.read_model(path)
    nn.quantize(model, 32, 3)
    for case, kinds in variants.of_model(model):
        checks = variants.check_ffns(case, 1, TIMED, {}, device.clock)
        assert kinds == 1 and len(case.layers) == 4
    assert {check.what: check.refused for check in checks} == {
        "fused": "big.up has 3-bit weights; the kernels take 4 and 8 bits",
        "masked": "MLX's masked product takes plain floats, and these weights are quantised",
    }
    assert {check.weights for check in checks} == {"3-bit"} and not device.launched


def test_a_models_own_ffns_are_checked_by_kind(device, saved):
    path, _ = saved(small_layers=[1, 3], router_choices="-sB")
    report = doctor.examine(Plan(repeats=1, rounds=1, chain=1), str(path), clock=device.clock)
    assert report.failed == []
    assert {(c.what, c.shape) for c in report.checks} == {
        (what, shape) for what in ("fused", "masked") for shape in ("16/24/8", "16/24/24")
    } | {("router", "16 to 3")}
    assert {decision.ffns for decision in report.auto} == {"float float32 16/24/8", "float float32 16/24/24"}
    with pytest.raises(DuoError, match="nowhere: there is no such directory"):
        doctor.examine(TIMED, "./nowhere")


@pytest.mark.usefixtures("device")
def test_damaged_weights_are_no_verdict_on_a_kernel(monkeypatch):
    def fail(*_):
        raise RuntimeError("[load] file is truncated")

    monkeypatch.setattr(selfcheck, "expected", fail)
    report = doctor.examine(Plan(repeats=1, rounds=0, shapes=SHAPES[:1]))
    assert "MLX's own modules cannot run: [load] file is truncated" in report.failed[0]
    assert not [key for key in fresh().verdicts if not key.startswith("router")]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"%s": 7}', '{"%s": {"verdicts": {"fused": {"passed": 1}}}}'])
@pytest.mark.usefixtures("device")
def test_a_damaged_cache_is_replaced(cache, content):
    cache.parent.mkdir()
    cache.write_text(content.replace("%s", verdicts.machine()))
    report = doctor.examine(BRIEF)
    assert report.stored == str(cache)
    assert fresh().figures and fresh().verdicts


@pytest.mark.usefixtures("device")
def test_what_others_found_stays(cache):
    other = verdicts.Record(of="another machine")
    other.store({"fused": Verdict(False, "wrong")})
    doctor.examine(BRIEF)
    assert list(json.loads(cache.read_text())) == ["another machine", verdicts.machine()]
    assert verdicts.Record(of="another machine").verdicts == {"fused": Verdict(False, "wrong")}


@pytest.mark.usefixtures("device")
def test_a_cache_that_cannot_be_written_is_said(cache):
    cache.parent.write_text("a file in place of the directory")
    report = doctor.examine(BRIEF)
    assert report.stored is None and report.failed == []
    assert f"{cache} cannot be written: what was found is lost when this ends" in report.notes


@pytest.mark.usefixtures("device")
def test_figures_that_fail_are_notes(monkeypatch):
    assert "MLX_METAL_FAST_SYNCH=1 cannot be measured: no answer" in doctor.examine(BRIEF).notes[0]
    assert fresh().figures.fast_crossing_s is None
    monkeypatch.setattr(figures, "fast_crossing", lambda: (Figure(2e-5, 1e-5, 3e-5), ""))
    doctor.examine(BRIEF)
    assert fresh().figures.fast_crossing_s == 2e-5
    noise = FIGURES | {"dispatch_s": Figure(-1e-7, -1e-6, 1e-6)}
    monkeypatch.setattr(figures, "measure", lambda *_: dict(noise))
    report = doctor.examine(BRIEF)
    assert "a figure is less than the noise" in report.notes[0] and report.figures["dispatch_s"].median == -1e-7
    assert fresh().figures.dispatch_s == 1e-4  # of the last time

    def fail(*_):
        raise RuntimeError("[malloc] Unable to allocate")

    monkeypatch.setattr(figures, "measure", fail)
    assert doctor.examine(BRIEF).notes == ["figures cannot be measured: [malloc] Unable to allocate"]


def test_on_a_cpu_nothing_is_stored(cache):
    report = doctor.examine(BRIEF)
    assert report.checks == [] and report.stored is None and not cache.exists()
    assert "Apple GPU" in report.no_kernels
    assert report.device == "CPU" and report.figures == FIGURES
    said = {decision.situation: (decision.strategy, sorted(decision.passed_over)) for decision in report.auto}
    assert said == {
        "host knows one route for all tokens": ("planned", []),
        "host knows routes that differ, 8 tokens": ("sorted", ["fused"]),
        "device knows the route, 1 token": ("sync", ["fused", "masked"]),
        "device knows the routes, 8 tokens": ("sorted", ["fused", "masked"]),
        "device knows the routes, 512 tokens": ("sorted", []),
    }
    assert report.auto[2].passed_over["masked"] == "saves nothing on a CPU"
    assert doctor.examine(variants.QUICK).figures == {}


def test_nobodys_name_is_in_the_report(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "alice"))
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path / "alice" / "cache"))
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    monkeypatch.setattr(launch, "execute", Device("uncompiled").execute)
    monkeypatch.setattr(variants, "ROWS", (1,))
    monkeypatch.setattr(socket, "gethostname", lambda: "alices-mac")
    monkeypatch.setattr("platform.node", lambda: "alices-mac")
    report = doctor.examine(Plan(repeats=1, rounds=0, shapes=SHAPES[:1])).as_json()
    assert report["stored"] == "~/cache/verdicts.json"
    assert "alice" not in json.dumps(report)


def test_other_forms_are_checked_and_named(device):
    shapes = (Shape(32, 64, 32, 32, of="gemma2", timed=True), Shape(32, 64, 0, 32, of="nemotron"))
    report = doctor.examine(Plan(repeats=1, rounds=1, shapes=shapes, chain=1), clock=device.clock)
    assert report.failed == []
    ran = {(check.what, check.weights) for check in report.checks if not check.refused and check.what != "router"}
    assert ran == {
        (what, f"{weights} {form}")
        for what in ("fused", "masked")
        for weights in ("float", "4-bit")
        for form in ("gated gelu_tanh", "plain relu2")
        if (what, weights) != ("masked", "4-bit")
    }


def test_a_form_that_nobody_knows_waits_for_the_host_with_a_reason(device):
    ffns = variants.make(SHAPES[0], 0, mx.float32)
    ffns.big = SwitchGLU(32, 64, 4)
    case = variants.Case([ffns], mx.float32, timed=True)
    for check in variants.check_ffns(case, 1, TIMED, {}, device.clock):
        assert check.refused.startswith("big: mlx_lm.models.switch_layers.SwitchGLU is not known as ")
        assert (check.shape, check.weights) == ("32/SwitchGLU/32", "unknown/float")
    assert not device.launched
    decided = {decision.situation: decision for decision in doctor.decisions([case])}
    one = decided["device knows the route, 1 token"]
    assert one.strategy == "sync" and decided["device knows the routes, 8 tokens"].strategy == "sorted"
    assert (
        "SwitchGLU is not known" in one.passed_over["fused"] and "SwitchGLU is not known" in one.passed_over["masked"]
    )


@pytest.mark.parametrize("shape", variants.SHAPES, ids=str)
def test_the_kernels_take_what_the_doctor_makes(shape):
    bits = 4 if shape.group else 0
    ffns = variants.make(shape, bits, mx.bfloat16)
    assert fused.refusal(ffns, 1, mx.bfloat16) is None
    case = variants.Case([ffns], mx.bfloat16, timed=False)
    form = {"gemma2": " gated gelu_tanh", "nemotron": " plain relu2"}.get(shape.of, "")
    assert case.shape == str(shape) and case.weights == (f"{bits}-bit" if bits else "float") + form
    assert ("small" in ffns) == bool(shape.small)


def test_timed_chains_read_more_than_a_cache_holds(monkeypatch):
    monkeypatch.setattr(variants, "BITS", (0,))
    plan = Plan(repeats=1, rounds=1, shapes=SHAPES, chain=100_000)
    layers = {(case.shape, case.dtype): len(case.layers) for case, _ in variants.made(plan)}
    assert layers["32/64/32", mx.float32] == 5 and layers["32/64/32", mx.float16] == 9  # big has 6144 weights
    assert layers["33/45/1", mx.float32] == 1  # not timed


def test_blas(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(_blas, "preload", lambda: _blas.Loaded("libopenblas.so.0"))
    assert doctor.blas() == "libopenblas.so.0"
    monkeypatch.setattr(_blas, "preload", lambda: None)
    monkeypatch.delenv(_blas.OPT_OUT, raising=False)
    assert doctor.blas().startswith("mlx's own BLAS is slow on Linux; install OpenBLAS (apt install")
    monkeypatch.setenv(_blas.OPT_OUT, "0")
    assert doctor.blas() == "mlx's own, as DUO_MLX_OPENBLAS=0 asks for"
    monkeypatch.setattr("sys.platform", "darwin")
    assert doctor.blas() == "Accelerate"
