"""Tokenizer files for a model directory: copied where there is a tokenizer.json, else made.

They are made from a tokenizer.model (`duo_mlx.convert.sentencepiece_bpe`), from vocab.json and merges.txt (by
transformers), or from a GGUF file's metadata (`duo_mlx.convert.gguf_tokenizer`).
"""

import json
import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from duo_mlx.convert import tokenizer_config
from duo_mlx.convert.readers.text import is_file, one_line
from duo_mlx.convert.tensors import Checkpoint
from duo_mlx.errors import DuoError
from duo_mlx.files import foreign_content

TEMPLATES = ("chat_template.jinja", "chat_template.json")
GENERATION = "generation_config.json"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    *TEMPLATES,
    GENERATION,
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


def write_tokenizer(checkpoint: Checkpoint, destination: Path, vocab_size: int) -> str | None:
    """Bring the tokenizer of ``checkpoint`` into ``destination``, for a model of ``vocab_size`` embeddings.

    A tokenizer.json beside a GGUF file is taken if it has the file's own tokens.

    Returns:
        What is worth a line; see `write`.

    Raises:
        DuoError: as `write` and `duo_mlx.convert.gguf_tokenizer.write`.
    """
    file = checkpoint.files[0]
    if checkpoint.format == "GGUF":
        from duo_mlx.convert import gguf_tokenizer  # sentencepiece, which it needs, takes a while to import

        if not gguf_tokenizer.is_beside(file):
            gguf_tokenizer.write(file, destination, vocab_size)
            return None
    return write(file.parent, destination, vocab_size)


def write(source: Path, destination: Path, vocab_size: int) -> str | None:
    """Bring the tokenizer of the directory ``source`` into ``destination``, for a model of ``vocab_size`` embeddings.

    Returns:
        A line that says so where tokenizer and embedding differ in size; None where they do not.

    Raises:
        DuoError: there is none, it is damaged, it is of a kind that cannot be carried over exactly, or it has ids
            beyond ``vocab_size`` that are no added tokens.
    """
    if (source / "tokenizer.json").is_file():
        origin = source / "tokenizer.json"
        made = _read(origin)
        _copy(source, destination, COPIED)
        if not (source / "tokenizer_config.json").is_file():
            _write_json(destination / "tokenizer_config.json", tokenizer_config.PLAIN)
    elif (source / "tokenizer.model").is_file():
        from duo_mlx.convert.sentencepiece_bpe import from_sentencepiece  # whose libraries take a while to import

        origin = source / "tokenizer.model"
        said = tokenizer_config.read(source)
        made, config = from_sentencepiece(
            origin, first_only=tokenizer_config.has_template(source, said) and said.get("legacy") is False
        )
        config = tokenizer_config.carried(made, config, said, source)
        (destination / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
        _write_json(destination / "tokenizer_config.json", config)
        _copy(source, destination, (*TEMPLATES, GENERATION))
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        origin = source / "vocab.json"
        _convert(source, destination)
        made = _read(destination / "tokenizer.json")
        tokenizer_config.check_ids(made, tokenizer_config.added_tokens(source, tokenizer_config.read(source)), origin)
        _copy(source, destination, (*TEMPLATES, GENERATION))
    else:
        raise DuoError(
            f"{source}: holds neither a tokenizer.json nor a tokenizer.model (sentencepiece), nor vocab.json with "
            "merges.txt"
        )
    return _compare(made, origin, vocab_size)


def _compare(made: Tokenizer, origin: Path, vocab_size: int) -> str | None:
    ids = made.get_vocab(with_added_tokens=True)
    highest = max(ids.values(), default=0)
    if highest < vocab_size - 1:
        return f"{origin}: has tokens 0 to {highest} of {vocab_size} embeddings; the others are never generated"
    added = {token.content for token in made.get_added_tokens_decoder().values()}
    beyond = sorted((token for token in ids if ids[token] >= vocab_size), key=lambda token: ids[token])
    if any(token not in added for token in beyond):
        raise DuoError(f"{origin}: has token ids up to {highest}, but config.json says vocab_size {vocab_size}")
    if beyond:
        return f"{origin}: {', '.join(beyond[:3])} has no embedding ({vocab_size} are there); a prompt cannot have it"
    return None


def _read(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises the bare class
        raise DuoError(f"{file}: {foreign_content(file) or f'is damaged or no tokenizer ({error})'}") from error


def _convert(source: Path, destination: Path) -> None:
    """Make a tokenizer.json of vocab.json and merges.txt as transformers reads them."""
    from transformers import AutoTokenizer, PretrainedConfig
    from transformers.utils import logging

    said = tokenizer_config.read(source)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if said.get("tokenizer_class"):  # else config.json's model_type says it
        options["config"] = PretrainedConfig()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        AutoTokenizer.from_pretrained(source, **options).save_pretrained(destination)
    except Exception as error:  # transformers raises whatever a damaged file leads it to
        for name in ("vocab.json", "merges.txt"):
            if what := foreign_content(source / name):
                raise DuoError(f"{source / name}: {what}") from None
        raise DuoError(
            f"{source}: vocab.json and merges.txt cannot be read as tokenizer_config.json says ({one_line(error)}); "
            "put a tokenizer.json beside them"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _copy(source: Path, destination: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if is_file(source / name):
            shutil.copyfile(source / name, destination / name)


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
