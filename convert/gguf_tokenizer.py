"""Make tokenizer files of a GGUF file's metadata: GPT-2's kind of BPE, and sentencepiece's.

GGUF stores the vocabulary and the merges but only a *name* for how a text is cut before them, ``tokenizer.ggml.pre``.
`CUTS` holds what these names mean in the tokenizers that they come from; "default" is llama.cpp's own. A name that is
not in it is refused, as a wrong cut gives other ids in places that nobody looks at.

transformers builds tokenizers of GGUF files, too. It takes GPT-2's cut for names that it does not know, such as
SmolLM's, and of Mistral's vocabulary it gives other ids wherever a text begins with a space.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from duo_mlx.convert.readers import gguf_header
from duo_mlx.convert.readers.gguf_metadata import CONTROL, TOKENIZER, token_ids
from duo_mlx.convert.readers.text import shown
from duo_mlx.convert.sentencepiece_bpe import SPACE, from_proto
from duo_mlx.convert.tokenizer_config import PLAIN, surround
from duo_mlx.errors import DuoError

NORMAL, UNKNOWN, USER_DEFINED, BYTE = 1, 2, 4, 6  # token types, sentencepiece's numbers
PREFIX = TOKENIZER
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' words and GGUF's

_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")  # Phi 3's tokens that leave the space after them

_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_ENDING}|{_WORD}|\p{{N}}{{1,3}}|{_TAIL % ''}"
_QWEN2 = rf"{_ENDING}|{_WORD}|\p{{N}}|{_TAIL % ''}"
_GPT4O = rf"{_CASED % (f'{_ENDING}?', f'{_ENDING}?')}|\p{{N}}{{1,3}}|{_TAIL % '/'}"
_TEKKEN = rf"{_CASED % ('', '')}|\p{{N}}|{_TAIL % '/'}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")


def _split(*patterns: str) -> Callable[[], Any]:
    def make() -> Any:
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    return make


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


CUTS: dict[str, Callable[[], Any]] = {
    "default": _split(*_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), _gpt2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), _split(_LLAMA3)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _split(_QWEN2)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _digits),
    **dict.fromkeys(("gpt-4o", "llama4"), _split(_GPT4O)),
    "tekken": _split(_TEKKEN),
    "deepseek-coder": _split(*_DEEPSEEK_CODER),
}
WHOLE = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # take a word that is a token as it is, merges or not
FIRST = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # begin a text with bos unless the file says otherwise
NFC = ("qwen2", "deepseek-r1-qwen")


def write(file: Path, destination: Path, vocab_size: int) -> None:
    """Write the tokenizer of the GGUF ``file`` into ``destination``, for a model of ``vocab_size`` embeddings.

    Gives tokenizer.json, tokenizer_config.json with the chat template, and generation_config.json with the ids that
    begin and end a text.

    Raises:
        DuoError: the file has no tokenizer, one of an unknown kind, or one with more tokens than ``vocab_size``.
    """
    metadata = gguf_header.read(file).metadata
    try:
        tokenizer, config = build(metadata)
        highest = len(metadata[f"{PREFIX}tokens"]) - 1
        if highest >= vocab_size:
            raise DuoError(f"has token ids up to {highest}, but its embedding is one of {vocab_size}")
        ids = token_ids(metadata, vocab_size)
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None
    (destination / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, value in (("tokenizer_config.json", config), ("generation_config.json", ids)):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (destination / name).write_text(text, encoding="utf-8")


def is_beside(file: Path) -> bool:
    """Return whether a tokenizer.json lies beside the GGUF ``file`` and has its tokens, or the file has none."""
    other = file.parent / "tokenizer.json"
    if not other.is_file():
        return False
    tokens = gguf_header.read(file).metadata.get(f"{PREFIX}tokens")
    if tokens is None:
        return True
    try:
        vocab = Tokenizer.from_file(str(other)).get_vocab(with_added_tokens=True)
    except Exception:  # noqa: BLE001 (tokenizers raises the bare class; such a file says nothing)
        return False
    return isinstance(tokens, list) and all(
        number < len(tokens) and tokens[number] == token for token, number in vocab.items()
    )


def build(metadata: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer and its tokenizer_config.json from GGUF's metadata.

    Raises:
        DuoError: see `write`.
    """
    model = metadata.get(f"{PREFIX}model")
    if model not in ("gpt2", "llama"):
        raise DuoError(f"its tokenizer is {shown(model)}; known are gpt2 and llama" if model else "has no tokenizer")
    tokens = _list(metadata, "tokens", str)
    types = _list(metadata, "token_type", int, [NORMAL] * len(tokens))
    if not tokens or len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise DuoError(f"its tokenizer has {len(tokens)} tokens ({len(set(tokens))} different) of {len(types)} types")
    roles = _roles(metadata, tokens, types)
    make = _gpt2_bpe if model == "gpt2" else _sentencepiece
    tokenizer, config = make(metadata, tokens, types, roles)
    config = config | {f"{role}_token": token for role, token in roles.items()}
    first = metadata.get(f"{PREFIX}add_bos_token", model == "llama" or metadata.get(f"{PREFIX}pre") in FIRST)
    last = metadata.get(f"{PREFIX}add_eos_token", False)
    surround(tokenizer, roles.get("bos") if first else None, roles.get("eos") if last else None)
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config |= {"chat_template": template, "split_special_tokens": False}  # a template writes them as text
    return tokenizer, config


