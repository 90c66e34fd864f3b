"""Costs as they are counted: products and weights in graphs, arrays, peaks of memory, and bytes on the wire.

Nothing here knows the formulas of `duo_mlx.bench.growth`. Peaks and what processes exchange come from processes of
their own, which `together` starts.
"""

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import duo_mlx  # noqa: F401  (first, so that it loads OpenBLAS before mlx comes)

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from duo_mlx import checkpoint
from duo_mlx.bench.oracle import first_layers
from duo_mlx.bench.peer import filled_cache, whole_products
from duo_mlx.errors import DuoError
from duo_mlx.flops import products
from duo_mlx.model import Config, Model
from duo_mlx.open_layers import can_open
from duo_mlx.processes import Processes
from duo_mlx.routes import Route, Routes
from duo_mlx.study import oracle, search
from duo_mlx.study.committed import Token
from duo_mlx.study.limits import parse_limit
from duo_mlx.study.sequence import Question, Searcher
from duo_mlx.study.tree import Text, Walk, Work, layer_options
from duo_mlx.training.data import Data
from duo_mlx.training.optimizer import Moments, Schedule
from duo_mlx.training.passes import Passes
from duo_mlx.training.routing import RandomRouting
from duo_mlx.training.small import SmallLearns
from duo_mlx.training.start import learn
from duo_mlx.training.state import State
from duo_mlx.training.trainer import Settings, Trainer

BIG, SMALL, SKIP, DROPOUT = 0.5, 0.4, 0.1, 0.1  # `train routes`' own
MEMORY = 1 << 30
TIME_LIMIT = 600  # seconds of a process


def model_of(config: dict[str, Any]) -> Model:
    """A model of these sizes with random weights."""
    mx.random.seed(0)
    model = Model(Config.from_dict(config))
    mx.eval(model.parameters())
    return model


# --- graphs ----------------------------------------------------------------------------------------------------------


def drawn_graph(outputs: list[mx.array], **named: mx.array) -> str:
    """The graph of unevaluated arrays in DOT's language."""
    file = io.StringIO()
    mx.export_to_dot(file, *outputs, **named)
    return file.getvalue()


def decoding(model: Model, pattern: Routes, context: int) -> tuple[int, int, int]:
    """Weight bytes, FLOPs and cache bytes of one token by a pattern ``[layers]`` after ``context - 1`` others."""
    cache = filled_cache(model, context - 1, seed=0)
    token = mx.array([[1]])
    flops = products(lambda ids: model(ids, cache=filled_cache(model, context - 1, seed=0), routes=pattern), token)
    weights = checkpoint.parameters(model)
    logits = model(token, cache=cache, routes=pattern)
    read = set(re.findall(r'"([\w.]+\.weight)" ->', drawn_graph([logits], **weights)))
    row = model.embedding(token).nbytes  # beside the head, which is the same table
    mx.eval(logits)
    held = sum(2 * layer.keys[..., : layer.offset, :].nbytes for layer in cache)  # values are as large as keys
    return sum(weights[name].nbytes for name in read) + row, flops, held


def training(config: dict[str, Any], small_only: bool, sequences: int, length: int) -> dict[str, Any]:
    """What a step's gradients take.

    Returns:
        Parameters that are ``learned``, bytes of them and their ``moments``, ``flops``, products ``added`` where layers
        are computed twice, and the ``routes`` that were drawn, ``[tokens, layers]``.
    """
    flops, counts = 0, []
    for recompute in (False, True):
        trainer, state = trainer_of(config, sequences, length, recompute, small_only)
        windows, drawn = trainer.batch(0)
        gradients = partial(_gradients, trainer, drawn)
        ids, learned = mx.array(windows), state.moments.learned
        if not recompute:  # a graph with layers that are computed twice cannot be exported with shapes
            flops = products(gradients, ids, **learned)
        counts.append(drawn_graph(gradients(ids, **learned)).count('[label ="Matmul", '))
    return {
        "learned": sum(each.size for each in learned.values()),
        "moments": sum(each.nbytes for each in state.moments.arrays()),
        "flops": flops,
        "added": counts[1] - counts[0],
        "routes": drawn["routes"].reshape(-1, drawn["routes"].shape[-1]),
    }


