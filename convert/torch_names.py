"""A Duo's canonical names, which are mlx-lm's, back to the names and layouts that transformers loads.

mlx-lm's `sanitize` turns a checkpoint's tensors into its own: it renames, transposes, splits and stacks them, for each
architecture in another way. What it did is learnt from it: `sanitize` gets tensors whose elements are their own
addresses, and where these come out is what has to be undone.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm import utils as mlx_lm_utils
from numpy.typing import NDArray

from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

BIG = re.compile(r"((?:.*?\.)?\d+\.\w+)\.big\.(.+)")
EXPERTS = re.compile(r"experts\.(gate_up|down)_proj$")  # inputs first, where mlx-lm has outputs first

Shapes = Mapping[str, tuple[int, ...]]
Addresses = dict[str, mx.array]


@dataclass(frozen=True)
class Piece:
    """A canonical tensor, or one row of it, and where in a checkpoint's tensor its elements are."""

    canonical: str
    row: int | None
    shape: tuple[int, ...]  # of the piece
    offset: int
    strides: tuple[int, ...]  # in elements of the checkpoint's tensor


def to_transformers(
    config: Mapping[str, Any], weights: Tensors, base: Callable[[], Any] | None = None
) -> dict[str, Tensor]:
    """Return a Duo's weights under the names of transformers' checkpoints.

    Args:
        config: the Duo's config.json.
        weights: by canonical names, none quantised. Those of small FFNs and routers stay as they are.
        base: makes a model of mlx-lm's form for the base. None: mlx-lm's own.

    Raises:
        DuoError: transformers lacks the base, or what mlx-lm does to its tensors cannot be undone.
    """
    from duo_mlx.convert.torch_reference import TEXT_ONLY, config_type, split

    kind = config_type(config)
    dense, parts = split(weights, bool(config.get("router_choices")))
    dense = {plain(name): tensor for name, tensor in dense.items()}
    if kind in TEXT_ONLY:  # mlx-lm has the hub's names for what it takes
        return dense | parts
    make = base or (lambda: _base({**config, "model_type": kind}))
    found = _undone(kind, dense, checkpoint_shapes(config, dense), make)
    if same := sorted(found.keys() & parts.keys()):
        raise DuoError(f"{same[0]} is a weight of the Duo and of transformers' {kind}; they cannot be in one file")
    return found | parts


def plain(name: str) -> str:
    """Return the base's name of a weight of big; other names as they are."""
    found = BIG.fullmatch(name)
    return f"{found[1]}.{found[2]}" if found else name


