"""The benchmark of memory: what was read is counted exactly, and each case is a process of its own."""

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx import checkpoint
from duo_mlx.bench import memory
from duo_mlx.errors import DuoError

LAYERS = 4
FFN = {"big": 3 * 16 * 24 * 4, "small": 3 * 16 * 8 * 4}  # bytes a layer
NORM = 16 * 4  # of the one before an FFN


@pytest.mark.parametrize(
    ("route", "read"),
    [("small", {"big": 0, "small": 12}), ("Bs--", {"big": 3, "small": 3}), ("----", {"big": 0, "small": 0})],
)
def test_a_module_that_no_route_uses_is_not_read(saved, route, read):
    directory, model = saved()
    found = memory.measure(directory, route, lazy=True, prompt=7, tokens=3)
    assert found["arrays_read"] == read
    assert found["weights_bytes"] == sum(array.nbytes for array in checkpoint.parameters(model).values())
    unread = sum((3 * LAYERS - read[module]) // 3 * FFN[module] for module in FFN) + route.count("-") * NORM
    assert found["weights_read_bytes"] == found["weights_bytes"] - unread
    assert found["cache_bytes"] == LAYERS * 2 * 2 * 256 * 4 * 4  # keys and values, heads, positions, dimensions, bytes
    assert found["peak_over_weights_read_and_cache"] > 0


def test_loaded_at_once_everything_is_read(saved):
    directory, _ = saved()
    found = memory.measure(directory, "small", lazy=False, prompt=7, tokens=3)
    assert found["arrays_read"] == {"big": 12, "small": 12}
    assert found["weights_read_bytes"] == found["weights_bytes"]


@pytest.mark.skipif(not memory.STATUS.is_file(), reason="needs Linux's /proc")
def test_resident_memory_is_that_of_this_process():
    before = memory.resident("VmRSS")
    block = np.ones(100_000_000, np.uint8)
    assert before + 90e6 < memory.resident("VmRSS") < before + 200e6
    del block
    assert memory.resident("VmHWM") > before + 90e6


def test_a_written_model_loads_with_its_dtype(tmp_path):
    memory.write_model(tmp_path, layers=1, dtype="bfloat16", seed=0)
    assert {array.dtype for array in checkpoint.parameters(checkpoint.read_model(tmp_path)).values()} == {mx.bfloat16}
    model, _ = checkpoint.load(tmp_path, lazy=True)
    assert model.config.hidden_size == memory.SHAPE["hidden_size"] and model.router().choices == (0, 1, 2)


def test_the_record(saved, tmp_path, monkeypatch):
    directory, _ = saved()
    names = ("all-small, lazy", "all-small, eager")
    monkeypatch.setattr(memory, "CASES", {name: memory.CASES[name] for name in names})
    out = tmp_path / "out.json"
    options = ["--model", str(directory), "--prompt", "5", "--tokens", "2"]
    done = CliRunner().invoke(memory.command, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    lazy, eager = (json.loads(out.read_text())["cases"][name] for name in names)
    assert lazy["arrays_read"] == {"big": 0, "small": 12} and eager["arrays_read"] == {"big": 12, "small": 12}
    # a process of its own has nothing of this one's
    assert lazy["active_bytes"]["loaded"] < eager["active_bytes"]["loaded"] < 1e6
    assert 50e6 < lazy["resident_bytes"]["libraries"] <= lazy["resident_bytes"]["peak"] < 5e9
    assert [line.split(",")[0] for line in done.stdout.splitlines()[1:]] == ["all-small", "all-small"]


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(DuoError, match="there is no such directory"):
        memory.in_process(tmp_path / "nothing", "small", True, 5, 2)
    done = CliRunner().invoke(memory.command, ["--out", str(tmp_path / "out.csv")])
    assert isinstance(done.exception, DuoError) and "must end in .json" in str(done.exception)
