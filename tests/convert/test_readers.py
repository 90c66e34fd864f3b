"""Readers: shapes and types before anything is loaded, bits kept, and what is refused in one line."""

import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.readers.names import unwrapped
from duo_mlx.convert.tensors import to_mlx
from duo_mlx.errors import DuoError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def state(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (6, 4), "norm.weight": (4,), "scalar": (), "empty": (0, 4), "cube": (2, 3, 4)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def split(tensors, directory, pattern, index, write, **weight_map):
    """Two shards and their index."""
    names = list(tensors)
    for number, part in enumerate((names[:2], names[2:]), 1):
        write({name: tensors[name] for name in part}, directory / pattern.format(number))
        weight_map = dict.fromkeys(part, pattern.format(number)) | weight_map
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return directory / index


def old_pickle(tensors, file):
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


FORMS = {
    "safetensors": ("safetensors", lambda t, d: save_file(t, d / "x.safetensors")),
    "pt": ("PyTorch", lambda t, d: torch.save(t, d / "x.pt")),
    "old pickle": ("PyTorch", lambda t, d: old_pickle(t, d / "x.pth")),
    "safetensors shards": (
        "safetensors",
        lambda t, d: split(t, d, "m-{}.safetensors", "model.safetensors.index.json", save_file),
    ),
    "bin shards": ("PyTorch", lambda t, d: split(t, d, "p-{}.bin", "pytorch_model.bin.index.json", torch.save)),
}


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_keeps_every_bit(directory, form, dtype):
    name, write = FORMS[form]
    tensors = state(DTYPES[dtype])
    write(tensors, directory)
    checkpoint = open_checkpoint(str(directory))
    assert (checkpoint.format, checkpoint.config, checkpoint.source) == (name, {"model_type": "llama"}, directory)
    assert len(checkpoint.files) == (2 if "shards" in form else 1)
    assert checkpoint.tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        tensor = checkpoint.tensors[key]
        assert (tensor.shape, tensor.dtype, tensor.stored) == (tuple(value.shape), dtype, "")
        loaded = tensor.load()
        expected = to_mlx(value)
        assert loaded.dtype == expected.dtype and loaded.shape == expected.shape
        bits = mx.uint32 if dtype == "float32" else mx.uint16
        np.testing.assert_array_equal(np.array(loaded.view(bits)), np.array(expected.view(bits)))


def test_tensors_are_read_when_asked_and_anew(directory):
    before, after = state(), {name: value + 1 for name, value in state().items()}
    save_file(before, directory / "x.safetensors")
    tensor = open_checkpoint(directory / "x.safetensors").tensors["cube"]
    np.testing.assert_array_equal(np.array(tensor.load()), before["cube"].numpy())
    save_file(after, directory / "x.safetensors")
    np.testing.assert_array_equal(np.array(tensor.load()), after["cube"].numpy())


def test_shards_come_one_after_the_other(directory):
    tensors = {f"t{number}": torch.full((2,), float(number)) for number in range(4)}
    split(tensors, directory, "m-{}.bin", "pytorch_model.bin.index.json", torch.save)
    found = open_checkpoint(directory).tensors
    assert list(found) == ["t0", "t1", "t2", "t3"]
    for name in ("t3", "t0", "t2", "t1"):  # whichever shard is open
        assert found[name].load().tolist() == tensors[name].tolist()


NESTED = {
    "model": lambda t: {"model": t, "step": 3, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
    "state_dict": lambda t: {"state_dict": t, "config": {"lr": 0.1}, "rng": torch.zeros(3, dtype=torch.uint8)},
    "module": lambda t: {"module": OrderedDict(t), "epoch": 1},
    "model_state_dict": lambda t: {"model_state_dict": t, "loss": 0.5},
    "twice": lambda t: {"state_dict": {"model": t, "best": None}, "args": ["a"]},
}


@pytest.mark.parametrize("nest", NESTED)
def test_nested_state_dicts(directory, nest):
    torch.save(NESTED[nest](state()), directory / "x.pt")
    assert open_checkpoint(directory / "x.pt").tensors.keys() == state().keys()


def test_strided_tied_and_shared_tensors(directory):
    base = torch.arange(24.0).reshape(4, 6)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3, bias=False), "b": torch.nn.Linear(4, 3, bias=False)})
    model["b"].weight = model["a"].weight
    tensors = {"turned": base.T, "every other": base[:, ::2], "part": base[1:3, 2:5], **model.state_dict()}
    for write in (torch.save, old_pickle):
        write(tensors, directory / "x.pt")
        found = open_checkpoint(directory / "x.pt").tensors
        for name, value in tensors.items():
            np.testing.assert_array_equal(np.array(found[name].load()), value.numpy())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_prefixes_of_training_are_taken_off(directory, prefix):
    tensors = {prefix + name: value for name, value in state().items()}
    torch.save(tensors, directory / "x.pt")
    save_file(tensors, directory / "x.safetensors")
    for file in ("x.pt", "x.safetensors"):
        assert open_checkpoint(directory / file).tensors.keys() == state().keys()


