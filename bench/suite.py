"""``duo-mlx bench run``: a question, measured group by group into a results folder.

For each group: quality on held-out text, a decoded token's parts, then rounds of its cells (`duo_mlx.bench.rounds`)
until the ratios to the first cell are known well enough or the time is over. Each round is kept as soon as it is done.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import speculation
from duo_mlx.bench import engine, figures, folder, grid, parts, quality, reading, results, rounds, summary, touched
from duo_mlx.bench.grid import DUO, PEER, Cell
from duo_mlx.bench.meters import Meter
from duo_mlx.bench.meters.window import measure_idle
from duo_mlx.bench.projected import gpu_work
from duo_mlx.bench.rounds import Case, Prompts, Session, Settings
from duo_mlx.bench.subject import Subject
from duo_mlx.bench.system import Conditions, cautions, conditions, system_record
from duo_mlx.cost import RouteTable
from duo_mlx.errors import DuoError
from duo_mlx.flops import flops
from duo_mlx.generation import policy_of
from duo_mlx.model import Model
from duo_mlx.routed import RoutedModel
from duo_mlx.router import Router

IDLE = 10.0  # s in which the idle computer's energy is measured
SAMPLED = 96  # tokens of the held-out text whose routes are shown one by one

Progress = Callable[[str, float, float], object]


@dataclass(frozen=True)
class Question:
    """What is asked of a model."""

    grid: grid.Grid
    against: str  # "mlx-lm" or "none"
    prompts: Path | None
    text: Path | None
    settings: Settings
    command: str


def run(
    question: Question,
    subject: Subject,
    out: Path,
    meter: Meter,
    *,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,  # noqa: ARG005
    look: Callable[[], Conditions] = conditions,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure, or go on measuring, and give the result, which is in the folder ``out``, too.

    Args:
        question: what to measure.
        subject: the question's model.
        out: the results folder.
        meter: of energy.
        force: replace a result that is there.
        progress: is called with a stage, what is done and what is to be.
        look: the machine's condition now.
        sleep: waits for s.
        clock: s, for the time limit.

    Raises:
        DuoError: a question that cannot be answered, or a folder that cannot be used; nothing was overwritten.
        KeyboardInterrupt: the user's; the rounds that were done are in the folder.
    """
    settings = question.settings
    groups = question.grid.groups(subject.stored, question.against == PEER)
    grid.check(groups, subject.args, subject.window)
    length = min(settings.quality_length, subject.args.max_position_embeddings or settings.quality_length)
    _check(groups, subject, length)
    prompt_text, held_out = reading.read(question.prompts, "prompts"), reading.read(question.text, "held_out")
    prompts = Prompts(reading.prompts(prompt_text, subject.tokenizer), subject.first)
    windows = reading.windows(held_out, subject.tokenizer, settings.quality_tokens, length)
    result = folder.begin(
        out,
        {
            "schema": results.SCHEMA,
            "command": question.command,
            "complete": False,
            "system": system_record(),
            "model": subject.record,
            "texts": {
                "prompts": prompt_text.record(sum(map(len, prompts.ids)), len(prompts.ids)),
                "held_out": held_out.record(windows[:, 1:].size, len(windows)),
            },
            "settings": asdict(settings),
            "meter": {name: getattr(meter, name) for name in ("name", "label", "scope", "why")}
            | {"notes": list(meter.notes), "idle": None},
            "roofline": None,
            "sessions": [],
            "parts": [],
            "samples": None,
            "cells": [_unmeasured(cell) for group in groups for cell in group],
        },
        force,
    )
    folder.save(out, result)  # a folder that cannot be written is better known now
    session = _begin(result, meter, look, sleep, clock)
    left, seconds = sum(map(len, groups)), 60 * settings.minutes  # cells, and the time for their rounds
    records = iter(result["cells"])
    try:
        for number, group in enumerate(groups):
            found = [next(records) for _ in group]
            of_group, left = len(group) / left, left - len(group)
            if all(record["done"] for record in found):
                continue
            model = subject.model(group[0].quantisation)
            flops_at = flops(model)
            _fill_quality(result, found, model, windows, subject, lambda share: progress("quality", share, 1.0))
            _add_parts(result, model, group[0])
            cases = rounds.cases(group, found, model, prompts, settings.seed)
            if not result["sessions"][-1]["noise_floor"]:
                floor = rounds.noise_floor(cases[0], prompts, settings.least_rounds)
                result["sessions"][-1]["noise_floor"] = floor
            began, until = clock(), clock() + seconds * of_group
            for done in rounds.rounds(cases, session, settings, prompts, until):
                _summarise(cases, model, flops_at, result, done)
                folder.save(out, result)
                share = 1.0 if done else min(1.0, (clock() - began) / max(until - began, 1e-9))
                progress("cells", number + share, len(groups))
            seconds -= clock() - began
    finally:
        folder.save(out, result)
    result["complete"] = True
    folder.save(out, result)
    return result


