"""What stands beside a tokenizer.model: tokenizer_config.json, added_tokens.json, special_tokens_map.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from duo_mlx.convert.readers.text import is_file, read_object, shown
from duo_mlx.errors import DuoError

PLAIN = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}  # where nothing is said
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
KEPT = ("chat_template", "model_max_length", "padding_side", "truncation_side", "split_special_tokens")
SPECIAL = ("additional_special_tokens", "extra_special_tokens")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def read(source: Path) -> dict[str, Any]:
    """Read the tokenizer_config.json of a directory, with special_tokens_map.json for what it does not say.

    Raises:
        DuoError: one of them is no JSON object.
    """
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if is_file(source / name):
            found |= {key: value for key, value in read_object(source / name).items() if value is not None}
    return found


def has_template(source: Path, said: Mapping[str, Any]) -> bool:
    """Whether a directory has a chat template, which writes special tokens as text."""
    return "chat_template" in said or any(is_file(source / f"chat_template.{kind}") for kind in ("jinja", "json"))


def added_tokens(source: Path, said: Mapping[str, Any]) -> dict[int, AddedToken]:
    """The tokens that were added to a directory's vocabulary, by their ids.

    Raises:
        DuoError: they are not what transformers writes.
    """
    file, found = source / "added_tokens.json", {}
    special = {_content(said.get(role)) for role in ROLES}
    for key in SPECIAL:
        values = said.get(key) or []
        special |= {_content(value) for value in (values.values() if isinstance(values, dict) else values)}
    if is_file(file):
        for token, number in read_object(file).items():
            if type(number) is not int:
                raise DuoError(f"{file}: {shown(token)} has the id {shown(number)}; it must be a whole number")
            found[number] = AddedToken(token, special=token in special, normalized=False)
    decoder = said.get("added_tokens_decoder") or {}
    for number, token in decoder.items() if isinstance(decoder, dict) else ():
        if not str(number).isdecimal() or not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise DuoError(f"{source / 'tokenizer_config.json'}: added_tokens_decoder has the wrong {shown(number)}")
        flags = {flag: token[flag] for flag in FLAGS if isinstance(token.get(flag), bool)}
        found[int(number)] = AddedToken(token["content"], **flags)
    return dict(sorted(found.items()))


def carried(tokenizer: Tokenizer, config: dict[str, Any], said: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Put into ``tokenizer`` and its ``config`` what the files beside a tokenizer.model say.

    Returns:
        The tokenizer_config.json to write.

    Raises:
        DuoError: an added token has an id that it cannot get, or the text of another one.
    """
    size = tokenizer.get_vocab_size()
    added = added_tokens(source, said)
    for number, token in added.items():
        if number >= size or token.special:
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    check_ids(tokenizer, added, source)
    config = config | {key: said[key] for key in KEPT if key in said}
    config |= {role: text for role in ROLES if (text := _content(said.get(role))) is not None}
    config |= {key: said[key] for key in SPECIAL if isinstance(said.get(key), list)}
    for role in ROLES:
        if role in config and tokenizer.token_to_id(config[role]) is None:
            raise DuoError(f"{source}: its {role} {shown(config[role])} is no token")
    if has_template(source, said) or any(number >= size for number in added):
        config["split_special_tokens"] = said.get("split_special_tokens", False)
    llama = str(said.get("tokenizer_class", "")).startswith(("Llama", "CodeLlama"))
    first = config.get("bos_token") if said.get("add_bos_token", llama) else None
    last = config.get("eos_token") if said.get("add_eos_token", False) else None
    surround(tokenizer, first, last)
    return config


def check_ids(tokenizer: Tokenizer, added: Mapping[int, AddedToken], source: Path) -> None:
    """Check that ``added`` tokens have the ids by which the model knows them.

    Raises:
        DuoError: one has another id.
    """
    for number, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != number:
            raise DuoError(
                f"{source}: the added token {shown(token.content)} must have the id {number}, but has {found}"
            )


def surround(tokenizer: Tokenizer, first: str | None, last: str | None) -> None:
    """Put the special tokens ``first`` before and ``last`` after every text; None: nothing."""
    ends = {name: token for name, token in (("first", first), ("last", last)) if token is not None}

    def around(text: str, kind: int) -> list[str]:
        return [f"{part}:{kind}" for part in ("first", text, "last") if part == text or part in ends]

    if ends:
        tokenizer.post_processor = TemplateProcessing(
            single=around("$A", 0),
            pair=around("$A", 0) + around("$B", 1),
            special_tokens=[
                {"id": name, "ids": [tokenizer.token_to_id(token)], "tokens": [token]} for name, token in ends.items()
            ],
        )


def _content(token: object) -> str | None:
    """A token of a configuration, which is a text or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
