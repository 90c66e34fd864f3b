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
import numpy as np
from numpy.typing import NDArray

from duo_mlx import checkpoint
from duo_mlx.convert.graft.importance import heard, measure_metrics, size
from duo_mlx.convert.graft.layers import Layers, batches
from duo_mlx.convert.graft.neurons import Neurons, active_width, name_neurons
from duo_mlx.convert.graft.solve import Copyable, Moments, SmallFFN, solve
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.forms import ACTIVATIONS
from duo_mlx.model import Model

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
    model: Model,
    ids: NDArray[np.integer],
    settings: Graft,
    work: Path,
    progress: Callable[[int, int], object] = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The small FFNs of a dense model, and what its config.json gains.

    Args:
        model: a Duo of the dense model without small FFNs (``small_layers`` is empty). A layer's weights are read when
            its turn comes, if they are loaded lazily; they may be quantised.
        ids: token ids ``[tokens]`` of the calibration text.
        settings: how to graft.
        work: a directory for what is done so far; the same call resumes there. The tensors are read from it.
        progress: is called with the steps that are done and all steps.
        note: is told if a graft is resumed.

    Returns:
        Weights of small by the model's names (``model.layers.0.mlp.small.gate_proj.weight``) in float32, and the
        configuration's new keys.

    Raises:
        DuoError: the text is too short, a layer does not exist, the model's layers cannot be run one by one, or
            ``work`` is another graft's.
    """
    count = model.config.num_hidden_layers
    chosen = tuple(range(count)) if settings.small_layers is None else settings.small_layers
    if wrong := [layer for layer in chosen if not 0 <= layer < count]:
        raise DuoError(f"--small-layers names layer {wrong[0]}, but the {count} layers are 0 to {count - 1}")
    wide = min(active_width(model.ffns[index].big, model.config.hidden_size) for index in chosen)
    width = wide // settings.small_ratio
    if width < 2:
        raise DuoError(f"--small-ratio {settings.small_ratio} leaves {width} of {wide} neurons")
    windows = cut(ids[: settings.tokens], model.config.base)
    layers = Layers(model, WINDOW)
    embedded = layers.embed(windows)
    state = State(work, _describe(model, settings, windows, embedded))

    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, 3 * count)

    if state.has("metric-0"):  # the last that is measured
        done = 2 * count
    else:
        measure_metrics(layers, windows, state, step)
    first = max((layer for layer in range(count + 1) if state.has(f"dense-{layer}")), default=0)
    if not state.has(f"dense-{first}"):
        state.save("routed-0", embedded)
        state.save("dense-0", embedded)
    elif first:
        note(f"resuming the graft in {work} at layer {first} of {count}")
    done += first
    activation = _activation(layers, windows)
    for index in range(first, count):
        _Layer(layers, index, settings, width, activation, state).graft(index in chosen)
        step()
    extra: dict[str, Any] = {"small_intermediate_size": width, "small_bias": True}
    if activation != "silu":
        extra["small_activation"] = activation
    if settings.small_layers is not None:
        extra["small_layers"] = sorted(set(chosen))
    return {name: tensor for index in chosen for name, tensor in _tensors(model, index, state).items()}, extra


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


def _activation(layers: Layers, windows: NDArray[np.integer]) -> str:
    """The activation of small: that of the first layer whose neurons can be named, or else silu."""
    h = mx.array(layers.embed(windows[:1]))
    for index in range(len(layers)):
        with layers.in_float32(index):
            h, x, *_ = layers.open(index, h)
            if neurons := name_neurons(layers.big(index), x):
                return neurons.activation
    return "silu"


@dataclass(frozen=True)
class _Layer:
    """One layer's graft."""

    layers: Layers
    index: int
    settings: Graft
    width: int
    activation: str
    state: State

    def graft(self, has_small: bool) -> None:
        """Solve the layer's small FFN and carry both prefixes on, from ``state`` and to it."""
        state, index = self.state, self.index
        dense, routed = state.load(f"dense-{index}"), state.load(f"routed-{index}")
        with self.layers.in_float32(index):
            self._carry_on(dense, routed, has_small)
        state.save(f"routed-{index + 1}", routed)
        state.save(f"dense-{index + 1}", dense)
        state.drop(f"routed-{index}")
        state.drop(f"dense-{index}")

    def _carry_on(self, dense: NDArray[np.float32], routed: NDArray[np.float32], has_small: bool) -> None:
        layers, index = self.layers, self.index
        before, inputs, said = routed.copy(), np.empty_like(routed), np.empty_like(routed)
        plain = layers.adds(index, mx.array(routed[:1]))
        neurons = self._neurons(routed[:1])
        moments = Moments.empty(routed.shape[-1], neurons.count if neurons else 0, routed.shape[-1])
        positions = None
        for rows in batches(len(dense)):
            after = layers.run(index, mx.array(dense[rows]))
            out, x, big, inner = layers.open(index, mx.array(routed[rows]), neurons)
            dense[rows], routed[rows], inputs[rows], said[rows] = (np.array(each) for each in (after, out, x, big))
            if not has_small:
                continue
            positions = heard(layers, index + 1, after) if positions is None else positions
            weights, lost = positions / size(after), after - out
            if not plain:
                lost, loudness = layers.pull_back(index, mx.array(before[rows]), lost)
                weights = weights * loudness
            moments.add(x, inner, big + self.settings.compensation * lost, weights)
        if has_small:
            small = self._solve(moments, neurons)
            self._let_small_speak(small, routed, before, inputs, said, plain)

    def _neurons(self, h: NDArray[np.float32]) -> Neurons | None:
        """Those that small can copy."""
        _, x, *_ = self.layers.open(self.index, mx.array(h))
        found = name_neurons(self.layers.big(self.index), x)
        return found if found is not None and found.activation == self.activation else None

    def _solve(self, moments: Moments, neurons: Neurons | None) -> SmallFFN:
        linear = round(self.settings.linear_share * self.width)
        metric = self.state.load(f"metric-{self.index}")
        small = solve(moments, Copyable.of(neurons, moments.inputs), metric, self.width, linear, self.activation)
        for name, value in vars(small).items():
            self.state.save(f"small-{self.index}-{name}", value)
        return small

    def _let_small_speak(
        self,
        small: SmallFFN,
        routed: NDArray[np.float32],
        before: NDArray[np.float32],
        inputs: NDArray[np.float32],
        said: NDArray[np.float32],
        plain: bool,
    ) -> None:
        """Change the routed prefix where small was drawn."""
        random = np.random.default_rng([self.settings.seed, self.index])
        drawn = random.random((*routed.shape[:2], 1)) < self.settings.small_share
        for rows in batches(len(routed)):
            own = np.array(run(small, mx.array(inputs[rows]), self.activation))
            change = np.where(drawn[rows], own - said[rows], 0)
            if plain:
                routed[rows] += change
            else:
                spoken = mx.array(said[rows] + change)
                routed[rows] = np.array(self.layers.give(self.index, mx.array(before[rows]), spoken))


