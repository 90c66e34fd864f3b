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
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from duo_mlx.bench.record import HELD_OUT, LENGTH, check_output, held_out_windows, run, write_output
from duo_mlx.bench.system import system_record
from duo_mlx.convert import graft as grafting
from duo_mlx.convert.calibration import encode, read_texts
from duo_mlx.convert.graft import Graft, graft
from duo_mlx.convert.graft.importance import measure_metrics
from duo_mlx.convert.graft.layers import Dense, attend
from duo_mlx.convert.graft.solve import Moments, Projection, SmallFFN
from duo_mlx.convert.graft.state import State
from duo_mlx.convert.source import Source, open_source
from duo_mlx.convert.tensors import Tensor
from duo_mlx.convert.tokenizer import write_tokenizer

RIDGE = 1e-3


def rough(moments: Moments, gate: Projection, up: Projection, metric: Any, width: int, linear: int) -> SmallFFN:  # noqa: ARG001
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
        gate=gate.weight[picked],
        gate_bias=gate.bias[picked],
        up=up.weight[picked],
        up_bias=up.bias[picked],
        down=np.ascontiguousarray(down.T, np.float32),
        down_bias=np.zeros(cross.shape[1], np.float32),
    )


def equal_weights(states: mx.array, *_: object) -> mx.array:
    """Every token counts alike."""
    return mx.ones((*states.shape[:2], 1))


def no_metric(dense: Dense, windows: Any, state: State, step: Any) -> None:  # noqa: ARG001
    """Every channel counts alike."""
    for index in range(dense.config.num_hidden_layers):
        state.save(f"metric-{index}", np.eye(dense.config.hidden_size))


def metric_of(measured: State) -> Callable[..., None]:
    """A measurement of metrics that takes those of ``measured``: they are the same whatever the method."""

    def copy(dense: Dense, windows: NDArray[np.integer], state: State, step: Callable[[], object]) -> None:
        if not measured.has("metric-0"):
            measure_metrics(dense, windows, measured, step)
        for index in range(dense.config.num_hidden_layers):
            state.save(f"metric-{index}", measured.load(f"metric-{index}"))

    return copy


PLAIN: dict[str, Callable[..., Any]] = {"token_weights": equal_weights, "measure_metrics": no_metric, "solve": rough}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Callable[..., Any]]]] = {
    "default": ({}, {}),
    "rough, big's output, dense prefix": ({"compensation": 0, "small_share": 0}, PLAIN),
    "rough, dense next state, random prefix": ({"compensation": 1}, PLAIN),
    "rough, mean of both, random prefix": ({"compensation": 0.5}, PLAIN),
    "rough, dense next state, all-small prefix": ({"compensation": 1, "small_share": 1}, PLAIN),
    "tokens count alike": ({}, {"token_weights": equal_weights}),
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


def losses(dense: Dense, smalls: dict[str, Tensor], windows: NDArray[np.int32]) -> dict[str, float]:
    """Nats a token of each of `patterns` on ``windows [windows, tokens]``."""
    embedded = dense.embed(windows[:, :-1])
    layers = dense.config.num_hidden_layers
    chosen = patterns(layers)
    states = {name: [mx.array(row)[None] for row in embedded] for name in chosen}
    for index in range(layers):
        layer = dense.layer(index)
        visible = dense.visible(layer, windows.shape[1] - 1)
        small = _small(smalls, index)
        for name, pattern in chosen.items():
            for row, h in enumerate(states[name]):
                middle = attend(layer, h, visible)
                x = layer.post_attention_layernorm(middle)
                states[name][row] = middle + (layer.mlp.big(x) if pattern[index] == "B" else grafting.run(small, x))
            mx.eval(states[name])
    weight, head = dense.head()

    def loss(row: int, h: mx.array) -> float:
        logits = mx.fast.rms_norm(h[0], weight, dense.config.rms_norm_eps) @ head.T
        return float(nn.losses.cross_entropy(logits, mx.array(windows[row, 1:]), reduction="mean"))

    return {name: float(np.mean([loss(row, h) for row, h in enumerate(rows)])) for name, rows in states.items()}


def _small(smalls: dict[str, Tensor], index: int) -> SmallFFN:
    def part(name: str) -> NDArray[np.float32]:
        return np.array(smalls[f"model.layers.{index}.mlp.small.{name}"].load())

    return SmallFFN(*(part(f"{name}_proj.{kind}") for name in ("gate", "up", "down") for kind in ("weight", "bias")))


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
    dense = Dense(source.tensors, source.config)
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
            settings = Graft(tokens=tokens, seed=seed, **changes)
            with ExitStack() as replaced:
                for part, other in ({"measure_metrics": metric_of(measured)} | parts).items():
                    replaced.enter_context(patch(f"{grafting.__name__}.{part}", other))
                smalls, _ = graft(source.tensors, source.config, settings, calibration, Path(folder) / str(number))
            results[name] = losses(dense, smalls, windows)
            click.echo(f"{name:44}" + "".join(f"{value:9.3f}" for value in results[name].values()))
            if out:  # after each, as a method takes minutes
                write_output(out, record | {"nats_per_token": results})


if __name__ == "__main__":
    run(command, "graft")
