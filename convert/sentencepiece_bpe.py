"""A tokenizer.json from a sentencepiece BPE model.

It gives sentencepiece's token ids, special tokens included: a ``</s>`` that stands in a text is text. It adds neither
bos nor eos. The normalisation is the `tokenizers` library's ``Precompiled``, which looks at grapheme clusters: a letter
with an accent written as a character of its own may come out differently.

transformers has a converter of its own. Its versions differ, and none is exact where a control symbol stands between
two user-defined ones.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import permutations
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from duo_mlx.convert.tokenizer_config import PLAIN
from duo_mlx.errors import DuoError
from duo_mlx.files import foreign_content

SPACE = "\u2581"  # what sentencepiece writes for a space
FEW = 100  # pieces of equal score, to look at each pair of them
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* 0\r?\n")  # the first line of a file of Llama 3, which has the same name


def from_sentencepiece(file: Path, *, first_only: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """Make a tokenizer and its tokenizer_config.json from a sentencepiece BPE model.

    Args:
        file: the model.
        first_only: a space goes before a text, but not before what follows a special token in it; transformers calls
            this ``legacy: false``.

    Raises:
        DuoError: the model is damaged, or has something that the `tokenizers` library cannot do in the same way:
            another algorithm than BPE, whitespace as a suffix, a normalisation of its own.
    """
    proto, content = sentencepiece_model_pb2.ModelProto(), file.read_bytes()
    if TIKTOKEN.match(content):
        raise DuoError(
            f"{file}: is a tiktoken file, not a sentencepiece model; put the model's tokenizer.json beside it"
        )
    try:
        proto.ParseFromString(content)
        return from_proto(proto, first_only=first_only)
    except DecodeError as error:
        what = foreign_content(file) or f"is damaged or no sentencepiece model ({' '.join(str(error).split())})"
        raise DuoError(f"{file}: {what}") from None
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None


def from_proto(proto: Any, added: bool = False, *, first_only: bool = False) -> tuple[Tokenizer, dict[str, Any]]:
    """As `from_sentencepiece`, from a ``ModelProto``.

    Args:
        proto: the model.
        added: read user-defined symbols as a tokenizer.json's added tokens, which llama.cpp does, too: unlike in
            sentencepiece, the text after one begins anew.
        first_only: see `from_sentencepiece`.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto.SerializeToString())
    except (RuntimeError, ValueError) as error:
        raise DuoError(f"is damaged or no sentencepiece model ({' '.join(str(error).split())})") from None
    kind = proto.SentencePiece
    plain = [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]
    whole = [] if added else plain
    tokenizer = Tokenizer(_bpe(proto, ignore_merges=bool(whole)))
    prefix = proto.normalizer_spec.add_dummy_prefix
    tokenizer.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec, prefix and not first_only))
    cuts: list[Any] = [pre_tokenizers.Metaspace(SPACE, "first", split=False)] if prefix and first_only else []
    cuts += _isolated(proto, whole) if whole else []
    if cuts:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    special = [piece.piece for piece in proto.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if added:
        tokenizer.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in plain])
    # split_special_tokens is transformers' word for reading special tokens in a text as text
    config: dict[str, Any] = {**PLAIN, "split_special_tokens": True}
    for role in ("unk", "bos", "eos", "pad"):
        number = getattr(processor, f"{role}_id")()
        if number >= 0:
            config[f"{role}_token"] = proto.pieces[number].piece
    return tokenizer, config


def _bpe(proto: Any, ignore_merges: bool) -> models.BPE:
    kind, trainer = proto.SentencePiece, proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise DuoError(
            f"is a sentencepiece model of type {trainer.ModelType.Name(trainer.model_type)}; only BPE is known"
        )
    if trainer.treat_whitespace_as_suffix:
        raise DuoError("treats whitespace as a suffix, which a tokenizer.json cannot say")
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == kind.NORMAL}
    if unused := [p.piece for p in proto.pieces if p.type == kind.UNUSED and _reachable(p.piece, normal)]:
        raise DuoError(
            f"has unused symbols ({', '.join(unused[:3])}), which a tokenizer.json reads differently; "
            "put a tokenizer.json of your own beside it"
        )
    # of pieces of equal score the longest first, so that a run of spaces grows from its left end
    long = sorted((piece for piece in normal if len(piece) > 1), key=lambda piece: (-normal[piece], -len(piece)))
    if tied := _disorderly(long, normal):
        raise DuoError(
            f"has pieces of equal score ({', '.join(tied[:3])}), which a tokenizer.json merges in another order; "
            "put a tokenizer.json of your own beside it"
        )
    if unreachable := [piece for piece in long if any(character not in normal for character in piece)]:
        raise DuoError(f"has the piece {unreachable[0]!r}, but not each of its characters")
    return models.BPE(
        vocab=vocab,
        merges=[merge for piece in long for merge in _merges(piece, normal)],
        unk_token=next(piece.piece for piece in proto.pieces if piece.type == kind.UNKNOWN),
        fuse_unk=True,
        byte_fallback=any(piece.type == kind.BYTE for piece in proto.pieces),
        ignore_merges=ignore_merges,
    )


