"""An oracle for deep models, whose patterns are too many to try: beam search and coordinate descent.

Both go from a pattern to its neighbours. A step tries every change of one layer's route, and of the pairs of changes
that stay within the limit those few whose single effects promise most: under a budget of exactly k big layers one layer
gives up its big FFN and another gets it, and there are hundreds of such pairs, of which two single changes that were
tried predict the good ones well.

``beam:W`` keeps a token's W best patterns of all that were tried and steps from each of them, the best first, until
none of the W is left to step from. ``descent:S`` goes from S starts to the best neighbour while that is better.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError
from duo_mlx.routes import Route, Routes
from duo_mlx.study.losses import Losses
from duo_mlx.study.oracle import Chosen
from duo_mlx.study.tree import Beginnings, Options, Walk, Work

Step = Callable[[Sequence[int], Sequence[int]], list[NDArray[np.int64]]]

PAIRS = 8  # of a step, the most promising ones
STARTS = 3  # of a beam
ATTEMPTS = 50  # to find a start within a limit
SIZES = {"beam": 8, "descent": 4}  # where none is given
FORMS = "exhaustive, beam[:WIDTH] or descent[:STARTS]"


@dataclass(frozen=True)
class Method:
    """How to look for a token's best pattern."""

    name: str  # exhaustive, beam or descent
    size: int = 0  # the beam's width, or starts

    def __str__(self) -> str:
        return f"{self.name}:{self.size}" if self.size else self.name


def parse_method(spec: str) -> Method:
    """The method that ``spec`` names.

    Raises:
        DuoError: it names none, in one line.
    """
    if spec == "exhaustive":
        return Method(spec)
    found = re.fullmatch(r"(beam|descent)(?::([1-9]\d{0,3}))?", spec)
    if not found:
        raise DuoError(f"--search {spec!r}: give {FORMS}")
    return Method(found[1], int(found[2] or SIZES[found[1]]))


class Scorer:
    """Losses of patterns, of which each is evaluated once.

    Args:
        walk: over the patterns that begin as wanted.
    """

    def __init__(self, walk: Callable[[Beginnings], Walk]):
        self.work = Work()
        self._walk = walk
        self._known: dict[bytes, Losses] = {}

    def __call__(self, patterns: Routes) -> Losses:
        """Nats ``[n, tokens]`` of patterns ``[n, layers]``."""
        new = np.array([pattern.tobytes() not in self._known for pattern in patterns], bool)
        if new.any():
            walk = self._walk(Beginnings(patterns[new]))
            for tried, losses in walk.losses():
                self._known |= {pattern.tobytes(): each for pattern, each in zip(tried, losses, strict=True)}
            self.work += walk.work
        return np.stack([self._known[pattern.tobytes()] for pattern in patterns])


