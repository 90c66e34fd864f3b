"""What runs only on Metal is checked on the machine at hand before it is used.

Nobody has run the kernels on a Mac before they reach the user's. So the first time that a strategy could run there, it
is compared with the two FFNs' own modules on the very shapes and formats in question: the numbers under every route,
outputs that start as NaN, and repeats that must agree bit for bit. What fails is not used.
"""

import warnings
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from duo_mlx import masked
from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFNs
from duo_mlx.forms import Form, form, unknown
from duo_mlx.kernels import fused, launch
from duo_mlx.kernels.verdicts import Verdict, record
from duo_mlx.routes import Route

REPEATS = 3  # at first use; the doctor repeats more often
TOLERANCE = {mx.float32: 1e-4, mx.float16: 5e-3, mx.bfloat16: 4e-2}  # of the largest value of a row

Strategy = Callable[[FFNs, mx.array, mx.array], mx.array]
STRATEGIES: dict[str, Strategy] = {"fused": fused.ffn, "masked": masked.run}


def verdict(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype) -> Verdict:
    """What the self-check says of a strategy for such FFNs on this machine; it is made where it never was."""
    key = name(strategy, ffns, rows, dtype)
    return _known(key, f"strategy {strategy!r}", lambda: check(strategy, ffns, rows, dtype))


def router_verdict(hidden: int, choices: int, rows: int, dtype: mx.Dtype) -> Verdict:
    """The same of the kernel that decides among ``choices`` routes from ``hidden`` values."""
    key = router_name(hidden, choices, rows, dtype)
    return _known(key, "the router's kernel", lambda: check_router(hidden, choices, rows, dtype))


def name(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype) -> str:
    """The key of a verdict: strategy, variant of the kernels, activations, and shape.

    Raises:
        DuoError: the form of a module is unknown.
    """
    big, small = _form(ffns.big), _form(ffns.small)
    if strategy == "fused":
        variant = fused.signature(ffns, rows, dtype)
    else:
        second = "small is big" if ffns.small is ffns.big else f"small {small}"
        variant = f"{_name(dtype)} rows{_bucket(rows)} big {big} {second}"
    return f"{strategy} {variant} {big.down.weight.shape} {small.down.weight.shape}"


def _form(module: nn.Module) -> Form:
    found = form(module)
    if found is None:
        raise DuoError(unknown(module))
    return found


def router_name(hidden: int, choices: int, rows: int, dtype: mx.Dtype) -> str:
    """The key of a router's verdict."""
    return f"router {_name(dtype)} rows{_bucket(rows)} choices{choices} {hidden}"


def routes(rows: int) -> list[mx.array]:
    """The routes to check, ``[1, rows]`` each: all alike, and every mixture of neighbours."""
    alike = [[route] * rows for route in Route]
    mixed = [[Route((first + row) % len(Route)) for row in range(rows)] for first in range(len(Route))]
    return [mx.array([list(map(int, each))], mx.uint32) for each in (alike + mixed if rows > 1 else alike)]


def expected(ffns: FFNs, x: mx.array, route: mx.array) -> mx.array:
    """What the modules themselves give under these routes, one token at a time, in float32.

    Products of several rows may take another way, such as TF32 on Apple GPUs that have it, and be less exact than what
    is to be checked.
    """
    tokens = [x[:, token : token + 1] for token in range(x.shape[1])]
    big, small = (mx.concatenate([module(token) for token in tokens], axis=1) for module in (ffns.big, ffns.small))
    column = route[..., None]
    return mx.where(column == Route.BIG, big, mx.where(column == Route.SMALL, small, 0)).astype(mx.float32)


def check(strategy: str, ffns: FFNs, rows: int, dtype: mx.Dtype, repeats: int = REPEATS) -> Verdict:
    """Compare a strategy with the modules; whatever goes wrong with it, compilation too, is a verdict and no exception.

    Raises:
        RuntimeError, ValueError: the modules cannot run: their weights cannot be read, or `mx.compile` traces them.
    """
    for route in routes(rows):
        if fault := _fault_under(route, STRATEGIES[strategy], ffns, dtype, repeats):
            return Verdict(False, f"{fault} (routes {route.flatten().tolist()})")
    return Verdict(True)