def checkpoint_shapes(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors that transformers writes for a base; nothing is allocated.

    Args:
        config: a Duo's config.json.
        names: see `duo_mlx.convert.torch_reference.transformers_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    from duo_mlx.convert.torch_reference import quiet, transformers_config

    with quiet(), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(transformers_config(config, names))
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {name: value for name, value in model.state_dict().items() if name not in tied}
    return {name: tuple(value.shape) for name, value in revert_weight_conversion(model, state).items()}


def _base(config: Mapping[str, Any]) -> Any:
    try:
        model, arguments = mlx_lm_utils._get_classes(dict(config))
        return model(arguments.from_dict(dict(config)))
    except (ValueError, TypeError, KeyError) as error:
        raise DuoError(f"mlx-lm cannot make a {config['model_type']}: {' '.join(str(error).split())}") from error


def _undone(kind: str, dense: Tensors, shapes: Shapes, base: Callable[[], Any]) -> dict[str, Tensor]:
    numbers = dict(enumerate(shapes))
    strangers: list[str] = []
    for write in (_as_written, _without_prefix, _outputs_first):
        given = {name: mx.broadcast_to(mx.array(number, mx.int32), shapes[name]) for number, name in numbers.items()}
        owners = _sanitized(base, write(given))
        if {name: array.shape for name, array in owners.items()} != {name: each.shape for name, each in dense.items()}:
            strangers = strangers or sorted(owners.keys() ^ dense.keys())
            continue
        untouched = {id(array): name for name, array in given.items()}
        places = _sanitized(
            base, write({name: mx.arange(prod(shape), dtype=mx.int32).reshape(shape) for name, shape in shapes.items()})
        )
        pieces: dict[str, list[Piece]] = {name: [] for name in shapes}
        for name in dense:
            if own := untouched.get(id(owners[name])):
                pieces[own].append(Piece(name, None, shapes[own], 0, _in_order(shapes[own])))
            else:
                for number, piece in _pieces(name, owners[name], places[name]):
                    pieces[numbers[number]].append(piece)
        if all(sum(prod(piece.shape) for piece in pieces[name]) == prod(shape) for name, shape in shapes.items()):
            read = lru_cache(maxsize=1)(lambda name: dense[name].load())
            return {name: _assembled(pieces[name], shape, dense, read) for name, shape in shapes.items()}
    more = f": {strangers[0]} is missing or unknown" if strangers else ""
    raise DuoError(f"what mlx-lm does to the weights of a {kind} cannot be undone for transformers{more}")


def _sanitized(base: Callable[[], Any], weights: Addresses) -> Addresses:
    """What mlx-lm makes of a checkpoint; nothing where the names are not those that it knows."""
    model = base()
    try:
        return dict(model.sanitize(dict(weights))) if hasattr(model, "sanitize") else weights
    except (KeyError, IndexError, ValueError):
        return {}


def _in_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor whose elements lie in their order."""
    return tuple(prod(shape[axis + 1 :]) if size > 1 else 0 for axis, size in enumerate(shape))


def _as_written(weights: Addresses) -> Addresses:
    return weights


def _without_prefix(weights: Addresses) -> Addresses:
    """The names of checkpoints that were written without a head, GPT-2's among them."""
    return {name.removeprefix("transformer.").removeprefix("model."): array for name, array in weights.items()}


def _outputs_first(weights: Addresses) -> Addresses:
    """gpt-oss: mlx-lm reads experts as they are published, in MXFP4, whose layout is the transposed one."""
    return {
        f"{name}.weight" if EXPERTS.search(name) else name: array.swapaxes(-1, -2) if EXPERTS.search(name) else array
        for name, array in weights.items()
    }


def _pieces(name: str, owners: mx.array, places: mx.array) -> Iterator[tuple[int, Piece]]:
    """Yield the number of the tensor that each piece comes from, and the piece.

    Raises:
        DuoError: the elements of a piece are not evenly spaced there, or are no addresses any more.
    """
    rows: list[int | None] = [None] if mx.all(owners == _first(owners)).item() else list(range(owners.shape[0]))
    for row in rows:
        owner, place = (owners, places) if row is None else (owners[row], places[row])
        number, offset = (_first(each) for each in (owner, place))
        strides = tuple(
            _first(mx.take(place, 1, axis)) - offset if size > 1 else 0 for axis, size in enumerate(place.shape)
        )
        spaced = mx.array(offset, mx.int32)
        for axis, (size, stride) in enumerate(zip(place.shape, strides, strict=True)):
            shape = [size if each == axis else 1 for each in range(place.ndim)]
            spaced = spaced + (mx.arange(size, dtype=mx.int32) * stride).reshape(shape)
        if place.dtype != mx.int32 or not (mx.all(owner == number) & mx.all(place == spaced)).item():
            raise DuoError(f"what mlx-lm made of {name} cannot be undone for transformers")
        yield number, Piece(name, row, place.shape, offset, strides)


def _first(array: mx.array) -> int:
    number: Any = array.flatten()[0].item()
    return int(number)


def _assembled(pieces: list[Piece], shape: tuple[int, ...], dense: Tensors, read: Callable[[str], mx.array]) -> Tensor:
    first = dense[pieces[0].canonical]
    if len(pieces) == 1 and pieces[0].row is None and (pieces[0].shape, pieces[0].strides) == (shape, _in_order(shape)):
        return first

    def load() -> mx.array:
        out: NDArray[Any] = np.empty(shape, "uint16" if first.dtype == "bfloat16" else first.dtype)
        for piece in pieces:
            array = read(piece.canonical)
            array = array if piece.row is None else array[piece.row]
            bits = np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
            strides = [stride * bits.itemsize for stride in piece.strides]
            np.lib.stride_tricks.as_strided(out.reshape(-1)[piece.offset :], piece.shape, strides)[...] = bits
        made = mx.array(out)
        return made.view(mx.bfloat16) if first.dtype == "bfloat16" else made

    return Tensor(shape, first.dtype, load, stored=first.stored)
