"""Results with names for them and their cells, short and the same in all of them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from duo_mlx.bench import results
from duo_mlx.errors import DuoError

LONGEST = 48  # characters of a name
LARGEST = 1e300
# what breaks a file or a line, or turns the text after it around
UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
PEER = "mlx-lm"


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell of a result, by three names: ``name`` tells it from the others of its result, ``line`` leaves out its
    context and ``brief`` all sizes."""

    result: "Result"
    sizes: str  # those that differ between cells: cells are comparable where they agree
    name: str
    line: str
    brief: str
    record: dict[str, Any]

    @property
    def title(self) -> str:
        """Its name among those of all results."""
        return joined(self.name, self.result.machine)

    @property
    def who(self) -> tuple[str, str]:
        """Machine and name, for a table."""
        return self.result.label, self.name

    @property
    def peer(self) -> bool:
        return bool(self.record["engine"] == PEER)

    @property
    def usable(self) -> bool:
        return bool(self.record["valid"] and self.record["summary"])

    @property
    def speculates(self) -> bool:
        return bool(self.record.get("speculate"))

    @property
    def group(self) -> str:
        """The cells that it may be compared with."""
        return joined(self.result.machine, self.sizes)

    def summary(self, *keys: str) -> Any:
        """A value of the summary; None as soon as there is none."""
        found = self.record["summary"]
        for key in keys:
            found = None if found is None else found[key]
        return found


@dataclass(frozen=True, eq=False)
class Result:
    """A result and what to call it; ``machine`` is "" where it is the only one."""

    label: str
    machine: str
    record: dict[str, Any]
    names: "Names"

    @cached_property
    def cells(self) -> list[Cell]:
        cells = self.record["cells"]
        return [
            Cell(self, self.names.sizes(cell), name, self.names.line(cell), self.names.brief(cell), cell)
            for cell, name in zip(cells, self.names.unique(cells), strict=True)
        ]

    @property
    def usable(self) -> list[Cell]:
        """The cells with figures that count."""
        return [cell for cell in self.cells if cell.usable]


class Names:
    """Names of cells, of only what differs between them."""

    SIZES = ("prompt_tokens", "generated_tokens", "batch", "context")

    def __init__(self, cells: Sequence[dict[str, Any]]) -> None:
        own = [cell for cell in cells if cell["engine"] != PEER]
        self._varied = {
            key
            for key in (*self.SIZES, "strategy_ran", "quantisation")
            if len({cell.get(key) for cell in (cells if key in self.SIZES else own)}) > 1
        }

    def brief(self, cell: dict[str, Any]) -> str:
        """Route, what drafts for it, and where they differ strategy and quantisation."""
        name, keys = results.routed(cell, short), ["strategy_ran", "quantisation"]
        if cell["engine"] == PEER:
            name, keys = short(f"{PEER} {cell['route']}"), keys[1:]
        return joined(name, *(short(cell.get(key, "")) for key in keys if key in self._varied))

    def line(self, cell: dict[str, Any]) -> str:
        """The same with sizes, but for the context."""
        return joined(self.brief(cell), self._sizes(cell, self.SIZES[:3]))

    def sizes(self, cell: dict[str, Any]) -> str:
        """Those sizes that differ."""
        return self._sizes(cell, self.SIZES)

    def unique(self, cells: Sequence[dict[str, Any]]) -> list[str]:
        """A name for each cell; where it takes it, with the strategy that was asked for or a number."""
        names = [joined(self.line(cell), self._sizes(cell, ["context"])) for cell in cells]
        asked = [joined(name, short(cell["strategy"])) for name, cell in zip(names, cells, strict=True)]
        return numbered(other if names.count(name) > 1 else name for name, other in zip(names, asked, strict=True))

    def _sizes(self, cell: dict[str, Any], keys: Iterable[str]) -> str:
        said = {
            "prompt_tokens": f"prompt {cell['prompt_tokens']}",
            "generated_tokens": f"{cell['generated_tokens']} generated",
            "batch": f"batch {cell['batch']}",
            "context": f"context {cell['context']}",
        }
        return joined(*(said[key] for key in keys if key in self._varied))


def load(paths: Sequence[Path]) -> list[Result]:
    """The results in folders or files, each with a label of its own.

    Raises:
        DuoError: as `results.read`; or a figure is no finite number.
    """
    return labelled([(_name(path), _fit(results.read(path), str(path))) for path in paths])


def labelled(records: Sequence[tuple[str, dict[str, Any]]]) -> list[Result]:
    """Results of (name of its folder, record): device and model, and the folder where these do not tell them apart."""
    labels = [f"{short(record['system']['device'])}, {short(record['model']['name'])}" for _, record in records]
    longer = [f"{label} ({short(name)})" for label, (name, _) in zip(labels, records, strict=True)]
    labels = numbered(other if labels.count(label) > 1 else label for label, other in zip(labels, longer, strict=True))
    names = Names([cell for _, record in records for cell in record["cells"]])
    return [
        Result(label, label if len(records) > 1 else "", record, names)
        for label, (_, record) in zip(labels, records, strict=True)
    ]


def usable(results: Sequence[Result]) -> list[Cell]:
    """The cells of all results with figures that count."""
    return [cell for result in results for cell in result.usable]


def joined(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def short(text: str) -> str:
    """At most `LONGEST` characters on one line."""
    text = " ".join(str(text).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def numbered(names: Iterable[str]) -> list[str]:
    """The names, those that came before with a number."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return found


def _name(path: Path) -> str:
    path = path.resolve()
    return path.parent.name if path.name == results.FILE else path.stem


def _fit(value: Any, name: str) -> Any:
    """The value with texts that can be shown and numbers that can be drawn."""
    if isinstance(value, str):
        return UNFIT.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_fit(key, name): _fit(each, name) for key, each in value.items()}
    if isinstance(value, list):
        return [_fit(each, name) for each in value]
    if isinstance(value, int | float) and not abs(value) < LARGEST:
        raise DuoError(f"{name}: is damaged: every figure should be a finite number, and one is none or beyond 1e300")
    return value