def check_router(hidden: int, choices: int, rows: int, dtype: mx.Dtype, repeats: int = REPEATS) -> Verdict:
    """Compare the kernel of router and argmax with MLX's own; a route whose logit nearly ties may be taken."""
    keys = mx.random.split(mx.random.key(0), 3)
    x = mx.random.normal((1, rows, hidden), key=keys[0]).astype(dtype)
    weight = (mx.random.normal((choices, hidden), key=keys[1]) / hidden**0.5).astype(dtype)
    offsets = mx.random.normal((choices,), key=keys[2]) / 5
    named = tuple(Route)[-choices:]
    logits = (x.astype(mx.float32)[..., None, :] * weight.astype(mx.float32)).sum(axis=-1) + offsets
    mx.eval(x, logits)

    def judge(found: list[mx.array]) -> str | None:
        taken = found[0][..., None] == mx.array(named)
        if not (taken.sum(axis=-1) == 1).all().item():
            return f"a route is none of {[int(route) for route in named]}"
        short = (logits.max(axis=-1) - mx.where(taken, logits, 0).sum(axis=-1)).max()
        if (short > TOLERANCE[dtype] * mx.abs(logits).max()).item():
            return f"a route's logit is {short.item():.2g} below the largest"
        return None

    fault = _fault(lambda: [fused.decide(x, weight, offsets, named)], judge, repeats)
    return Verdict(fault is None, fault or "")


def _known(key: str, what: str, check: Callable[[], Verdict]) -> Verdict:
    """The verdict in the record, where `check` adds one that is not there; a failure is said each time."""
    known = record()
    found = known.verdicts.get(key)
    if found is None:
        try:
            found = check()
        except (RuntimeError, ValueError) as error:
            found = Verdict(False, f"it cannot be made now: {one_line(error)}")
        else:
            known.store({key: found})
    if not found.passed:  # Python shows the same warning once a process
        message = f"{what} failed its self-check on this machine and is not used: {found.reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return found


def _fault_under(route: mx.array, strategy: Strategy, ffns: FFNs, dtype: mx.Dtype, repeats: int) -> str | None:
    """What is wrong with a strategy under these routes."""
    shape = (*route.shape, _form(ffns.big).down.weight.shape[0])
    x = mx.random.normal(shape, key=mx.random.key(0)).astype(dtype)
    wanted = expected(ffns, x, route)
    mx.eval(x, wanted)  # here, where an error is not the strategy's
    return _fault(
        lambda: [strategy(ffns, x, route)],
        lambda found: _difference(found[0], wanted, TOLERANCE[dtype]),
        repeats,
    )


def _fault(
    run: Callable[[], list[mx.array]], judge: Callable[[list[mx.array]], str | None], repeats: int
) -> str | None:
    """What is wrong with a run's outputs by ``judge``, or as they are not the same again; None if nothing is."""
    try:
        with launch.prefilled_with_nan():
            first = run()
            mx.eval(first)
        if said := judge(first):
            return said
        for _ in range(repeats):
            same = [mx.array_equal(*pair, equal_nan=True) for pair in zip(run(), first, strict=True)]
            if not all(each.item() for each in same):
                return "repeats do not agree"
    except Exception as error:  # noqa: BLE001  (MLX raises what Metal's compiler says, and more)
        return one_line(error)
    return None


def _difference(found: mx.array, wanted: mx.array, tolerance: float) -> str | None:
    """How ``found [1, rows, hidden]`` differs from finite numbers that are wanted, if by more than a share of the
    largest in its row.
    """
    usual = mx.isfinite(wanted)
    if (usual & mx.isnan(found)).any().item():
        return "an output was not written"
    zero = mx.zeros(())
    scale = mx.abs(mx.where(usual, wanted, zero)).max(axis=-1)
    error = mx.abs(mx.where(usual, found.astype(mx.float32) - wanted, zero)).max(axis=-1)
    over = error - tolerance * scale
    if (over <= 0).all().item():
        return None
    row = mx.argmax(over).item()
    return f"differs from the modules by {error[0, row].item():.2g} of {scale[0, row].item():.2g}"


def _bucket(rows: int) -> int:
    """The number of rows that kernels are compiled for."""
    return next((bucket for bucket in fused.COLUMNS if rows <= bucket), rows)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def one_line(error: Exception) -> str:
    """What an exception says."""
    return " ".join(str(error).split())[:300] or type(error).__name__
