"""Hosting: mlx-lm's own model, opened so that a pass can say what its FFNs, its layers and its trunk do.

A base's classes call each other with the arguments that mlx-lm gave them, and none of these is a route. So the modules
of a hosted model look up the pass that is open: a context variable, set when the model is called and reset when that
call ends. Another thread, a nested call and an exception each leave it as it was.

- A *trunk* is the module that holds the layers. It makes final hidden states, of which the head makes logits.
- A *block* is one decoder layer; its `__class__` becomes a subclass whose call goes through the open pass.
- An *FFN* is a block's feed-forward module, in whose place a `duo_mlx.ffn.DuoFFN` stands.
"""

import copy
import inspect
import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from duo_mlx.errors import DuoError

FFN_NAMES = (
    "mlp",
    "feed_forward",
    "block_sparse_moe",
    "ffn",
    "moe",
    "mlp_block",
)  # of a block's FFN, in the order of trying
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")

Call = Callable[..., Any]


class Opened(Protocol):
    """A pass that the modules of a hosted model look up."""

    def trunk(self, call: Call, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return the final hidden states; ``call`` is the trunk's own."""

    def block(self, index: int, call: Call, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return a layer's output for ``h``; ``call(h, *args, **named)`` is the layer's own."""

    memo: dict[Any, Any]  # what the layers of the pass have in common, by name

    def ffn(self, ffn: Any, x: mx.array, residual: mx.array | None = None) -> mx.array:
        """Return the output of a layer's `DuoFFN` for its normalised input ``x [..., hidden]``.

        It is added to a ``residual`` for modules that take one (`duo_mlx.cpu`).
        """

    def attention(self, index: int, call: Call, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return a layer's attention; only for models that `open_attention` prepared."""


_current: ContextVar[Opened | None] = ContextVar("duo_mlx_pass", default=None)


def current() -> Opened | None:
    """Return the pass that is open in this thread, if one is."""
    return _current.get()


@contextmanager
def opened(made: Opened | None) -> Iterator[None]:
    """Open a pass for the duration of a ``with`` block; None closes the one that is open meanwhile."""
    token = _current.set(made)
    try:
        yield
    finally:
        _current.reset(token)


class Trunk:
    """A trunk that the open pass may replace."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        made, call = _current.get(), super().__call__  # type: ignore[misc]
        return call(*args, **named) if made is None else made.trunk(call, args, named)


class Block:
    """A block whose call goes through the open pass, or through one of its own.

    mlx-lm's gradient checkpointing calls a block once more after the pass has ended.
    """

    duo_index: int
    duo_default: Callable[[], Opened]  # makes the pass of a call outside of one

    def __call__(self, *args: Any, **named: Any) -> Any:
        made, call = _current.get(), super().__call__  # type: ignore[misc]
        if made is None:
            with opened(self.duo_default()):
                return Block.__call__(self, *args, **named)
        if args:
            return made.block(self.duo_index, call, args[0], args[1:], named)
        (first, h), *rest = named.items()  # a base that names all arguments

        def positional(h: mx.array, **others: Any) -> Any:
            return call(**{first: h}, **others)

        return made.block(self.duo_index, positional, h, (), dict(rest))


class Attention:
    """A block's attention whose call goes through the open pass."""

    duo_index: int

    def __call__(self, *args: Any, **named: Any) -> Any:
        made, call = _current.get(), super().__call__  # type: ignore[misc]
        return call(*args, **named) if made is None else made.attention(self.duo_index, call, args, named)


OPENINGS = (Trunk, Block, Attention)


@cache
def _through(opening: type, own: type) -> type:
    """The subclass of a module's ``own`` class whose call goes through the open pass."""
    return type(own.__name__, (opening, own), {"__module__": own.__module__, "__doc__": own.__doc__})


def open_up(module: nn.Module, opening: type, index: int = 0) -> None:
    """Let a module's calls go through the open pass."""
    module.__class__ = _through(opening, type(module))
    module.duo_index = index


def replace_class(module: nn.Module, own: type) -> None:
    """Let a module compute as ``own`` does, which has the same weights under the same names."""
    before = type(module)
    module.__class__ = _through(before.__mro__[1], own) if before.__mro__[1] in OPENINGS else own


def restore_class(module: nn.Module) -> None:
    """Undo `replace_class`."""
    own = type(module)
    opening = own.__mro__[1] if own.__mro__[1] in OPENINGS else None
    before = closed(own)
    module.__class__ = before if opening is None else _through(opening, before)


def closed(own: type) -> type:
    """The class of mlx-lm that a module had before `open_up` and `replace_class`."""
    own = own.__mro__[2] if own.__mro__[1] in OPENINGS else own
    found: type = getattr(own, "replaces", own)
    return found


def open_attention(model: Any) -> None:
    """Let the attention of every layer go through the open pass, too.

    Raises:
        DuoError: a layer has no attention under a known name.
    """
    for index, block in enumerate(model.layers):
        name = next((name for name in ATTENTION_NAMES if name in block), None)
        if name is None:
            raise DuoError(f"{model.kind}: a layer has no attention that this package knows, so it takes no dropout")
        if not isinstance(block[name], Attention):
            open_up(block[name], Attention, index)


def trunk_of(model: nn.Module, layers: list[Any]) -> nn.Module:
    """The module that holds the layers.

    Raises:
        DuoError: none does.
    """
    for module in model.modules():
        if any(isinstance(child, list) and any(each is layers[0] for each in child) for child in module.values()):
            return module
    raise DuoError("no module holds the layers")


def ffn_name(block: nn.Module) -> str:
    """The name of a block's FFN.

    Raises:
        DuoError: it has none under a known name, or one that needs more than hidden states.
    """
    for name in FFN_NAMES:
        if isinstance(block.get(name), nn.Module):
            _check_call(block[name])
            return name
    raise DuoError(f"a layer has no FFN that this package knows, only {', '.join(sorted(block))}")


def _check_call(ffn: nn.Module) -> None:
    needed = [
        each
        for each in inspect.signature(ffn.__call__).parameters.values()
        if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if len(needed) > 1:
        raise DuoError(f"a layer's FFN takes more than hidden states, {', '.join(map(str, needed))}")


def norms_of_ffn(block: nn.Module) -> list[nn.Module]:
    """The norms of a block that only its FFN has use for, as far as their names tell."""
    for name in ("pre_feedforward_layernorm", "pre_ff_layernorm", "ffn_norm", "ln_2"):
        if name in block:
            return [block[name]]
    norm = block.get("post_attention_layernorm")  # some blocks have a list of them
    if isinstance(norm, nn.Module) and not any("feedforward" in name for name in block):
        return [norm]
    return []


def without(model: Any) -> nn.Module:
    """The base that a hosted model is: a copy with the same weights, in which each big FFN is the block's own again."""

    def plain(value: Any, own: type | None = None) -> Any:
        if isinstance(value, list):
            return [plain(each) for each in value]
        if isinstance(value, dict) and not isinstance(value, nn.Module):
            return {key: plain(each) for key, each in value.items()}
        if not isinstance(value, nn.Module):
            return value
        if getattr(value, "replaces_ffn", False):
            return plain(value.big)
        made = copy.copy(value)
        made.__class__ = own or closed(type(value))
        for key, each in value.items():
            made[key] = plain(each)
        return made

    found: nn.Module = plain(model, model.base_class)
    return found


def primitives(output: mx.array) -> Counter[str]:
    """How many of MLX's primitives of each name the graph of an array has, none of which is computed."""
    file = io.StringIO()
    mx.export_to_dot(file, output)
    return Counter(re.findall(r'\[label ="([^"]*)", shape=rectangle\]', file.getvalue()))
