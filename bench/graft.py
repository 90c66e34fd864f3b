"""Grafts compared: how much each part of the method gives, on text that no graft has seen.

    python -m duo_mlx.bench.graft MODEL TEXT... --out graft.json

MODEL is a dense model, as ``duo-mlx convert --graft`` takes it. Calibration tokens are the beginning of the first
TEXT, held-out tokens the last 5 % of the others. Each method grafts on the same tokens; what it made is judged by nats
a token under fixed patterns. ``rough`` methods are the obvious one, written here on its own: the loudest 1/16 of the
neurons, and a ridge regression of the down projection in which all tokens and channels count alike.
"""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx import checkpoint
from duo_mlx.bench.record import HELD_OUT, LENGTH, check_output, held_out_windows, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.config import Config
from duo_mlx.convert import graft as grafting
from duo_mlx.convert.calibration import encode, read_texts
from duo_mlx.convert.dense import host
from duo_mlx.convert.graft import Graft, Grafted, graft
from duo_mlx.convert.graft.importance import measure_metrics
from duo_mlx.convert.graft.layers import Layers
from duo_mlx.convert.graft.solve import Copyable, Moments, SmallFFN
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.sorting import in_order
from duo_mlx.convert.source import Source, open_source
from duo_mlx.convert.tensors import Tensor
from duo_mlx.convert.tokenizer import write_tokenizer
from duo_mlx.model import Model
from duo_mlx.routes import parse_pattern
from duo_mlx.study.losses import token_losses

RIDGE = 1e-3


def rough(moments: Moments, big: Copyable, metric: Any, width: int, linear: int, activation: str) -> SmallFFN:  # noqa: ARG001
    """The obvious small FFN, in the place of `duo_mlx.convert.graft.solve.solve`."""
    first = moments.inputs + 1
    gram, cross = moments.gram[first:, first:], moments.cross[first:]
    ridge = RIDGE * float(np.diag(gram).mean())
    every = np.linalg.solve(gram + ridge * np.eye(len(gram)), cross)  # stands for big's own down projection
    loudness = np.sqrt(np.diag(gram)) * np.linalg.norm(every, axis=1)
    picked = np.argsort(-loudness)[:width]
    among = gram[np.ix_(picked, picked)].astype(np.float64)
    down = np.linalg.solve(among + RIDGE * np.trace(among) / width * np.eye(width), cross[picked])
    return SmallFFN(
        gate=big.gate[picked],
        gate_bias=big.gate_bias[picked],
        up=big.up[picked],
        up_bias=big.up_bias[picked],
        down=np.ascontiguousarray(down.T, np.float32),
        down_bias=np.zeros(cross.shape[1], np.float32),
    )


def equal_size(states: mx.array) -> mx.array:
    """Every token counts alike."""
    return mx.ones((*states.shape[:2], 1))


def equally_heard(layers: Layers, index: int, states: mx.array) -> mx.array:  # noqa: ARG001
    """So does every position."""
    return mx.ones((states.shape[1], 1))


def no_metric(layers: Layers, windows: Any, state: State, step: Any) -> None:  # noqa: ARG001
    """Every channel counts alike."""
    for index in range(len(layers)):
        state.save(f"metric-{index}", np.eye(layers.model.config.hidden_size))


def metric_of(measured: State) -> Callable[..., None]:
    """A measurement of metrics that takes those of ``measured``: they are the same whatever the method."""

    def copy(layers: Layers, windows: NDArray[np.integer], state: State, step: Callable[[], object]) -> None:
        if not measured.has("metric-0"):
            measure_metrics(layers, windows, measured, step)
        for index in range(len(layers)):
            state.save(f"metric-{index}", measured.load(f"metric-{index}"))

    return copy


ALIKE: dict[str, Callable[..., Any]] = {"size": equal_size, "heard": equally_heard}
PLAIN: dict[str, Callable[..., Any]] = ALIKE | {"measure_metrics": no_metric, "solve": rough}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Callable[..., Any]]]] = {
    "default": ({}, {}),
    **{f"nested, 1/{ratio:g} of big": ({"kind": "nested", "small_ratio": ratio}, {}) for ratio in (4 / 3, 2, 4)},
    "rough, big's output, dense prefix": ({"compensation": 0, "small_share": 0}, PLAIN),
    "rough, dense next state, random prefix": ({"compensation": 1}, PLAIN),
    "rough, mean of both, random prefix": ({"compensation": 0.5}, PLAIN),
    "rough, dense next state, all-small prefix": ({"compensation": 1, "small_share": 1}, PLAIN),
    "tokens count alike": ({}, ALIKE),
    "channels count alike": ({}, {"measure_metrics": no_metric}),
    "copied neurons only": ({"linear_share": 0}, {}),
    "3/4 linear neurons": ({"linear_share": 0.75}, {}),
    "linear neurons only": ({"linear_share": 1}, {}),
    "dense prefix": ({"small_share": 0}, {}),
    "no compensation": ({"compensation": 0}, {}),
    "half compensation": ({"compensation": 0.5}, {}),
    "full compensation": ({"compensation": 1}, {}),
}


