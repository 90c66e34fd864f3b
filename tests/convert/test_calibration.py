"""Calibration texts: read as they are, divided so that nothing is measured on what was grafted on, and recorded."""

import hashlib
import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duo_mlx import checkpoint
from duo_mlx.convert import calibration
from duo_mlx.errors import DuoError
from duo_mlx.study import patterns


@given(
    size=st.integers(0, 6000),
    graft=st.one_of(st.just(0), st.integers(128, 4000)),
    measure=st.one_of(st.just(0), st.integers(128, 3000)),
    longest=st.one_of(st.none(), st.integers(64, 2000)),
)
def test_the_two_parts_are_apart_and_no_larger_than_asked(size, graft, measure, longest):
    ids = np.arange(size, dtype=np.int32)
    least = 128 * bool(graft) + 130 * bool(measure)
    if size < least:
        with pytest.raises(DuoError, match=f"the texts have {size} tokens; at least {least} are needed"):
            calibration.split(ids, graft, measure, longest)
        return
    found = calibration.split(ids, graft, measure, longest)
    np.testing.assert_array_equal(found.graft, ids[: len(found.graft)])
    assert len(found.graft) <= graft and (not graft or len(found.graft) >= 128)
    if not measure:
        assert found.windows is None and (found.note is None) == (len(found.graft) == graft)
        return
    count, width = found.windows.shape
    np.testing.assert_array_equal(np.diff(found.windows.flatten()), 1)  # one after the other
    assert found.windows.min(initial=size) >= len(found.graft)
    assert count >= 2 and 32 <= width - 1 <= min(512, longest or 512)
    predicted = count * (width - 1)
    assert predicted <= max(measure, 128)
    if size >= graft + max(130, measure + -(-measure // min(512, longest or 512))):
        assert len(found.graft) == graft and found.note is None
        assert predicted >= measure - 2 * count


def test_what_is_asked_for_by_default():
    found = calibration.split(np.arange(30_000, dtype=np.int32), 20_000, 1024)
    assert (found.graft.shape, found.windows.shape, found.note) == ((20_000,), (2, 513), None)
    assert found.windows[-1, -1] == 29_999


def test_a_text_that_is_too_short_is_shared_and_that_is_said():
    found = calibration.split(np.arange(2000, dtype=np.int32), 20_000, 1024)
    assert found.windows.shape == (2, 200) and found.graft.shape == (1600,)
    assert found.note == "the texts have 2000 tokens: 1600 are grafted on (of 20000), 398 are measured (of 1024)"
    alone = calibration.split(np.arange(500, dtype=np.int32), 0, 1024)
    assert alone.note == "the texts have 500 tokens: 498 are measured (of 1024)"


def test_texts_and_their_digests(tmp_path):
    (tmp_path / "a.txt").write_bytes("w1 \u00e9\r\n".encode())
    (tmp_path / "b.txt").write_text("w2")
    found = calibration.read_texts([tmp_path / "a.txt", tmp_path / "b.txt"])
    assert [(text.name, text.content) for text in found] == [("a.txt", "w1 \u00e9\r\n"), ("b.txt", "w2")]
    assert found[0].sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "line"), [(None, "cannot be read (No such file or directory)"), (b"ab\xff", "is not UTF-8 (byte 2)")]
)
def test_a_text_that_cannot_be_read_is_one_line(tmp_path, content, line):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DuoError) as error:
        calibration.read_texts([file])
    assert str(error.value) == f"--calibrate {file}: {line}"


def test_ids_are_the_tokenizers_without_special_tokens_or_a_warning(saved, write_tokenizer, tmp_path, caplog):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 3}))
    (tmp_path / "config.json").write_text((saved()[0] / "config.json").read_text())
    texts = [calibration.Text(name, "", content) for name, content in (("a", "w1 w2 w3 w4 w5"), ("b", "w6 x"))]
    ids = calibration.encode(tmp_path, {"eos_token_id": 1}, texts)
    assert ids.dtype == np.int32 and ids.tolist() == [3, 4, 5, 6, 7, 8, 0]
    assert caplog.text == ""


def test_patterns_are_those_of_the_study_and_the_record_says_of_what(saved, tmp_path):
    directory, model = saved()
    weights = checkpoint.parameters(model)
    checkpoint.save(tmp_path, json.loads((directory / "config.json").read_text()), weights)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    windows = np.random.default_rng(0).integers(0, 32, (2, 17), np.int32)
    done = []
    found = calibration.measure(tmp_path, windows, [calibration.Text("emma.txt", "0f", "")], done.append)
    expected = patterns.measure(model, mx.array(windows))
    assert found == expected.patterns and len(found) > 4 and done == sorted(done) and done[-1] == 1
    record = json.loads((tmp_path / "patterns.json").read_text())
    assert record["texts"] == [{"name": "emma.txt", "sha256": "0f"}] and record["windows"] == [2, 17]
    assert set(record["versions"]) == {"duo-mlx", "mlx"}
    assert record["loss"]["small_in_one_layer"] == expected.small
