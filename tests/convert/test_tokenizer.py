"""A sentencepiece model as a tokenizer.json: the same ids, the same text, and mlx-lm's streaming detokenizer."""

import io

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer
from mlx_lm.tokenizer_utils import load as load_tokenizer

from duo_mlx.convert import tokenizer
from duo_mlx.convert.sentencepiece_bpe import from_sentencepiece
from duo_mlx.errors import DuoError

TEXT = """It was a truth that the sun came up, and then the sun went down; "And so," she said, "it is."
The old man -- he was very old -- had not the least doubt of it. 1234567890 times? Never! (Perhaps.)"""
SAMPLES = [
    "It was a truth",
    "  two  spaces\n\nand lines\tand tabs ",
    "</s> and <s> are text here, <unk> too",
    "naïve café, Ünïcode ﬁligree №5 ½",
    "日本語 🙂 👩‍👩‍👧",
    "sun▁moon",
    "…—“quotes” and more",
    "\u00a0no break\u200b\ufeff",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A sentencepiece processor and mlx-lm's tokenizer of the directory that is made from it."""
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    (source / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer.write(source, made, 340)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()), load_tokenizer(made)


@pytest.mark.parametrize("text", [TEXT, *SAMPLES])
def test_ids_are_sentencepieces(both, text):
    theirs, ours = both
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


@given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x24F), max_size=40))
def test_ids_are_sentencepieces_for_any_latin_text(both, text):
    theirs, ours = both
    assert ours.encode(text) == theirs.encode(text)


def test_streaming_says_the_whole_text(both):
    _, ours = both
    assert isinstance(ours.detokenizer, SPMStreamingDetokenizer)
    for text in (TEXT, "naïve café 日本語"):
        detokenizer, said = ours.detokenizer, ""
        for token in ours.encode(text):
            detokenizer.add_token(token)
            said += detokenizer.last_segment
        detokenizer.finalize()
        said += detokenizer.last_segment
        assert said.strip() == ours.decode(ours.encode(text)).strip()


def test_nothing_is_added_and_the_ends_are_known(both):
    theirs, ours = both
    assert ours.eos_token_ids == {theirs.eos_id()} and ours.bos_token_id == theirs.bos_id()
    assert ours.encode("")[:1] == []


def test_a_vocabulary_beyond_the_embeddings_is_refused(both, tmp_path):
    theirs, _ = both
    (tmp_path / "tokenizer.model").write_bytes(theirs.serialized_model_proto())
    (tmp_path / "out").mkdir()
    with pytest.raises(DuoError, match="token ids up to 339, but config.json says vocab_size 300"):
        tokenizer.write(tmp_path, tmp_path / "out", 300)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff"])
def test_a_damaged_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DuoError, match="tokenizer.model: is damaged"):
        from_sentencepiece(tmp_path / "tokenizer.model")


def test_another_algorithm_is_refused_by_name(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3), model_writer=model, vocab_size=60, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(DuoError, match="of type UNIGRAM; only BPE"):
        from_sentencepiece(tmp_path / "tokenizer.model")
