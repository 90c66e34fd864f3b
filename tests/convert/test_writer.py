"""Writing weights: shards that the safetensors library reads, numbers that are refused, disks that are full."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from duo_mlx import shards
from duo_mlx.convert.tensors import Tensor, to_torch
from duo_mlx.convert.writer import refuse_nonfinite, write_weights
from duo_mlx.errors import DuoError

DTYPES = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


def random_tensor(shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return Tensor.of(mx.array(values.astype(np.float32)).astype(getattr(mx, dtype)))


def index_of(directory, stem="model"):
    return json.loads((directory / f"{stem}.safetensors.index.json").read_text())


@pytest.mark.parametrize("limit", [1, 300, 1 << 30])
def test_what_is_written_is_what_other_libraries_read(tmp_path, limit):
    shapes = {"b.weight": (5, 7), "a.weight": (12, 3), "scalar": (), "none": (0, 4), "ä": (3,)}
    tensors = {
        f"{dtype}.{name}": random_tensor(shape, dtype, seed)
        for seed, (name, shape) in enumerate(shapes.items())
        for dtype in DTYPES
    }
    write_weights(tmp_path, tensors, limit=limit, metadata={"format": "pt"})
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    found, theirs = {}, {}
    for file in files:
        theirs |= load_file(tmp_path / file)
        found |= mx.load(str(tmp_path / file))
        with safe_open(tmp_path / file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert set(opened.keys()) == {
                name for name, where in index_of(tmp_path)["weight_map"].items() if where == file
            }
    assert (
        files == ["model.safetensors"]
        if limit == 1 << 30
        else files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    )
    assert found.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = to_torch(tensor.load())
        assert theirs[name].dtype == expected.dtype and torch.equal(theirs[name], expected)
        assert found[name].dtype == tensor.load().dtype and mx.array_equal(found[name], tensor.load()).item()
    assert index_of(tmp_path)["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert list(index_of(tmp_path)["weight_map"]) == sorted(tensors)


@given(st.lists(st.integers(0, 50)), st.integers(1, 60))
def test_a_plan_keeps_the_order_and_the_limit_and_opens_no_shard_too_early(sizes, limit):
    named = {f"t{number}": size for number, size in enumerate(sizes)}
    planned = shards.plan(named, limit)
    assert [name for names in planned for name in names] == list(named)
    for names in planned:
        assert sum(named[name] for name in names) <= limit or len(names) == 1
    for before, after in pairwise(planned):
        assert sum(named[name] for name in before) + named[after[0]] > limit


def test_each_tensor_is_loaded_once_in_order_and_progress_is_told(tmp_path):
    loaded, told = [], []

    def watched(name):
        tensor = random_tensor((2, 3))
        return Tensor(tensor.shape, tensor.dtype, lambda: loaded.append(name) or tensor.load())

    tensors = {name: watched(name) for name in ("z", "a", "m")}
    write_weights(tmp_path, tensors, limit=48, stem="part", progress=lambda done, total: told.append((done, total)))
    assert loaded == ["z", "a", "m"] and told == [(24, 72), (48, 72), (72, 72)]
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "part-00001-of-00002.safetensors",
        "part-00002-of-00002.safetensors",
        "part.safetensors.index.json",
    ]


def test_a_transposed_and_a_sliced_array_arrive_as_they_read(tmp_path):
    base = random_tensor((6, 8), "bfloat16").load()
    arrays = {"transposed": base.T, "sliced": base[1::2, 2:5], "broadcast": mx.broadcast_to(base[0], (3, 8))}
    write_weights(tmp_path, {name: Tensor.of(array) for name, array in arrays.items()})
    found = mx.load(str(tmp_path / "model.safetensors"))
    assert all(mx.array_equal(found[name], array).item() for name, array in arrays.items())


def test_donated_arrays_are_let_go_one_by_one(tmp_path):
    arrays = {name: mx.arange(4) * 1.0 for name in "abc"}
    held = shards.held(arrays, donate=True)
    left = []
    shards.write(tmp_path, held, progress=lambda *_: left.append(sorted(arrays)))
    assert left == [["b", "c"], ["c"], []]


def test_reading_is_never_more_than_one_tensor_ahead_of_writing(tmp_path, monkeypatch):
    put, written = shards._put, []

    def slow(out, file, data):
        time.sleep(0.01)
        put(out, file, data)
        written.append(bytes(data))

    def watched(number):
        def load():
            # the header comes first, so that number - 1 things and it are to be there before this one is read
            assert len(written) >= number
            return mx.full((2,), number)

        return Tensor((2,), "int32", load)

    monkeypatch.setattr(shards, "_put", slow)
    monkeypatch.setitem(shards.TYPES, "int32", ("I32", 4))
    shards.write(tmp_path, {f"t{number}": watched(number) for number in range(6)})
    assert written[1:] == [np.full(2, number, np.int32).tobytes() for number in range(6)]


def test_a_write_that_fails_is_an_error_although_the_next_would_not(tmp_path, monkeypatch):
    put, calls = shards._put, []

    def failing(out, file, data):
        calls.append(len(data))
        if len(calls) == 2:
            raise DuoError("the second write failed")
        put(out, file, data)

    monkeypatch.setattr(shards, "_put", failing)
    with pytest.raises(DuoError, match="the second write failed"):
        write_weights(tmp_path, {name: random_tensor((2,)) for name in "abcd"})
    assert len(calls) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_values_are_refused_by_name_and_count(tmp_path, dtype, bad):
    values = np.full((4, 5), -1.5, np.float32)
    values[1, 2] = values[3, 4] = bad
    tensors = {"fine": random_tensor((2,), dtype), "bad.weight": Tensor.of(mx.array(values).astype(getattr(mx, dtype)))}
    counts = "2 NaN and 0 infinite" if np.isnan(bad) else "0 NaN and 2 infinite"
    with pytest.raises(DuoError, match=f"^bad.weight: holds {counts} values; --allow-nonfinite"):
        write_weights(tmp_path, tensors)
    write_weights(tmp_path, tensors, allow_nonfinite=True)
    stored = mx.load(str(tmp_path / "model.safetensors"))["bad.weight"].astype(mx.float32)
    np.testing.assert_array_equal(np.array(stored), values)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=6))
def test_the_bit_test_agrees_with_numpy(dtype, numbers):
    """Any bits at all: subnormal, negative zero, every NaN."""
    bits = np.array([number & np.iinfo(DTYPES[dtype]).max for number in numbers], DTYPES[dtype])
    wide = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else bits.view(f"f{bits.itemsize}")
    if np.isfinite(wide).all():
        refuse_nonfinite("w", bits, dtype)
    else:
        counts = f"{np.isnan(wide).sum()} NaN and {np.isinf(wide).sum()} infinite"
        with pytest.raises(DuoError, match=counts):
            refuse_nonfinite("w", bits, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_and_zeros_are_no_infinity(dtype):
    largest = {"float32": 0x7F7F_FFFF, "float16": 0x7BFF, "bfloat16": 0x7F7F}[dtype]
    sign = 1 << (8 * np.dtype(DTYPES[dtype]).itemsize - 1)
    for bits in ([largest], [sign], [largest | sign], [0], [1, sign | 1], [sign | largest, largest, 0]):
        assert refuse_nonfinite("w", np.array(bits, DTYPES[dtype]), dtype) is None


def test_a_tensor_that_is_not_what_it_said_is_refused(tmp_path):
    for promised in (Tensor((2, 2), "float32", lambda: mx.zeros((2, 3))), Tensor((2,), "float16", lambda: mx.zeros(2))):
        with pytest.raises(DuoError, match=r"^w: was to be float\d\d \[2.*\] and came as float32"):
            write_weights(tmp_path, {"w": promised})
    with pytest.raises(DuoError, match="^w: is int8; what can be written is float32"):
        shards.write(tmp_path, shards.held({"w": mx.zeros(2, mx.int8)}))
    with pytest.raises(DuoError, match="a tensor is called __metadata__"):
        write_weights(tmp_path, {"__metadata__": random_tensor((2,))})


def test_a_source_that_fails_while_it_is_read_is_said_with_the_tensor(tmp_path):
    def fail():
        raise OSError("the disk is gone")

    with pytest.raises(DuoError, match="^w: cannot be read: the disk is gone"):
        write_weights(tmp_path, {"w": Tensor((2,), "float32", fail)})


FULL = """
import resource, signal, sys
from pathlib import Path
import mlx.core as mx
from duo_mlx.convert.tensors import Tensor
from duo_mlx.convert.writer import write_weights
from duo_mlx.errors import DuoError
from duo_mlx.files import output_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails, as it does on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
tensors = {name: Tensor.of(mx.zeros((128, 128))) for name in "abc"}  # 65,536 bytes each
try:
    with output_directory(Path(sys.argv[1])) as directory:
        write_weights(directory, tensors, limit=140_000)
except DuoError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "model")], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert done.stdout.strip().endswith("model-00001-of-00002.safetensors: cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, a disk that is always full")
def test_the_systems_word_for_a_full_disk_comes_through(tmp_path):
    (tmp_path / "model.safetensors").symlink_to("/dev/full")
    with pytest.raises(DuoError, match=r"model.safetensors: cannot be written: No space left on device$"):
        write_weights(tmp_path, {"w": random_tensor((4,))})


def test_a_file_that_is_shorter_than_what_was_written_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_put", lambda out, _, data: out.write(data[:-1]))
    with pytest.raises(DuoError, match=r"model.safetensors: has \d+ of \d+ bytes after writing"):
        write_weights(tmp_path, {"w": random_tensor((4,))})