def _check(groups: Sequence[Sequence[Cell]], subject: Subject, length: int) -> None:
    """Refuse cells that the model cannot run, before anything is measured; ``length`` is that of quality's windows."""
    asked = [cell for group in groups for cell in group]
    for cell in asked:
        if reason := subject.refusal(cell.quantisation):
            raise DuoError(reason)
        routes = policy_of(subject.model(subject.stored), cell.route)
        recorded = None if isinstance(routes, Router) else routes.length
        if recorded is not None and recorded < max(cell.positions, length):
            raise DuoError(
                f"--route {cell.route}: holds routes for {recorded} positions; {max(cell.positions, length)} are needed"
            )
    drafting = (cell for cell in asked if cell.speculate)
    for route, draft, many in dict.fromkeys((c.route, c.speculate, c.draft_tokens) for c in drafting):
        model = subject.model(subject.stored)
        try:
            speculation.checked(model, policy_of(model, route), policy_of(model, draft), many)
        except DuoError as error:
            raise DuoError(f"--speculate {draft}: {error}") from None
    named = (cell for cell in asked if cell.strategy not in ("auto", "dense"))  # which run anywhere
    for bits, route, strategy, batch in dict.fromkeys((c.quantisation, c.route, c.strategy, c.batch) for c in named):
        model = subject.model(bits)
        try:
            RoutedModel(model, policy_of(model, route), strategy)(mx.zeros((batch, 1), mx.int32))
        except DuoError as error:
            raise DuoError(f"--route {route}: {error}") from None


def _unmeasured(cell: Cell) -> dict[str, Any]:
    return (
        {"id": cell.id}
        | asdict(cell)
        | {"strategy_ran": "", "big_layers": None, "valid": False, "invalid_why": ["not measured"], "done": False}
        | {"runs": [], "speculation": None, "summary": None, "quality": None}
    )


def _begin(
    result: dict[str, Any],
    meter: Meter,
    look: Callable[[], Conditions],
    sleep: Callable[[float], None],
    clock: Callable[[], float],
) -> Session:
    """A new session: the machine's condition, its idle energy, and, if it is the first, its bandwidth."""
    began = look()
    idle = measure_idle(meter, IDLE) if meter.rails else None
    if result["meter"]["idle"] is None and idle is not None:
        result["meter"]["idle"] = idle.record()
    if result["roofline"] is None:
        bandwidth = figures.bandwidth(figures.effort())
        how = "products of a vector with matrices, more of them than the caches hold; median of rounds"
        result["roofline"] = {"bandwidth_bytes_s": bandwidth.median, "how": how}
    result["sessions"].append(
        {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "conditions": asdict(began),
            "cautions": cautions(began),
            "noise_floor": None,
        }
    )
    return Session(len(result["sessions"]) - 1, meter, idle, began, look, sleep, clock)


