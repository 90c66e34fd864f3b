"""Rounds of ``duo-mlx bench run``: the cells of a group there and back, each run with latency and energy of one work.

A run of a cell is a window of prefills, then one of decoding after the last of them. What the machine did meanwhile may
make a run invalid; it is kept with the reason, and does not count.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np

from duo_mlx.bench import engine, peer, reading, summary
from duo_mlx.bench.energy import Counted
from duo_mlx.bench.grid import PEER, Cell
from duo_mlx.bench.interleave import Timings, interleave
from duo_mlx.bench.meters import Meter
from duo_mlx.bench.meters.window import Energy
from duo_mlx.bench.speculating import Speculating
from duo_mlx.bench.system import Conditions, changes, conditions
from duo_mlx.generation import policy_of
from duo_mlx.intervals import interval
from duo_mlx.model import Model
from duo_mlx.router import Router
from duo_mlx.routes import Route, Routes

GIVE_UP = 3  # rounds in a row of which nothing was valid
PATIENCE = 300.0  # s that a hot machine is waited for
LOOK = 10.0  # s between looks at whether it has cooled down


@dataclass(frozen=True)
class Settings:
    """How much is measured; all of it is in the result."""

    preset: str
    least_rounds: int
    most_rounds: int
    minutes: float  # for all groups together
    precision: float  # half the interval of a ratio to the first cell, relative, at which a group is done
    window: float  # s of energy in a run's prefills, and in its decoding
    cool_down: float  # s between runs
    quality_tokens: int
    quality_length: int
    seed: int


@dataclass(frozen=True)
class Prompts:
    """Token ids of prompts, and of the token that begins a text, if there is one."""

    ids: list[list[int]]
    first: int | None

    def of(self, cell: Cell, run: int) -> list[list[int]]:
        """A prompt for each sequence of a cell's batch, others for each run; cut and run on to the cell's length."""
        first = None if cell.context else self.first
        rows = range(run * cell.batch, (run + 1) * cell.batch)
        return [reading.cut(self.ids, row, cell.prompt_tokens, first) for row in rows]

    def context(self, cell: Cell) -> list[int]:
        """What stands before a cell's prompts."""
        return reading.cut(self.ids, len(self.ids) // 2, cell.context, self.first) if cell.context else []


@dataclass
class Session:
    """What one start of the program measures with."""

    number: int
    meter: Meter
    idle: Energy | None
    began: Conditions
    look: Callable[[], Conditions] = conditions
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def settle(self, now: Conditions) -> None:
        """A machine that has cooled down since the session began is what later runs are compared with."""
        if now.thermal_level is not None and now.thermal_level < (self.began.thermal_level or 0):
            self.began = replace(self.began, thermal_level=now.thermal_level)


@dataclass
class Case:
    """A cell that can be run: its record in the result, and what generates.

    Made by `cases`, and then it has run once, so that all is compiled and the routes are known.
    """

    cell: Cell
    record: dict[str, Any]
    generator: engine.Generator
    ran: str  # the strategy
    by_router: bool = False
    routes: Routes = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint8))  # realised, of the last decoding

    def generate(self, prompts: list[list[int]]) -> float:
        """Generate once, for no figure but the seconds a token."""
        self.generator.prefill(prompts)
        return float(np.mean(self.decode()))

    def decode(self, after_each: Callable[[int], object] = lambda came: None) -> list[float]:  # noqa: ARG005
        """Decode after the last prefill: seconds from token to token."""
        return self.generator.decode(self.cell.generated_tokens, after_each)

    def speculation(self) -> dict[str, Any] | None:
        """What speculation came to since the last prefill; None where nothing speculates."""
        return self.generator.record() if isinstance(self.generator, Speculating) else None

    def note_routes(self, layers: int) -> None:
        """Keep what the last decoding's routes were."""
        if self.cell.engine == PEER:
            self.routes = np.full((1, self.cell.batch, layers), Route.BIG, np.uint8)
        else:
            self.routes = self.generator.routes()


def cases(
    group: Sequence[Cell], records: Sequence[dict[str, Any]], model: Model, prompts: Prompts, seed: int
) -> list[Case]:
    """What runs the cells of a group."""
    made = []
    for cell, record in zip(group, records, strict=True):
        if cell.engine == PEER:
            generator = engine.stock(peer.base_twin(model), prompts.context(cell), cell.batch)
            case = Case(cell, record, generator, "")
        else:
            policy = policy_of(model, cell.route, seed)
            if cell.speculate:
                draft = policy_of(model, cell.speculate, seed)
                generator = Speculating(
                    model, policy, draft, cell.strategy, prompts.context(cell), draft_tokens=cell.draft_tokens
                )
            else:
                generator = engine.routed(model, policy, cell.strategy, prompts.context(cell), cell.batch)
            ran = engine.strategy_ran(model, policy, cell.strategy, cell.batch)
            case = Case(cell, record, generator, ran, isinstance(policy, Router))
        record["strategy_ran"] = case.ran
        case.generate(prompts.of(cell, 0))
        if isinstance(generator, Speculating):
            generator.forget()  # times of what had never run would mislead it for long
            case.generate(prompts.of(cell, 0))
        case.note_routes(len(model.layers))
        made.append(case)
    return made


