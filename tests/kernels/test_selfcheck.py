"""The self-check: it passes what is right, names what is wrong, and what it found is asked for once."""

import warnings
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from duo_mlx.kernels import fused, launch, selfcheck, verdicts
from duo_mlx.kernels.verdicts import Verdict
from duo_mlx.routes import Route

FLOAT = (27, (45, "float", "float+bias"), (11, "float+bias", "float"))
QUANTISED = (64, (96, "q4g32", "q4g32"), (32, "q8g32", "float+bias"))
GELU = (27, (45, "float", "float", "gated gelu_tanh"), (11, "float+bias", "float", "gated gelu"))
PLAIN = (64, (96, "q4g32+bias", "q4g32+bias", "plain relu2"), (32, "float", "float", "gated relu2"))
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv(verdicts.CACHE, str(tmp_path))
    verdicts.record.cache_clear()
    yield
    verdicts.record.cache_clear()


def right(ffns, x, route):
    """What a strategy must give, by the modules on all rows at once."""
    column = route[..., None]
    return mx.where(column == 2, ffns.big(x), mx.where(column == 1, ffns.small(x), mx.zeros((), x.dtype)))


@pytest.fixture
def strategy(monkeypatch):
    """``strategy(run)``: puts ``run(ffns, x, route)`` in the place of the kernels and returns its calls."""

    def replace(run):
        calls = []

        def counted(*arguments):
            calls.append(arguments)
            return run(*arguments)

        monkeypatch.setitem(selfcheck.STRATEGIES, "fused", counted)
        return calls

    return replace


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", [FLOAT, QUANTISED, GELU, PLAIN], ids=["float", "quantised", "gelu", "plain"])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_what_is_right_passes(ffns_of, strategy, form, rows, dtype):
    calls = strategy(right)
    assert selfcheck.check("fused", ffns_of(*form, dtype), rows, dtype, repeats=2) == Verdict(True)
    assert len(calls) == 3 * (3 if rows == 1 else 6)
    assert {arguments[1].shape[:2] for arguments in calls} == {(1, rows)}


def test_masked_passes_here(ffns_of):
    float_plain = (64, (96, "float+bias", "float+bias", "plain relu2"), (32, "float", "float", "gated relu2"))
    for form in (FLOAT, GELU, float_plain):
        for rows in (1, 5):
            assert selfcheck.check("masked", ffns_of(*form, mx.float32), rows, mx.float32) == Verdict(True)


def test_every_mixture_of_neighbours_is_checked():
    for rows in (1, 2, 3, 8):
        tried = [route.flatten().tolist() for route in selfcheck.routes(rows)]
        assert [[int(route)] * rows for route in Route] == tried[:3]
        pairs = {pair for routes in tried[3:] for pair in pairwise(routes)}
        assert rows == 1 or pairs == {(0, 1), (1, 2), (2, 0)}


def nothing(_, x, __):
    return mx.zeros_like(x)


def small_for_big(ffns, x, route):
    return right(ffns, x, mx.where(route == 2, 1, route))


def the_neighbours_route(ffns, x, route):
    return right(ffns, x, mx.roll(route, 1, axis=-1))


def one_column(ffns, x, route):
    out = right(ffns, x, route)
    return mx.where(mx.arange(out.shape[-1]) == 7, 0, out)


def skips_are_not_zero(ffns, x, route):
    return mx.where(route[..., None] == 0, x, right(ffns, x, route))


def infinite(ffns, x, route):
    out = right(ffns, x, route)
    return mx.where(mx.arange(out.shape[-1]) == 7, float("inf"), out)


WRONG = [nothing, small_for_big, the_neighbours_route, one_column, skips_are_not_zero, infinite]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["usual", "faint"])
def test_wrong_numbers_fail_also_where_the_output_is_faint(ffns_of, strategy, wrong, dtype, scale):
    strategy(wrong)
    ffns = ffns_of(27, (45, "float", "float"), (11, "float", "float"), dtype)
    down = [module.down_proj for module in (ffns.big, ffns.small)]
    kept = [linear.weight for linear in down]
    try:
        for linear in down:
            linear.weight = linear.weight * scale
        found = selfcheck.check("fused", ffns, 3, dtype)
    finally:
        for linear, weight in zip(down, kept, strict=True):
            linear.weight = weight
    assert not found.passed and found.reason.startswith("differs from the modules by ")
    assert found.reason.endswith("])") and "(routes [" in found.reason


