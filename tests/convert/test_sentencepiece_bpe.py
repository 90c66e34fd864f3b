"""Sentencepiece models with pieces of equal score and user-defined symbols, as Llama 2's and Mistral's have them."""

import json

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from sentencepiece import sentencepiece_model_pb2

from duo_mlx.convert import tokenizer
from duo_mlx.convert.sentencepiece_bpe import from_proto
from duo_mlx.errors import DuoError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
RUNS = [2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11]  # Llama 2's, in its order
WORDS = ["\u2581t", "he", "\u2581the", "in", "\u2581a", "er", "</", "s>", "EF"]
CHARACTERS = "\u2581abcdefghijklmnopqrstuvwxyz</>[]REFINST_0123456789x\né"
ADDED = ["[REF]", "[/REF]", "[REF]9"]


def model(pieces=(), user_defined=(), prefix=True):
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, kind in (("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), ("[INST]", CONTROL)):
        proto.pieces.add(piece=piece, score=0, type=kind)
    for piece in user_defined:
        proto.pieces.add(piece=piece, score=0, type=USER_DEFINED)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0, type=BYTE)
    for place, piece in enumerate(WORDS):
        proto.pieces.add(piece=piece, score=-place, type=NORMAL)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score, type=NORMAL)
    for place, character in enumerate(dict.fromkeys(CHARACTERS)):
        proto.pieces.add(piece=character, score=-100 - place, type=NORMAL)
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = prefix
    proto.normalizer_spec.remove_extra_whitespaces = False
    return proto


def runs(character="\u2581"):
    return [(character * size, -1e9) for size in RUNS]


@pytest.fixture(scope="module", params=["runs", "runs and symbols", "no prefix"])
def both(request):
    proto = model(runs(), () if request.param == "runs" else ADDED, request.param != "no prefix")
    made, _ = from_proto(proto)
    made.encode_special_tokens = True
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()), made


BITS = st.sampled_from(
    [" ", "  ", " " * 15, " " * 17, "\n", "\u2581", "the", " the", "inner", "é", "日本", "🙂", "[RE", "]"]
)
SYMBOLS = st.sampled_from(["</s>", "<s>", "<0x41>", "<unk>", "[INST]", *ADDED])


@given(
    st.lists(BITS | SYMBOLS | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=4))
)
@example([" " * 70])
@example(["[REF]", "</s>", "[REF]"])
@example(["[REF]", "<0x41>"])
def test_ids_are_sentencepieces(both, parts):
    theirs, ours = both
    text = "".join(parts)
    ids = theirs.encode(text)
    assert ours.encode(text, add_special_tokens=False).ids == ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.mark.parametrize("length", range(1, 50))
def test_runs_grow_from_the_left(both, length):
    theirs, ours = both
    for text in (" " * length, "the" + " " * length + "the"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text)


def test_pieces_of_equal_score_that_meet_are_refused():
    from_proto(model([("ab", -50.0), ("cd", -50.0)]))
    for tied in (("ab", "bc"), ("ab", "abc")):
        with pytest.raises(DuoError, match="has pieces of equal score .*merges in another order"):
            from_proto(model([("zz", -49.0), *((piece, -50.0) for piece in tied)]))


def directory(tmp_path, config, **files):
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    made.mkdir()
    proto = model(runs())
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    for name, value in ({"tokenizer_config": config} | files).items():
        (source / f"{name}.json").write_text(json.dumps(value))
    return source, made, len(proto.pieces)


def test_what_stands_beside_a_model_is_carried_over(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }}<|im_end|>{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "chat_template": template, "add_bos_token": True}
    source, made, size = directory(
        tmp_path,
        config | {"eos_token": {"content": "<|im_end|>"}},
        special_tokens_map={"bos_token": "<s>", "pad_token": "<pad>"},
        generation_config={"eos_token_id": 2},
    )
    (source / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<pad>": size + 1}))
    assert "<pad> has no embedding" in tokenizer.write(source, made, size + 1)
    assert "others are never generated" in tokenizer.write(source, made, size + 64)
    assert tokenizer.write(source, made, size + 2) is None
    loaded = load_tokenizer(made)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token_id) == ("<s>", "<|im_end|>", size + 1)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    assert loaded.encode("the end") == [1, *theirs.encode("the end")]
    ids = loaded.apply_chat_template([{"role": "user", "content": "the end"}])
    assert ids == [1, 3, *theirs.encode("the end"), size]  # no second space before what follows [INST]
    assert json.loads((made / "generation_config.json").read_text()) == {"eos_token_id": 2}


def test_an_added_token_with_another_id_is_refused(tmp_path):
    source, made, size = directory(tmp_path, {}, added_tokens={"<|im_end|>": 9999})
    with pytest.raises(DuoError, match=rf"<\|im_end\|> must have the id 9999, but has {size}"):
        tokenizer.write(source, made, 10000)


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DuoError, match="is a tiktoken file"):
        tokenizer.write(tmp_path, tmp_path, 10)
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(DuoError, match=r"tokenizer\.json: is a Git LFS pointer"):
        tokenizer.write(tmp_path, tmp_path, 10)


def test_vocab_and_merges_are_taken(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    gpt2 = Tokenizer(models.BPE())
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    gpt2.train_from_iterator(["the sun came up over the hill and the sun went down"] * 5, trainer)
    source, made = tmp_path / "source", tmp_path / "made"
    source.mkdir()
    made.mkdir()
    gpt2.model.save(str(source))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}')
    tokenizer.write(source, made, gpt2.get_vocab_size())
    loaded = load_tokenizer(made)
    assert loaded.encode("the sun, 12 naïve") == gpt2.encode("the sun, 12 naïve").ids
    assert loaded.eos_token == "<|endoftext|>"