def _fill_quality(
    result: dict[str, Any],
    records: Sequence[dict[str, Any]],
    model: Model,
    windows: NDArray[np.int32],
    subject: Subject,
    progress: Callable[[float], object],
) -> None:
    """The quality of the routes in ``records``, measured where no cell of this quantisation has it yet."""
    quantisation, ours = records[0]["quantisation"], [record for record in records if record["engine"] == DUO]
    known = {
        record["route"]: record["quality"]
        for record in result["cells"]
        if record["quantisation"] == quantisation and record["quality"]
    }
    missing = dict.fromkeys(record["route"] for record in ours if record["route"] not in known)
    if missing:
        policies = {route: policy_of(model, route, result["settings"]["seed"]) for route in missing}
        found, samples = quality.measure(model, policies, windows, progress)
        known |= found
        ids = windows[0, : SAMPLED + 1].tolist()
        shown = result["samples"] or {
            "ids": ids,
            "tokens": [subject.tokenizer.decode([token]) for token in ids],
            "policies": [],
        }
        # the first token has a route and no loss, the last one shown a loss and no route
        shown["policies"] += [
            {
                "route": route,
                "quantisation": quantisation,
                "patterns": each["patterns"][: len(ids)],
                "loss": [None, *each["loss"][: len(ids) - 1]],
            }
            for route, each in samples.items()
        ]
        result["samples"] = shown
    for record in ours:
        record["quality"] = known[record["route"]]


def _add_parts(result: dict[str, Any], model: Model, cell: Cell) -> None:
    """A decoded token's parts in cells of one sequence and this context, where they can be had and are not known."""
    known = {(each["quantisation"], each["context"]) for each in result["parts"]}
    if cell.batch == 1 and (cell.quantisation, cell.context) not in known and parts.possible(model):
        found = parts.measure(model, cell.context + cell.prompt_tokens)
        result["parts"].append({"quantisation": cell.quantisation, "context": cell.context} | found)


def _gpu_work(model: Model, case: Case) -> dict[str, Any] | None:
    """A token's work on an Apple GPU; None of speculation: it is of passes over one token."""
    if case.cell.speculate:
        return None
    return gpu_work(model, case.cell.quantisation, case.routes, _half_way(case.cell), case.by_router)


def _half_way(cell: Cell) -> int:
    """Positions that the token in the middle of a generation attends to."""
    return cell.context + cell.prompt_tokens + cell.generated_tokens // 2


def _summarise(
    cases: Sequence[Case], model: Model, flops_at: Callable[[int], RouteTable], result: dict[str, Any], done: bool
) -> None:
    """Bring the cells' figures up to date."""
    layers = len(model.layers)
    counted = []
    for case in cases:
        case.note_routes(layers)
        case.record["speculation"] = found = summary.speculation(case.record["runs"])
        if found:
            counted.append((found["bytes_per_token"], found["flops_per_token"]))
            continue
        read = touched.bytes_per_token(model, case.routes, _half_way(case.cell), case.ran, case.by_router)
        table = flops_at(_half_way(case.cell))
        counted.append((read, touched.flops_per_token(model.config, table, case.routes, case.ran)))
    for case, (read, computed) in zip(cases, counted, strict=True):
        record, mix = case.record, engine.shares(case.routes)
        record["summary"] = summary.summarise(
            record,
            cases[0].record,
            {
                "bytes_per_token": read,
                "flops_per_token": computed,
                "route_mix": mix,
                "baseline_bytes": counted[0][0],
                "baseline_flops": counted[0][1],
                "bandwidth_bytes_s": result["roofline"]["bandwidth_bytes_s"],
                "why_no_energy": result["meter"]["why"],
            },
        )
        lost = sorted({why for each in record["runs"] for why in each["invalid_why"]})
        valid = record["summary"] is not None
        record |= {
            "big_layers": mix["big"] * layers,
            "gpu_work": _gpu_work(model, case),
            "valid": valid,
            "done": done,
            "invalid_why": [] if valid else lost,
        }
