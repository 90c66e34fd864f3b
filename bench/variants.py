"""Variants of the kernels: FFNs to run them on, made ones or a model's, and what each does there.

A variant is a strategy, a form of FFN, a storage format, a dtype and a number of tokens. One that the kernels refuse
is not launched; any other is compared with the modules by `duo_mlx.kernels.selfcheck` and timed against `planned`.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import gemma2, nemotron

from duo_mlx import masked
from duo_mlx.bench.interleave import interleave
from duo_mlx.ffn import DuoFFN, FFNs, GatedFFN, nbytes
from duo_mlx.forms import Form, form
from duo_mlx.kernels import fused, selfcheck
from duo_mlx.kernels.verdicts import Verdict
from duo_mlx.model import Model
from duo_mlx.routes import Route

ROWS = tuple(fused.COLUMNS)  # of each variant of the kernels
BITS = (0, *fused.BITS)  # 0: plain floats

Clock = Callable[[], float]  # s


@dataclass(frozen=True)
class Shape:
    """FFNs to make: values in and out, inner widths (small 0: small is big), group of quantised weights (0: none).

    ``of`` names the model of mlx-lm whose FFN big and small are, one of `OF`.
    """

    hidden: int
    big: int
    small: int
    group: int
    biases: bool = False
    timed: bool = False
    of: str = "llama"

    def __str__(self) -> str:
        return f"{self.hidden}/{self.big}/{self.small or self.big}"


# FFNs of other forms than Llama's, by hidden and inner width
OF: dict[str, Callable[[int, int], nn.Module]] = {
    "gemma2": gemma2.MLP,  # gated, gelu_tanh
    "nemotron": lambda hidden, width: nemotron.MLP(
        SimpleNamespace(hidden_size=hidden, intermediate_size=width, mlp_bias=False)
    ),  # two matrices, relu2
}


SHAPES = (
    Shape(576, 1536, 96, 32, timed=True),  # SmolLM2-135M with a small of a sixteenth
    Shape(416, 1120, 32, 32, biases=True),
    Shape(1001, 2731, 1, 0, biases=True),
    Shape(576, 1536, 0, 64),
    Shape(1024, 2816, 128, 128),
    Shape(2048, 8192, 512, 64, timed=True),  # Llama-3.2-1B
    Shape(640, 2048, 128, 64, of="gemma2"),
    Shape(768, 3072, 0, 64, of="nemotron"),
)
ROUTER_CHOICES = (2, 3)


@dataclass(frozen=True)
class Plan:
    """How thoroughly to look: repeats of a check, rounds of timing (0: none), bytes of big that a timed chain reads."""

    repeats: int = 100
    rounds: int = 5
    shapes: tuple[Shape, ...] = SHAPES
    chain: int = 1 << 28


QUICK = Plan(repeats=3, rounds=0, shapes=SHAPES[:2])


@dataclass(frozen=True)
class Case:
    """FFNs of one kind, such as those of a model's layers."""

    layers: Sequence[FFNs]
    dtype: mx.Dtype
    timed: bool

    @property
    def hidden(self) -> int:
        """Values in and out, 0 if the form of both modules is unknown."""
        return next((found.down.weight.shape[0] for _, found in self._forms() if found), 0)

    @property
    def shape(self) -> str:
        """Values in and out and inner widths, such as ``576/1536/96``; the class of a module of unknown form."""
        forms = self._forms()
        widths = [found.up.weight.shape[0] if found else type(module).__name__ for module, found in forms]
        return "/".join(map(str, (*([self.hidden] if self.hidden else []), *widths)))

    @property
    def weights(self) -> str:
        """How big and small are stored: ``float``, ``4-bit``, or ``4-bit/float``; with a form that is not SwiGLU."""
        stored = []
        for _, found in self._forms():
            if found is None:
                stored.append("unknown")
                continue
            bits = f"{found.down.bits}-bit" if "scales" in found.down else "float"
            stored.append(bits if str(found) == "gated silu" else f"{bits} {found}")
        return "/".join(dict.fromkeys(stored))

    def _forms(self) -> list[tuple[nn.Module, Form | None]]:
        return [(module, form(module)) for module in (self.layers[0].big, self.layers[0].small)]


@dataclass(frozen=True)
class Check:
    """One variant's outcome. ``times`` are by route, in units of ``planned``'s time for big; empty if not timed."""

    what: str  # strategy, or "router"
    weights: str
    dtype: str
    shape: str
    rows: int
    refused: str = ""
    failed: str = ""
    times: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(
            filter(None, (self.what, self.weights, self.dtype, self.shape, f"{self.rows} row{'s' * (self.rows > 1)}"))
        )


