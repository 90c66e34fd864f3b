"""Texts become token files: what is held out, where documents join, what cannot be trained on, and how much memory."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
import sentencepiece

from duo_mlx import checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.training import data, texts, tokenizer, tokens
from duo_mlx.training.data import Data, Question

WHO, WHERE = ("cat", "dog", "old man", "ship"), ("mat", "log", "wall", "hat", "stone")
TEXT = "".join(f"The {who}\nsat on the {where}.\n\n" for who in WHO for where in WHERE)


class Words:
    """A tokenizer whose tokens are words of digits, with or without an end of text."""

    def __init__(self, eos=None):
        self.eos_token_id = eos

    def encode(self, texts, *, add_special_tokens, verbose):
        assert not add_special_tokens and not verbose
        return [self.ids(text) for text in texts]

    @staticmethod
    def ids(text):
        return [int(word) for word in text.split()]


def numbers(count, start=0):
    return " ".join(str(number) for number in range(start, start + count))


def lines(*documents, key="text"):
    return "".join(json.dumps({"id": 1, key: document}) + "\n" for document in documents)


@pytest.fixture
def tokenised(tmp_path):
    """``tokenised(*files, eos=None, **question)``: the data of these files."""

    def make(*files, eos=None, vocabulary=1000, **question):
        asked = Question(files, **question)
        asked.check()
        data.tokenise(asked, tmp_path, Words(eos), vocabulary, {})
        return data.open_data(asked, tmp_path, vocabulary, lambda *_: None)

    return make


def test_the_end_of_every_text_is_held_out(write, tokenised):
    files = write("a.txt", numbers(100)), write("b.txt", numbers(50, 200))
    found = tokenised(*files, held_out=0.2)
    for number, file in enumerate(files):
        text = file.read_text()
        cut = round(len(text) * 0.8)  # as examples/train_pytorch.py has it
        begin = found.ends[0] if number else 0
        assert found.held_out[begin : found.ends[number]].tolist() == Words.ids(text[cut:])
    assert found.train[:5].tolist() == [0, 1, 2, 3, 4] and 200 in found.train
    assert found.held_out_bytes == sum(round(file.stat().st_size * 0.2) for file in files)


@pytest.mark.parametrize(("eos", "joint"), [(None, []), (9, [9])])
def test_documents_are_joined_with_the_end_of_text(write, tokenised, eos, joint):
    many = write("many.jsonl", lines("1 2", "3", "", "4 5", "6", "7", "8"))
    text = write("a.txt", "11 12 13 14")
    found = tokenised(text, many, text, eos=eos, held_out=0.5)
    assert found.train.tolist() == [11, 12, *joint, 1, 2, *joint, 3, *joint, 4, 5, *joint, 11, 12]
    assert found.held_out.tolist() == [13, 14, 6, *joint, 7, *joint, 8, 13, 14]
    assert found.ends == [2, 5 + 2 * len(joint), 7 + 2 * len(joint)]


def test_documents_under_another_key_and_blank_lines(write, tokenised):
    file = write("many.ndjson", "\n" + lines("1", "2", key="body") + "  \n" + lines("3", "4", key="body"))
    found = tokenised(file, key="body", held_out=0.5)
    assert (found.train.tolist(), found.held_out.tolist()) == ([1, 2], [3, 4])


@pytest.mark.parametrize("block", [1, 7, 50, 1 << 20])
def test_a_long_text_is_read_in_pieces_that_end_between_words(write, tokenised, monkeypatch, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    file = write("long.txt", "\n\n".join(numbers(9, 10 * start) for start in range(30)))
    pieces = list(texts.pieces(file, "text", 0.25))
    whole = file.read_text()
    assert "".join(piece.content for piece in pieces if not piece.held_out) == whole[: round(0.75 * len(whole))]
    assert "".join(piece.content for piece in pieces) == whole
    assert [piece.ends for piece in pieces].count(True) == 2 and pieces[-1].ends
    assert max(len(piece.content) for piece in pieces) < 2 * block + 30
    if block > 4:
        monkeypatch.undo()
        expected = tokenised(file, held_out=0.25).train.tolist()
        monkeypatch.setattr(texts, "BLOCK", block)
        assert tokenised(file, held_out=0.25).train.tolist() == expected


def test_pieces_end_after_a_paragraph_rather_than_a_line_or_a_word(write, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 20)
    cases = {
        "a b\n\nc\nd e f g h i j k l m": "a b\n\n",
        "a b\nc d e f g h i j k l m": "a b\n",
        "a b c d e f g h i j k l": "a b c d e f g h i j",
    }
    for content, first in cases.items():
        assert next(texts.pieces(write("t.txt", content), "text", 0.01)).content == first


def test_reading_takes_memory_for_a_piece_and_not_for_a_text(write, monkeypatch):
    monkeypatch.setattr(texts, "BLOCK", 1 << 12)
    files = write("many.jsonl", lines(*("1 2 3",) * 40_000)), write("long.txt", "1 2 3 4 5\n" * 100_000)
    assert min(file.stat().st_size for file in files) > 900_000
    tracemalloc.start()
    count = [0, 0]
    for number, file in enumerate(files):
        for piece in texts.pieces(file, "text", 0.05):
            count[number] += len(piece.content.split())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == [120_000, 500_000] and peak < 150_000


@pytest.mark.parametrize("documents", [1, 2, 1 << 10])
def test_ids_of_a_batch_are_those_of_single_documents(write, tmp_path, monkeypatch, documents):
    monkeypatch.setattr(texts, "DOCUMENTS", documents)
    many = ["It was", " ", "", "naïve 東京 🙂 e\u0301", "ends in a line\n", "\n", "</s> a <s>", "x" * 300, "It was"]
    settings = {"truncation": {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}}
    settings["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0,
                           "pad_token": "<unk>", "pad_to_multiple_of": None}  # fmt: skip
    file = write("many.jsonl", lines(*many))
    for name, more in (("plain", {}), ("cut", settings)):
        shutil.copytree(checkpoint.EMBEDDED, tmp_path / name, ignore=shutil.ignore_patterns("model*"))
        path = tmp_path / name / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        asked, read = Question((file,), held_out=0.3), checkpoint.read_tokenizer(tmp_path / name, {})
        data.tokenise(asked, tmp_path / name, read, 4096, {})
        found = data.open_data(asked, tmp_path / name, 4096, lambda *_: None)
        singly = [read.encode(each, add_special_tokens=False, verbose=False) for each in many if each]
        for ids, of in ((found.train, singly[:5]), (found.held_out, singly[5:])):
            joined = [token for each in of for token in [*each, read.eos_token_id]]
            assert ids.tolist() == joined[:-1]
    assert len(singly[-2]) > 9


def test_a_batch_has_so_many_characters_or_documents(monkeypatch):
    monkeypatch.setattr(texts, "BATCH", 10)
    monkeypatch.setattr(texts, "DOCUMENTS", 4)
    pieces = [texts.Piece("x" * size, False, True) for size in (3, 6, 1, 30, 9, 1, 1, 1, 1, 1, 1, 1)]
    found = list(texts.batches(pieces))
    assert [len(batch) for batch in found] == [3, 1, 2, 4, 2]
    assert [piece for batch in found for piece in batch] == pieces


def test_no_more_than_a_batch_of_documents_is_in_memory(write, tmp_path):
    count, calls = 40 * texts.DOCUMENTS, 0
    file = write("many.jsonl", lines(*("1 2",) * count) + "{\n")

    def progress(done, total):
        nonlocal calls
        calls += 1
        assert done == 3 * calls <= total

    tracemalloc.start()
    with pytest.raises(DuoError, match=rf"many.jsonl: line {count + 1} is no JSON"):
        data.tokenise(Question((file,)), tmp_path, Words(), 10, {}, progress)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert calls == count and peak < 1_000_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "", "empty.txt: holds no text"),
        ("blank.txt", " \n\t\n", "blank.txt: holds no text"),
        ("none.jsonl", "\n", "none.jsonl: holds no text"),
        ("void.jsonl", lines("", " "), "void.jsonl: holds no text"),
        ("bad.jsonl", lines("1") + "{\n", "bad.jsonl: line 2 is no JSON (Expecting property name"),
        ("deep.jsonl", "[" * 100_000 + "\n", "deep.jsonl: line 1 is no JSON (maximum recursion"),
        ("list.jsonl", "\n[1]\n", "list.jsonl: line 2 is no object with a text under 'text'; --text-key names another"),
        ("key.jsonl", lines("1", key="body"), "key.jsonl: line 1 is no object with a text under 'text'"),
        ("number.jsonl", '{"text": 1}\n', "number.jsonl: line 1 is no object with a text under 'text'"),
        ("half.jsonl", '{"text": "\\ud800"}\n', "half.jsonl: line 1 has half of a character, a lone surrogate"),
    ],
)
def test_what_holds_no_text(write, name, content, message, tmp_path):
    with pytest.raises(DuoError) as refused:
        data.tokenise(Question((write(name, content),)), tmp_path, Words(), 10, {})
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_text_of_another_encoding(tmp_path):
    for name in ("latin.txt", "latin.jsonl"):
        (tmp_path / name).write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
        with pytest.raises(DuoError, match=rf"{name}: is not UTF-8 text$"):
            list(texts.pieces(tmp_path / name, "text", 0.1))


def test_files_that_are_not_there_or_not_alone(write, tmp_path):
    with pytest.raises(DuoError, match=r"absent.txt: there is no such file to train on"):
        Question((tmp_path / "absent.txt",)).check()
    with pytest.raises(DuoError, match=r"a token file is trained on alone"):
        Question((write("a.txt", "a"), write("b.npy", ""))).check()


@pytest.mark.parametrize(("vocabulary", "kind"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_token_files_are_as_narrow_as_the_vocabulary_allows(tmp_path, vocabulary, kind):
    rows = [[0, vocabulary - 1], [], [7] * 100_000]
    with tokens.token_file(tmp_path / "t.npy", vocabulary) as append:
        for row in rows:
            append(row)
        assert not (tmp_path / "t.npy").exists()
    found = tokens.read(tmp_path / "t.npy", vocabulary)
    assert isinstance(found, np.memmap) and found.dtype == kind and found.tolist() == [0, vocabulary - 1, *rows[2]]
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), found)
    assert [file.name for file in tmp_path.iterdir()] == ["t.npy"]


def test_a_token_file_that_is_interrupted_is_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), tokens.token_file(tmp_path / "t.npy", 10) as append:
        append([1])
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["<u2", "<u4", "<i4", "<i8", ">u2"])
def test_any_row_of_integers_is_a_token_file_and_its_end_is_held_out(tmp_path, kind):
    file = tmp_path / "t.npy"
    np.save(file, np.arange(40).astype(kind))
    found = data.open_data(Question((file,), held_out=0.25), tmp_path, 40, lambda *_: None)
    assert found.train.tolist() == list(range(30)) and found.held_out.tolist() == list(range(30, 40))
    assert list(found.ends) == [10] and found.held_out_bytes is None


@pytest.mark.parametrize("block", [3, 1 << 24])
@pytest.mark.parametrize("bad", [32, -1, 40_000])
def test_a_token_out_of_range_is_named(tmp_path, monkeypatch, block, bad):
    monkeypatch.setattr(tokens, "BLOCK", block)
    np.save(tmp_path / "t.npy", np.array([31, 0, 5, 6, 7, bad, 1, bad]))
    with pytest.raises(DuoError, match=rf"t.npy: token 5 is {bad}, but the vocabulary's ids are 0 to 31$"):
        tokens.read(tmp_path / "t.npy", 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((2, 3), np.uint16), "must hold one row of integers"),
        (np.zeros(3), "must hold one row of integers"),
        (b"12 13 14", "is no token file, which is a .npy file of token ids"),
        (b"", "is no token file"),
        (np.array([{}]), "is no token file"),
    ],
)
def test_what_is_no_token_file(tmp_path, content, message):
    file = tmp_path / "t.npy"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(DuoError, match=message):
        tokens.read(file, 10)


def test_too_little_to_train_on_or_to_validate_on():
    ids = np.arange(100)
    assert Data(ids, ids, [100], 1).check(99) is None
    with pytest.raises(DuoError, match="there are 100 tokens to train on, too few for a window of 100"):
        Data(ids, ids, [100], 1).check(100)
    with pytest.raises(DuoError, match="no held-out text fills a window of 30 tokens"):
        Data(ids, ids, [30, 60, 90], 1).check(30)
    assert Data(ids, ids, [31, 60, 100], 1).starts(30).tolist() == [0, 60]


def test_the_tokenizer_is_the_one_that_the_example_trains(write, tmp_path):
    """Ids of a text, read in small pieces, are sentencepiece's of the whole text."""
    file, out = write("cats.txt", TEXT), tmp_path / "out"
    out.mkdir()
    asked = Question((file,), held_out=0.1)
    assert tokenizer.train(asked, out, 300) == 300
    assert sorted(each.name for each in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    cut = round(len(TEXT) * 0.9)
    lines = (line for part in TEXT[:cut].split("\n\n") if (line := " ".join(part.split())))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(tmp_path / "sp"), vocab_size=300, model_type="bpe",
        byte_fallback=True, character_coverage=1.0, max_sentence_length=1 << 16, minloglevel=2,
    )  # fmt: skip
    expected = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    read = checkpoint.read_tokenizer(out, {})
    for block in (64, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(texts, "BLOCK", block)
            data.tokenise(asked, out, read, 300, {})
        found = data.open_data(asked, out, 300, lambda *_: None)
        assert found.train.tolist() == expected.encode(TEXT[:cut])
        assert found.held_out.tolist() == expected.encode(TEXT[cut:])


def test_a_tokenizer_that_cannot_be_trained(write, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DuoError, match=r"--vocab 5000: sentencepiece cannot train on these texts: Vocabulary size too"):
        tokenizer.train(Question((write("a.txt", TEXT),)), out, 5000)
    with pytest.raises(DuoError, match=r"bad.jsonl: line 1 is no JSON"):
        tokenizer.train(Question((write("bad.jsonl", "{\n"),)), out, 300)
    assert not list(out.iterdir())


def test_of_very_long_texts_it_sees_paragraphs_at_equal_distances(write):
    file = write("long.txt", "\n\n".join(f"p {number}\n a" for number in range(10)))
    asked = Question((file,), held_out=0.2)
    assert list(tokenizer._paragraphs(asked, 3)) == ["p 0 a", "p 3 a", "p 6 a"]
    assert len(list(tokenizer._paragraphs(asked, 1))) == 8


def test_another_model_s_tokenizer_is_brought(saved, tmp_path):
    directory, _ = saved()
    assert tokenizer.bring(directory, tmp_path) == 32
    assert tokenizer.bring(directory, tmp_path, 40) == 40
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()
    with pytest.raises(DuoError, match="has token ids up to 31, but config.json says vocab_size 20"):
        tokenizer.bring(directory, tmp_path, 20)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
