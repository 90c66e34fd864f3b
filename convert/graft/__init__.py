"""Grafting: a dense model becomes a Duo whose big FFNs are the dense ones, and whose small ones are solved from text.

Layer after layer, calibration tokens meet two prefixes: the dense model's, and one in which every token drew big or
small in each layer before, so that a small FFN is fitted to the inputs that it will really get. Its target is what big
gives on them, and a part of what the prefix has lost: `Graft.compensation`. See `solve` for what a small FFN is made of
and `importance` for which errors count. (The paper trains small FFNs from scratch; this is for models that nobody can
train anew. Solving for what is left of a pruned layer goes back to Optimal Brain Surgeon, Hassibi and Stork 1993.)
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.convert.graft.importance import measure_metrics, token_weights
from duo_mlx.convert.graft.layers import Dense, attend, batches
from duo_mlx.convert.graft.solve import Moments, Projection, SmallFFN, solve
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.tensors import Tensor, Tensors
from duo_mlx.errors import DuoError

WINDOW = 256  # tokens
LEAST = 16 * WINDOW


@dataclass(frozen=True)
class Graft:
    """How a dense model is grafted."""

    small_ratio: int = 16  # big's width over small's
    small_layers: tuple[int, ...] | None = None  # layers that get a small FFN; None: all
    tokens: int = 20_000  # calibration tokens, at most
    seed: int = 0
    linear_share: float = 0.5  # of small's neurons
    compensation: float = 0.25  # share of the routed prefix's error that a small FFN is to take back
    small_share: float = 0.5  # probability of small in the routed prefix

    def __post_init__(self) -> None:
        if self.small_ratio < 2:
            raise DuoError(f"--small-ratio is {self.small_ratio}; it must be at least 2")
        if self.tokens < LEAST:
            raise DuoError(f"--calibration-tokens is {self.tokens}; it must be at least {LEAST}")


def graft(
    dense: Tensors,
    config: dict[str, Any],
    settings: Graft,
    ids: NDArray[np.integer],
    work: Path,
    progress: Callable[[int, int], object] = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The small FFNs of a dense model, and what its config.json gains.

    Args:
        dense: the model's weights under canonical names (``model.layers.N.mlp.gate_proj.weight`` ...).
        config: its configuration, see `duo_mlx.convert.settings`.
        settings: how to graft.
        ids: token ids ``[tokens]`` of the calibration text.
        work: a directory for what is done so far; the same call resumes there. The tensors are read from it.
        progress: is called with the steps that are done and all steps.
        note: is told if a graft is resumed.

    Returns:
        ``model.layers.N.mlp.small.*`` in float32, and the configuration's new keys.

    Raises:
        DuoError: the text is too short, a layer does not exist, or ``work`` is another graft's.
    """
    model = Dense(dense, config)
    layers = model.config.num_hidden_layers
    chosen = tuple(range(layers)) if settings.small_layers is None else settings.small_layers
    if wrong := [layer for layer in chosen if not 0 <= layer < layers]:
        raise DuoError(f"--small-layers names layer {wrong[0]}, but the {layers} layers are 0 to {layers - 1}")
    width = model.config.intermediate_size // settings.small_ratio
    if width < 2:
        raise DuoError(
            f"--small-ratio {settings.small_ratio} leaves {width} of {model.config.intermediate_size} neurons"
        )
    windows = cut(ids[: settings.tokens], config)
    state = State(work, _describe(dense, config, settings, windows))

    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, 3 * layers)

    if state.has("metric-0"):  # the last that is measured
        done = 2 * layers
    else:
        measure_metrics(model, windows, state, step)
    first = max((layer for layer in range(layers + 1) if state.has(f"dense-{layer}")), default=0)
    if not state.has(f"dense-{first}"):
        embedded = model.embed(windows)
        state.save("routed-0", embedded)
        state.save("dense-0", embedded)
    elif first:
        note(f"resuming the graft in {work} at layer {first} of {layers}")
    done += first
    for index in range(first, layers):
        _graft_layer(model, index, index in chosen, settings, width, state)
        step()
    smalls: dict[str, Tensor] = {}
    for index in chosen:
        for name in SmallFFN.__dataclass_fields__:
            part = f"{name.removesuffix('_bias')}_proj.{'bias' if name.endswith('_bias') else 'weight'}"
            smalls[f"model.layers.{index}.mlp.small.{part}"] = _lazy(state, f"small-{index}-{name}")
    extra: dict[str, Any] = {"small_intermediate_size": width, "small_bias": True}
    if settings.small_layers is not None:
        extra["small_layers"] = sorted(set(chosen))
    return smalls, extra


