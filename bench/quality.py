"""What routes keep: loss, divergence and agreement with all-big on held-out text, token by token.

Each window is a text of its own, passed once by all-big and once by each policy. A token's loss is that of the token
given those before it in its window, whose keys and values come from the same policy.
"""

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import interval
from duo_mlx.model import Model
from duo_mlx.policies import FixedPolicy
from duo_mlx.routed import RoutedModel, Source
from duo_mlx.routes import Route, format_pattern
from duo_mlx.sampling import normalised


def log_probabilities(
    model: Model, policy: Source, window: NDArray[np.int32], number: int
) -> tuple[mx.array, NDArray[np.uint8]]:
    """Log-probabilities ``[tokens, vocab]`` of a window's next tokens, and the routes ``[tokens, layers]``.

    Args:
        model: a Duo.
        policy: whose routes; where they depend on the position, those of window ``number`` in a long text.
        window: ids ``[tokens + 1]``.
        number: of the window.
    """
    tokens = len(window) - 1
    start = 0 if getattr(policy, "length", None) is not None else number * tokens
    routed = RoutedModel(model, policy, start=start)
    logits = routed(mx.array(window[None, :-1]))[0].astype(mx.float32)
    found = normalised(logits)
    mx.eval(found)
    return found, routed.taken(start, start + tokens)[0]


def measure(
    model: Model,
    policies: Mapping[str, Source],
    windows: NDArray[np.int32],
    progress: Callable[[float], object] = lambda share: None,  # noqa: ARG005
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Quality by policy, and how each routed the first window: ``patterns`` and ``loss`` by token.

    Args:
        model: a Duo.
        policies: by name.
        windows: ids ``[windows, tokens + 1]``.
        progress: is called with the share that is done.
    """
    big = FixedPolicy(np.full(model.config.num_hidden_layers, Route.BIG, np.uint8))
    losses: dict[str, list[float]] = {name: [] for name in policies}
    divergence: dict[str, list[float]] = {name: [] for name in policies}
    agreement: dict[str, list[float]] = {name: [] for name in policies}
    samples = {}
    for number, window in enumerate(windows):
        reference, _ = log_probabilities(model, big, window, number)
        likeliest = mx.argmax(reference, axis=-1)
        for name, policy in policies.items():
            found, routes = log_probabilities(model, policy, window, number)
            each = nn.losses.cross_entropy(found, mx.array(window[1:]))
            losses[name].append(float(each.mean()))
            divergence[name].append(float((mx.exp(reference) * (reference - found)).sum(axis=-1).mean()))
            agreement[name].append(float((mx.argmax(found, axis=-1) == likeliest).mean()))
            if not number:
                samples[name] = {
                    "patterns": [format_pattern(pattern) for pattern in routes],
                    "loss": np.array(each).tolist(),
                }
        progress((number + 1) / len(windows))
    found_quality = {
        name: {
            "loss": interval(losses[name], of=np.mean).record(),
            "perplexity": float(np.exp(np.mean(losses[name]))),
            "kl": float(np.mean(divergence[name])),
            "argmax_agreement": float(np.mean(agreement[name])),
            "tokens": windows.shape[0] * (windows.shape[1] - 1),
        }
        for name in policies
    }
    return found_quality, samples
