"""The command ``duo-mlx convert`` and its sources, as fixtures that hand out functions."""

import json
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import pytest
from click.testing import CliRunner, Result

from duo_mlx import checkpoint, shards
from duo_mlx.cli import main
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError


@pytest.fixture(scope="session")
def invoke() -> Callable[..., Result]:
    """``invoke(*arguments)``: the command's result."""
    return lambda *arguments: CliRunner().invoke(main, ["convert", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture(scope="session")
def succeed(invoke: Callable[..., Result]) -> Callable[..., Result]:
    """``succeed(*arguments)``: the result of a command that does what it is told."""

    def run(*arguments: object) -> Result:
        done = invoke(*arguments)
        assert done.exit_code == 0, done.output
        return done

    return run


@pytest.fixture(scope="session")
def fails(invoke: Callable[..., Result]) -> Callable[..., Result]:
    """``fails(line, *arguments)``: the result of a command that refuses with one line, which holds ``line``."""

    def run(line: str, *arguments: object) -> Result:
        done = invoke(*arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert line in done.stderr
        return done

    return run


@pytest.fixture
def as_typed(monkeypatch):
    """The command line of the process is ``duo-mlx as typed``, whatever the tests were called with."""
    monkeypatch.setattr(sys, "argv", ["duo-mlx", "as", "typed"])


@pytest.fixture
def text(tmp_path):
    """A text of 700 words that the tiny tokenizer knows."""
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"w{number * number % 29}" for number in range(700)))
    return file


@pytest.fixture
def dense(tiny_model, llama_twin, tiny_config, write_tokenizer, tmp_path):
    """``dense(dtype="float32", weights={}, **config)``: a llama's directory in shards; ``weights`` replaces some."""

    def make(dtype="float32", weights=None, **changes):
        directory = tmp_path / "dense"
        directory.mkdir(exist_ok=True)
        sizes = {
            key: value for key, value in changes.items() if key in ("hidden_size", "intermediate_size", "mlp_bias")
        }
        found = checkpoint.parameters(llama_twin(tiny_model(**sizes)))
        found = {name: value.astype(getattr(mx, dtype)) for name, value in found.items()} | (weights or {})
        shards.write(directory, shards.held(found), limit=8000, metadata={"format": "pt"})
        changes = {"model_type": "llama", "small_intermediate_size": None, "tie_word_embeddings": True} | changes
        (directory / "config.json").write_text(json.dumps(tiny_config(**changes)))
        write_tokenizer(directory)
        return directory

    return make


@pytest.fixture
def graft(monkeypatch):
    """The stand-in for the graft; what it was called with is in its ``calls``, ``fail`` is raised before layer 2."""
    fake = types.ModuleType("duo_mlx.convert.graft")
    fake.calls, fake.fail = [], None

    @dataclass(frozen=True)
    class Graft:
        kind: str = "own"
        small_ratio: float | None = None
        small_layers: tuple[int, ...] | None = None
        tokens: int = 20000
        seed: int = 0

        def __post_init__(self):
            if (self.small_ratio or 0) > 1000:
                raise DuoError("--small-ratio: no neuron would be left")

    def make(model, ids, settings, work, progress, _):
        work.mkdir(exist_ok=True)
        resumed = len(list(work.iterdir()))
        fake.calls.append((settings, ids, resumed))
        weights = checkpoint.parameters(model)
        layers, width = (
            model.config.num_hidden_layers,
            int(model.config.intermediate_size // (settings.small_ratio or 16)),
        )
        chosen = range(layers) if settings.small_layers is None else settings.small_layers
        smalls = {}
        for layer in range(layers):
            if layer == 2 and fake.fail:
                raise fake.fail
            (work / str(layer)).touch()
            progress(layer + 1, layers)
            if layer not in chosen:
                continue
            for kind in ("gate", "up", "down"):
                big = weights[f"model.layers.{layer}.mlp.big.{kind}_proj.weight"].astype(mx.float32)
                small = big[:, :width] if kind == "down" else big[:width]
                prefix = f"model.layers.{layer}.mlp.small.{kind}_proj"
                smalls[f"{prefix}.weight"] = Tensor.of(small)
                smalls[f"{prefix}.bias"] = Tensor.of(mx.full(small.shape[:1], 0.1))
        extra = {"small_intermediate_size": width, "small_bias": True, "small_layers": settings.small_layers}
        return types.SimpleNamespace(tensors=smalls, config=extra, orders={})

    fake.Graft, fake.graft = Graft, make
    monkeypatch.setitem(sys.modules, "duo_mlx.convert.graft", fake)
    return fake