def _gradients(trainer: Trainer, drawn: dict[str, NDArray[Any]], windows: mx.array, **learned: mx.array) -> list[Any]:
    """As `Trainer.gradients`, for a graph: nothing is evaluated."""

    def loss_of(learned: dict[str, mx.array]) -> mx.array:
        trainer.model.update(tree_unflatten(list(learned.items())))
        return trainer.stage.loss(trainer.model, windows, drawn).mean()

    loss, gradients = mx.value_and_grad(loss_of)(learned)
    return [loss, *gradients.values()]


def trainer_of(
    config: dict[str, Any], sequences: int, length: int, recompute: bool, small_only: bool = False
) -> tuple[Trainer, State]:
    """A trainer as `duo-mlx train` makes it, of random weights and tokens, and its first state."""
    model = model_of(config)
    kind = SmallLearns if small_only else RandomRouting
    stage = kind(len(model.layers), BIG, SMALL, SKIP, passes=Passes(DROPOUT, recompute))
    weights = checkpoint.parameters(model)
    learned = {name: each for name, each in weights.items() if stage.learns(name)}
    learn(model, set(learned))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 8 * length + 8).astype(np.int32)
    data = Data(ids, ids, [len(ids)], None)
    settings = Settings(Schedule(10, 1e-3, 0.1, 1), sequences, length, 0.1, 1.0, 0, 1, 1)
    processes = Processes()
    own = None if processes.rank else data  # the first process's windows reach the others
    trainer = Trainer(model, stage, settings, own, len(ids), data.starts(length), processes)
    state = State(0, Moments.of(learned))
    mx.eval(model.parameters(), state.moments.arrays())
    return trainer, state


# --- peaks, in processes of their own --------------------------------------------------------------------------------


def training_peak(config: dict[str, Any], sequences: int, length: int, recompute: bool) -> dict[str, Any]:
    """Peaks of forward and backward beyond parameters and moments, of a whole step, and of one of a short sequence."""
    trainer, state = trainer_of(config, sequences, length, recompute)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    gradients = trainer.gradients(state.moments.learned, *trainer.batch(0))
    mx.eval(*gradients)
    found = {"gradients": mx.get_peak_memory() - before}
    del gradients
    mx.reset_peak_memory()
    trainer.step(state)
    found["step"] = mx.get_peak_memory()
    del trainer, state
    short = trainer_of(config, 1, 2, recompute)
    mx.reset_peak_memory()
    short[0].step(short[1])
    return found | {"short": mx.get_peak_memory()}


def search_peak(config: dict[str, Any], tokens: int, rows: int) -> int:
    """The peak of a search of all patterns of big and small over one text, beyond the weights."""
    model = model_of(config)
    walk = _text(model, tokens, (Route.SMALL, Route.BIG), rows)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in walk.losses():
        pass
    return mx.get_peak_memory() - before


def exchanged(configs: list[dict[str, Any]], sequences: int, length: int, texts: int) -> dict[str, Any]:
    """What one of several processes gives to sums, sends, and searches.

    Returns:
        For each model the bytes ``summed`` and ``sent`` in one step (None where the system does not tell); and how many
        of so many texts this process searches.
    """
    steps = []
    for config in configs:
        trainer, state = trainer_of(config, sequences, length, recompute=False)
        trainer.processes.gather(b"ready")
        before = sent()
        with patch.object(mx.distributed, "all_sum", side_effect=mx.distributed.all_sum) as all_sum:
            trainer.step(state)
        after = sent()
        summed = sum(call.args[0].nbytes for call in all_sum.call_args_list)
        steps.append({"summed": summed, "sent": None if before is None or after is None else after - before})
    return {"steps": steps, "searched": _searched(configs[0], texts)}


def _searched(config: dict[str, Any], texts: int) -> int:
    """Texts that this process searches."""
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (texts, 5)).astype(np.int32)
    question = Question("sB", "shared", ("none",), 0, {}, {"name": "random", "sha256": ""})
    one = patch.object(Searcher, "sequence", autospec=True, side_effect=Searcher.sequence)
    with tempfile.TemporaryDirectory() as folder, one as searched:
        search.run(model_of(config), ids, question, Path(folder) / "oracle", "", MEMORY)
    return int(searched.call_count)


