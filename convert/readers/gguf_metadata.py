"""Read a GGUF file's metadata: values of the right type, or a message with the key's full name."""

from math import isfinite
from typing import Any

import numpy as np

from duo_mlx.convert.readers.text import shown
from duo_mlx.errors import DuoError

TOKENIZER = "tokenizer.ggml."
CONTROL = 3  # a token's type
# tokens that end a turn; llama.cpp knows them by their text, as many files name only the one that ends a document
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


class Metadata:
    """The keys below ``prefix``; None: below the name of the architecture."""

    def __init__(self, values: dict[str, Any], prefix: str | None = None) -> None:
        self.values = values
        self.architecture = str(values.get("general.architecture"))
        self.prefix = f"{self.architecture}." if prefix is None else prefix

    def full(self, key: str) -> str:
        return self.prefix + key

    def has(self, key: str) -> bool:
        """Return whether the key is there and not 0, which writers put where nothing is meant."""
        return bool(self.values.get(self.full(key)))

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(self.full(key), default)
        if value is None:
            raise DuoError(f"its metadata has no {self.full(key)}")
        return shown(value) if isinstance(value, str) else value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.get(key, default)
        if isinstance(value, list) and len(set(map(repr, value))) == 1:  # one for each layer
            value = value[0]
        if type(value) is not int or not least <= value < 1 << 31:
            raise DuoError(f"{self.full(key)} is {shown(value)}, not one whole number from {least} on")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (float, int) or not isfinite(value) or value <= 0:
            raise DuoError(f"{self.full(key)} is {shown(value)}, not a number above 0")
        return _shortest(value)


def _shortest(value: float) -> float:
    """Return the decimal that was meant: 1e-05 for the float32 next to it."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def token_ids(metadata: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return ``bos_token_id``, ``eos_token_id`` and ``pad_token_id`` where said; several that end a text are a list."""
    say = Metadata(metadata, TOKENIZER)
    found = {
        role: say.integer(f"{key}_token_id", least=0)
        for role, key in {"bos": "bos", "eos": "eos", "pad": "padding", "eot": "eot", "eom": "eom"}.items()
        if f"{TOKENIZER}{key}_token_id" in metadata
    }
    for role, number in found.items():
        if number >= vocab_size:
            raise DuoError(f"its {role} token is {number}, beyond its vocabulary of {vocab_size}")
    ends = [found[role] for role in ("eos", "eot", "eom") if role in found]
    ends = list(dict.fromkeys([*ends, *_ends(metadata, vocab_size)]))
    ids: dict[str, Any] = {f"{role}_token_id": found[role] for role in ("bos", "pad") if role in found}
    return ids | ({"eos_token_id": ends if len(ends) > 1 else ends[0]} if ends else {})


def _ends(metadata: dict[str, Any], vocab_size: int) -> list[int]:
    tokens, types = (metadata.get(f"{TOKENIZER}{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list):
        return []
    pairs = zip(tokens[:vocab_size], types, strict=False)
    return [number for number, (token, kind) in enumerate(pairs) if kind == CONTROL and token in ENDS]
