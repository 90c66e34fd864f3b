"""The fused kernels as a layer calls them: which FFNs they take, and the launches for one layer.

A layer is three dispatches: `decide` (router and argmax) and two for `ffn` (gate, up and activation; then down). Rows
that skip read no weights. Rows of a batch that share a module read its weights once.
"""

from functools import cache
from math import prod
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from duo_mlx.errors import DuoError
from duo_mlx.ffn import FFNs
from duo_mlx.forms import ACTIVATIONS, Form, Gated, form, unknown
from duo_mlx.kernels import launch
from duo_mlx.kernels.launch import Launch
from duo_mlx.routes import FEW

ROWS = FEW  # tokens of one launch at most
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
BITS = (4, 8)
GROUPS = (32, 64, 128)
CHOICES = 3  # a router names a route at most once
LANES = 32  # of a simdgroup
SIMDGROUPS = 2  # of a threadgroup that multiplies, as in common.metal
MOST_SIMDGROUPS = 16  # of a threadgroup that routes: half of what Metal allows, to leave registers
# By the number of rows rounded up: the columns of one simdgroup. Each row has a sum for each of them in registers.
COLUMNS = {1: 4, 2: 4, 4: 4, 8: 2}


class Format(NamedTuple):
    """How a linear map is stored: ``bits`` 0 is plain floats."""

    bits: int
    group: int
    bias: bool

    def __str__(self) -> str:
        return (f"q{self.bits}g{self.group}" if self.bits else "float") + ("+bias" if self.bias else "")


class Module(NamedTuple):
    """The form, formats and sizes of one module; gate and up share a format."""

    form: Form
    up: Format
    down: Format
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.form} {self.up}/{self.down}"


def refusal(ffns: FFNs, rows: int, dtype: mx.Dtype) -> str | None:
    """Why the kernels cannot run these FFNs on ``rows`` tokens of ``dtype``, in one line; None if they can."""
    try:
        _modules(ffns, rows, dtype)
    except DuoError as error:
        return str(error)
    return None


def router_refusal(hidden: int, choices: int, rows: int, dtype: mx.Dtype) -> str | None:
    """Why `decide` cannot take such input, in one line; None if it can."""
    try:
        _check(rows, dtype)
    except DuoError as error:
        return str(error)
    if not 1 <= choices <= CHOICES:
        return f"the kernel chooses among 1 to {CHOICES} routes, not {choices}"
    return None if hidden > 0 else "a hidden state has at least one value"


def signature(ffns: FFNs, rows: int, dtype: mx.Dtype) -> str:
    """The variant of the kernels that these FFNs take, in a short stable form.

    Raises:
        DuoError: they are refused.
    """
    big, small = _modules(ffns, rows, dtype)
    second = "small is big" if small is big else f"small {small}"
    return f"{_name(dtype)} rows{_bucket(rows)} big {big} {second}"


def ffn(ffns: FFNs, x: mx.array, route: mx.array) -> mx.array:
    """Return the outputs of the FFNs that ``route [...]`` names; zeros for tokens that skip.

    Args:
        ffns: the layer's two modules.
        x: their normalised input, ``[..., hidden]``, and so is what is returned.
        route: 0 skip, 1 small, 2 big, of any integer type.

    Raises:
        DuoError: the FFNs or the input are refused; nothing was launched.
    """
    big, small = _modules(ffns, route.size, x.dtype)
    if x.shape != (*route.shape, big.hidden):
        raise DuoError(f"x {x.shape} and route {route.shape} are not for {big.hidden} values")
    rows, route = (route.size, big.hidden), route.reshape(route.size).astype(mx.uint32)
    (inner,) = launch.execute(up(big, small, x.reshape(rows), route))
    (out,) = launch.execute(down(big, small, inner, route))
    return out.reshape(x.shape)


def decide(x: mx.array, weight: mx.array, offsets: mx.array, choices: tuple[int, ...]) -> mx.array:
    """Return the routes ``[...]``: of ``choices`` the one with the largest logit.

    Args:
        x: the router's input, ``[..., hidden]``, normalised.
        weight: the router's, ``[choices, hidden]``.
        offsets: added to the logits, ``[choices]``.
        choices: the route of each row of ``weight``.

    Raises:
        DuoError: the input is refused; nothing was launched.
    """
    hidden, rows = x.shape[-1], prod(x.shape[:-1])
    if reason := router_refusal(hidden, len(choices), rows, x.dtype):
        raise DuoError(reason)
    if (weight.shape, offsets.shape) != ((len(choices), hidden), (len(choices),)):
        raise DuoError(f"the router's weight {weight.shape} and offsets {offsets.shape} are not for {hidden} values")
    (route,) = launch.execute(router(x.reshape(rows, hidden), weight, offsets, choices))
    return route.reshape(x.shape[:-1])


