"""A finished oracle read back: what was written, and one line for what cannot be read."""

import json

import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.study import results, search, sequence

LENGTH = 5
WINDOWS = np.random.default_rng(4).integers(0, 32, (2, LENGTH + 1))
BUDGETS = ("none", "2", "3..1", "0", "at-most:1")
FILES = ("tokens-none.npz", "tokens-2.npz", "tokens-3-to-1.npz", "tokens-0.npz", "tokens-at-most-1.npz")


def write(model, out, budgets, **options):
    asked = sequence.Question("sB", "shared", budgets, 0, {"source": "here"}, {"name": "tiny"})
    return search.run(model, WINDOWS, asked, out, "typed", 1 << 24, **options)


@pytest.fixture
def folder(tiny_model, tmp_path):
    """Of a finished oracle of one budget."""
    write(tiny_model(), tmp_path / "out", ("2",))
    return tmp_path / "out"


def test_what_was_written_is_read(tiny_model, tmp_path):
    summary = write(tiny_model(), tmp_path, BUDGETS)
    found = results.read(tmp_path)
    assert found.folder == tmp_path and found.layers == 4
    assert found.summary["budgets"] == summary["budgets"] and found.summary["choices"] == "sB"
    assert tuple(found.tables) == BUDGETS
    for budget, file in zip(BUDGETS, FILES, strict=True):
        with np.load(tmp_path / file) as written:
            assert found.tables[budget].keys() == set(written.files)
            for name in written.files:
                np.testing.assert_array_equal(found.tables[budget][name], written[name], strict=True)
        of = found.tables[budget]
        assert of["oracle_loss"].shape == WINDOWS[:, 1:].shape
        assert of["oracle_loss"].mean() == pytest.approx(summary["budgets"][budget]["oracle"])
    np.testing.assert_array_equal(found.any["inputs"], WINDOWS[:, :-1])
    assert list(found.exact) == [0, 2] and found.exact[2] is found.tables["2"]


def test_a_single_budget_has_the_plain_name(folder):
    found = results.read(folder)
    assert tuple(found.tables) == ("2",) and (folder / "tokens.npz").is_file()


def test_numbers_of_big_layers_are_in_order():
    tables = {name: {} for name in ("10", "2", "bytes:0.5", "0")}
    assert list(results.Found(None, {}, tables).exact) == [0, 2, 10]


def refused(folder, file, *words):
    """`read` says in one line which file it is about, and these words."""
    with pytest.raises(DuoError) as caught:
        results.read(folder)
    said = str(caught.value)
    assert said.startswith(f"{folder / file}: ") and "\n" not in said
    assert all(word in said for word in words), said


def test_what_is_not_finished_is_refused(tiny_model, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tiny_model(), tmp_path / "out", ("2",), progress=stop)
    assert (tmp_path / "out" / "sequences" / "00000.npz").is_file()
    refused(tmp_path / "out", "summary.json", "give the folder of a finished duo-mlx oracle")
    refused(tmp_path / "nowhere", "summary.json", "give the folder of a finished duo-mlx oracle")


@pytest.mark.parametrize(
    "content", [b"", b'{"schema": ', b"\xff\xfe{}", b"[" * 10], ids=["empty", "cut", "bytes", "open"]
)
def test_a_damaged_summary(folder, content):
    (folder / "summary.json").write_bytes(content)
    refused(folder, "summary.json", "is damaged")


@pytest.mark.parametrize("content", [{}, {"schema": "duo-mlx-oracle/0", "budgets": {}}, [], "duo-mlx-oracle/1", None])
def test_a_summary_of_something_else(folder, content):
    (folder / "summary.json").write_text(json.dumps(content))
    refused(folder, "summary.json", "is no duo-mlx-oracle/1")


def test_a_missing_table_is_left_out(tiny_model, tmp_path):
    write(tiny_model(), tmp_path, BUDGETS)
    whole = results.read(tmp_path)
    for file in ("tokens-none.npz", "tokens-0.npz"):
        (tmp_path / file).unlink()
    found = results.read(tmp_path)
    assert tuple(found.tables) == ("2", "3..1", "at-most:1") and list(found.exact) == [2]
    assert found.summary == whole.summary and found.layers == 4
    assert found.tables["2"].keys() == whole.tables["2"].keys()
    np.testing.assert_array_equal(found.any["oracle_loss"], whole.tables["2"]["oracle_loss"])


def test_no_table_at_all(folder):
    (folder / "tokens.npz").rename(folder / "tokens-2.npz")  # which is no table's name where there is one budget
    refused(folder, "", "holds none of the tables that its summary.json names")


def cut(file):
    file.write_bytes(file.read_bytes()[:200])


def changed_inside(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(bytes(content))


def text(file):
    file.write_text("inputs, targets\n")


def bare_array(file):
    with file.open("wb") as opened:
        np.save(opened, np.zeros(3))


def objects(file):
    with np.load(file) as archive:
        arrays = dict(archive) | {"inputs": np.array([{"any": "thing"}], object)}
    np.savez(file, **arrays)


@pytest.mark.parametrize("damage", [cut, changed_inside, text, bare_array, objects])
def test_a_damaged_table(folder, damage):
    damage(folder / "tokens.npz")
    refused(folder, "tokens.npz", "is damaged (")


@pytest.mark.parametrize("missing", [("oracle_routes",), ("inputs", "loss_small")])
def test_a_table_without_what_all_hold(folder, missing):
    with np.load(folder / "tokens.npz") as archive:
        arrays = {name: archive[name] for name in archive.files if name not in missing}
    np.savez(folder / "tokens.npz", **arrays)
    refused(folder, "tokens.npz", f"holds no {' and no '.join(missing)}; an oracle's table does")
