"""The texts of bench run: bundled ones are real and apart, prompts run on, held-out windows are spread over a text."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from duo_mlx import checkpoint
from duo_mlx.bench import reading
from duo_mlx.bench.reading import Text
from duo_mlx.errors import DuoError

TEXTS = Path(reading.__file__).parent / "texts"


class Letters:
    """A tokenizer whose ids are those of Unicode; special tokens would be a 0 in front."""

    def encode(self, text, add_special_tokens=True):
        return [0] * add_special_tokens + [ord(letter) for letter in text]


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded model's."""
    return checkpoint.read_tokenizer(checkpoint.EMBEDDED, checkpoint.read_config(checkpoint.EMBEDDED))


def words(text):
    return re.findall(r"[A-Za-z]+", text.lower())


def test_the_bundled_prompts_are_many_real_paragraphs(tokenizer):
    text = reading.read(None, "prompts")
    found = reading.prompts(text, tokenizer)
    assert text.source == "bundled" and len(found) >= 16
    assert len({tuple(ids) for ids in found}) == len(found)
    for ids in found:
        decoded = tokenizer.decode(ids)
        assert len(words(decoded)) > 20 and sum(map(str.isalpha, decoded)) > len(decoded) / 2
    assert text.record(5, 3) == {"source": "bundled", "sha256": text.sha256, "tokens": 5, "count": 3}


def test_the_bundled_held_out_text_has_windows_for_every_preset_and_nothing_of_the_prompts(tokenizer):
    held_out, prompts = (reading.read(None, name).content for name in ("held_out", "prompts"))
    assert reading.windows(Text("", held_out), tokenizer, 8192, 256).shape == (32, 257)
    in_a_row = 12
    runs = [
        {tuple(each[start : start + in_a_row]) for start in range(len(each) - in_a_row + 1)}
        for each in (words(held_out), words(prompts))
    ]
    assert all(runs) and not runs[0] & runs[1]


def test_the_digest_is_that_of_the_file():
    for name in ("prompts", "held_out"):
        digest = hashlib.sha256((TEXTS / f"{name}.txt").read_bytes()).hexdigest()
        assert reading.read(None, name).sha256 == digest == reading.read(TEXTS / f"{name}.txt", "prompts").sha256


def test_a_users_file_is_read_in_place_of_the_bundled_text_and_named_without_its_directory(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("é", encoding="utf-8")
    assert reading.read(file, "prompts") == Text("mine.txt", "é")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b"caf\xe9"), "is no UTF-8 text"),
        (Path.exists, "cannot be read (No such file or directory)"),
        (Path.mkdir, "cannot be read (Is a directory)"),
    ],
    ids=["latin-1", "missing", "a directory"],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, make, message):
    file = tmp_path / "mine.txt"
    make(file)
    with pytest.raises(DuoError) as caught:
        reading.read(file, "prompts")
    assert str(caught.value) == f"{file}: {message}"


def test_prompts_are_paragraphs_without_their_line_breaks_and_special_tokens():
    text = Text("mine.txt", "\n\n one\ntwo\n \t\n\nthree\r\n\r\nfour\n")
    assert reading.prompts(text, Letters()) == [
        [ord(letter) for letter in each] for each in ("one two", "three", "four")
    ]


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
def test_a_text_without_a_prompt_is_refused(content):
    with pytest.raises(DuoError, match=r"^mine\.txt: holds no prompt; write them as paragraphs"):
        reading.prompts(Text("mine.txt", content), Letters())


def test_a_paragraph_without_a_token_is_no_prompt():
    tokenizer = Letters()
    tokenizer.encode = lambda text, **_: [] if text == "?" else [1]
    assert reading.prompts(Text("", "?\n\nwhat\n\n?"), tokenizer) == [[1]]


def test_a_prompt_is_cut_or_runs_on_into_the_next_and_around():
    prompts = [[1, 2, 3], [4], [5, 6]]
    assert reading.cut(prompts, 0, 2, None) == [1, 2]
    assert reading.cut(prompts, 1, 3, None) == [4, 5, 6]
    assert reading.cut(prompts, 2, 10, None) == [5, 6, 1, 2, 3, 4, 5, 6, 1, 2]
    assert reading.cut(prompts, 7, 3, None) == [4, 5, 6]  # number 7 of 3 is number 1
    assert reading.cut(prompts, 0, 3, 9) == [9, 1, 2]
    assert reading.cut(prompts, 0, 1, 9) == [9]
    assert prompts == [[1, 2, 3], [4], [5, 6]]


def test_windows_are_spread_over_the_text():
    text = Text("", "".join(chr(number) for number in range(1, 102)))
    found = reading.windows(text, Letters(), 30, 10)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found[:, 0], [1, 41, 91])  # the first, the last that fits, and one between
    np.testing.assert_array_equal(found - found[:, :1], [range(11)] * 3)
    everything = reading.windows(text, Letters(), 10**6, 10)  # no token is predicted twice, however many are asked for
    np.testing.assert_array_equal(everything[:, 1:].ravel(), range(2, 102))
    assert reading.windows(text, Letters(), 1, 10).shape == (1, 11)
    assert reading.windows(text, Letters(), 100, 100).shape == (1, 101)


@pytest.mark.parametrize("tokens", [0, 1, 10])
def test_a_text_too_short_for_a_window_is_refused(tokens):
    with pytest.raises(DuoError) as caught:
        reading.windows(Text("mine.txt", "a" * tokens), Letters(), 30, 10)
    assert str(caught.value) == f"mine.txt: has {tokens} tokens; quality is measured on 11 or more"