class Pool:
    """Patterns that were tried, with their losses; a row is one of them.

    Args:
        score: of patterns ``[n, layers]`` the losses ``[n, tokens]``.
        allows: which of them each token may have, ``[n, tokens]``, or ``[n, 1]`` if all may the same.
        price: of patterns, for ties: the lower one wins, then the lower route in the first layer that differs.
        tokens: how many.
        layers: of a pattern.
    """

    def __init__(
        self,
        score: Callable[[Routes], Losses],
        allows: Callable[[Routes], NDArray[np.bool_]],
        price: Callable[[Routes], NDArray[Any]],
        tokens: int,
        layers: int,
    ):
        self.tokens = tokens
        self.patterns: Routes = np.empty((0, layers), np.uint8)
        self.losses: Losses = np.empty((0, tokens), np.float32)
        self.within = np.empty((0, tokens), np.bool_)
        self._score, self._allows, self._price = score, allows, price
        self._rows: dict[bytes, int] = {}

    def add(self, patterns: Routes) -> NDArray[np.int64]:
        """Try those that are new; the rows of all."""
        new = {pattern.tobytes(): pattern for pattern in patterns if pattern.tobytes() not in self._rows}
        if new:
            tried = np.stack(list(new.values()))
            self._rows |= {key: len(self.patterns) + place for place, key in enumerate(new)}
            self.patterns = np.concatenate([self.patterns, tried])
            self.losses = np.concatenate([self.losses, self._score(tried)])
            self.within = np.concatenate([self.within, np.broadcast_to(self._allows(tried), (len(tried), self.tokens))])
        return np.array([self._rows[pattern.tobytes()] for pattern in patterns], np.int64)

    def allowed(self, patterns: Routes, token: int) -> NDArray[np.bool_]:
        """Which patterns ``[n, layers]`` one token may have."""
        found = self._allows(patterns)
        return found[:, token if found.shape[1] > 1 else 0]

    def best(self, token: int, count: int, rows: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """Rows of the best patterns within a token's limit, of ``rows`` or of all; the best first."""
        rows = np.arange(len(self.patterns)) if rows is None else np.unique(rows)
        rows = rows[self.within[rows, token]]
        if len(rows) > count:
            last = np.partition(self.losses[rows, token], count - 1)[count - 1]
            rows = rows[self.losses[rows, token] <= last]
        patterns = self.patterns[rows]
        order = np.lexsort((*patterns.T[::-1], self._price(patterns), self.losses[rows, token]))
        return rows[order[:count]]


def find(pool: Pool, options: Options, method: Method, seed: int) -> Chosen:
    """The best patterns that a method finds.

    Args:
        pool: what scores patterns; what it holds already counts.
        options: each layer's routes.
        method: beam or descent.
        seed: of the random starts.

    Raises:
        DuoError: no start is within a token's limit.
    """
    step = partial(neighbours, pool, options)
    if method.name == "beam":
        _beam(pool, step, _starts(pool, options, STARTS, seed), method.size)
    else:
        _descent(pool, step, _starts(pool, options, method.size, seed))
    best = np.concatenate([pool.best(token, 1) for token in range(pool.tokens)])
    return Chosen(pool.losses[best, np.arange(pool.tokens)], pool.patterns[best], pool.within.sum(axis=0))


def neighbours(pool: Pool, options: Options, tokens: Sequence[int], rows: Sequence[int]) -> list[NDArray[np.int64]]:
    """Try the neighbours of a pattern for each of some tokens; their rows by token, in or out of its limit."""
    moves = [(layer, route) for layer, routes in enumerate(options) for route in routes]
    singles = pool.add(np.concatenate([_changed(pool.patterns[[row]], moves) for row in rows]))
    by_token = singles.reshape(len(rows), len(moves))  # a move to the route that is there leaves the pattern itself
    one, two = np.triu_indices(len(moves), 1)
    layer = np.array([layer for layer, _ in moves])
    one, two = one[layer[one] != layer[two]], two[layer[one] != layer[two]]
    promising = []
    for token, row, changed in zip(tokens, rows, by_token, strict=True):
        gain = pool.losses[changed, token] - pool.losses[row, token]
        real = changed != row
        pairs = np.flatnonzero(real[one] & real[two])
        patterns = np.repeat(pool.patterns[[row]], len(pairs), axis=0)
        for of in (one, two):
            patterns[np.arange(len(pairs)), layer[of[pairs]]] = np.array([route for _, route in moves])[of[pairs]]
        may = pool.allowed(patterns, token)
        order = np.argsort((gain[one] + gain[two])[pairs[may]], kind="stable")[:PAIRS]
        promising.append(patterns[may][order])
    both = np.split(pool.add(np.concatenate(promising)), np.cumsum([len(each) for each in promising])[:-1])
    return [np.concatenate(each) for each in zip(by_token, both, strict=True)]


def _changed(pattern: Routes, moves: Sequence[tuple[int, Route]]) -> Routes:
    """The pattern ``[1, layers]`` after each of some moves."""
    changed = np.repeat(pattern, len(moves), axis=0)
    for place, (layer, route) in enumerate(moves):
        changed[place, layer] = route
    return changed


def _beam(pool: Pool, step: Step, begun: Sequence[NDArray[np.int64]], width: int) -> None:
    done: list[set[int]] = [set() for _ in range(pool.tokens)]  # rows that were stepped from
    waiting = [list(dict.fromkeys(rows.tolist())) for rows in begun]
    while True:
        here = {}
        for token, passed in enumerate(done):
            nexts = waiting[token] or [row for row in pool.best(token, width).tolist() if row not in passed]
            if nexts:
                here[token] = nexts.pop(0)
                passed.add(here[token])
        if not here:
            return
        step(list(here), list(here.values()))


def _descent(pool: Pool, step: Step, begun: Sequence[NDArray[np.int64]]) -> None:
    for at in zip(*begun, strict=True):  # a start for each token
        here = dict(enumerate(int(row) for row in at))
        while here:
            found = step(list(here), list(here.values()))
            best = {}
            for (token, row), rows in zip(here.items(), found, strict=True):
                best[token] = int(pool.best(token, 1, np.append(rows, row))[0])
            here = {token: row for token, row in best.items() if row != here[token]}


def _starts(pool: Pool, options: Options, count: int, seed: int) -> list[NDArray[np.int64]]:
    """Try patterns to start from: by token the rows of ``count`` that are within its limit."""
    random, tokens = np.random.default_rng(seed), range(pool.tokens)
    chosen: list[list[Routes]] = [[] for _ in tokens]
    for attempt in range(ATTEMPTS * count):
        tried = _by_count(options, random if attempt else None)
        for token, own in enumerate(chosen):
            may = tried[pool.allowed(tried, token)]
            wanted = count - len(own)
            if len(may) and wanted:
                places = (
                    np.linspace(0, len(may) - 1, min(wanted, len(may))) if attempt == 0 else [random.integers(len(may))]
                )
                own.extend(may[round(place)] for place in places)
        if all(len(own) == count for own in chosen):
            break
    if without := [token for token in tokens if not chosen[token]]:
        raise DuoError(f"no pattern to start from is within the budget of {len(without)} tokens, such as {without[0]}")
    return [pool.add(np.stack((own * count)[:count])) for own in chosen]


def drawn(allows: Callable[[Routes], NDArray[np.bool_]], options: Options, count: int, seed: int) -> Routes:
    """So many different random patterns ``[n, layers]`` for which ``allows`` gives ``[n, 1]`` true; fewer if rare.

    The number of layers with their highest route is drawn first, evenly, so that a budget of few is met, too.
    """
    random, found = np.random.default_rng(seed), dict[bytes, Routes]()
    for _ in range(ATTEMPTS * count):
        high = random.random(len(options)).argsort() < random.integers(len(options) + 1)
        lower = [routes[int(random.integers(max(1, len(routes) - 1)))] for routes in options]
        pattern = np.where(high, [routes[-1] for routes in options], lower).astype(np.uint8)
        if allows(pattern[None])[0, 0]:
            found[pattern.tobytes()] = pattern
        if len(found) == count:
            break
    return np.stack(list(found.values())) if found else np.empty((0, len(options)), np.uint8)


def _by_count(options: Options, random: np.random.Generator | None) -> Routes:
    """Patterns with n layers of their highest route, for every n: evenly spaced, or at random.

    The other layers have their lowest route, and once more their next one, if there are three.
    """
    layers, found = len(options), []
    for count in range(layers + 1):
        if random:
            high = random.choice(layers, count, replace=False)
        else:
            high = np.floor((np.arange(count) + 0.5) * layers / max(1, count)).astype(int)
        for lower in range(max(1, max(map(len, options)) - 1)):
            pattern = np.array([routes[min(lower, max(0, len(routes) - 2))] for routes in options], np.uint8)
            pattern[high] = [options[layer][-1] for layer in high]
            found.append(pattern)
    return np.stack(found)
