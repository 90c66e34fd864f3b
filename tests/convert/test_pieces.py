"""What is only copied: its bits come from the file in pieces, and are those that MLX would load."""

import os

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from duo_mlx.convert.keymaps import named
from duo_mlx.convert.plan import mapped
from duo_mlx.convert.readers import open_checkpoint, safetensors_file
from duo_mlx.convert.writer import write_weights
from duo_mlx.errors import DuoError

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=[1, 3, 1000])
def source(request, monkeypatch, tmp_path):
    """A checkpoint of three types, one tensor empty and one a scalar, read in pieces of so many float32."""
    monkeypatch.setattr(safetensors_file, "PIECE", 4 * request.param)
    torch.manual_seed(0)
    state = {name: torch.randn(5, 7).to(dtype) for name, dtype in TYPES.items()}
    save_file(state | {"empty": torch.ones(0, 3), "scalar": torch.tensor(0.5)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def bits(array):
    return np.array(array.view({2: mx.uint16, 4: mx.uint32}[array.dtype.size])).flatten()


def test_pieces_are_the_tensor(source):
    for name, tensor in open_checkpoint(source, bare=True).tensors.items():
        parts = [part.copy() for part in tensor.pieces()]
        assert all(0 < part.nbytes <= safetensors_file.PIECE for part in parts)
        loaded = tensor.load()
        assert sum(part.size for part in parts) == loaded.size
        if parts:
            np.testing.assert_array_equal(np.concatenate(parts), bits(loaded), err_msg=name)


def test_what_is_written_from_pieces_is_the_tensor(source, tmp_path):
    tensors = open_checkpoint(source, bare=True).tensors
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", tensors)
    written = open_checkpoint(tmp_path / "out" / "model.safetensors", bare=True).tensors
    assert written == tensors
    for name, tensor in tensors.items():
        if tensor.load().size:
            np.testing.assert_array_equal(bits(written[name].load()), bits(tensor.load()))


def test_a_tensor_that_is_not_copied_as_it_is_has_no_pieces(source):
    tensors = open_checkpoint(source, bare=True).tensors
    one = tensors["float16"]
    assert one.astype("float16").pieces is not None
    assert mapped(tensors, named("canonical"), {}, source)["float16"].pieces is not None
    assert one.astype("float32").pieces is None and one.apply(lambda array: array.T, (7, 5)).pieces is None


def test_what_is_no_number_is_counted_in_the_whole_tensor(source, tmp_path):
    spoilt = torch.zeros(4, 9)
    spoilt[0, 0], spoilt[3, 7:] = torch.nan, torch.inf
    save_file({"spoilt": spoilt}, source)
    (tmp_path / "out").mkdir()
    with pytest.raises(DuoError, match="spoilt: holds 1 NaN and 2 infinite values"):
        write_weights(tmp_path / "out", open_checkpoint(source, bare=True).tensors)


@pytest.mark.parametrize("change", ["another", "touched", "shorter", "gone"])
def test_a_file_that_changes_before_it_is_copied(source, change):
    tensor = open_checkpoint(source, bare=True).tensors["float32"]
    match change:
        case "another":
            save_file({"float32": torch.zeros(5, 7)}, source)
        case "touched":
            os.utime(source, ns=(1, 1))
        case "shorter":
            source.write_bytes(source.read_bytes()[:-3])
        case "gone":
            source.unlink()
    with pytest.raises(DuoError, match=r"model\.safetensors: float32 cannot be read \(") as error:
        list(tensor.pieces())
    assert ("has changed" in str(error.value)) == (change != "gone")


def test_a_file_that_becomes_shorter_while_it_is_copied(source, monkeypatch):
    monkeypatch.setattr(safetensors_file, "PIECE", 4)
    tensor = open_checkpoint(source, bare=True).tensors["float32"]
    parts = tensor.pieces()
    next(parts)
    source.write_bytes(source.read_bytes()[:200])
    with pytest.raises(DuoError, match="float32 cannot be read .the file has changed since it was opened"):
        list(parts)