def launches(ffns: FFNs, rows: int, dtype: mx.Dtype) -> list[Launch]:
    """What `ffn` launches for these FFNs, on zeros: their source can be seen or compiled ahead.

    Raises:
        DuoError: the FFNs are refused.
    """
    big, small = _modules(ffns, rows, dtype)
    x, inner = (mx.zeros((rows, width), dtype) for width in (big.hidden, big.width))
    route = mx.zeros(rows, mx.uint32)
    return [up(big, small, x, route), down(big, small, inner, route)]


def router(x: mx.array, weight: mx.array, offsets: mx.array, choices: tuple[int, ...]) -> Launch:
    """The launch of route.metal on ``x [rows, hidden]``: one threadgroup a row."""
    rows, hidden = x.shape
    groups = min(-(-hidden // (4 * LANES)), MOST_SIMDGROUPS)  # four values a lane, or more
    return Launch(
        kernel="route",
        inputs=(
            ("x", x),
            ("weight", weight),
            ("offsets", offsets.astype(mx.float32)),
            ("choices", _constant(choices, mx.uint32)),
        ),
        template=(("GROUPS", groups), ("CHOICES", len(choices))),
        grid=(rows * groups * LANES, 1, 1),
        threadgroup=(groups * LANES, 1, 1),
        outputs=(("route", (rows,), mx.uint32),),
    )


def up(big: Module, small: Module, x: mx.array, route: mx.array) -> Launch:
    """The launch of up.metal on ``x [rows, hidden]``; its grid is for big: only the device knows the routes."""
    rows = len(x)
    names = ("BIG_ACTIVATION", "BIG_GATED", "SMALL_ACTIVATION", "SMALL_GATED")
    forms = (
        part
        for module in (big, small)
        for part in (_activation(module.form.activation), isinstance(module.form, Gated))
    )
    return Launch(
        kernel="up",
        inputs=(
            ("x", x),
            ("route", route),
            *_weights("big_gate", big.form.gate if isinstance(big.form, Gated) else None, x.dtype),
            *_weights("big_up", big.form.up, x.dtype),
            *_weights("small_gate", small.form.gate if isinstance(small.form, Gated) else None, x.dtype),
            *_weights("small_up", small.form.up, x.dtype),
        ),
        template=(*_template(small is big, big.up, small.up, rows, x.dtype), *zip(names, forms, strict=True)),
        **_threads(big.width, rows),
        outputs=(("inner", (rows, big.width), x.dtype),),
    )


def down(big: Module, small: Module, inner: mx.array, route: mx.array) -> Launch:
    """The launch of down.metal on ``inner [rows, width]``."""
    rows = len(inner)
    return Launch(
        kernel="down",
        inputs=(
            ("inner", inner),
            ("route", route),
            *_weights("big_down", big.form.down, inner.dtype),
            *_weights("small_down", small.form.down, inner.dtype),
        ),
        template=_template(small is big, big.down, small.down, rows, inner.dtype),
        **_threads(big.hidden, rows),
        outputs=(("out", (rows, big.hidden), inner.dtype),),
    )


@cache
def _activation(name: str) -> int:
    """An activation's number in up.metal."""
    return list(ACTIVATIONS).index(name)


def _bucket(rows: int) -> int:
    """The number of rows that a kernel is compiled for."""
    return 1 << (rows - 1).bit_length()


def _threads(outputs: int, rows: int) -> dict[str, tuple[int, int, int]]:
    threads = SIMDGROUPS * LANES
    groups = -(-outputs // (SIMDGROUPS * COLUMNS[_bucket(rows)]))
    return {"grid": (groups * threads, 1, 1), "threadgroup": (threads, 1, 1)}


def _template(
    shared: bool, big: Format, small: Format, rows: int, dtype: mx.Dtype
) -> tuple[tuple[str, mx.Dtype | int | bool], ...]:
    bucket = _bucket(rows)
    return (
        ("T", dtype),
        ("ROWS", bucket),
        ("COLUMNS", COLUMNS[bucket]),
        ("SHARED", shared),
        ("BIG_BITS", big.bits),
        ("BIG_GROUP", big.group),
        ("BIG_BIAS", big.bias),
        ("SMALL_BITS", small.bits),
        ("SMALL_GROUP", small.group),
        ("SMALL_BIAS", small.bias),
    )


def _weights(name: str, linear: nn.Module | None, dtype: mx.Dtype) -> tuple[tuple[str, mx.array], ...]:
    """A linear map's arrays under the names of the kernels; what its format lacks is one value that nobody reads."""
    nothing = _constant((0,), dtype)
    stored: dict[str, mx.array] = linear or {}
    return (
        (name, stored.get("weight", nothing)),
        (f"{name}_scales", stored.get("scales", nothing)),
        (f"{name}_biases", stored.get("biases", nothing)),
        (f"{name}_bias", stored.get("bias", nothing)),
    )


@cache
def _constant(values: tuple[float, ...], dtype: mx.Dtype) -> mx.array:
    return mx.array(values, dtype)


def _modules(ffns: FFNs, rows: int, dtype: mx.Dtype) -> tuple[Module, Module]:
    """Formats and sizes of big and small, or `DuoError` with the reason why the kernels cannot run them."""
    _check(rows, dtype)
    big = _module("big", ffns.big, dtype)
    small = big if ffns.small is ffns.big else _module("small", ffns.small, dtype)
    if small.hidden != big.hidden:
        raise DuoError(f"small is for {small.hidden} hidden values and big for {big.hidden}")
    if small.width > big.width:
        raise DuoError(f"small is {small.width} wide and big only {big.width}; the kernels are launched for big")
    return big, small


def _check(rows: int, dtype: mx.Dtype) -> None:
    if dtype not in DTYPES:
        raise DuoError(f"the kernels take {', '.join(map(_name, DTYPES))}, not {_name(dtype)}")
    if not 1 <= rows <= ROWS:
        raise DuoError(f"the kernels take 1 to {ROWS} tokens, not {rows}")


def _module(name: str, ffn: nn.Module, dtype: mx.Dtype) -> Module:
    found = form(ffn)
    if found is None:
        raise DuoError(f"{name}: {unknown(ffn)}")
    up, width, hidden = _linear(f"{name}.up", found.up, dtype)
    down, *down_shape = _linear(f"{name}.down", found.down, dtype)
    shapes = [down_shape]
    if isinstance(found, Gated):
        gate, *gate_shape = _linear(f"{name}.gate", found.gate, dtype)
        if gate != up:
            raise DuoError(f"{name}.gate and {name}.up are stored differently ({gate}, {up})")
        shapes.append(gate_shape[::-1])
    if any(shape != [hidden, width] for shape in shapes):
        raise DuoError(f"the shapes of {name}'s projections do not fit together")
    return Module(found, up, down, width, hidden)


def _linear(name: str, linear: nn.Module, dtype: mx.Dtype) -> tuple[Format, int, int]:
    """Format, outputs and inputs of a linear map."""
    if type(linear) not in (nn.Linear, nn.QuantizedLinear):
        raise DuoError(f"{name} is of type {type(linear).__name__}; the kernels take Linear and QuantizedLinear")
    weight, bias = linear["weight"], linear.get("bias")
    outputs, inputs = weight.shape
    form = Format(0, 0, bias is not None)
    floats = [weight]
    if type(linear) is nn.QuantizedLinear:
        form = _quantised(name, linear, bias is not None)
        inputs = inputs * 32 // form.bits
        floats = [linear["scales"], linear["biases"]]
        if any(part.shape != (outputs, inputs // form.group) for part in floats):
            raise DuoError(f"{name}'s scales and biases are not one for each group of {form.group} weights")
    for part in floats if bias is None else [*floats, bias]:
        if part.dtype != dtype:
            raise DuoError(f"{name} is stored in {_name(part.dtype)} and the activations are {_name(dtype)}")
    return form, outputs, inputs


def _quantised(name: str, linear: nn.QuantizedLinear, bias: bool) -> Format:
    if linear.mode != "affine":
        raise DuoError(f"{name} is quantised in mode {linear.mode!r}; the kernels take 'affine'")
    if linear.bits not in BITS:
        raise DuoError(f"{name} has {linear.bits}-bit weights; the kernels take {BITS[0]} and {BITS[1]} bits")
    if linear.group_size not in GROUPS:
        raise DuoError(f"{name} has groups of {linear.group_size}; the kernels take {', '.join(map(str, GROUPS))}")
    return Format(linear.bits, linear.group_size, bias)


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
