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
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import checkpoint
from duo_mlx.convert.graft.importance import heard, measure_metrics, size
from duo_mlx.convert.graft.kinds import Kind, Nested, Own, Small
from duo_mlx.convert.graft.layers import Layers, batches
from duo_mlx.convert.graft.neurons import active_width, name_neurons
from duo_mlx.convert.graft.solve import Moments
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.graft.survey import neurons_of, survey
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.forms import form, unknown
from duo_mlx.model import Model

WINDOW = 256  # tokens
RATIOS = {"nested": 2.0, "own": 16.0}  # big's width over small's where nobody says
SMALL = [f"{name}_proj.{part}" for name in ("gate", "up", "down") for part in ("weight", "bias")]
LEAST = 16 * WINDOW


@dataclass(frozen=True)
class Graft:
    """How a dense model is grafted."""

    kind: str = "own"  # or "nested"
    small_ratio: float | None = None  # big's width over small's; None: `RATIOS`
    small_layers: tuple[int, ...] | None = None  # layers that get a small FFN; None: all
    tokens: int = 20_000  # calibration tokens, at most
    seed: int = 0
    linear_share: float = 0.5  # of the neurons of an own small FFN
    compensation: float = 0.25  # share of the routed prefix's error that a small FFN is to take back
    small_share: float = 0.5  # probability of small in the routed prefix

    def __post_init__(self) -> None:
        if self.kind not in RATIOS:
            raise DuoError(f"--small-kind is {self.kind!r}; it must be {' or '.join(RATIOS)}")
        if self.small_ratio is not None and not self.small_ratio > 1:
            raise DuoError(f"--small-ratio is {self.small_ratio:g}; it must be more than 1")
        if self.tokens < LEAST:
            raise DuoError(f"--calibration-tokens is {self.tokens}; it must be at least {LEAST}")


class Grafted(NamedTuple):
    """What a graft made."""

    tensors: dict[str, Tensor]  # weights of small by the model's names, in float32
    config: dict[str, Any]  # what config.json gains
    orders: dict[int, NDArray[np.intp]]  # by layer, in which big's neurons are to be put; empty: they stay