def run(small: SmallFFN, x: mx.array, activation: str = "silu") -> mx.array:
    """What a small FFN gives for ``x [..., inputs]``."""
    parts = {name: mx.array(value) for name, value in vars(small).items()}
    inner = ACTIVATIONS[activation](x @ parts["gate"].T + parts["gate_bias"]) * (x @ parts["up"].T + parts["up_bias"])
    return inner @ parts["down"].T + parts["down_bias"]


def _tensors(model: Model, index: int, state: State) -> dict[str, Tensor]:
    """A layer's small FFN by the model's names, read from ``state`` when it is loaded."""
    path = model.ffn_paths[index]
    found = {}
    for name in SmallFFN.__dataclass_fields__:
        part = f"{name.removesuffix('_bias')}_proj.{'bias' if name.endswith('_bias') else 'weight'}"
        found[f"{path}.small.{part}"] = _lazy(state, f"small-{index}-{name}")
    return found


def _lazy(state: State, name: str) -> Tensor:
    return Tensor(state.load(name).shape, "float32", lambda: mx.array(state.load(name)))


def _describe(
    model: Model, settings: Graft, windows: NDArray[np.integer], embedded: NDArray[np.float32]
) -> dict[str, Any]:
    """What a graft is of: a state with another description is another graft's. Vectors stand for all weights."""
    digest = hashlib.sha256(windows.tobytes())
    digest.update(embedded[0].tobytes())
    for name, array in checkpoint.parameters(model).items():
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        if array.ndim == 1:
            digest.update(np.array(array.astype(mx.float32)).tobytes())
    return {"settings": asdict(settings), "config": model.config.to_dict(), "inputs": digest.hexdigest()}