def sent() -> int | None:
    """Bytes that this process has written to its TCP connections; None where the system is not Linux."""
    if sys.platform != "linux":
        return None
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        try:
            number = int(entry.name)
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(number)) as connection:
                told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
        except OSError:  # it is closed by now, or no TCP
            continue
        waiting, given, again = struct.unpack_from("<I52xQQ", told, 144)  # notsent_bytes, bytes_sent, bytes_retrans
        total += waiting + given - again
    return total


def together(function: Callable[..., Any], *arguments: Any, processes: int = 1) -> list[Any]:
    """What a function of this module gives in new processes, which are connected where there are several, by rank.

    Raises:
        DuoError: one failed.
    """
    code = (
        "import sys, json; sys.modules['torch'] = None; from duo_mlx.bench import counted; "  # takes long to import
        "print(json.dumps(getattr(counted, sys.argv[1])(*json.loads(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, function.__name__, json.dumps(arguments)]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in _free_ports(processes)]))
        ring = {"MLX_HOSTFILE": str(hosts)} if processes > 1 else {}
        started = [
            subprocess.Popen(
                command,
                env=os.environ | ring | ({"MLX_RANK": str(rank)} if ring else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            ended = [process.communicate(timeout=TIME_LIMIT) for process in started]
        finally:
            for process in started:
                process.kill()
    for process, (_, said) in zip(started, ended, strict=True):
        if process.returncode:
            raise DuoError(f"{function.__name__}: a process failed: {' '.join(said.split())[-300:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def _free_ports(count: int) -> list[int]:
    with ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


# --- searches --------------------------------------------------------------------------------------------------------


def searching(model: Model, layers: int, choices: tuple[Route, ...], tokens: int, rows: int) -> Work:
    """Evaluations over a text in a search of all patterns of the first layers."""
    cut = first_layers(model, layers)
    with evaluations(cut, tokens) as work:
        for _ in _text(cut, tokens, choices, rows).losses():
            pass
    return work


def _text(model: Model, tokens: int, choices: tuple[Route, ...], rows: int) -> Walk:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens + 1)
    return Text(model, ids[:-1], ids[1:], layer_options(model, choices), rows)


def committed(model: Model, big: int) -> Work:
    """Evaluations for one token, after another, in the committed reading with exactly so many big layers."""
    options = layer_options(model, (Route.SMALL, Route.BIG))
    limit = parse_limit(str(big), model, 2)
    cache = filled_cache(model, 1, seed=0)
    wanted = partial(limit.reaches, layers=len(options), token=1, tokens=2)
    with evaluations(model, 1) as work:
        oracle.lowest(Token(model, cache, 1, 2, options, wanted=wanted), oracle.Space(model, options))
    return work


@contextmanager
def evaluations(model: Model, tokens: int) -> Iterator[Work]:
    """How often modules are evaluated on so many tokens, by the rows that go in; of an FFN, into its last product."""
    can_open(model)  # its trial is no evaluation of these
    own: Any = type(model.layers[0].self_attn)
    kinds = {id(model.table): "head"}
    kinds |= {id(layer.self_attn): "attention" for layer in model.layers}
    kinds |= {id(module.down_proj): "ffn" for ffn in model.ffns for module in (ffn.big, ffn.small)}
    work = Work()

    def counted(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def call(module: nn.Module, x: mx.array, *others: Any, **named: Any) -> mx.array:
            if kind := kinds.get(id(module)):
                setattr(work, kind, getattr(work, kind) + x.size // x.shape[-1] // tokens)
            return function(module, x, *others, **named)

        return call

    attention = patch.object(own, "__call__", counted(own.__call__))
    linear = patch.object(nn.Linear, "__call__", counted(nn.Linear.__call__))
    head = patch.object(nn.Embedding, "as_linear", counted(nn.Embedding.as_linear))
    with attention, linear, head, whole_products():  # or some would pass `linear` by
        yield work
