"""What a graft has done so far, on disk: it bounds the memory that a graft takes, and an interrupted one resumes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError

FILE = "graft.json"


class State:
    """Arrays by name in a directory; each is written whole or not at all."""

    def __init__(self, directory: Path, of: dict[str, Any]):
        """Open the state of the graft that ``of`` describes.

        Raises:
            DuoError: the directory holds something else, or the state of another graft.
        """
        self.directory = directory
        description = json.loads(json.dumps(of))
        if directory.exists():
            try:
                found = json.loads((directory / FILE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise DuoError(f"{directory}: is in the way of this graft's state; remove it") from None
            if found != description:
                raise DuoError(
                    f"{directory}: holds what an interrupted graft of another model, text or setting has done; "
                    "repeat that command to finish it, or remove the directory"
                )
        else:
            directory.mkdir(parents=True)
            self._replace(FILE, json.dumps(description, indent=2).encode())

    def has(self, name: str) -> bool:
        return (self.directory / f"{name}.npy").exists()

    def save(self, name: str, array: NDArray[Any]) -> None:
        temporary = self.directory / ".new.npy"
        with temporary.open("wb") as file:
            np.save(file, array)
        temporary.replace(self.directory / f"{name}.npy")

    def load(self, name: str) -> NDArray[Any]:
        found: NDArray[Any] = np.load(self.directory / f"{name}.npy", allow_pickle=False)
        return found

    def drop(self, name: str) -> None:
        (self.directory / f"{name}.npy").unlink(missing_ok=True)

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self.directory / ".new"
        temporary.write_bytes(content)
        temporary.replace(self.directory / name)