def graft(
    model: Model,
    ids: NDArray[np.integer],
    settings: Graft,
    work: Path,
    progress: Callable[[int, int], object] = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Grafted:
    """Make the small FFNs of a dense model.

    Args:
        model: a Duo of the dense model without small FFNs (``small_layers`` is empty). A layer's weights are read when
            its turn comes, if they are loaded lazily; they may be quantised.
        ids: token ids ``[tokens]`` of the calibration text.
        settings: how to graft.
        work: a directory for what is done so far; the same call resumes there. The tensors are read from it.
        progress: is called with the steps that are done and all steps.
        note: is told if a graft is resumed.

    Raises:
        DuoError: the text is too short, a layer does not exist, the model's layers cannot be run one by one, small FFNs
            cannot be nested in its big ones, or ``work`` is another graft's.
    """
    count = model.config.num_hidden_layers
    chosen = tuple(range(count)) if settings.small_layers is None else settings.small_layers
    if wrong := [layer for layer in chosen if not 0 <= layer < count]:
        raise DuoError(f"--small-layers names layer {wrong[0]}, but the {count} layers are 0 to {count - 1}")
    kind = settings.kind
    if kind == "nested":
        for index in chosen:
            _require_nesting(model, index)
    ratio = settings.small_ratio or RATIOS[kind]
    wide = min(active_width(model.ffns[index].big, model.config.hidden_size) for index in chosen)
    if wide // ratio < 2:
        raise DuoError(f"--small-ratio {ratio:g} leaves {wide // ratio:.0f} of {wide} neurons")
    windows = cut(ids[: settings.tokens], model.config.base)
    layers = Layers(model, WINDOW)
    embedded = layers.embed(windows)
    state = State(work, _describe(model, settings, windows, embedded))
    total, done = (4 if kind == "nested" else 3) * count, 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    if state.has("metric-0"):  # the last that is measured
        done = 2 * count
    else:
        measure_metrics(layers, windows, state, step)
    has = tuple(index in chosen for index in range(count))
    made: Kind
    if kind == "nested":
        if state.has("widths"):
            done += count
        else:
            survey(layers, windows, has, ratio, state, step)
        made = Nested(tuple(state.load("widths").tolist()), state)
    else:
        made = Own(has, int(wide // ratio), _activation(layers, windows), settings.linear_share, state)
    first = max((layer for layer in range(count + 1) if state.has(f"dense-{layer}")), default=0)
    if not state.has(f"dense-{first}"):
        state.save("routed-0", embedded)
        state.save("dense-0", embedded)
    elif first:
        note(f"resuming the graft in {work} at layer {first} of {count}")
    done += first
    for index in range(first, count):
        _Layer(layers, index, settings, made, state).graft()
        step()
    solved = [index for index in range(count) if made.width(index)]
    return Grafted(
        {name: tensor for index in solved for name, tensor in _tensors(model, index, state).items()},
        made.config(),
        {index: state.load(f"order-{index}") for index in solved} if kind == "nested" else {},
    )


def _require_nesting(model: Model, index: int) -> None:
    """Refuse an FFN whose neurons cannot be sorted.

    Raises:
        DuoError: its form is not known, or it is quantised: columns of packed weights cannot change places.
    """
    big = model.ffns[index].big
    if form(big) is None:
        raise DuoError(f"--small-kind nested: layer {index}: {unknown(big)}; use --small-kind own")
    if any("scales" in part for part in big.modules()):
        raise DuoError(
            f"--small-kind nested: layer {index} is quantised, so its neurons cannot be sorted; use --small-kind own, "
            "or graft the model in float and quantise it with --bits"
        )


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
    kind: Kind
    state: State

    def graft(self) -> None:
        """Solve the layer's small FFN and carry both prefixes on, from ``state`` and to it."""
        state, index = self.state, self.index
        dense, routed = state.load(f"dense-{index}"), state.load(f"routed-{index}")
        with self.layers.in_float32(index):
            self._carry_on(dense, routed)
        state.save(f"routed-{index + 1}", routed)
        state.save(f"dense-{index + 1}", dense)
        state.drop(f"routed-{index}")
        state.drop(f"dense-{index}")

    def _carry_on(self, dense: NDArray[np.float32], routed: NDArray[np.float32]) -> None:
        layers, index, kind = self.layers, self.index, self.kind
        before, inputs, said = routed.copy(), np.empty_like(routed), np.empty_like(routed)
        plain = layers.adds(index, mx.array(routed[:1]))
        neurons = kind.copies(neurons_of(layers, index, routed[:1]))
        moments: Moments | None = None
        positions = None
        for rows in batches(len(dense)):
            after = layers.run(index, mx.array(dense[rows]))
            out, x, big, inner = layers.open(index, mx.array(routed[rows]), neurons)
            dense[rows], routed[rows], inputs[rows], said[rows] = (np.array(each) for each in (after, out, x, big))
            if not kind.width(index):
                continue
            positions = heard(layers, index + 1, after) if positions is None else positions
            weights, lost = positions / size(after), after - out
            if not plain:
                lost, loudness = layers.pull_back(index, mx.array(before[rows]), lost)
                weights = weights * loudness
            seen = kind.seen(x)
            moments = moments or Moments.empty(seen.shape[-1], neurons.count if neurons else 0, routed.shape[-1])
            moments.add(seen, inner, big + self.settings.compensation * lost, weights)
        if moments is not None:
            small = kind.solve(index, moments, neurons)
            for name, value in small.tensors().items():
                self.state.save(f"small-{index}-{name}", value)
            self._let_small_speak(small, routed, before, inputs, said, plain)

    def _let_small_speak(
        self,
        small: Small,
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
            own = np.array(small(mx.array(inputs[rows])))
            change = np.where(drawn[rows], own - said[rows], 0)
            if plain:
                routed[rows] += change
            else:
                spoken = mx.array(said[rows] + change)
                routed[rows] = np.array(self.layers.give(self.index, mx.array(before[rows]), spoken))


def _tensors(model: Model, index: int, state: State) -> dict[str, Tensor]:
    """A layer's small FFN by the model's names, read from ``state`` when it is loaded."""
    path = model.ffn_paths[index]
    return {
        f"{path}.small.{name}": _lazy(state, f"small-{index}-{name}")
        for name in SMALL
        if state.has(f"small-{index}-{name}")
    }


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
