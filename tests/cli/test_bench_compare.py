"""``duo-mlx bench compare``: exit codes for CI, a table that says what it found, and one object."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from duo_mlx.bench import alike, compare
from duo_mlx.cli import bench_compare, main

# the made result belongs to the tests of bench
_spec = importlib.util.spec_from_file_location("bench_conftest", Path(__file__).parents[1] / "bench" / "conftest.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
made_result = _module.made_result


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "compare", *map(str, arguments)], prog_name="duo-mlx")


def refused(line, *arguments):
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr


@pytest.fixture
def write(made_result, tmp_path):
    """``write(name, change=None, **options)``: a results folder with a made result, changed."""

    def make(name, change=lambda _: None, **options):
        result = made_result(**options)
        change(result)
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps(result))
        return tmp_path / name

    return make


def test_a_slowdown_fails(write):
    done = run(write("a"), write("b", slower=1.1) / "results.json")
    assert done.exit_code == 1, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("A: ") and lines[1].startswith("B: ") and "embedded, Test M9" in lines[0]
    big = next(line for line in lines if line.startswith("duo-mlx big"))
    assert big.split()[8:] == ["20", "22.01", "+10.00%", "[+10.00%,", "+10.00%]", "5", "worse"]
    assert "TPOT over 5 cells (geometric mean): x1.1, +10.00% [+10.00%, +10.00%], 5 rounds: worse" in lines
    assert lines[-1] == "15 worse, 0 undecided, 14 same, 0 better"


def test_a_speed_up_and_no_change_do_not_fail(write):
    done = run(write("a", slower=1.1), write("b"))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "0 worse, 0 undecided, 14 same, 15 better")
    done = run(write("a"), write("a"))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "0 worse, 0 undecided, 29 same, 0 better")
    assert "  ~ [+0.00%, +0.00%]  5       same" in done.stdout and "  ~ " in done.stdout.split("peak_bytes")[1]


def test_the_threshold_and_the_metrics_are_the_users(write):
    a, b = write("a"), write("b", slower=1.1)
    assert run(a, b, "--threshold", "12.5%").exit_code == 0
    done = run(a, b, "--metric", "loss", "--metric", "peak_bytes")
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "0 worse, 0 undecided, 9 same, 0 better")
    assert "tpot_s" not in done.stdout


@pytest.mark.parametrize("text", ["2", "0.02", "two%", "-1%", "nan%", "%"])
def test_a_threshold_is_a_percentage(write, text):
    refused(f"{text}: give a percentage from 0% on, such as 2%", write("a"), write("a"), "--threshold", text)


def test_the_object_holds_the_comparison(write):
    a, b = write("a"), write("b", slower=1.1)
    done = run(a, b, "--json")
    found = json.loads(done.stdout)
    assert done.exit_code == 1 and found["regressed"]
    assert (found["A"]["path"], found["B"]["device"], found["threshold"]) == (str(a), "Test M9", 0.02)
    first = found["rows"][0]
    assert (first["metric"], first["verdict"], first["rounds"]) == ("tpot_s", "worse", 5)
    assert first["change"] == pytest.approx({"median": 0.1, "low": 0.1, "high": 0.1})
    assert found["overall"]["verdict"] == "worse"


def test_what_was_not_measured_alike_needs_a_flag(write):
    a, b = write("a"), write("b", device="Test M10")
    refused("chip: Test M9 in A, Test M10 in B; --allow-different chip compares them all the same", a, b)
    done = run(a, b, "--allow-different", "chip")
    assert done.exit_code == 0 and "note: chip: Test M9 in A, Test M10 in B\n" in done.stdout


def test_bad_input_is_one_line(write, tmp_path):
    a = write("a")
    refused("there is no such file", a, tmp_path / "none")
    refused("holds no results.json", tmp_path, a)
    refused("no cell in common", a, write("b", lambda result: result.update(cells=[])))
    refused("--metric", a, a, "--metric", "speed")
    refused("no meter: this is a test", a, write("b", metered=False), "--metric", "decode_j_per_token")


def test_what_is_left_out_is_told(write):
    def spoil(result):
        result["cells"][0].update(valid=False, invalid_why=["a\nb\x1b[31m"])
        result["cells"][1]["id"] = "another"
        result["complete"] = False

    done = run(write("a"), write("b", spoil))
    assert done.exit_code == 0, done.output
    for line in (
        "note: B is not finished: what it has is compared",
        "only in A: duo-mlx big auto float32 p32 g16 b1 c0",
        "only in B: another",
        "not valid: mlx-lm big auto float32 p32 g16 b1 c0: in B: a b?[31m",
    ):
        assert line in done.stdout.splitlines()


def test_too_few_rounds_are_undecided(write):
    done = run(write("a", rounds=2), write("b", rounds=2, slower=2.0))
    assert done.exit_code == 0 and "undecided: too few rounds: 2 in common, 3 needed" in done.stdout


def test_the_choices_are_those_of_the_library():
    assert bench_compare.METRICS == compare.METRICS == tuple(bench_compare.UNITS)
    assert tuple(alike.DIFFERENCES) == bench_compare.DIFFERENCES


def test_help_gives_examples():
    done = run("--help")
    assert done.exit_code == 0 and "duo-mlx bench compare results/before results/after" in done.stdout
