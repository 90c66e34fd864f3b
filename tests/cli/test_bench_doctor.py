"""``duo-mlx bench doctor``: what people and programs see of a report, and its exit codes."""

import io
import json
import sys

import pytest
from click.testing import CliRunner

from duo_mlx.bench import doctor, figures, meters, variants
from duo_mlx.bench.doctor import Decision, Report
from duo_mlx.bench.figures import Figure
from duo_mlx.bench.variants import Check
from duo_mlx.cli import bench_doctor, main
from duo_mlx.kernels import verdicts

LAST = "For a bug report, paste all of the above and the command that went wrong; "


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path / "cache"))
    verdicts.record.cache_clear()
    monkeypatch.setattr(meters, "found", lambda: [meters.Found("rapl", "", "only root may read it")])
    monkeypatch.setattr(figures, "effort", lambda: figures.Effort(2, 3, 4096))
    yield tmp_path / "cache"
    verdicts.record.cache_clear()


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "doctor", *arguments], prog_name="duo-mlx")


SYSTEM = {
    "device": "Apple M9", "chip": "Apple M9", "model": "Mac99,1", "memory_bytes": 24 << 30,
    "os": {"name": "macOS", "version": "30.1", "build": None}, "versions": {"mlx": "9.9", "zeus-apple-silicon": None},
    "environment": {"MLX_METAL_FAST_SYNCH": "1"},
}  # fmt: skip
TIMES = {"big": 1.021, "small": 0.1, "skip": 0.05}


def report(*checks, **changes):
    checks = [
        Check("fused", "float", "bfloat16", "576/1536/96", 1, times=TIMES),
        Check("fused", "float", "bfloat16", "576/1536/96", 8),
        Check("fused", "float", "bfloat16", "416/1120/32", 1),
        Check("masked", "4-bit", "bfloat16", "576/1536/96", 1, refused="takes plain floats"),
        Check("masked", "4-bit", "bfloat16", "576/1536/96", 8, refused="takes plain floats"),
        Check("router", "", "bfloat16", "576 to 2", 1),
        *checks,
    ]
    given = {
        "system": SYSTEM,
        "blas": "Accelerate",
        "meters": [meters.Found("ioreport", "SoC estimate (CPU, GPU)", "")],
        "no_kernels": None,
        "checks": checks,
        "device": "GPU",
        "figures": {"bandwidth_bytes_s": Figure(1.234e11, 1e11, 1.3e11), "read_back_s": Figure(2e-4, 1.5e-4, 3e-4)},
        "notes": ["a note"],
        "auto": [Decision("device knows the route, 1 token", "float", "masked", {"fused": "it [failed]"})],
        "stored": "/caches/verdicts.json",
    }
    return Report(**given | changes)


@pytest.fixture
def finds(monkeypatch):
    """``finds(report)``: what the doctor is to find; returns the list of what it was asked for."""

    def put(found):
        asked = []
        monkeypatch.setattr(doctor, "examine", lambda *arguments: asked.append(arguments) or found)
        return asked

    return put


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_report_as_plain_text(finds):
    finds(report())
    result = run()
    assert result.exit_code == 0 and result.stderr == ""
    said = lines(result.stdout)
    for line in (
        "device Apple M9",
        "chip Apple M9 Mac99,1",
        "memory 24.0 GiB",
        "system macOS 30.1",
        "versions mlx 9.9",
        "BLAS Accelerate",
        "switches MLX_METAL_FAST_SYNCH=1",
        "ioreport SoC estimate (CPU, GPU)",
        "weights dtype 1 token 8 tokens",
        "fused float bfloat16 2 ok 1 ok",
        "masked 4-bit bfloat16 refused refused",
        "router bfloat16 1 ok -",
        "fused float bfloat16 576/1536/96 1.02 / 0.10 / 0.05",
        "masked 4-bit bfloat16 takes plain floats",
        "bandwidth of a matrix-vector product 123 GB/s 100 to 130",
        "the host waits for a route 200 us 150 to 300",
        "float device knows the route, 1 token masked fused: it [failed]",
        "a note",
    ):
        assert line in said, line
    assert said[-1] == f"{LAST}verdicts are stored in /caches/verdicts.json."
    assert "failed" not in said
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


def test_a_failure_is_shown_and_is_exit_code_1(finds):
    failed = Check("fused", "float", "bfloat16", "576/1536/96", 8, failed="an output was not written (routes [0, 1])")
    finds(report(failed))
    result = run()
    assert result.exit_code == 1
    said = lines(result.stdout)
    assert "fused float bfloat16 2 ok FAILED 1 of 2" in said
    assert "fused float bfloat16 576/1536/96 8 rows: an output was not written (routes [0, 1])" in said
    result = run("--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failed"] == [
        "fused float bfloat16 576/1536/96 8 rows: an output was not written (routes [0, 1])"
    ]


def test_json_has_all_that_was_found(finds):
    finds(report())
    result = run("--json")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["system"] == SYSTEM and found["failed"] == []
    assert found["checks"][0]["times"] == TIMES
    assert found["figures"]["read_back_s"] == {"median": 2e-4, "low": 1.5e-4, "high": 3e-4}
    assert found["meters"][0]["name"] == "ioreport"


def test_on_a_terminal_there_are_tables(finds, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    finds(report())
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    plain = run().stdout
    monkeypatch.setattr(sys, "stdout", Terminal())
    bench_doctor._print(report().as_json())
    shown = sys.stdout.getvalue()
    assert "───" in shown and "───" not in plain
    for word in ("Apple M9", "2 ok", "1.02 / 0.10 / 0.05", "123 GB/s", "fused: it [failed]", LAST):
        assert word in shown and word in plain


def test_how_thorough_and_what_to_look_at(finds):
    asked = finds(report())
    run()
    run("--quick", "--model", "models/duo")
    plans = [(plan, model) for plan, model, _ in asked]
    assert plans == [(variants.Plan(), None), (variants.QUICK, "models/duo")]
    assert variants.QUICK.rounds == 0 and variants.QUICK.repeats < variants.Plan().repeats == 100


def test_this_machine(cache):
    result = run()
    assert result.exit_code == 0 and result.stderr == ""
    said = lines(result.stdout)
    assert "rapl only root may read it" in said
    assert "not checked: Metal kernels need an Apple GPU, and MLX finds none here" in said
    assert "figures of the CPU" in said
    assert [line for line in said if line.startswith("float float32 576/1536/96 device knows the route, 1 token sync")]
    assert said[-1] == f"{LAST}nothing was stored."
    assert not cache.exists()


def test_this_machine_and_a_model(saved):
    path, _ = saved()
    found = json.loads(run("--quick", "--json", "--model", str(path)).stdout)
    assert found["figures"] == {} and found["notes"] == ["figures were not measured, as nothing was to be timed"]
    assert {decision["ffns"] for decision in found["auto"]} == {"float float32 16/24/8"}
    assert str(path) not in json.dumps(found)


def test_a_model_that_is_not_there(tmp_path):
    result = run("--model", str(tmp_path))
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert f"{tmp_path}" in result.stderr
