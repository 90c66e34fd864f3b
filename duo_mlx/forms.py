"""Forms of FFNs: which linear maps a module has, what each of them is for, and the activation between them.

`form` finds this out by a trial, because a module's names tell neither its activation nor what its code does. The trial
gives a copy of the module tiny linear maps and compares its outputs with those of each candidate. It never reads the
module's own weights.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import permutations
from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu_tanh": nn.gelu_approx,
    "gelu": nn.gelu,
    "gelu_fast": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
}
LINEAR = (nn.Linear, nn.QuantizedLinear)

WIDTH = 8  # of a trial's linear maps, and how many inputs it has of each scale
SCALES = (0.3, 1, 3, 10, 100, 1000)  # large inputs show limits, such as those of a clipped SwiGLU
TOLERANCE = 1e-5  # of the largest output of an input, in float32


class Gated(NamedTuple):
    """``down(activation(gate(x)) * up(x))``."""

    gate: nn.Module
    up: nn.Module
    down: nn.Module
    activation: str

    def __str__(self) -> str:
        return f"gated {self.activation}"


class TwoMatrices(NamedTuple):
    """``down(activation(up(x)))``."""

    up: nn.Module
    down: nn.Module
    activation: str

    def __str__(self) -> str:
        return f"plain {self.activation}"


Form: TypeAlias = Gated | TwoMatrices


def form(module: nn.Module) -> Form | None:
    """Return the form of an FFN with its own linear maps, or None if it is neither `Gated` nor `TwoMatrices`.

    The trial is made once for each class and configuration.
    """
    kind = _kind(module)
    if kind is None:
        return None
    *gate, up, down = (module[name] for name in kind.names)
    return Gated(gate[0], up, down, kind.activation) if gate else TwoMatrices(up, down, kind.activation)


def unknown(module: nn.Module) -> str:
    """Return the reason why `form` is None for a module, in one line."""
    others = [
        f"its {name} is of type {type(part).__name__}"
        for name, part in module.items()
        if isinstance(part, nn.Module) and type(part) not in LINEAR
    ]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return "; ".join([f"{kind} is not known as a gated FFN or one of two linear maps", *others])


def names(module: nn.Module) -> tuple[str, ...] | None:
    """Return the names of an FFN's linear maps, that of the down projection last; None where `form` is None."""
    kind = _kind(module)
    return None if kind is None else kind.names


class _Kind(NamedTuple):
    """What a trial found: the names of the linear maps in the order of the form's fields."""

    names: tuple[str, ...]
    activation: str


_kinds: dict[Hashable, _Kind | None] = {}


def _kind(module: nn.Module) -> _Kind | None:
    key = _key(module)
    if key not in _kinds:
        _kinds[key] = _trial(module)
    return _kinds[key]


class _Same:
    """A key that stands for one object, and keeps it."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _key(module: nn.Module) -> Hashable:
    """Everything that what a module's code does may depend on, but for its arrays."""
    own = tuple((name, _token(value)) for name, value in vars(module).items() if name != "_no_grad")
    return type(module), own, tuple((name, _part(value)) for name, value in module.items())


def _token(value: object) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


def _part(value: object) -> Hashable:
    if isinstance(value, nn.Module) and type(value) not in LINEAR:
        return _key(value)
    return type(value).__qualname__


class _Map(nn.Linear):
    """A linear map in plain float32.

    `nn.Linear` would draw weights, which changes what is drawn after it, and GPUs may multiply in less than float32.
    """

    def __init__(self, weight: mx.array):
        nn.Module.__init__(self)
        self.weight = weight

    def __call__(self, x: mx.array) -> mx.array:
        return (x[..., None, :] * self.weight).sum(axis=-1)


def _trial(module: nn.Module) -> _Kind | None:
    public = {name: part for name, part in module.items() if not name.startswith("_")}
    linears = [name for name, part in public.items() if type(part) in LINEAR]
    others = [part for name, part in public.items() if name not in linears]
    if len(linears) not in (2, 3) or not all(isinstance(part, nn.Module) and not part.parameters() for part in others):
        return None
    random = np.random.default_rng(0)
    drawn = random.standard_normal((len(linears), WIDTH, WIDTH)).astype(np.float32)
    inputs = np.concatenate([random.standard_normal((WIDTH, WIDTH)) * scale for scale in SCALES]).astype(np.float32)
    maps = [_Map(mx.array(weight)) for weight in drawn]
    x = mx.array(inputs)[None]
    out = _outputs(module, dict(zip(linears, maps, strict=True)), x)
    if out is None:
        return None
    for order in permutations(range(len(linears))):
        ordered = [maps[index] for index in order]
        for activation in ACTIVATIONS:
            if _agree(out, _candidate(ordered, activation, x)):
                return _Kind(tuple(linears[index] for index in order), activation)
    return None


def _outputs(module: nn.Module, maps: dict[str, _Map], x: mx.array) -> mx.array | None:
    """What a copy of a module with other linear maps gives; None if it fails, for which its code may have any reason.

    Private parts are hidden from the copy: they may hold the module's own weights.
    """
    copy = type(module).__new__(type(module))
    vars(copy).update(vars(module))
    for name, part in module.items():
        if name.startswith("_"):
            vars(copy)[name] = None
        else:
            copy[name] = maps.get(name, part)
    try:
        out = copy(x)
        mx.eval(out)
    except Exception:  # noqa: BLE001
        return None
    return out if isinstance(out, mx.array) and out.shape == x.shape else None


def _candidate(maps: Sequence[Any], activation: str, x: mx.array) -> mx.array:
    *gate, up, down = maps
    act = ACTIVATIONS[activation]
    out: mx.array = down(act(gate[0](x)) * up(x) if gate else act(up(x)))
    return out


def _agree(out: mx.array, wanted: mx.array) -> bool:
    size = mx.abs(wanted).max(axis=-1)
    return bool((mx.abs(out - wanted).max(axis=-1) <= TOLERANCE * size).all().item())
