"""What benchmarks of decoding share: a model, mlx-lm's own model with the same weights, and decoding both alike.

Decoding goes through mlx-lm's own `generate_step` for either, greedily, from a cache that was filled before the clock
starts. `generate_step` is always one step ahead, so that N tokens take N + 1 steps; all of them are waited for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step, generation_stream
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from duo_mlx import checkpoint, cost
from duo_mlx.bench.prefill import SHAPE
from duo_mlx.device import on_cpu
from duo_mlx.errors import DuoError
from duo_mlx.hosting import primitives, without
from duo_mlx.intervals import interval
from duo_mlx.model import Model, ModelArgs
from duo_mlx.policies import FixedPolicy
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.routes import Route, Routes

PATTERNS = {"all-big": Route.BIG, "all-small": Route.SMALL, "all-skip": Route.SKIP}


def open_model(directory: Path | None, layers: int, seed: int) -> Model:
    """The model in a directory; None: SmolLM2-135M's shape with ``layers`` layers and random weights and routers.

    Fused, as ``duo-mlx generate`` loads it.

    Raises:
        DuoError: the directory holds no Duo model.
    """
    mx.random.seed(seed)
    if directory:
        return checkpoint.load(directory, fuse=True)[0]
    model = Model(ModelArgs.from_dict(SHAPE | {"num_hidden_layers": layers, "router_choices": "-sB"}))
    for ffn in model.ffns:  # a new router's weights are zeros
        ffn.router.weight = mx.random.normal(ffn.router.weight.shape)
    if on_cpu():
        from duo_mlx import cpu

        cpu.quicken(model, fuse=True)
    mx.eval(model.parameters())
    return model


def base_twin(model: Model) -> nn.Module:
    """mlx-lm's own model with the Duo's big FFNs and the Duo's own arrays as weights, so they are in memory once."""
    return without(model)


def pattern(model: Model, route: Route) -> Routes:
    """One route in all layers, ``[layers]``."""
    return np.full(model.config.num_hidden_layers, route, np.uint8)


def filled_cache(model: Model, context: int, seed: int) -> list[Any]:
    """A cache of ``context`` positions of noise: what decoding costs depends on how many, not on which.

    Raises:
        DuoError: a cache cannot be taken back to where it began, because attention slides or a layer has a state.
    """
    cache = model.make_cache()
    if not can_trim_prompt_cache(cache) or any(cost.windows(model)):
        raise DuoError("this benchmark needs caches that can be taken back, and this model's attention slides")
    # the pass is built and never computed: noise takes the place of what it writes
    model(mx.zeros((1, context), mx.uint32), cache, routes=[Route.BIG] * model.config.num_hidden_layers)
    keys = iter(mx.random.split(mx.random.key(seed), 4 * len(cache)))
    for layer in cache:
        for name, value in vars(layer).items():
            if isinstance(value, mx.array):
                setattr(layer, name, mx.random.normal(value.shape, value.dtype, key=next(keys)))
    mx.eval([layer.state for layer in cache])
    return cache


def check_context(model: Model, positions: int) -> None:
    """Refuse more positions than the model has."""
    limit = model.config.max_position_embeddings
    if limit is not None and positions > limit:
        raise DuoError(f"--context and --tokens come to {positions} positions; the model has {limit}")


@dataclass
class Decoder:
    """Decodes from the same ``context`` positions again and again.

    ``bind`` makes what `generate_step` calls, anew for each run, because a `RoutedModel` counts positions.
    """

    bind: Callable[[], Callable[..., mx.array]]
    cache: list[Any]
    context: int

    def __call__(self, tokens: int) -> list[int]:
        """Decode and wait until everything is done."""
        self.rewind()
        steps = generate_step(mx.array([1]), self.bind(), max_tokens=tokens, prompt_cache=self.cache)
        decoded = [token for token, _ in steps]
        mx.synchronize(generation_stream)
        return decoded

    def rewind(self) -> None:
        """Back to ``context`` positions."""
        trim_prompt_cache(self.cache, self.cache[0].offset - self.context)

    def primitives(self) -> int:
        """How many primitives the graph of one step's logits has; exact."""
        self.rewind()
        logits = self.bind()(mx.array([[1]]), cache=self.cache)
        count = primitives(logits).total()
        mx.eval(logits)
        return count


def routed(model: Model, policy: Source, context: int, strategy: str = "auto", seed: int = 0) -> Decoder:
    """A decoder of the Duo by a policy or router, as ``duo-mlx generate`` runs it."""
    return Decoder(
        lambda: RoutedModel(model, policy, strategy, start=context), filled_cache(model, context, seed), context
    )


def decoders(
    model: Model, twin: nn.Module | None, context: int, seed: int = 0, patterns: Sequence[str] = tuple(PATTERNS)
) -> dict[str, Decoder]:
    """Decoders of the twin, if there is one, and of the Duo by uniform patterns, by name."""
    made = {}
    if twin is not None:
        made["mlx-lm"] = Decoder(lambda: twin, filled_cache(model, context, seed), context)
    for name in patterns:
        made[name] = routed(model, FixedPolicy(pattern(model, PATTERNS[name])), context, seed=seed)
    return made


@contextmanager
def whole_products() -> Iterator[None]:
    """Within it no product is cut into pieces, see `duo_mlx.cpu.products`."""
    if not on_cpu():
        yield
        return
    from duo_mlx.cpu import products

    with patch.object(products, "pieces", lambda weight, x: 1):  # noqa: ARG005
        yield


def step_bytes(model: Model, routes: Routes, context: int, by_router: bool = False) -> float:
    """Bytes of weights and cache that a decoding step touches, as a mean over the patterns ``routes [..., layers]``."""
    table = cost.weight_bytes(model, by_router) + cost.cache_bytes(model, context)
    return float(table.of(model.config.realised(routes)).mean())


def spread(ratios: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """The median of paired ratios, a 95 % bootstrap interval of it, and the ratios."""
    found = interval(ratios, seed=seed)
    return {"median": found.median, "interval_95": [found.low, found.high], "rounds": list(ratios)}
