"""The sampled text's tokens with their routes by policy, and an oracle's beside them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo_mlx.bench.report.rows import Result, joined, numbered, short
from duo_mlx.errors import DuoError
from duo_mlx.routes import format_pattern

NEEDED = ("inputs", "difficulty", "oracle_routes")
Text = dict[str, Any]


def texts(results: Sequence[Result], oracle: Path | None = None) -> list[Text]:
    """One a result that has samples: label, tokens, policies (name, patterns, loss), and difficulty or None.

    ``difficulty`` is of predicting each token, as its loss is: the oracle knows it of the token before.

    Raises:
        DuoError: the oracle's file is none, or none of its sequences begins as any of the texts.
    """
    found = []
    matched = False
    tables = {name: _read(file) for name, file in _files(oracle).items()} if oracle else {}
    for result in results:
        if not (samples := result.record["samples"]):
            continue
        policies = samples["policies"]
        several = len({policy["quantisation"] for policy in policies}) > 1
        names = numbered(joined(short(one["route"]), short(one["quantisation"]) * several) for one in policies)
        text: Text = {
            "label": result.label,
            "tokens": samples["tokens"],
            "layers": result.record["model"]["layers"],
            "policies": [
                {"name": name, "patterns": policy["patterns"], "loss": policy["loss"]}
                for name, policy in zip(names, policies, strict=True)
            ],
            "difficulty": None,
        }
        for name, read in tables.items():
            if (sequence := _sequence(read["inputs"], samples["ids"])) is None:
                continue
            matched = True
            difficulty, routes = (read[array][sequence] for array in NEEDED[1:])
            if routes.shape[1] != text["layers"]:
                raise DuoError(f"{oracle}: has routes of {routes.shape[1]} layers, and the model has {text['layers']}")
            _add_oracle(text, name, difficulty, routes)
        if text["policies"]:
            found.append(text)
    if tables and not matched:
        raise DuoError(f"{oracle}: none of its sequences begins as the text that the results sampled")
    return found


def _files(oracle: Path) -> dict[str, Path]:
    """A table, or those of a folder, by what to call them."""
    if not oracle.is_dir():
        return {"oracle": oracle}
    tables = sorted(oracle.glob("tokens*.npz"))
    if not tables:
        raise DuoError(f"{oracle}: holds no tokens.npz of a finished duo-mlx oracle")
    return {file.stem.replace("tokens", "oracle", 1).replace("-", " ", 1): file for file in tables}


def _add_oracle(text: Text, name: str, difficulty: np.ndarray, routes: np.ndarray) -> None:
    patterns = [format_pattern(token) for token in routes.astype(int)]
    count = len(text["tokens"])
    hard = [None, *(float(each) if np.isfinite(each) else None for each in difficulty)]
    text["policies"].append({"name": name, "patterns": patterns[:count], "loss": []})
    if text["difficulty"] is None or name == "oracle none":
        text["difficulty"] = hard[:count]


def _sequence(inputs: np.ndarray, ids: list[int]) -> int | None:
    """The sequence that begins as the text does, as far as both reach; a single token is no beginning."""
    length = min(len(ids), inputs.shape[1])
    same = (inputs[:, :length] == np.array(ids[:length], np.int64)).all(axis=1)
    return int(same.argmax()) if length > 1 and same.any() else None


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            found = {name: archive[name] for name in NEEDED}
    except FileNotFoundError:
        raise DuoError(f"{file}: there is no such file") from None
    except KeyError as error:
        raise DuoError(f"{file}: {error.args[0]}; an oracle's tokens.npz holds {', '.join(NEEDED)}") from None
    except Exception as error:  # noqa: BLE001  (zipfile, zlib and numpy each have their own)
        raise DuoError(f"{file}: cannot be read as an oracle's tokens.npz ({' '.join(str(error).split())})") from None
    inputs, difficulty, routes = found.values()
    plain = all(array.dtype.kind in kinds for array, kinds in zip(found.values(), ("iu", "fiu", "iu"), strict=True))
    if not (plain and inputs.ndim == 2 and difficulty.shape == inputs.shape and routes.shape[:2] == inputs.shape):
        shapes = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in found.items())
        raise DuoError(f"{file}: its arrays do not fit one another as [sequences, length(, layers)]: {shapes}")
    if routes.ndim != 3 or routes.size == 0 or not 0 <= routes.min() <= routes.max() <= 2:
        raise DuoError(f"{file}: oracle_routes should be [sequences, length, layers] of 0 skip, 1 small and 2 big")
    return found
