"""IOReport through a stand-in for zeus-apple-silicon: what it says, what it leaves out, and how it dies."""

import platform
from types import SimpleNamespace

import pytest

from duo_mlx.bench.meters import Unavailable
from duo_mlx.bench.meters.ioreport import IOReportMeter, open_meter
from duo_mlx.bench.system import Output, run_command

PACKAGE = """
import time

class Metrics:
    efficiency_cores_mj = [7, 7]  # parts of the CPU's total
    performance_cores_mj = [9, 9]
    dram_mj = ane_mj = gpu_sram_mj = None
    def __init__(self):
        self.cpu_total_mj = int(time.monotonic() * 1e5)
        self.gpu_mj = int(time.monotonic() * 1e6)

class AppleEnergyMonitor:
    def __init__(self):
        pass
    def get_cumulative_energy(self):
        return Metrics()
"""


@pytest.fixture
def on_mac(monkeypatch, tmp_path):
    """``on_mac(code, chip="Apple M4")``: a Mac with a package of this code; the `run` that its commands go through."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")

    def make(code, chip="Apple M4", version="1.1.0"):
        if code is not None:
            (tmp_path / "zeus_apple_silicon.py").write_text(code)
            info = tmp_path / f"zeus_apple_silicon-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: zeus-apple-silicon\nVersion: {version}\n")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(__import__("sys").modules, "zeus_apple_silicon", raising=False)

        def run(command, limit):
            return Output(f"{chip}\n") if command[0] == "/usr/sbin/sysctl" else run_command(command, limit)

        return run

    return make


def test_a_mac_with_the_package_has_a_meter(on_mac):
    meter = open_meter(None, on_mac(PACKAGE))
    assert meter.label == "SoC estimate (cpu, gpu)" and meter.notes == () and meter.scope == "soc"
    first, second = meter.read(), meter.read()
    assert set(first.joules) == {"cpu", "gpu"}  # cores are parts of the CPU, absent rails are absent
    assert second.joules["gpu"] > first.joules["gpu"] > 0 and second.time > first.time


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "pip install zeus-apple-silicon"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11"),
        ("class AppleEnergyMonitor:\n    def __init__(self): raise RuntimeError('no subscription')", "no subscription"),
        ("raise ImportError('dlopen(/Users/alice/x.so): no symbol')", r"ImportError: dlopen\(\)"),
        ("import time\ntime.sleep(60)", "no answer in 2 s"),
        ("import sys\nsys.exit(0)", "the probe said nothing"),
        (
            "class Metrics: pass\nclass AppleEnergyMonitor:\n    def get_cumulative_energy(self): return Metrics()",
            "neither CPU nor GPU",
        ),
    ],
    ids=["absent", "crash", "error", "path", "hangs", "silent", "no rails"],
)
def test_a_bad_probe_is_a_reason_and_not_a_crash(on_mac, code, says):
    with pytest.raises(Unavailable, match=says) as caught:
        open_meter(None, on_mac(code), limit=2.0)
    assert "\n" not in str(caught.value) and "alice" not in str(caught.value)


def test_other_systems_say_what_is_needed():
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        pytest.skip("a Mac")
    with pytest.raises(Unavailable, match="Apple silicon"):
        open_meter(None)


def answering(answer, chip="Apple M4"):
    return lambda command, _limit: Output(f"{chip}\n" if command[0] == "/usr/sbin/sysctl" else answer)


def test_a_cpu_that_stands_still_under_load_is_said(on_mac):
    on_mac(PACKAGE)
    meter = open_meter(None, answering('{"rails": ["cpu", "gpu"], "cpu_moves": false, "version": "1.1.0"}'))
    assert meter.tick is None and "stood still" in meter.notes[0]


def test_an_ultra_is_flagged(on_mac):
    on_mac(PACKAGE)
    answer = '{"rails": ["cpu", "gpu"], "cpu_moves": true, "version": "1.1.0"}'
    meter = open_meter(None, answering(answer, "Apple M2 Ultra"))
    assert "Ultra" in meter.notes[0] and "1.1.0" in meter.notes[0]
    assert open_meter(None, answering(answer, "Apple M2 Max")).notes == ()


class Monitor:
    """The package's fields from known watts: the CPU's and DRAM's published each 2.2 s, integers of mJ."""

    def __init__(self, clock, **watts):
        self.clock, self.watts = clock, watts

    def get_cumulative_energy(self):
        now = self.clock.now
        published = now // 2.2 * 2.2
        fields = {
            "cpu_total_mj": int(self.watts["cpu"] * published * 1000),
            "dram_mj": int(self.watts["dram"] * published * 1000),
            "gpu_mj": int(self.watts["gpu"] * now * 1000),
            "gpu_sram_mj": int(0.3 * now * 1000),
            "ane_mj": 0,
            "efficiency_cores_mj": [int(self.watts["cpu"] * published * 500)] * 2,
            "performance_cluster_mj": [int(self.watts["cpu"] * published * 1000)],
        }
        return SimpleNamespace(**fields)


def test_no_energy_is_counted_twice(clock, measure):
    """Cores and clusters are parts of the CPU, and nothing is added up by what its name contains."""
    monitor = Monitor(clock, cpu=6.0, dram=2.0, gpu=28.0)
    meter = IOReportMeter(monitor, ["cpu", "gpu", "dram", "ane", "gpu_sram"], clock=clock)
    energy = measure(meter)
    assert energy.label == "SoC estimate (cpu, gpu, dram, ane)"
    assert energy.mean_w == pytest.approx(36, rel=0.01)
    assert energy.joules["gpu_sram"] == pytest.approx(0.3 * energy.seconds, rel=0.01)  # told, but not in the total


def test_a_monitor_that_fails_midway_costs_the_figure_only(clock, measure):
    monitor = Monitor(clock, cpu=6.0, dram=2.0, gpu=28.0)
    meter = IOReportMeter(monitor, ["cpu", "gpu", "dram"], clock=clock)

    def fail(gone):
        if 20 < gone < 31:
            monitor.get_cumulative_energy = lambda: (_ for _ in ()).throw(RuntimeError("no sample"))
        else:
            monitor.__dict__.pop("get_cumulative_energy", None)

    energy = measure(meter, during=fail)
    assert energy.total_j is None and "not reported" in energy.why["gpu"]


def test_without_gpu_there_is_no_total(clock, measure):
    monitor = Monitor(clock, cpu=6.0, dram=2.0, gpu=28.0)
    get = monitor.get_cumulative_energy
    monitor.get_cumulative_energy = lambda: SimpleNamespace(**vars(get()) | {"gpu_mj": None})
    meter = IOReportMeter(monitor, ["cpu", "dram"], clock=clock)
    energy = measure(meter)
    assert energy.label == "SoC estimate (cpu, dram)" and energy.total_j is None and "gpu: " in energy.why["total"]
    assert energy.joules["cpu"] == pytest.approx(6 * energy.seconds, rel=0.01)
