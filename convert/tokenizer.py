"""Tokenizer files for a model directory: copied where there is a tokenizer.json, else made from a tokenizer.model.

A GGUF file has its tokenizer in its metadata, see `duo_mlx.convert.gguf_tokenizer`.

What is made from a sentencepiece model gives sentencepiece's token ids, special tokens included: a ``</s>`` that stands
in a text is text. It adds neither bos nor eos. The normalisation is the `tokenizers` library's ``Precompiled``, which
looks at grapheme clusters: a letter with an accent written as a character of its own may come out differently.
"""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from duo_mlx.convert.tensors import Checkpoint
from duo_mlx.errors import DuoError

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
SPACE = "\u2581"  # what sentencepiece writes for a space


def write_tokenizer(checkpoint: Checkpoint, destination: Path, vocab_size: int) -> None:
    """Bring the tokenizer of ``checkpoint`` into ``destination``, for a model of ``vocab_size`` embeddings.

    A tokenizer.json beside a GGUF file is taken if it has the file's own tokens.

    Raises:
        DuoError: as `write` and `duo_mlx.convert.gguf_tokenizer.write`.
    """
    from duo_mlx.convert import gguf_tokenizer  # which builds on this module

    file = checkpoint.files[0]
    if checkpoint.format == "GGUF" and not gguf_tokenizer.is_beside(file):
        gguf_tokenizer.write(file, destination, vocab_size)
    else:
        write(file.parent, destination, vocab_size)


def write(source: Path, destination: Path, vocab_size: int) -> None:
    """Bring the tokenizer of the directory ``source`` into ``destination``, for a model of ``vocab_size`` embeddings.

    Raises:
        DuoError: there is none, it is damaged, it is of a kind that cannot be carried over exactly, or it has ids
            beyond ``vocab_size``.
    """
    if (source / "tokenizer.json").is_file():
        origin = source / "tokenizer.json"
        try:
            made = Tokenizer.from_file(str(origin))
        except Exception as error:  # tokenizers raises the bare class
            raise DuoError(f"{origin}: is damaged or no tokenizer ({error})") from error
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
        config = None if (source / "tokenizer_config.json").is_file() else CONFIG
    elif (source / "tokenizer.model").is_file():
        origin = source / "tokenizer.model"
        made, config = from_sentencepiece(origin)
        (destination / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
        for name in ("chat_template.jinja", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, destination / name)
    else:
        raise DuoError(f"{source}: holds neither a tokenizer.json nor a tokenizer.model (sentencepiece)")
    if config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (destination / "tokenizer_config.json").write_text(text, encoding="utf-8")
    highest = max(made.get_vocab(with_added_tokens=True).values(), default=0)
    if highest >= vocab_size:
        raise DuoError(f"{origin}: has token ids up to {highest}, but config.json says vocab_size {vocab_size}")


def from_sentencepiece(file: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer and its tokenizer_config.json from a sentencepiece BPE model.

    Raises:
        DuoError: the model is damaged, or has something that the `tokenizers` library cannot do in the same way:
            another algorithm than BPE, user-defined symbols, whitespace as a suffix, a normalisation of its own.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        return from_proto(proto)
    except DecodeError as error:
        raise DuoError(f"{file}: is damaged or no sentencepiece model ({' '.join(str(error).split())})") from None
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None


def from_proto(proto: Any, added: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """As `from_sentencepiece`, from a ``ModelProto``.

    Args:
        proto: the model.
        added: read user-defined symbols as a tokenizer.json's added tokens, which llama.cpp does, too: unlike in
            sentencepiece, the text after one begins anew.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise DuoError(f"is damaged or no sentencepiece model ({' '.join(str(error).split())})") from None
    kind = proto.SentencePiece
    tokenizer = Tokenizer(_bpe(proto, added))
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec))
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in proto.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    plain = [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in plain])
    # split_special_tokens is transformers' word for reading special tokens in a text as text
    config: dict[str, Any] = {**CONFIG, "split_special_tokens": True}
    for role in ("unk", "bos", "eos", "pad"):
        number = getattr(processor, f"{role}_id")()
        if number >= 0:
            config[f"{role}_token"] = proto.pieces[number].piece
    return tokenizer, config


def _bpe(proto: Any, added: bool) -> models.BPE:
    kind, trainer = proto.SentencePiece, proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise DuoError(
            f"is a sentencepiece model of type {trainer.ModelType.Name(trainer.model_type)}; only BPE is known"
        )
    if trainer.treat_whitespace_as_suffix:
        raise DuoError("treats whitespace as a suffix, which a tokenizer.json cannot say")
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    refused = [("unused", [p.piece for p in proto.pieces if p.type == kind.UNUSED and _reachable(p.piece, normal)])]
    if not added:
        refused.append(("user-defined", [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]))
    for name, found in refused:
        if found:
            raise DuoError(
                f"has {name} symbols ({', '.join(found[:3])}), which a tokenizer.json reads differently; "
                "put a tokenizer.json of your own beside it"
            )
    # of runs of equal score the longest first: sentencepiece merges the leftmost pair, so a run grows from its left end
    long = sorted((piece for piece in normal if len(piece) > 1), key=lambda piece: (-normal[piece], -len(piece)))
    equal = [piece for pair in pairwise(long) if normal[pair[0]] == normal[pair[1]] for piece in pair]
    if any(len(set(piece)) > 1 for piece in equal):
        raise DuoError("has pieces of equal score, so the order of its merges is not known")
    if unreachable := [piece for piece in long if any(character not in normal for character in piece)]:
        raise DuoError(f"has the piece {unreachable[0]!r}, but not each of its characters")
    return models.BPE(
        vocab=vocab,
        merges=[merge for piece in long for merge in _merges(piece, normal)],
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == kind.UNKNOWN),
        fuse_unk=True,
        byte_fallback=any(piece.type == kind.BYTE for piece in proto.pieces),
    )


def _reachable(piece: str, known: dict[str, float]) -> bool:
    """Whether sentencepiece may come to ``piece`` at all."""
    return len(piece) == 1 or bool(_merges(piece, known))


def _merges(piece: str, known: dict[str, float]) -> list[tuple[str, str]]:
    """All ways to make ``piece`` of two known ones.

    Sentencepiece takes the leftmost of several merges that give the same piece, a tokenizer.json the one that it lists
    first. The two can only disagree where they overlap, ``A+B`` and ``B+C`` in ``ABC``: then ``piece`` repeats itself
    after ``len(A)`` characters, and such splits come first.
    """
    splits = [at for at in range(1, len(piece)) if piece[:at] in known and piece[at:] in known]
    splits.sort(key=lambda at: (not piece.startswith(piece[at:]), -at))
    return [(piece[:at], piece[at:]) for at in splits]


def _normalizers(spec: Any) -> list[Any]:
    if not spec.escape_whitespaces:
        raise DuoError("does not escape whitespace, which a tokenizer.json cannot say")
    found: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        found = [normalizers.Prepend(" "), *found]
    if spec.remove_extra_whitespaces:
        found = [*found, normalizers.Replace(Regex(r"\A +| +(?= )"), "")]
    found = [*found, normalizers.Replace(" ", SPACE)]
    if spec.remove_extra_whitespaces:
        found = [*found, normalizers.Replace(Regex(rf"{SPACE}+\z"), "")]
        if spec.add_dummy_prefix:
            found.append(normalizers.Prepend(SPACE))
    return found