def noise_floor(case: Case, prompts: Prompts, rounds: int) -> dict[str, float]:
    """TPOT of a cell over its own, in interleaved rounds: how far apart two equal things are here."""
    seconds: dict[str, list[float]] = {"cell": [], "again": []}
    for_all = prompts.of(case.cell, 0)

    def once(name: str) -> Callable[[], object]:
        return lambda: seconds[name].append(case.generate(for_all))

    interleave({name: once(name) for name in seconds}, rounds, warm_up=0)
    return interval(Timings(seconds).ratios("again", {"cell": 1})).record()


def rounds(
    cases: Sequence[Case], session: Session, settings: Settings, prompts: Prompts, until: float
) -> Iterator[bool]:
    """Run rounds; after each, whether it was the last. A round that is interrupted leaves nothing.

    Args:
        cases: of a group; the first is the baseline.
        session: what to measure with.
        settings: when to end.
        prompts: to generate after.
        until: when the group's time is over, by the session's clock.
    """
    number = max((run["round"] + 1 for case in cases for run in case.record["runs"]), default=0)
    lost, done = 0, False
    while not done:
        try:
            for way, ordered in enumerate((cases, list(reversed(cases)))):
                for case in ordered:
                    case.record["runs"].append(run(case, session, settings, prompts, number, 2 * number + way))
        except BaseException:
            for case in cases:
                case.record["runs"] = [each for each in case.record["runs"] if each["round"] != number]
            raise
        valid = any(number in summary.valid_rounds(case.record["runs"]) for case in cases)
        lost, number = 0 if valid else lost + 1, number + 1
        done = lost == GIVE_UP or number >= settings.most_rounds or session.clock() >= until or precise(cases, settings)
        yield done


def precise(cases: Sequence[Case], settings: Settings) -> bool:
    """Whether each cell's time over the baseline's is known well enough, from enough rounds that are valid for both.

    Of a single cell, its time.
    """
    valid = [summary.valid_rounds(case.record["runs"]) for case in cases]
    if any(len(each.keys() & valid[0].keys()) < settings.least_rounds for each in valid):
        return False
    own = summary.by_round(valid[0], summary.tpot)
    assert own is not None  # there is a round, and every run has times
    ratios = [summary.tpot_ratio(case.record["runs"], cases[0].record["runs"]) for case in cases[1:]]
    found = ratios or [interval(list(own.values()))]
    return all(each is not None and (each.high - each.low) / 2 <= settings.precision * each.median for each in found)


def run(
    case: Case, session: Session, settings: Settings, prompts: Prompts, round_number: int, number: int
) -> dict[str, Any]:
    """One run of a cell, as in a result: ``number`` of its kind, in round ``round_number``."""
    _cool(session, settings.cool_down)
    cell = case.cell
    before = session.look()
    session.settle(before)
    mx.reset_peak_memory()
    start = mx.get_active_memory()

    ttft: list[float] = []
    prefill = Counted(session.meter, settings.window)
    while not ttft or not prefill.over:
        ttft.append(case.generator.prefill(prompts.of(cell, number + len(ttft))))
        prefill.add(cell.batch * cell.prompt_tokens)
    prefill_energy = prefill.record(session.idle)

    tokens: list[list[float]] = []
    decode = Counted(session.meter, settings.window)
    while not tokens or not decode.over:
        tokens.append(case.decode(lambda came: decode.add(cell.batch * came)))
    decode_energy = decode.record(session.idle)

    peak = mx.get_peak_memory()
    after = session.look()
    return {
        "round": round_number,
        "session": session.number,
        "ttft_s": _short(ttft),
        "token_s": [_short(generation) for generation in tokens],
        "peak_bytes": peak,
        "working_bytes": max(0, peak - start),
        "prefill_energy": prefill_energy,
        "decode_energy": decode_energy,
        "speculation": case.speculation(),
        "invalid_why": sorted({*changes(session.began, before), *changes(before, after)}),
    }


def _short(seconds: Sequence[float]) -> list[float]:
    """To the tenth of a microsecond."""
    return [round(each, 7) for each in seconds]


def _cool(session: Session, cool_down: float) -> None:
    """Rest between runs, and wait for a machine that got hotter than it was."""
    if cool_down:
        session.sleep(cool_down)
    waited, began = 0.0, session.began.thermal_level
    while began is not None and (session.look().thermal_level or 0) > began and waited < PATIENCE:
        session.sleep(LOOK)
        waited += LOOK
