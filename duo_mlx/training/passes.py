"""A pass that learns: a Duo's layers without a cache, with dropout, and computed anew for the gradient if so wished.

It is the model's own pass, with dropout on both residual branches as in the PyTorch reference. Routes are known to
the host, so each FFN runs on its own tokens (the strategy ``sorted``), and nothing waits for the device. The sizes of
these groups differ from step to step, so a step is not compiled: on a CPU ``dense`` compiled takes 0.37 s where this
takes 0.31, and compiles for 39 s (6 layers of the embedded model's width, 512 tokens).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx import conditional, hosting
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN
from duo_mlx.forward import OnBlock
from duo_mlx.model import Model
from duo_mlx.routes import Route, Routes

BRANCHES = 2  # of a layer into the residual stream: attention and FFN
STRATEGY = "sorted"

Keys = NDArray[np.uint32]  # of random numbers, [sequences, layers, branches, 2]
# from a layer's FFNs and what its router sees, [sequences, length, hidden], to weights [sequences, length, choices] and
# something else, [sequences]
Weigh = Callable[[DuoFFN, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True)
class Passes:
    """How passes are made while training.

    Args:
        dropout: the share of values that both branches of a layer lose.
        recompute: keep only what lies between layers for the gradient, and compute each layer twice.
    """

    dropout: float = 0.0
    recompute: bool = False

    def keys(self, random: np.random.Generator, layers: int) -> Keys:
        """Keys of the dropout in one sequence ``[layers, branches, 2]``."""
        return random.integers(1 << 32, size=(layers, BRANCHES, 2), dtype=np.uint32)

    def logits(
        self,
        model: Model,
        tokens: mx.array,
        routes: Routes,
        keys: Keys,
        caches: Sequence[Any] | None = None,
        head: Callable[[mx.array], mx.array] | None = None,
    ) -> mx.array:
        """Logits ``[sequences, length, vocab]`` in float32.

        Args:
            model: a Duo.
            tokens: ids ``[sequences, length]``, at least two of a sequence.
            routes: ``[sequences, length, layers]``, or ``[layers]`` for all tokens.
            keys: of the dropout.
            caches: one a layer, which are not changed (`duo_mlx.beside`); None: there is nothing before the tokens.
            head: gives the logits; None: the model's.
        """
        planned = conditional.plan(routes, tokens.shape[0], tokens.shape[1], model.config.num_hidden_layers, STRATEGY)
        keyed = mx.array(keys)  # [sequences, layers, branches, 2]

        def branch(place: int) -> Callable[[int, Callable[[], mx.array]], mx.array]:
            return lambda index, run: self._drop(run(), keyed[:, index, place])

        hooks = {"on_attention": branch(0), "after_ffn": branch(1)} if self.dropout else {}
        if self.dropout:
            hosting.open_attention(model)
        with model.carried_out(planned, STRATEGY, on_block=self._kept(model), **hooks):
            final = model.trunk(tokens, cache=list(caches) if caches else None)
        return (head or model.head)(final).astype(mx.float32)

    def mixture(
        self, model: Model, tokens: mx.array, choices: Sequence[int], weigh: Weigh
    ) -> tuple[mx.array, mx.array]:
        """Logits ``[sequences, length, vocab]`` where each layer adds a weighted sum of its modules' outputs.

        Args:
            model: a Duo.
            tokens: ids ``[sequences, length]``, at least two of a sequence.
            choices: the routes that have weights.
            weigh: gives a layer's weights ``[sequences, length, choices]``, see `Weigh`.

        Returns:
            The logits in float32, and what ``weigh`` found beside the weights, ``[layers, sequences]``.

        Raises:
            DuoError: small means skip in some layers.
        """
        if model.config.small_skips:
            raise DuoError("a mixture of routes is not known for a model with small_skips; train router by gains")
        choices, found = tuple(choices), dict[int, mx.array]()
        skip = choices.index(Route.SKIP) if Route.SKIP in choices else None
        whole = model.parts is not None
        weights: dict[int, mx.array] = {}  # of layers that weigh before their attention

        def layer(index: int, run: Callable[[mx.array], mx.array], h: mx.array) -> mx.array:
            def weighed(h: mx.array) -> tuple[mx.array, mx.array]:
                if model.parts is not None:
                    weights[index], found[index] = weigh(model.ffns[index], model.parts[index].seen(h))
                return run(h), found[index]

            h, found[index] = self._recomputed(model, index, weighed)(h)
            return h

        def attention(index: int, run: Callable[[], mx.array]) -> mx.array:
            return run() if skip is None else run() * (1 - weights[index][..., skip, None])

        def ffn(duo: DuoFFN, x: mx.array) -> mx.array:
            if whole:
                of = weights.pop(duo.index)
            else:
                of, found[duo.index] = weigh(duo, x)
            modules = {Route.BIG: duo.big, Route.SMALL: duo.small}
            outputs = [
                of[..., number, None] * modules[Route(choice)](x)
                for number, choice in enumerate(choices)
                if choice != Route.SKIP
            ]
            return sum(outputs[1:], start=outputs[0])

        if whole:
            hosting.open_attention(model)
        with model.carried_out([], STRATEGY, on_block=layer, on_ffn=ffn, on_attention=attention if whole else None):
            final = model.trunk(tokens)
        return model.head(final).astype(mx.float32), mx.stack([found[index] for index in sorted(found)])

    def _kept(self, model: Model) -> OnBlock | None:
        """What makes a pass compute each layer anew for the gradient; None where it is not to."""
        if not self.recompute:
            return None
        return lambda index, run, h: self._recomputed(model, index, run)(h)

    def _recomputed(self, model: Model, index: int, run: Callable[[mx.array], Any]) -> Callable[[mx.array], Any]:
        """One layer as a function of its input, computed once more for the gradient if so wished."""
        if not self.recompute:
            return run
        made = hosting.current()

        def again(h: mx.array) -> Any:
            with hosting.opened(made):  # the pass has ended when the gradient is asked for
                return run(h)

        checked: Callable[[mx.array], Any] = nn.utils.checkpoint(model.layers[index], again)
        return checked

    def _drop(self, values: mx.array, keys: mx.array) -> mx.array:
        """Dropout of ``values [sequences, length, hidden]``; each sequence has its key, whatever its batch is."""
        if not self.dropout or not values.ndim:
            return values
        kept = mx.vmap(lambda key: mx.random.bernoulli(1 - self.dropout, values.shape[1:], key))(keys)
        return mx.where(kept, values / (1 - self.dropout), mx.zeros((), values.dtype))


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """The mean loss of each sequence ``[sequences]`` in nats a token; the arithmetic is float32."""
    losses: mx.array = nn.losses.cross_entropy(logits.astype(mx.float32), targets)
    return losses.mean(axis=-1)
