"""Checkpoints and the folder around them: whole or the one before, of this run and no other."""

import errno
import io
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

import duo_mlx
from duo_mlx import checkpoint, shards
from duo_mlx.errors import DuoError
from duo_mlx.training import state
from duo_mlx.training.folder import Folder
from duo_mlx.training.optimizer import Moments
from duo_mlx.training.state import State

RECIPE = {"batch": 4, "files": [{"name": "a.txt", "bytes": 3}], "lr": 0.002}
ROW = {"step": "5", "tokens": "10", "loss": "1.5"}


def arrays(number, shapes=((3, 2), (4,))):
    return {f"layer.{place}": mx.full(shape, number + place / 7) for place, shape in enumerate(shapes)}


def at(step, **changes):
    return State(step, Moments(*(arrays(step + each, **changes) for each in range(3))), {"big": 1 / 3})


@pytest.fixture
def folder(tmp_path):
    found = Folder(tmp_path / "run")
    found.begin(resume=False)
    return found


def same(one, other):
    assert (one.step, one.before) == (other.step, other.before)
    for kind in state.KINDS:
        these, those = getattr(one.moments, kind), getattr(other.moments, kind)
        assert these.keys() == those.keys()
        assert all(mx.array_equal(each, those[name]) and each.dtype == mx.float32 for name, each in these.items())


def test_a_checkpoint_holds_all_bit_for_bit(folder):
    for step in (5, 10):
        folder.keep(at(step), RECIPE, ROW | {"step": str(step)})
        same(folder.resumed(RECIPE, arrays(0)), at(step))
    assert [file.name for file in folder.checkpoint.parent.iterdir()] == ["state.safetensors"]
    assert "step 10" in folder.kept()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.001}, "was made with lr 0.002, not 0.001"),
        ({"batch": 8, "lr": 0.001}, "was made with batch 4, not 8"),
        ({"more": 1}, "was made with more None, not 1"),
        ({"files": []}, "was made with files [{'name': 'a.txt', 'bytes': 3}], not []"),
    ],
)
def test_a_checkpoint_of_another_recipe(folder, changes, said):
    folder.keep(at(5), RECIPE, ROW)
    with pytest.raises(DuoError) as refused:
        folder.resumed(RECIPE | changes, arrays(0))
    assert f"state.safetensors: {said}; resume with what it was made with, or give another --out" in str(refused.value)


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        (((3, 2), (5,)), "first.layer.1 is [4] in it, and [5] in this one"),
        (((3, 2),), "first.layer.1 is [4] in it, and not there in this one"),
        (((3, 2), (4,), (1,)), "first.layer.2 is not there in it, and [1] in this one"),
    ],
)
def test_a_checkpoint_of_another_model(folder, shapes, said):
    folder.keep(at(5), RECIPE, ROW)
    with pytest.raises(DuoError) as refused:
        folder.resumed(RECIPE, arrays(0, shapes))
    assert f"is of another model: {said}" in str(refused.value)


def test_files_that_are_no_checkpoints(folder):
    folder.keep(at(5), RECIPE, ROW)
    whole = folder.checkpoint.read_bytes()
    for content in (b"", whole[:-1], whole[:200], b"\xff" * 300):
        folder.checkpoint.write_bytes(content)
        with pytest.raises(DuoError, match=r"state.safetensors: is damaged or no checkpoint \("):
            folder.resumed(RECIPE, arrays(0))
    shards.write(folder.checkpoint.parent, shards.held(arrays(0)), stem="state")
    with pytest.raises(DuoError, match=r"state.safetensors: is no checkpoint of duo-mlx train$"):
        folder.resumed(RECIPE, arrays(0))


class Full(io.FileIO):
    """A file on a disk that is full after some bytes."""

    room = 0

    def write(self, data):
        if Full.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(len(data), Full.room)
        Full.room -= taken
        return super().write(bytes(data)[:taken])


@pytest.mark.parametrize("room", [0, 20, 400, 700])
def test_a_full_disk_leaves_the_checkpoint_before(folder, monkeypatch, room):
    folder.keep(at(5), RECIPE, ROW)
    log = folder.log.read_text()
    unbuffered = {"buffering": 0}
    opening = type(folder.checkpoint).open
    monkeypatch.setattr(
        type(folder.checkpoint), "open",
        lambda path, mode="r", *args, **more: Full(path, "wb") if mode == "wb" and more == unbuffered
        else opening(path, mode, *args, **more),
    )  # fmt: skip
    Full.room = room
    with pytest.raises(DuoError) as refused:
        folder.keep(at(10), RECIPE, ROW | {"step": "10"})
    said = str(refused.value)
    assert said.startswith(f"{folder.checkpoint}: cannot be written: No space left on device; ")
    assert said.endswith(f"{folder.out} keeps step 5; --resume goes on") and "\n" not in said
    monkeypatch.undo()
    assert [file.name for file in folder.checkpoint.parent.iterdir()] == ["state.safetensors"]
    same(folder.resumed(RECIPE, arrays(0)), at(5))
    assert folder.log.read_text() == log


