"""The benchmark over lengths of context: the caches have them, and the figures are what they say."""

import json

import pytest
from click.testing import CliRunner

from duo_mlx.bench import context, peer
from duo_mlx.bench.interleave import Timings
from duo_mlx.errors import DuoError
from duo_mlx.policies import parse_route

LAYERS = 4


def test_every_case_attends_to_its_context(tiny_model):
    cases = context.cases(tiny_model(), [4, 300], seed=0)
    assert list(cases) == [f"{name} at {length}" for length in (4, 300) for name in context.NAMES]
    for name, case in cases.items():
        length = int(name.split()[-1])
        assert all(layer.keys[..., :length, :].shape[2] == length == layer.offset for layer in case.cache)
        assert float(abs(case.cache[0].keys[..., length - 1, :]).max()) > 0  # noise to its end
        case(2)
        assert case.cache[0].offset == length + 3


def test_the_summary_pairs_times_of_the_same_context(tiny_model):
    model = tiny_model()
    seconds = {"mlx-lm at 4": 6.0, "all-big at 4": 4.0, "all-small at 4": 2.0}
    seconds |= {"mlx-lm at 9": 9.0, "all-big at 9": 9.0, "all-small at 9": 6.0}
    runs = {name: [value, value] for name, value in seconds.items()}
    short, long = context.summary(Timings(runs), model, [4, 9], tokens=1)
    assert short["median_ms"] == {"mlx-lm": 3000, "all-big": 2000, "all-small": 1000}
    assert [at["all-big / all-small"]["median"] for at in (short, long)] == [2, 1.5]
    assert [at["mlx-lm / all-big"]["median"] for at in (short, long)] == [1.5, 1]
    big = parse_route("big", LAYERS).routes(0, 1)
    assert short["bytes"]["all-big"] == peer.step_bytes(model, big, 5)
    assert short["byte_ratio"] > long["byte_ratio"] > 1


def test_the_record(saved, tmp_path):
    directory, _ = saved()
    out = tmp_path / "out.json"
    options = ["--model", str(directory), "--contexts", "9,4", "--rounds", "2", "--tokens", "2"]
    done = CliRunner().invoke(context.command, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    record = json.loads(out.read_text())
    assert [at["context"] for at in record["summary"]] == [4, 9]
    assert all(len(runs) == 4 for runs in record["runs_s"].values()) and len(record["runs_s"]) == 6
    assert "--contexts 4,9 --rounds 2 --tokens 2" in record["command"]
    assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == ["4", "9"]


@pytest.mark.parametrize("contexts", ["", "1,,2", "a", "0", "-4"])
def test_contexts_that_are_none_are_refused(contexts):
    done = CliRunner().invoke(context.command, [f"--contexts={contexts}"])
    assert isinstance(done.exception, DuoError) and "such as 128,1024" in str(done.exception)
