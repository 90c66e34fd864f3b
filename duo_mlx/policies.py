"""Policies: where a token's routes come from.

A policy answers one question: the routes of the tokens at positions ``start`` to ``stop`` of each sequence. The answer
depends on the position alone and never on how a prompt is cut into chunks, so prefill and decoding, any strategy and
any chunk size meet the same routes. Every policy here is known to the host before a pass is built.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route, Routes, check_routes, parse_pattern


class Policy(Protocol):
    """Source of host-known routes."""

    @property
    def length(self) -> int | None:
        """How many positions of a sequence have routes; None where every position has."""

    def routes(self, start: int, stop: int, batch: int = 1) -> Routes:
        """Routes of positions ``start`` to ``stop``: ``[layers]`` if all are alike, or ``[batch, tokens, layers]``."""


@dataclass(frozen=True)
class FixedPolicy:
    """One pattern for every token."""

    pattern: Routes
    length: int | None = None

    def routes(self, start: int, stop: int, batch: int = 1) -> Routes:  # noqa: ARG002
        return self.pattern


@dataclass(frozen=True)
class RandomPolicy:
    """Each token and layer draws its route independently (Duo-LLM, stage 1).

    The draws come from a counter-based generator (Philox): row, position and layer address them directly.
    """

    layers: int
    big: float = 0.5
    small: float = 0.5
    skip: float = 0.0
    seed: int = 0
    length: int | None = None

    def __post_init__(self) -> None:
        shares = (self.big, self.small, self.skip)
        if not all(share >= 0 for share in shares) or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise DuoError(
                f"random routes: the probabilities of big, small and skip are {self.big:g}, {self.small:g} and "
                f"{self.skip:g}; they must not be negative and must sum to 1"
            )

    def routes(self, start: int, stop: int, batch: int = 1) -> Routes:
        counters = -(-self.layers // 4)  # each Philox counter yields four draws
        draws = np.empty((batch, stop - start, self.layers))
        for row in range(batch):
            source = np.random.Philox(key=[self.seed, row]).advance(start * counters)
            draws[row] = np.random.Generator(source).random((stop - start, 4 * counters))[:, : self.layers]
        # compared from the end that keeps a probability of zero from ever being drawn
        routes = np.where(draws < self.big, Route.BIG, np.where(draws < self.big + self.small, Route.SMALL, Route.SKIP))
        if self.skip == 0:
            routes[routes == Route.SKIP] = Route.SMALL if self.small else Route.BIG
        return routes.astype(np.uint8)


@dataclass(frozen=True)
class ReplayPolicy:
    """Recorded routes ``[positions, layers]``, the same for every row of a batch."""

    recorded: Routes
    name: str = "replay"

    @property
    def length(self) -> int | None:
        return len(self.recorded)

    def routes(self, start: int, stop: int, batch: int = 1) -> Routes:
        if stop > len(self.recorded):
            raise DuoError(
                f"{self.name}: holds routes for {len(self.recorded)} positions, position {stop - 1} has none"
            )
        return np.broadcast_to(self.recorded[start:stop], (batch, stop - start, self.recorded.shape[1]))


def parse_route(spec: str, layers: int, seed: int = 0) -> Policy:
    """The policy that a route SPEC names.

    Args:
        spec: what `duo_mlx.routes.parse_pattern` reads; ``random`` (0.5 big, 0.5 small) or ``random:BIG,SMALL,SKIP``
            with probabilities; or a file to replay: ``tokens.npz`` as the oracle writes it (its first sequence;
            ``FILE:N`` for sequence N) or a text file with one pattern a line, position by position.
        layers: the model's number of layers.
        seed: of random routes.

    Raises:
        DuoError: what is wrong with ``spec``, in one line.
    """
    if spec == "random" or spec.startswith("random:"):
        return _parse_random(spec, layers, seed)
    file, sequence = _as_file(spec)
    if file.is_file():
        return ReplayPolicy(read_routes(file, layers, sequence), name=str(file))
    if file.suffix in (".npz", ".txt") or "/" in spec:
        raise DuoError(f"route {spec!r}: there is no such file to replay")
    return FixedPolicy(parse_pattern(spec, layers))


def _parse_random(spec: str, layers: int, seed: int) -> RandomPolicy:
    if spec == "random":
        return RandomPolicy(layers, seed=seed)
    try:
        big, small, skip = (float(share) for share in spec.removeprefix("random:").split(","))
    except ValueError:
        raise DuoError(f"route {spec!r}: write random:BIG,SMALL,SKIP with three probabilities") from None
    return RandomPolicy(layers, big, small, skip, seed)


def _as_file(spec: str) -> tuple[Path, int]:
    stem, colon, number = spec.rpartition(":")
    if colon and number.isascii() and number.isdigit():
        return Path(stem), int(number)
    return Path(spec), 0


def read_routes(file: Path, layers: int, sequence: int = 0) -> Routes:
    """Recorded routes ``[positions, layers]`` of one sequence from an ``.npz`` (key ``oracle_routes``) or text file."""
    if file.read_bytes()[:2] != b"PK":  # the magic of a zip archive, which an npz is
        return _read_text_routes(file, layers)
    try:
        with np.load(file, allow_pickle=False) as archive:
            recorded = archive["oracle_routes"]
    except KeyError:
        raise DuoError(f"{file}: holds no array named oracle_routes") from None
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged archive
        raise DuoError(f"{file}: cannot be read as an npz file ({error})") from error
    if recorded.ndim != 3 or recorded.shape[2] != layers:
        raise DuoError(
            f"{file}: oracle_routes has shape {list(recorded.shape)}, not [sequences, length, layers] "
            f"with the model's {layers} layers"
        )
    if sequence >= len(recorded):
        raise DuoError(f"{file}: has {len(recorded)} sequences, so there is no sequence {sequence} (they count from 0)")
    try:
        return check_routes(recorded[sequence : sequence + 1], 1, recorded.shape[1], layers)[0]
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None


def _read_text_routes(file: Path, layers: int) -> Routes:
    try:
        lines = file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        raise DuoError(f"{file}: is neither an npz file nor text with one pattern a line") from None
    if not lines:
        raise DuoError(f"{file}: holds no routes; a text file has one pattern of {layers} characters a line")
    try:
        return np.stack([parse_pattern(line, layers) for line in lines])
    except DuoError as error:
        raise DuoError(f"{file}: {error}") from None