def patterns(layers: int) -> dict[str, str]:
    """The fixed patterns that a graft is judged by; text as in ``--route``."""
    middle = layers - 10
    every = {"all big": "B" * layers, "all small": "s" * layers, "first and last big": "B" + "s" * (layers - 2) + "B"}
    every["alternating"] = ("Bs" * layers)[:layers]
    if middle > 0:
        every["first and last 5 big, alternating between"] = "B" * 5 + ("sB" * middle)[:middle] + "B" * 5
    return every


def losses(model: Model, grafted: Grafted, windows: NDArray[np.int32]) -> dict[str, float]:
    """Nats a token of each of `patterns` on ``windows [windows, tokens]``."""
    keys = {key: value for key, value in model.config.to_dict().items() if not key.startswith("small_")}
    made = Model(Config.from_dict(keys | grafted.config))
    whole = {name: Tensor.of(array) for name, array in checkpoint.parameters(model).items()}
    weights = in_order(whole, model, grafted.orders) | grafted.tensors
    made.load_weights([(name, tensor.load()) for name, tensor in weights.items()])
    layers = made.config.num_hidden_layers

    def loss(row: NDArray[np.int32], pattern: str) -> float:
        logits = made(mx.array(row[None, :-1]), routes=parse_pattern(pattern, layers))
        return float(token_losses(logits, row[1:]).mean())

    chosen = patterns(layers)
    return {name: float(np.mean([loss(row, pattern) for row in windows])) for name, pattern in chosen.items()}


def tokens_of(source: Source, texts: tuple[Path, ...], held_out: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Calibration tokens of the first text, and held-out windows ``[windows, LENGTH + 1]``, as many of each other."""
    read = read_texts(texts)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(source.checkpoint, Path(folder), source.config["vocab_size"])
        ids = [encode(Path(folder), source.config, [text]) for text in read]
    windows = held_out_windows(texts[1:] or texts, ids[1:] or ids, held_out)
    return ids[0][: round(len(ids[0]) * (1 - HELD_OUT))], windows


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tokens", type=click.IntRange(4096), default=20_480, help="Calibration tokens.")
@click.option("--held-out", type=click.IntRange(LENGTH), default=3072, help="Held-out tokens.")
@click.option("--method", "methods", multiple=True, type=click.Choice(list(METHODS)), help="[default: all]")
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--out", type=click.Path(path_type=Path), help="Write the result to a .json file.")
@click.option("--force", is_flag=True, help="Replace an existing --out.")
def command(
    model: Path,
    texts: tuple[Path, ...],
    tokens: int,
    held_out: int,
    methods: tuple[str, ...],
    seed: int,
    out: Path | None,
    force: bool,
) -> None:
    """Graft a dense MODEL by several methods and compare them on held-out text."""
    if out:
        check_output(out, force)
    source = open_source(model, graft=True)
    source.check()
    calibration, windows = tokens_of(source, texts, held_out)
    dense = host(source.tensors, source.config)
    results: dict[str, dict[str, float]] = {}
    names = " ".join([model.name, *(text.name for text in texts)])
    record = {
        "command": f"python -m duo_mlx.bench.graft {names} --tokens {tokens} --held-out {held_out} --seed {seed}",
        "system": system_record(),
        "patterns": patterns(dense.config.num_hidden_layers),
    }
    click.echo("nats a token: " + ", ".join(patterns(dense.config.num_hidden_layers)))
    with tempfile.TemporaryDirectory() as folder:
        measured = State(Path(folder) / "metrics", {})
        for number, name in enumerate(methods or METHODS):
            changes, parts = METHODS[name]
            settings = Graft(**changes, tokens=tokens, seed=seed)
            with ExitStack() as replaced:
                for part, other in ({"measure_metrics": metric_of(measured)} | parts).items():
                    where = f"{grafting.__name__}.kinds" if part == "solve" else grafting.__name__
                    replaced.enter_context(patch(f"{where}.{part}", other))
                made = graft(dense, calibration, settings, Path(folder) / str(number))
            results[name] = losses(dense, made, windows)
            click.echo(f"{name:44}" + "".join(f"{value:9.3f}" for value in results[name].values()))
            if out:  # after each, as a method takes minutes
                write_output(out, record | {"nats_per_token": results})


if __name__ == "__main__":
    run(command, "graft")