def test_an_output_that_is_not_written_fails(ffns_of, strategy):
    def run(ffns, x, route):
        out = right(ffns, x, route)
        assert launch._init_value is None or np.isnan(launch._init_value)
        return out if launch._init_value is None else mx.where(route[..., None] == 0, launch._init_value, out)

    strategy(run)
    found = selfcheck.check("fused", ffns_of(*FLOAT, mx.float32), 1, mx.float32)
    assert found == Verdict(False, "an output was not written (routes [0])")
    assert launch._init_value is None


def test_repeats_must_agree_bit_for_bit(ffns_of, strategy):
    def run(*arguments):
        return right(*arguments) * (1 + 2**-23 * (len(calls) % 6 == 0))

    calls = strategy(run)
    found = selfcheck.check("fused", ffns_of(*FLOAT, mx.float32), 1, mx.float32, repeats=5)
    assert found == Verdict(False, "repeats do not agree (routes [1])")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Unable to build\n  metal library"), "Unable to build metal library"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_exception_is_a_verdict(ffns_of, strategy, error, reason):
    def run(*_):
        raise error

    strategy(run)
    found = selfcheck.check("fused", ffns_of(*FLOAT, mx.float32), 1, mx.float32)
    assert found == Verdict(False, f"{reason} (routes [0])")


def test_weights_that_are_nan_are_no_fault_of_the_kernels(ffns_of, strategy):
    strategy(right)
    for dtype in DTYPES:
        ffns = ffns_of(9, (12, "float", "float"), (4, "float", "float"), dtype)
        kept = ffns.big.down_proj.weight
        row = (mx.arange(9) == 3)[:, None]
        try:
            for broken in (float("nan"), float("inf")):
                ffns.big.down_proj.weight = mx.where(row, broken, kept)
                assert selfcheck.check("fused", ffns, 3, dtype) == Verdict(True)
        finally:
            ffns.big.down_proj.weight = kept


def test_the_check_is_made_once_and_kept(ffns_of, strategy):
    calls = strategy(right)
    ffns = ffns_of(*FLOAT, mx.float32)
    for _ in range(2):
        assert selfcheck.verdict("fused", ffns, 1, mx.float32) == Verdict(True)
    made = len(calls)
    assert made == 3 * (1 + selfcheck.REPEATS)
    verdicts.record.cache_clear()
    assert selfcheck.verdict("fused", ffns, 1, mx.float32).passed and len(calls) == made
    assert selfcheck.verdict("fused", ffns, 4, mx.float32).passed and len(calls) > made
    made = len(calls)
    assert selfcheck.verdict("fused", ffns, 3, mx.float32).passed and len(calls) == made  # the same kernel


def test_a_failure_is_said_by_each_process(ffns_of, strategy):
    strategy(nothing)
    ffns = ffns_of(*FLOAT, mx.float32)
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=r"strategy 'fused' failed its self-check .* differs from the modules"):
            assert not selfcheck.verdict("fused", ffns, 1, mx.float32).passed
        verdicts.record.cache_clear()


def test_verdicts_are_apart(ffns_of):
    hidden, big, small = FLOAT
    half = ffns_of(*FLOAT, mx.float16)
    kinds = [
        (ffns_of(*FLOAT, mx.float32), 1, mx.float32),
        (ffns_of(*FLOAT, mx.float32), 2, mx.float32),
        (half, 1, mx.float16),
        (ffns_of(hidden, big, (12, *small[1:]), mx.float32), 1, mx.float32),
        (ffns_of(28, big, small, mx.float32), 1, mx.float32),
        (ffns_of(hidden, big, None, mx.float32), 1, mx.float32),
        (ffns_of(hidden, big, big, mx.float32), 1, mx.float32),
        (ffns_of(hidden, (*big, "gated gelu_tanh"), small, mx.float32), 1, mx.float32),
        (ffns_of(hidden, (*big, "plain gelu_tanh"), small, mx.float32), 1, mx.float32),
        (ffns_of(hidden, big, (*small, "gated gelu_tanh"), mx.float32), 1, mx.float32),
    ]
    names = {selfcheck.name(strategy, *kind) for strategy in ("fused", "masked") for kind in kinds}
    assert len(names) == 2 * len(kinds)


