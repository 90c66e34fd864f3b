"""The search of one sequence: its oracle under each budget, and what to judge it by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import cost
from duo_mlx.device import on_cpu
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import LETTERS, Route, Routes
from duo_mlx.study import controls, local, oracle
from duo_mlx.study.committed import Token
from duo_mlx.study.limits import Limit, parse_limit
from duo_mlx.study.oracle import Chosen
from duo_mlx.study.tree import Options, Text, Work, layer_options

MOST = 2_000_000  # patterns that are searched one by one
MOST_ROWS = 256  # patterns of a batch
CACHED = 1024  # tokens of a batch on a CPU, where larger ones leave its caches and take longer
RANDOM = 100  # patterns that the random baseline is the best of

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Question:
    """What is searched; two runs of one question give the same table."""

    choices: str  # letters of routes
    prefix: str
    budgets: tuple[str, ...]
    seed: int  # of the random patterns and of the controls' noise
    text: Mapping[str, Any]  # where it is from
    model: Mapping[str, Any]  # name and sha256
    controls: bool = False  # see `duo_mlx.study.controls`
    search: str = "exhaustive"


def refuse_many(options: Options, tokens: int) -> None:
    """Raise `DuoError` with the cost and what would do, where there are more patterns than can be searched."""
    count = prod(map(len, options))
    if count > MOST:
        raise DuoError(
            f"{count:.2g} patterns of {len(options)} layers are too many to search one by one: that is as many passes "
            f"over {tokens} tokens for each sequence, and {MOST:,} is the limit; give --search beam or --search "
            "descent, which try some hundreds for each token, or fewer --choices"
        )


def rows_within(model: Model, tokens: int, context: int, max_memory: int) -> int:
    """Patterns of a batch whose states, inner values and logits take about so many bytes.

    Args:
        model: a Duo.
        tokens: that a pattern is tried on at once.
        context: of them, for attention.
        max_memory: bytes.
    """
    args = model.config
    waiting = args.num_hidden_layers * len(Route) * args.hidden_size
    at_work = (
        6 * args.hidden_size + 3 * args.intermediate_size + 3 * args.vocab_size + args.num_attention_heads * context
    )
    most = min(MOST_ROWS, max(1, CACHED // tokens)) if on_cpu() else MOST_ROWS
    return int(np.clip(max_memory // (4 * tokens * (waiting + at_work)), 1, most))


class Searcher:
    """What is the same for all texts of a question, and the search of one.

    Raises:
        DuoError: more patterns than can be searched, an impossible budget, or controls that do not fit the memory.
    """

    def __init__(self, model: Model, question: Question, tokens: int, max_memory: int):
        self._model, self._question, self._tokens = model, question, tokens
        self._options = layer_options(model, [Route(LETTERS.index(letter)) for letter in question.choices])
        self._method = local.parse_method(question.search)
        self.price = cost.weight_bytes(model).of
        self.limits = [parse_limit(budget, model, tokens) for budget in question.budgets]
        self.rows = rows_within(model, 1 if question.prefix == "committed" else tokens, tokens, max_memory)
        self.space: oracle.Space | None = None
        if self._method.name == "exhaustive":
            refuse_many(self._options, tokens)
            self.space = oracle.Space(model, self._options)
            self._allowed = oracle.allowed_by(self.limits, self.space, tokens)
            self._refuse_empty()
        if question.controls:
            self._refuse_controls(max_memory)
        self._drawn = self._random_patterns()

    def _refuse_empty(self) -> None:
        for name, allowed in self._allowed.items():
            if without := int((~allowed.any(axis=0)).sum()):
                raise DuoError(
                    f"--budget {name!r}: no pattern of {self._question.choices!r} is within it at all tokens"
                    f" ({without} have none)"
                )

    def _refuse_controls(self, max_memory: int) -> None:
        if self.space is None or self._question.prefix != "shared":
            raise DuoError("--controls: only --prefix shared with --search exhaustive has a pass for each pattern")
        if (needed := controls.memory(len(self.space.patterns), self._tokens)) > max_memory:
            raise DuoError(f"--controls keeps all losses and needs --max-memory {-(-needed >> 20) + 1} or more")

    def _random_patterns(self) -> dict[str, Routes]:
        """Up to `RANDOM` patterns within each limit that is the same for all tokens, the same ones for all texts."""
        found = {}
        for limit in self.limits:
            if limit.scheduled:
                continue
            if self.space is None:
                allows = partial(limit.allows, tokens=1)
                drawn = local.drawn(allows, self._options, RANDOM, self._question.seed)
                if len(drawn):
                    found[limit.name] = drawn
            else:
                within = np.flatnonzero(self._allowed[limit.name][:, 0])
                random = np.random.default_rng(self._question.seed)
                chosen = np.sort(random.choice(within, min(RANDOM, len(within)), replace=False))
                found[limit.name] = self.space.patterns[chosen]
        return found

    def sequence(
        self,
        window: NDArray[np.integer],
        number: int,
        progress: Callable[[float], object] = lambda share: None,  # noqa: ARG005
    ) -> Arrays:
        """Everything about one sequence, as arrays by name.

        Args:
            window: its ids ``[length + 1]``.
            number: which one it is, as a seed of the noise.
            progress: is called with the share of its search that is done.
        """
        inputs, targets = window[:-1], window[1:]
        found: Arrays = {"inputs": inputs.astype(np.int32), "targets": targets.astype(np.int32)}
        for route in Route:
            name = route.name.lower()
            found[f"loss_{name}"], found[f"entropy_{name}"] = oracle.uniform(self._model, inputs, targets, route)
        mx.reset_peak_memory()
        score = local.Scorer(partial(Text, self._model, inputs, targets, self._options, self.rows))
        if self._question.prefix == "committed":
            best, work = self._committed(inputs, targets, progress)
        elif self.space is None:
            best, work = self._local(score), Work()
        else:
            best, work = self._exhaustive(self.space, inputs, targets, number, found, progress)
        for place, limit in enumerate(self.limits):
            of = best[limit.name]
            found |= {
                f"oracle_loss_{place}": of.loss,
                f"oracle_routes_{place}": of.patterns,
                f"seen_{place}": of.seen,
            }
            if "means" not in found and limit.name in self._drawn:
                losses = score(self._drawn[limit.name])
                found |= {f"random_{place}": losses.min(axis=0), f"drawn_{place}": losses.mean(axis=1)}
        work += score.work
        found["work"] = np.array([work.attention, work.ffn, work.head])
        found["peak_bytes"] = np.array(mx.get_peak_memory())
        return found

    def _exhaustive(
        self,
        space: oracle.Space,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        number: int,
        found: Arrays,
        progress: Callable[[float], object],
    ) -> tuple[dict[str, Chosen], Work]:
        kept = np.empty((len(space.patterns), len(inputs)), np.float32) if self._question.controls else None
        drawn = {}
        for name, patterns in self._drawn.items():
            drawn[f"random {name}"] = np.isin(np.arange(len(space.patterns)), space.numbers(patterns))[:, None]
        best, means, work = oracle.shared(
            self._model, inputs, targets, space, self._allowed | drawn, self.rows, kept, progress
        )
        found["means"] = means.astype(np.float32)
        for place, limit in enumerate(self.limits):
            if f"random {limit.name}" in best:
                found[f"random_{place}"] = best[f"random {limit.name}"].loss
        if kept is not None:
            self._controls(space, inputs, targets, number, found, best, kept)
        return {limit.name: best[limit.name].chosen(space) for limit in self.limits}, work

    def _local(self, score: local.Scorer) -> dict[str, Chosen]:
        found = {}
        for limit in self.limits:
            allows = partial(limit.allows, tokens=self._tokens)
            pool = local.Pool(score, allows, self.price, self._tokens, len(self._options))
            found[limit.name] = local.find(pool, self._options, self._method, self._question.seed)
        return found

    def _committed(
        self, inputs: NDArray[np.integer], targets: NDArray[np.integer], progress: Callable[[float], object]
    ) -> tuple[dict[str, Chosen], Work]:
        works: list[Work] = []

        def choose(limit: Limit, cache: list[Any], place: int) -> Chosen:
            progress(len(works) / (len(self.limits) * len(inputs)))
            walk = partial(Token, self._model, cache, int(inputs[place]), int(targets[place]), self._options, self.rows)
            if self.space is None:
                score = local.Scorer(walk)
                pool = local.Pool(
                    score, lambda of: limit.at(of, place, self._tokens)[:, None], self.price, 1, len(self._options)
                )
                found = local.find(pool, self._options, self._method, self._question.seed)
                works.append(score.work)
                return found
            every = walk(partial(limit.reaches, layers=len(self._options), token=place, tokens=self._tokens))
            found = oracle.lowest(every, self.space)
            works.append(every.work)
            return found

        best = {limit.name: oracle.committed(self._model, inputs, partial(choose, limit)) for limit in self.limits}
        return best, sum(works, Work())

    def _controls(
        self,
        space: oracle.Space,
        inputs: NDArray[np.integer],
        targets: NDArray[np.integer],
        number: int,
        found: Arrays,
        best: Mapping[str, oracle.Best],
        kept: NDArray[np.float32],
    ) -> None:
        passes = controls.Noise(self._model, inputs, targets, self.rows, (self._question.seed, number))
        second = controls.SecondContext(self._model, inputs, targets, space, self.rows, kept)
        found |= second.losses | {"table": kept}
        for place, limit in enumerate(self.limits):
            allowed = self._allowed[limit.name]
            means = found["means"][allowed[:, 0]]
            of = controls.equal_n(kept, allowed)
            of |= controls.noise(passes, limit, means, len(inputs))
            of |= second.compare(allowed, best[limit.name].number)
            of[controls.WORST] = controls.worst(kept, allowed, space)
            found |= {f"{name}_{place}": losses for name, losses in of.items()}

    def across(self, found: list[Arrays]) -> None:
        """Add to the arrays of all sequences what takes all of them, or the patterns, to know."""
        for place, limit in enumerate(self.limits):
            if self.space is not None and limit.name in self._drawn:
                chosen = self.space.numbers(self._drawn[limit.name])
                for each in found:
                    if "means" in each:
                        each[f"drawn_{place}"] = each["means"][chosen]
        if not self._question.controls:
            return
        for name, kinds in controls.kinds_of(found).items():
            for place, limit in enumerate(self.limits):
                if not limit.scheduled:
                    losses = controls.split_by_kind(found, self._allowed[limit.name], kinds)
                    for each, of in zip(found, losses, strict=True):
                        each[f"{name}_{place}"] = of