def _disorderly(long: list[str], normal: dict[str, float]) -> list[str]:
    """Pieces of equal score whose merges cannot be put in sentencepiece's order; none: all can.

    Of equal scores sentencepiece merges the leftmost pair, a tokenizer.json the pair that it lists first. They agree
    where all pieces are runs of one character, and where no merge of one piece can touch another piece.
    """
    by_score = defaultdict(list)
    for piece in long:
        by_score[normal[piece]].append(piece)
    for score, tied in by_score.items():
        if len(tied) == 1 or all(len(set(piece)) == 1 for piece in tied):
            continue
        better = [piece for piece in long if normal[piece] >= score]
        if len(tied) > FEW or any(_overlap(*pair) for pair in permutations(tied, 2)):
            return tied
        if any(piece in other and piece != other for piece in tied for other in better):
            return tied
    return []


def _overlap(left: str, right: str) -> bool:
    """Whether ``left`` ends with what ``right`` begins with."""
    return any(left.endswith(right[:size]) for size in range(1, min(len(left), len(right)) + 1))


def _isolated(proto: Any, whole: list[str]) -> list[Any]:
    """The cuts that make each of the user-defined symbols ``whole`` a word, which a BPE may take without merges.

    Between two such words may stand the text of a piece that sentencepiece would not choose there, such as ``</s>``.
    That is cut after its first token.
    """
    bare = sentencepiece_model_pb2.ModelProto()
    bare.CopyFrom(proto)
    spec = bare.normalizer_spec
    spec.precompiled_charsmap, spec.add_dummy_prefix, spec.remove_extra_whitespaces = b"", False, False
    processor = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
    normal = normalizers.Sequence(_normalizers(proto.normalizer_spec, False))
    if changed := [piece for piece in whole if normal.normalize_str(piece) != piece]:
        raise DuoError(
            f"has user-defined symbols ({', '.join(changed[:3])}) that its normalisation changes, which a "
            "tokenizer.json reads differently; put a tokenizer.json of your own beside it"
        )
    pieces = [piece.piece for piece in proto.pieces if piece.type != proto.SentencePiece.USER_DEFINED]
    cuts = defaultdict(list)
    for piece, tokens in zip(pieces, processor.encode(pieces, out_type=str), strict=True):
        if len(tokens) > 1:
            first = tokens[0] if piece.startswith(tokens[0]) else piece[0]
            cuts[first].append(piece.removeprefix(first))
    found = [pre_tokenizers.Split(Regex(_either(sorted(whole, key=len, reverse=True))), "isolated")]
    if cuts:
        parts = "|".join(rf"{re.escape(first)}(?=(?:{_either(rests)})\z)" for first, rests in cuts.items())
        found.append(pre_tokenizers.Split(Regex(rf"\A(?:{parts})"), "isolated"))
    return found


def _either(texts: Iterable[str]) -> str:
    return "|".join(map(re.escape, texts))


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


def _normalizers(spec: Any, prefix: bool) -> list[Any]:
    """The steps of a normalisation; ``prefix``: a space goes before the text."""
    if not spec.escape_whitespaces:
        raise DuoError("does not escape whitespace, which a tokenizer.json cannot say")
    found: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if prefix and not spec.remove_extra_whitespaces:
        found = [normalizers.Prepend(" "), *found]
    if spec.remove_extra_whitespaces:
        found = [*found, normalizers.Replace(Regex(r"\A +| +(?= )"), "")]
    found = [*found, normalizers.Replace(" ", SPACE)]
    if spec.remove_extra_whitespaces:
        found = [*found, normalizers.Replace(Regex(rf"{SPACE}+\z"), "")]
        if prefix:
            found.append(normalizers.Prepend(SPACE))
    return found