def test_masked_has_a_name_where_the_kernels_refuse(ffns_of):
    wide = ffns_of(27, (11, "float", "float"), (45, "float", "float"), mx.float32)
    assert "small is 45 wide" in fused.refusal(wide, 1, mx.float32)
    assert selfcheck.verdict("masked", wide, 1, mx.float32).passed
    assert selfcheck.verdict("masked", wide, 11, mx.float32).passed


def test_within_a_transformation_nothing_is_found_out_for_good(ffns_of, strategy):
    """The weights are inputs of the compiled function there, and nobody can look at them."""
    strategy(right)
    ffns = ffns_of(*FLOAT, mx.float32)
    found = []

    def step(x):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(selfcheck.verdict("fused", ffns, 1, mx.float32))
        return ffns.big(x)

    mx.eval(mx.compile(step, inputs=[ffns.big.state])(mx.zeros((1, 1, 27))))
    assert not found[0].passed and found[0].reason.startswith("it cannot be made now: ")
    assert selfcheck.verdict("fused", ffns, 1, mx.float32) == Verdict(True)


@pytest.fixture
def decide(monkeypatch):
    """``decide(change)``: the router's kernel by MLX's own products, whose route is changed."""

    def put(change=lambda route: route):
        def run(x, weight, offsets, choices):
            logits = (x @ weight.T).astype(mx.float32) + offsets
            return change(mx.array(choices, mx.uint32)[mx.argmax(logits, axis=-1)])

        monkeypatch.setattr(fused, "decide", run)

    return put


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "choices", "rows"), [(16, 2, 1), (130, 3, 8), (7, 2, 3)])
def test_a_right_router_passes(decide, hidden, choices, rows, dtype):
    decide()
    assert selfcheck.check_router(hidden, choices, rows, dtype) == Verdict(True)


WRONG_ROUTERS = {
    "a route is none of [1, 2]": mx.zeros_like,
    "a route's logit is": lambda route: 3 - route,
}


@pytest.mark.parametrize("reason", WRONG_ROUTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_router_fails(decide, reason, dtype):
    decide(WRONG_ROUTERS[reason])
    found = selfcheck.check_router(16, 2, 4, dtype)
    assert not found.passed and reason in found.reason


def test_a_routers_verdict_is_kept_too(decide):
    decide(WRONG_ROUTERS["a route's logit is"])
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="the router's kernel failed its self-check"):
            assert not selfcheck.router_verdict(16, 2, 1, mx.float32).passed
        decide()  # not asked again
    assert selfcheck.router_verdict(16, 3, 1, mx.float32).passed


@pytest.mark.parametrize(
    ("form", "dtype", "rows"),
    [(FLOAT, mx.float32, 1), (QUANTISED, mx.bfloat16, 3), (GELU, mx.float32, 2), (PLAIN, mx.float16, 1)],
)
def test_the_kernels_that_ship_pass_in_the_emulator(emulated, ffns_of, form, dtype, rows):
    assert selfcheck.check("fused", ffns_of(*form, dtype), rows, dtype, repeats=1) == Verdict(True)
    assert {run.launch.kernel for run in emulated.runs} == {"up", "down"}
    assert selfcheck.check_router(40, 2, rows, dtype, repeats=1) == Verdict(True)


def test_the_modules_numbers_are_of_one_token_at_a_time(ffns_of):
    ffns, shapes = ffns_of(*FLOAT, mx.float32), []

    class Spy(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def __call__(self, x):
            shapes.append(x.shape)
            return self.module(x)

    spied = type(ffns)(Spy(ffns.big), Spy(ffns.small))
    x = mx.random.normal((1, 3, 27), key=mx.random.key(0))
    out = selfcheck.expected(spied, x, mx.array([[2, 0, 1]]))
    assert set(shapes) == {(1, 1, 27)}
    wanted = [ffns.big(x)[0, 0], mx.zeros(27), ffns.small(x)[0, 2]]
    assert mx.allclose(out[0], mx.stack(wanted), atol=1e-5)