def _roles(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, str]:
    """Which token plays which role. An unknown or padding token that is an ordinary one is a writer's default."""
    found = {}
    for role, key in ROLES.items():
        number = metadata.get(f"{PREFIX}{key}_token_id")
        if type(number) is not int or not 0 <= number < len(tokens):
            continue
        if role in ("bos", "eos") or types[number] != NORMAL:
            found[role] = tokens[number]
    return found


def _list(metadata: dict[str, Any], key: str, of: type, default: list[Any] | None = None) -> list[Any]:
    values = metadata.get(PREFIX + key, default)
    if not isinstance(values, list) or not all(type(value) is of for value in values):
        raise DuoError(f"its {PREFIX}{key} is {'missing' if values is None else f'no list of {of.__name__}'}")
    return values


def _gpt2_bpe(
    metadata: dict[str, Any], tokens: list[str], types: list[int], roles: dict[str, str]
) -> tuple[Tokenizer, dict[str, Any]]:
    cut = metadata.get(f"{PREFIX}pre", "default")
    if cut not in CUTS:
        raise DuoError(f"its {PREFIX}pre is {shown(cut)}; known are {', '.join(CUTS)}; put a tokenizer.json beside it")
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in _list(metadata, "merges", str)]
    for merge in merges:
        if len(merge) != 2 or not all(part in vocab for part in (*merge, "".join(merge))):
            raise DuoError(f"its {PREFIX}merges has {shown(' '.join(merge))!r}, not two tokens that make a third")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=cut in WHOLE))
    if cut in NFC:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    special = {*roles.values(), *(token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL)}
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens if token in special]
    )
    plain = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and token not in special]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return tokenizer, dict(PLAIN)


def _sentencepiece(
    metadata: dict[str, Any], tokens: list[str], types: list[int], roles: dict[str, str]
) -> tuple[Tokenizer, dict[str, Any]]:
    scores = _list(metadata, "scores", float)
    if len(scores) != len(tokens) or not all(NORMAL <= kind <= BYTE for kind in types):
        raise DuoError(f"its tokenizer has {len(tokens)} tokens, {len(scores)} scores and types up to {max(types)}")
    proto = sentencepiece_model_pb2.ModelProto()
    prefix = metadata.get(f"{PREFIX}add_space_prefix", True) is True
    if "unk" in roles:  # Gemma's is a control token
        types = [UNKNOWN if token == roles["unk"] else kind for token, kind in zip(tokens, types, strict=True)]
    if UNKNOWN not in types:
        raise DuoError("is damaged or no sentencepiece model (no token is the unknown one)")
    for token, score, kind in zip(tokens, scores, types, strict=True):
        # llama.cpp's converter writes user-defined symbols with spaces
        proto.pieces.add(piece=token if kind != USER_DEFINED else token.replace(" ", SPACE), score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = trainer.BPE, BYTE in types, len(tokens)
    for role, token in roles.items():
        setattr(trainer, f"{role}_piece", token)
        setattr(trainer, f"{role}_id", tokens.index(token))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = prefix
    normalizer.remove_extra_whitespaces = metadata.get(f"{PREFIX}remove_extra_whitespaces", False) is True
    if charsmap := _list(metadata, "precompiled_charsmap", int, []):
        normalizer.precompiled_charsmap = bytes(number & 255 for number in charsmap)
    tokenizer, config = from_proto(proto, added=True)
    phi3 = metadata.get("general.architecture") == "phi3"
    return _adjusted(tokenizer, normalised=not prefix, stripped=phi3), config


def _adjusted(tokenizer: Tokenizer, normalised: bool, stripped: bool) -> Tokenizer:
    """Return the tokenizer with other flags of its added tokens.

    Args:
        tokenizer: what `from_proto` makes.
        normalised: look for user-defined symbols in the normalised text, where runs of spaces are found, too.
        stripped: a token takes the spaces after it, as llama.cpp does for Phi 3.
    """
    state = json.loads(tokenizer.to_str())
    for token in state["added_tokens"]:
        token["normalized"] = normalised and not token["special"]
        token["rstrip"] = stripped and token["content"] not in _PHI3_PLAIN
    return Tokenizer.from_str(json.dumps(state))
