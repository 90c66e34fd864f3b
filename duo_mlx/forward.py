"""A pass over tokens: its routes, and the hooks with which oracle, training and grafting open its layers."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from duo_mlx import conditional
from duo_mlx.conditional import LayerRoutes
from duo_mlx.hosting import Call, current
from duo_mlx.router import Router
from duo_mlx.routes import Route
from duo_mlx.skipping import Skippable

OnBlock = Callable[[int, Callable[[mx.array], mx.array], mx.array], Any]  # layer, what it computes, its input
OnFFN = Callable[[Any, mx.array], mx.array]  # a DuoFFN and its input
OnBranch = Callable[[int, Callable[[], Any]], Any]  # layer, what its branch computes


class Forward:
    """A pass, as `duo_mlx.hosting.Opened` has it.

    Args:
        entries: of each layer, its routes or the router to ask.
        strategy: how they are carried out.
        parts: what skipping a whole layer takes, one a layer (`duo_mlx.skipping`); None where a skip bypasses the FFN
            alone.
        on_block: is called in place of each layer.
        on_ffn: is called in place of each FFN. It may return one output for each of several routes, stacked on a new
            first axis: what follows in a block works for each position and broadcasts.
        on_attention: is called in place of each layer's attention, see `duo_mlx.hosting.open_attention`.
        after_ffn: is called with what computes the routed FFNs' output, and gives what is taken for it.
        memo: what the layers of one pass have in common, by name; passes over the same tokens may share it.
        final: hidden states that are taken for the trunk's; nothing of it is computed.
    """

    def __init__(
        self,
        entries: list[LayerRoutes | Router],
        strategy: str,
        parts: Sequence[Skippable] | None = None,
        on_block: OnBlock | None = None,
        on_ffn: OnFFN | None = None,
        on_attention: OnBranch | None = None,
        after_ffn: OnBranch | None = None,
        memo: dict[Any, Any] | None = None,
        final: mx.array | None = None,
    ):
        self.entries, self.strategy = entries, strategy
        self.memo: dict[Any, Any] = {} if memo is None else memo
        self._parts, self._final = parts, final
        self._on_block, self._on_ffn, self._on_attention, self._after_ffn = on_block, on_ffn, on_attention, after_ffn
        self._decided: dict[int, tuple[LayerRoutes, str]] = {}

    def trunk(self, call: Call, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return call(*args, **named) if self._final is None else self._final

    def block(self, index: int, call: Call, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._on_block is None:
            return self.run_block(index, call, h, args, named)

        def run(x: mx.array) -> Any:
            made = current()  # which may be another pass than this one: a recorded call
            assert isinstance(made, Forward), "a layer runs within a pass"
            return made.run_block(index, call, x, args, named)

        return self._on_block(index, run, h)

    def run_block(self, index: int, call: Call, h: mx.array, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Return a layer's output as `block` does, without asking ``on_block``."""
        if self._parts is None or self._on_ffn is not None:
            return call(h, *args, **named)
        layer, entry = self._parts[index], self.entries[index]
        x = layer.seen(h) if isinstance(entry, Router) else layer.tokens(h)
        route, by = conditional.decide(entry, index, x, layer.ffn, self.strategy)
        if route is Route.SKIP and by != "dense":
            return layer.write_only(h, args, named)
        self._decided[index] = route, by
        return conditional.unless_skipped(call(h, *args, **named), h, route)

    def ffn(self, ffn: Any, x: mx.array, residual: mx.array | None = None) -> mx.array:
        if self._on_ffn is not None:
            out = self._on_ffn(ffn, x)
            return out if residual is None else residual + out
        decided = self._decided.pop(ffn.index, None)
        if decided is None:
            decided = conditional.decide(self.entries[ffn.index], ffn.index, x, ffn, self.strategy)
        if self._after_ffn is None:
            return conditional.run(ffn, x, *decided, residual)
        return self._after_ffn(ffn.index, lambda: conditional.run(ffn, x, *decided))

    def attention(self, index: int, call: Call, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._on_attention is None:
            return call(*args, **named)
        return self._on_attention(index, lambda: call(*args, **named))