def made(plan: Plan) -> Iterator[tuple[Case, int]]:
    """Cases with random weights, one at a time, and how many there are."""
    kinds = [
        (shape, bits, dtype)
        for shape in plan.shapes
        for bits in BITS
        for dtype in fused.DTYPES
        if shape.group or not bits
    ]
    for shape, bits, dtype in kinds:
        first = make(shape, bits, dtype)
        timed = bool(plan.rounds) and shape.timed
        more = range(1, max(1, -(-plan.chain // nbytes(first.big)))) if timed else ()
        yield Case([first, *(make(shape, bits, dtype, seed) for seed in more)], dtype, timed), len(kinds)


def make(shape: Shape, bits: int, dtype: mx.Dtype, seed: int = 0) -> DuoFFN:
    """FFNs with random weights."""

    def gated(hidden: int, inner: int) -> nn.Module:
        return GatedFFN(hidden, inner, bias=shape.biases)

    make_ffn = OF.get(shape.of, gated)
    big, small = (make_ffn(shape.hidden, inner) if inner else None for inner in (shape.big, shape.small))
    assert big is not None, "a layer has a big FFN"
    ffns = DuoFFN(big, small, None, 0)
    keys = iter(mx.random.split(mx.random.key(seed), 20))

    def draw(value: mx.array) -> mx.array:
        bound = value.shape[-1] ** -0.5
        return mx.random.uniform(-bound, bound, value.shape, dtype, key=next(keys))

    ffns.update(tree_map(draw, ffns.parameters()))
    if bits:
        nn.quantize(ffns, shape.group, bits)
    mx.eval(ffns.parameters())
    return ffns


def of_model(model: Model) -> Iterator[tuple[Case, int]]:
    """A model's layers by kind, and how many kinds there are."""
    dtype = model.dtype
    kinds: dict[str, list[FFNs]] = {}
    for ffn in model.ffns:
        kind = fused.refusal(ffn, 1, dtype) or selfcheck.name("fused", ffn, 1, dtype)
        kinds.setdefault(kind, []).append(ffn)
    for layers in kinds.values():
        yield Case(layers, dtype, True), len(kinds)


def check_ffns(case: Case, rows: int, plan: Plan, kept: dict[str, Verdict], clock: Clock) -> list[Check]:
    """Each strategy on ``rows`` tokens; verdicts on those that are not refused are added to ``kept``."""
    ffns, checks = case.layers[0], {}
    refusals = {"fused": fused.refusal(ffns, rows, case.dtype), "masked": masked.refusal(ffns, case.dtype)}
    for strategy, refused in refusals.items():
        check = Check(strategy, case.weights, name(case.dtype), case.shape, rows, refused or "")
        if not refused:
            key = selfcheck.name(strategy, ffns, rows, case.dtype)
            failed = _tried(kept, key, selfcheck.check, strategy, ffns, rows, case.dtype, plan.repeats)
            check = replace(check, failed=failed)
        checks[strategy] = check
    passed = [strategy for strategy, check in checks.items() if not (check.refused or check.failed)]
    if plan.rounds and case.timed and passed:
        try:
            times = _times(case, rows, passed, plan.rounds, clock)
        except Exception as error:  # noqa: BLE001  (what Metal says is for the report)
            times, said = {}, f"cannot be timed: {selfcheck.one_line(error)}"
            checks |= {strategy: replace(checks[strategy], failed=said) for strategy in passed}
        for strategy, by_route in times.items():
            checks[strategy] = replace(checks[strategy], times=by_route)
            key = selfcheck.name(strategy, ffns, rows, case.dtype)
            kept[key] = replace(kept[key], slowdown=by_route["big"])
    return list(checks.values())


def _times(case: Case, rows: int, strategies: Sequence[str], rounds: int, clock: Clock) -> dict[str, dict[str, float]]:
    """By strategy and route, the time of a case's layers one after another over `planned`'s with big."""
    x = mx.random.normal((1, rows, case.hidden), key=mx.random.key(0)).astype(case.dtype)

    def chain(step: Callable[[FFNs, mx.array], mx.array]) -> Callable[[], None]:
        def run() -> None:
            h = x
            for ffns in case.layers:
                h = step(ffns, h)
            mx.eval(h)

        return run

    def routed(strategy: str, route: Route) -> Callable[[], None]:
        routes, run = mx.full((1, rows), int(route), mx.uint32), selfcheck.STRATEGIES[strategy]
        return chain(lambda ffns, h: h + run(ffns, h, routes))

    calls = {"planned": chain(lambda ffns, h: h + ffns.big(h))}
    calls |= {f"{strategy} {route.name}": routed(strategy, route) for strategy in strategies for route in Route}
    timings = interleave(calls, rounds, clock=clock)

    def ratio(strategy: str, route: Route) -> float:
        return statistics.median(timings.ratios(f"{strategy} {route.name}", {"planned": 1}))

    return {name: {route.name.lower(): ratio(name, route) for route in reversed(Route)} for name in strategies}


def made_routers(plan: Plan) -> list[tuple[int, int, mx.Dtype]]:
    hidden = dict.fromkeys(shape.hidden for shape in plan.shapes)
    return [(size, choices, dtype) for size in hidden for choices in ROUTER_CHOICES for dtype in fused.DTYPES]


def routers(model: Model) -> list[tuple[int, int, mx.Dtype]]:
    choices = len(model.config.router_choices)
    return [(model.config.hidden_size, choices, model.dtype)] if choices else []


def check_routers(kinds: Sequence[tuple[int, int, mx.Dtype]], plan: Plan, kept: dict[str, Verdict]) -> list[Check]:
    """The kernel of a router by hidden size, number of choices and dtype."""
    checks = []
    for hidden, choices, dtype in kinds:
        for rows in ROWS:
            refused, failed = fused.router_refusal(hidden, choices, rows, dtype), ""
            if not refused:
                key = selfcheck.router_name(hidden, choices, rows, dtype)
                failed = _tried(kept, key, selfcheck.check_router, hidden, choices, rows, dtype, plan.repeats)
            checks.append(Check("router", "", name(dtype), f"{hidden} to {choices}", rows, refused or "", failed))
    return checks


def _tried(kept: dict[str, Verdict], key: str, check: Callable[..., Verdict], *arguments: Any) -> str:
    """Why a check failed, "" if it passed; its verdict is kept unless it was MLX's own modules that could not run."""
    try:
        kept[key] = check(*arguments)
    except (RuntimeError, ValueError) as error:
        return f"MLX's own modules cannot run: {selfcheck.one_line(error)}"
    return kept[key].reason


def name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
