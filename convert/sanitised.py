"""The names and forms that a base's weights have in mlx-lm: what its ``sanitize`` makes of a checkpoint's.

``sanitize`` renames, stacks, splits and transposes arrays. It is run once on stand-ins that have shapes and types and
no content. So it is known which tensor becomes which, and whether it stays as it is, before one is read. A tensor that
only gets another name is copied bit for bit; one that is computed is computed when it is loaded, from what it needs.
"""

import copy
import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from duo_mlx.convert.tensors import Tensor, Tensors, dtype_name
from duo_mlx.errors import DuoError
from duo_mlx.model import Model


def sanitised(model: Model, tensors: Tensors, source: Path) -> dict[str, Tensor]:
    """Return the base's tensors by mlx-lm's names; each knows by ``name`` what it comes from.

    Args:
        model: an empty one; ``sanitize`` may take from it what the tensors show to be absent, such as a head.
        tensors: of a dense model, by the names that mlx-lm expects in a checkpoint.
        source: for messages.

    Raises:
        DuoError: ``sanitize`` fails, as it does when tensors are missing that it puts together.
    """
    if not hasattr(model.base_class, "sanitize"):
        return dict(tensors)
    before = copy.copy(model)
    base: Any = model.base_class
    absent = {name: _stand_in(tensor) for name, tensor in tensors.items()}
    names = {id(array): name for name, array in absent.items()}
    try:
        made = base.sanitize(model, dict(absent))
    except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
        what = f"tensor {error.args[0]!r} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise DuoError(f"{source}: mlx-lm's {model.kind} does not take its weights: {what}") from None
    found: dict[str, Tensor] = {}
    for name, array in made.items():
        if id(array) in names:
            found[name] = tensors[names[id(array)]]
            continue
        needed = _needed(array, absent)
        origin = " + ".join(tensors[each].name or each for each in needed)
        load = partial(_compute, before, tensors, absent, needed, name)
        found[name] = Tensor(array.shape, dtype_name(array.dtype), load, name=origin)
    return found


def _stand_in(tensor: Tensor) -> mx.array:
    return mx.zeros(tensor.shape, getattr(mx, tensor.dtype, mx.uint8))


def _needed(array: mx.array, absent: dict[str, mx.array]) -> list[str]:
    """The tensors that ``array`` is computed from, by its graph."""
    named = {f"tensor{number}": name for number, name in enumerate(absent)}
    graph = io.StringIO()
    mx.export_to_dot(graph, array, **{short: absent[name] for short, name in named.items()})
    used = set(re.findall(r'^"(tensor\d+)" -> \d', graph.getvalue(), re.MULTILINE))
    return [name for short, name in named.items() if short in used]


def _compute(model: Model, tensors: Tensors, absent: dict[str, mx.array], needed: list[str], name: str) -> mx.array:
    base: Any = model.base_class
    weights = absent | {each: tensors[each].load() for each in needed}
    made: mx.array = base.sanitize(copy.copy(model), weights)[name]  # which may change the model: each time a copy
    return made