def cut(ids: NDArray[np.integer], config: dict[str, Any]) -> NDArray[np.integer]:
    """Windows ``[windows, WINDOW]`` of a text.

    Every other one begins with the model's first token, if it has one: the first token of a window is an attention
    sink, and small FFNs must know it as it comes in chats and in texts.

    Raises:
        DuoError: the text is too short.
    """
    if len(ids) < LEAST:
        raise DuoError(f"--calibrate: the texts have {len(ids)} tokens for the graft; at least {LEAST} are needed")
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW).copy()
    first = config.get("bos_token_id")
    if isinstance(first, int):
        windows[::2, 0] = first
    return windows


def _graft_layer(model: Dense, index: int, has_small: bool, settings: Graft, width: int, state: State) -> None:
    """Solve a layer's small FFN and carry both prefixes on, from ``state`` and to it."""
    layer = model.layer(index)
    following = model.layer(index + 1) if index + 1 < model.config.num_hidden_layers else None
    dense, routed = state.load(f"dense-{index}"), state.load(f"routed-{index}")
    bigs = np.empty_like(routed)  # what big says to the routed prefix
    visible = model.visible(layer, WINDOW)
    random = np.random.default_rng([settings.seed, index])
    drawn = random.random((*dense.shape[:2], 1)) < settings.small_share
    big = layer.mlp.big
    moments = Moments.empty(model.config.hidden_size, model.config.intermediate_size, model.config.hidden_size)
    for rows in batches(len(dense)):
        middle = attend(layer, mx.array(dense[rows]), visible)
        after = middle + big(layer.post_attention_layernorm(middle))
        own = attend(layer, mx.array(routed[rows]), visible)
        x = layer.post_attention_layernorm(own)
        neurons = nn.silu(big.gate_proj(x)) * big.up_proj(x)
        said = big.down_proj(neurons)
        if has_small:
            target = said + settings.compensation * (after - own - said)
            weights = token_weights(after, following, visible)
            moments.add(*_moments(x, neurons, target, weights), x.shape[0] * x.shape[1])
        dense[rows], routed[rows], bigs[rows] = np.array(after), np.array(own), np.array(said)
    small = None
    if has_small:
        linear = round(settings.linear_share * width)
        gate, up = (_projection(part) for part in (big.gate_proj, big.up_proj))
        small = solve(moments, gate, up, state.load(f"metric-{index}"), width, linear)
        for name, value in vars(small).items():
            state.save(f"small-{index}-{name}", value)
    if small is not None:
        for rows in batches(len(dense)):
            x = layer.post_attention_layernorm(mx.array(routed[rows]))
            bigs[rows] = np.where(drawn[rows], np.array(run(small, x)), bigs[rows])
    routed += bigs
    state.save(f"routed-{index + 1}", routed)
    state.save(f"dense-{index + 1}", dense)
    state.drop(f"routed-{index}")
    state.drop(f"dense-{index}")


def _projection(part: nn.Linear) -> Projection:
    weight = np.array(part.weight)
    return Projection(weight, np.array(part.bias) if "bias" in part else np.zeros(len(weight), np.float32))


def _moments(
    x: mx.array, neurons: mx.array, target: mx.array, weights: mx.array
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    features = mx.concatenate([x, mx.ones((*x.shape[:2], 1)), neurons], axis=-1)
    rows = (features * weights).reshape(-1, features.shape[-1])
    targets = (target * weights).reshape(-1, target.shape[-1])
    return np.array(rows.T @ rows), np.array(rows.T @ targets)


def run(small: SmallFFN, x: mx.array) -> mx.array:
    """What a small FFN gives for ``x [..., inputs]``."""
    parts = {name: mx.array(value) for name, value in vars(small).items()}
    inner = nn.silu(x @ parts["gate"].T + parts["gate_bias"]) * (x @ parts["up"].T + parts["up_bias"])
    return inner @ parts["down"].T + parts["down_bias"]


def _lazy(state: State, name: str) -> Tensor:
    return Tensor(state.load(name).shape, "float32", lambda: mx.array(state.load(name)))


def _describe(dense: Tensors, config: dict[str, Any], settings: Graft, windows: NDArray[np.integer]) -> dict[str, Any]:
    """What a graft is of: a state with another description is another graft's. The norms stand for all weights."""
    digest = hashlib.sha256(windows.tobytes())
    for name, tensor in sorted(dense.items()):
        digest.update(f"{name} {tensor.shape} {tensor.dtype} {tensor.stored}".encode())
        if name.endswith("norm.weight"):
            digest.update(np.array(tensor.load().astype(mx.float32)).tobytes())
    return {"settings": asdict(settings), "config": config, "inputs": digest.hexdigest()}