def test_a_disk_that_is_full_before_the_first_checkpoint(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(folder.log), "write_text", full)
    with pytest.raises(
        DuoError, match=r"log.csv: cannot be written: No space left on device; .* keeps no checkpoint yet"
    ):
        folder.keep(at(5), RECIPE, ROW)


def test_the_log_goes_on_where_the_checkpoint_does(folder):
    for step in (5, 10):
        folder.keep(at(step), RECIPE, ROW | {"step": str(step)})
    folder.log.write_text(folder.log.read_text() + "15,30,9.9\n")  # a kill came before the checkpoint of step 15
    assert folder.resumed(RECIPE, arrays(0)).step == 10
    folder.keep(at(15), RECIPE, ROW | {"step": "15"})
    assert folder.log.read_text() == "step,tokens,loss\n5,10,1.5\n10,10,1.5\n15,10,1.5\n"
    folder.checkpoint.unlink()
    assert folder.resumed(RECIPE, arrays(0)) is None and not folder.log.exists()


def test_a_folder_begins_once_and_goes_on_when_told(folder, tmp_path):
    with pytest.raises(DuoError, match=r"--out .*run: exists already; give --resume to go on with it, or another name"):
        folder.begin(resume=False)
    with pytest.raises(DuoError, match=r"--resume: .*other holds no training to go on with; leave out --resume"):
        Folder(tmp_path / "other").begin(resume=True)
    kept = tmp_path / "mine" / ".note.1.new.txt"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(DuoError, match="mine holds no training to go on with"):
        Folder(kept.parent).begin(resume=True)
    assert kept.exists()
    for left in (".state.77.new.safetensors", ".state.77.new.safetensors.index.json"):
        (folder.checkpoint.parent).mkdir(exist_ok=True)
        (folder.checkpoint.parent / left).touch()
    (folder.out / ".tokenizer.x").mkdir()
    (folder.out / ".model.new").mkdir()
    (folder.out / ".model.new" / "config.json").touch()
    (folder.tokens / ".train.77.new.npy").touch()
    folder.begin(resume=True)
    assert sorted(each.name for each in folder.out.rglob("*")) == ["checkpoint", "tokens"]
    (tmp_path / "file").touch()
    with pytest.raises(DuoError, match="file: exists already"):
        Folder(tmp_path / "file").begin(resume=False)


def test_the_end_is_a_model_directory_and_then_the_record(folder, saved, monkeypatch):
    directory, model = saved()
    config, weights = json.loads((directory / "config.json").read_text()), checkpoint.parameters(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / name, folder.out)
    folder.keep(at(5), RECIPE, ROW)
    moved = []
    replace = type(folder.out).replace
    monkeypatch.setattr(type(folder.out), "replace", lambda path, to: (moved.append(to.name), replace(path, to))[1])
    folder.finish(config, weights, {"steps": 5})
    assert moved[-2:] == ["config.json", "training.json"] and "model.safetensors" in moved
    loaded, _ = duo_mlx.load(folder.out)
    for name, each in checkpoint.parameters(loaded).items():
        np.testing.assert_array_equal(np.array(each), np.array(weights[name]))
    with pytest.raises(DuoError, match=r"--out .*run: holds a finished training; give another name"):
        folder.begin(resume=True)


def test_a_full_disk_at_the_end_keeps_the_checkpoint(folder, saved, monkeypatch):
    _, model = saved()
    folder.keep(at(5), RECIPE, ROW)
    opening = type(folder.out).open
    monkeypatch.setattr(
        type(folder.out), "open",
        lambda path, mode="r", *args, **more: Full(path, "wb") if mode == "wb" else opening(path, mode, *args, **more),
    )  # fmt: skip
    Full.room = 100
    with pytest.raises(DuoError) as refused:
        folder.finish({}, checkpoint.parameters(model), {})
    assert str(refused.value).startswith(f"{folder.out / 'model.safetensors'}: cannot be written: No space left on dev")
    assert "keeps step 5" in str(refused.value)
    monkeypatch.undo()
    assert sorted(each.name for each in folder.out.iterdir()) == ["checkpoint", "log.csv", "tokens"]
    with pytest.raises(DuoError, match=r"holds no config.json, so it is no model directory"):
        duo_mlx.load(folder.out)