def test_prefixes_that_are_names():
    assert unwrapped({"module.a": 1, "b": 2}) == {"module.a": 1, "b": 2}
    assert unwrapped({"layers.0._orig_mod.a": 1, "b._orig_mod": 2}) == {"layers.0.a": 1, "b._orig_mod": 2}
    assert unwrapped({"module.": 1, "module.a": 2}) == {"module.": 1, "module.a": 2}
    with pytest.raises(DuoError, match="a and _orig_mod.a are both a without their prefixes"):
        unwrapped({"_orig_mod.a": 1, "a": 2})


SEGMENTS = st.lists(st.sampled_from(["layers", "0", "module", "weight", "a"]), min_size=1, max_size=4).map(".".join)


@given(st.sets(SEGMENTS, min_size=1), st.integers(0, 3), st.randoms(use_true_random=False))
def test_any_names_come_back_from_their_wrappers(names, times, random):
    if all(name.startswith("module.") for name in names):
        names = {f"x.{name}" for name in names}
    wrapped = {}
    for name in names:
        segments = name.split(".")
        for _ in range(random.randrange(3)):
            segments.insert(random.randrange(len(segments)), "_orig_mod")
        wrapped["module." * times + ".".join(segments)] = name
    assert unwrapped(wrapped) == {name: name for name in names}


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_pickle_that_would_run_code_does_not(directory, form):
    ran, file = directory / "ran", directory / "x.pt"
    if form == "bare":
        file.write_bytes(pickle.dumps(Payload(ran)))
    else:
        (torch.save if form == "zip" else old_pickle)(state() | {"payload": Payload(ran)}, file)
    with pytest.raises(DuoError, match=r"x\.pt: (holds more than tensors|is damaged)"):
        open_checkpoint(file)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Payload(ran)))  # the payload would have worked
    assert ran.exists()


