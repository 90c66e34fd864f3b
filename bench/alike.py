"""Whether two results of ``duo-mlx bench run`` were measured alike: machine, power, model, router and texts."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from duo_mlx.errors import DuoError

Record = Mapping[str, Any]


# by what --allow-different calls it: what must be alike, each as all values that a result has of it
DIFFERENCES: dict[str, Callable[[Record], dict[str, list[Any]]]] = {
    "chip": lambda result: {
        name: [result["system"].get(key)]
        for name, key in {"chip": "device", "processor": "chip", "computer": "model", "cores": "cores"}.items()
    },
    "power": lambda result: {
        name.replace("_", " "): [result["system"].get(name), *_sessions(result, name)]
        for name in ("power_source", "power_mode")
    },
    "model": lambda result: {
        "model": [result["model"]["sha256"]],
        "revision of the model": [result["model"]["revision"]],
    },
    "router": lambda result: {
        "router and known patterns": [result["model"].get("routing_sha256")] if _chosen(result) else [],
    },
    "texts": lambda result: {
        "prompts": [result["texts"]["prompts"]["sha256"]],
        "held-out text": [result["texts"]["held_out"]["sha256"]],
    },
}


def differences(a: Record, b: Record, allowed: Collection[str]) -> list[str]:
    """What must be said of how A and B were measured; what is unknown in one of them is not taken to differ.

    Raises:
        DuoError: they were not measured alike, in something that is not ``allowed``.
    """
    notes, refused = [], {}
    for flag, known in DIFFERENCES.items():
        sides = known(a), known(b)
        found = [
            f"{name}: {_words(sides[0][name])} in A, {_words(sides[1][name])} in B"
            for name in sides[0]
            if all(_known(side[name]) for side in sides) and _known(sides[0][name]) != _known(sides[1][name])
        ]
        if found and flag not in allowed:
            refused[flag] = found
        notes += found
    if refused:
        flags = " ".join(f"--allow-different {flag}" for flag in refused)
        whats = "; ".join(what for found in refused.values() for what in found)
        raise DuoError(f"A and B were not measured alike: {whats}; {flags} compares them all the same")
    versions = [result["system"]["versions"] for result in (a, b)]
    for name in sorted({*versions[0], *versions[1]}):
        old, new = (each.get(name) for each in versions)
        if old != new:
            notes.append(f"{name}: {old or 'none'} in A, {new or 'none'} in B")
    for side, result in (("A", a), ("B", b)):
        if not result["complete"]:
            notes.append(f"{side} is not finished: what it has is compared")
        for caution in dict.fromkeys(caution for session in result["sessions"] for caution in session["cautions"]):
            notes.append(f"{side} was measured with a caution: {caution}")
    return notes


def _known(values: Iterable[Any]) -> set[str]:
    return {json.dumps(value, sort_keys=True) for value in values if value not in (None, {}, "")}


def _words(values: Iterable[Any]) -> str:
    """What was found, a hash by its beginning."""
    texts = [text.strip('"') for text in sorted(_known(values))]
    return " and ".join(text if len(text) < 60 else f"{text[:12]}..." for text in texts)


def _sessions(result: Record, condition: str) -> list[Any]:
    return [session["conditions"].get(condition) for session in result["sessions"]]


def _chosen(result: Record) -> bool:
    """Whether the model's own router or known patterns had a part in it."""
    specs = [cell.get(key) or "" for cell in result["cells"] for key in ("route", "speculate")]
    return any(spec.startswith(("router", "budget:", "default")) for spec in specs)