def as_zip(file, compression):
    """The same archive, packed anew, with a record of zeros that was never there."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        archive.writestr("x/data/99", bytes(1 << 20))


def edit_header(file, edit):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    head = edit(content[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length :])


def save(value, name="x.pt"):
    return lambda d: torch.save(value, d / name)


def then(*steps):
    return lambda d: [step(d) for step in steps]


def st_file(**tensors):
    return lambda d: save_file(tensors or state(), d / "x.safetensors")


def index(**weight_map):
    return lambda d: split(state(), d, "m-{}.safetensors", "model.safetensors.index.json", save_file, **weight_map)


def replace(name, old, new):
    return lambda d: (d / name).write_text((d / name).read_text().replace(old, new, 1))


INDEX = "model.safetensors.index.json"
ONE = torch.ones(2)
REFUSED = {
    # what a path means
    "nothing there": ("no/such/file.pt", then(), "there is no such file or directory"),
    "no weights": (".", then(), "holds no weights file; it must have one of model.safetensors.index.json"),
    "two": (".", then(save({"a": ONE}, "a.pt"), save({"a": ONE}, "b.pt")), "several weights files (a.pt, b.pt)"),
    "another suffix": ("x.npz", lambda d: (d / "x.npz").write_text(""), "is no weights file; known are .safetensors"),
    "no tensors": ("x.pt", save({}), "holds no tensor"),
    "no config": (
        "x.pt",
        then(save({"a": ONE}), lambda d: (d / "config.json").unlink()),
        "has no config.json beside it; give one with --config FILE",
    ),
    "config a list": ("x.pt", then(save({"a": ONE}), lambda d: (d / "config.json").write_text("[]")), "JSON object"),
    "config a tower": (
        "x.pt",
        then(save({"a": ONE}), lambda d: (d / "config.json").write_text("[" * 100_000)),
        "config.json: is no JSON (nested too deeply)",
    ),
    "config twice": (
        "x.pt",
        then(save({"a": ONE}), lambda d: (d / "config.json").write_text('{"b": {"a": 1, "a": 2}}')),
        "config.json: has the key a twice",
    ),
    # pickles
    "a list": ("x.pt", save([ONE]), "is no state dict, a dict from name to tensor"),
    "an entry": ("x.pt", save({"a": ONE, "step": 3}), "a dict from name to tensor: step is of type int"),
    "a number's name": ("x.pt", save({3: ONE}), "3 is of type int"),
    "two state dicts": (
        "x.pt",
        save({"model": {"a": ONE}, "module": {"a": ONE}}),
        "several state dicts (model, module)",
    ),
    "meta": ("x.pt", save({"a": torch.ones(2, device="meta")}), "a is [2], more than the file holds"),
    "endless": ("x.pt", save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}), "more than the file holds"),
    "a bomb": ("x.pt", then(save({"a": ONE}), lambda d: as_zip(d / "x.pt", zipfile.ZIP_DEFLATED)), "is damaged"),
    "no pickle": ("x.pt", lambda d: (d / "x.pt").write_bytes(b""), "is damaged or no PyTorch checkpoint"),
    # safetensors
    "st text": ("x.safetensors", lambda d: (d / "x.safetensors").write_text("text"), "is damaged or no safetensors"),
    "st lying length": (
        "x.safetensors",
        then(st_file(), lambda d: (d / "x.safetensors").write_bytes(b"\xff" * 7 + b"\x7f" + b"{}")),
        "is damaged or no safetensors",
    ),
    "st cut": (
        "x.safetensors",
        then(st_file(), lambda d: (d / "x.safetensors").write_bytes((d / "x.safetensors").read_bytes()[:-1])),
        "is damaged or no safetensors",
    ),
    "st shape": (
        "x.safetensors",
        then(
            st_file(a=torch.ones(2, 3)),
            lambda d: edit_header(d / "x.safetensors", lambda h: h.replace(b"[2,3]", b"[9,9]")),
        ),
        "is damaged or no safetensors",
    ),
    "st twice": (
        "x.safetensors",
        then(
            st_file(a=ONE),
            lambda d: edit_header(
                d / "x.safetensors",
                lambda h: h.rstrip()[:-1] + b',"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
            ),
        ),
        "is damaged or no safetensors file (has the key a twice in one object)",
    ),
    # shards
    "a shard missing": (
        INDEX,
        then(index(), lambda d: (d / "m-2.safetensors").unlink()),
        "m-2.safetensors, which is not",
    ),
    "a tensor missing": (INDEX, index(extra="m-1.safetensors"), "names extra, which m-1.safetensors does not hold"),
    "in another shard": (INDEX, index(cube="m-1.safetensors"), "names cube, which m-1.safetensors does not hold"),
    "out of the directory": (
        INDEX,
        index(a="../m-1.safetensors"),
        "'../m-1.safetensors', which is not a file beside it",
    ),
    "an absolute path": (INDEX, index(a="/etc/passwd"), "'/etc/passwd', which is not a file beside it"),
    "the directory": (INDEX, index(a=".."), "'..', which is not a file beside it"),
    "a name with NUL": (INDEX, index(a="\0"), r"names '\x00', which is not there"),
    "a long name": (INDEX, index(a="m" * 5000), "which is not there"),
    "a shard of text": (INDEX, then(index(a="x.txt"), lambda d: (d / "x.txt").write_text("")), "is no weights file"),
    "itself": (INDEX, index(a=INDEX), "is no weights file"),
    "both formats": (INDEX, then(save({"a": ONE}), index(a="x.pt")), "several formats (PyTorch, safetensors)"),
    "in two shards": (
        INDEX,
        then(index(), lambda d: save_file(state() | {"new": ONE}, d / "m-2.safetensors")),
        "which another shard holds, too",
    ),
    "an unknown tensor": (
        INDEX,
        then(index(), lambda d: save_file({"new": ONE}, d / "m-2.safetensors")),
        "holds the unknown tensor new, which model.safetensors.index.json does not name",
    ),
    "a name twice": (
        INDEX,
        then(index(), replace(INDEX, '"weight_map": {', '"weight_map": {"cube": "m-1.safetensors", ')),
        "has the key cube twice in one object",
    ),
    "two maps": (INDEX, then(index(), replace(INDEX, "{", '{"weight_map": {}, ')), "the key weight_map twice"),
    "no map": (INDEX, lambda d: (d / INDEX).write_text('{"weight_map": []}'), "no index with a weight_map"),
    "a number for a file": (INDEX, lambda d: (d / INDEX).write_text('{"weight_map": {"a": 1}}'), "no index with"),
    "no JSON": (INDEX, lambda d: (d / INDEX).write_bytes(b"\xff{"), "is no JSON"),
    "an empty map": (INDEX, lambda d: (d / INDEX).write_text('{"weight_map": {}}'), "holds no tensor"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(directory, case):
    name, write, line = REFUSED[case]
    write(directory)
    with pytest.raises(DuoError) as error:
        open_checkpoint(directory / name)
    message = str(error.value)
    assert line in message and message.startswith(str(directory)) and message.isprintable()


def test_a_given_configuration_replaces_the_own(directory):
    torch.save(state(), directory / "x.pt")
    (directory / "other.json").write_text('{"model_type": "duo"}')
    given_one = open_checkpoint(directory, config=directory / "other.json")
    assert given_one.config == {"model_type": "duo"}
    (directory / "config.json").unlink()
    assert open_checkpoint(directory / "x.pt", config=directory / "other.json").config == given_one.config
    assert open_checkpoint(directory / "x.pt", bare=True).config == {}
    with pytest.raises(DuoError, match=r"gone\.json: there is no such file"):
        open_checkpoint(directory / "x.pt", config=directory / "gone.json", bare=True)
    with pytest.raises(DuoError, match="needs its config.json"):
        open_checkpoint(directory)


def test_without_pytorch_only_pickles_are_missed(directory, monkeypatch):
    save_file(state(), directory / "model.safetensors")
    torch.save(state(), directory / "x.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert open_checkpoint(directory).tensors["cube"].load().shape == (2, 3, 4)
    with pytest.raises(DuoError, match=r"x\.pt: reading it needs PyTorch: pip install 'duo-mlx\[torch\]'"):
        open_checkpoint(directory / "x.pt")


def test_a_file_that_changes_between(directory):
    save_file(state(), directory / "x.safetensors")
    tensor = open_checkpoint(directory / "x.safetensors").tensors["cube"]
    save_file({"other": ONE}, directory / "x.safetensors")
    with pytest.raises(DuoError, match=r"x\.safetensors: cube cannot be read"):
        tensor.load()
