"""Tiny models and measures that the test modules share, as fixtures that hand out functions.

How long hypothesis looks for trouble at night: ``pytest tests/convert --hypothesis-profile nightly``.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores, of which each would take all
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import duo_mlx  # noqa: F401  (before mlx, so that it loads OpenBLAS first)

# isort: split
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from duo_mlx import _blas, checkpoint, cpu
from duo_mlx.cpu import products
from duo_mlx.kernels import launch, verdicts
from duo_mlx.model import Model, ModelArgs

settings.register_profile("nightly", max_examples=4000)

TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 24,
    "small_intermediate_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32,
}

WORDS = ["<unk>", "</s>", *(f"w{number}" for number in range(30))]


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights by name that keep activations near 1; no norm is all ones and no bias all zeros."""
    random = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        draw = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            draw = 1 + draw / 5
        elif len(shape) == 1:
            draw = draw / 5
        else:
            draw = draw / shape[-1] ** 0.5
        weights[name] = draw.astype(np.float32)
    return weights


@pytest.fixture
def blas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[_blas.Loaded | None], None]]:
    """``blas(loaded)``: what OpenBLAS there is, as `duo_mlx.cpu.products` sees it."""

    def set_to(loaded: _blas.Loaded | None) -> None:
        monkeypatch.setattr(_blas, "preload", lambda: loaded)
        products._pieces.cache_clear()

    yield set_to
    products._pieces.cache_clear()


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    """``tiny_config(**changes)``: a config.json's keys; a value of None leaves the key out."""

    def make(**changes: Any) -> dict[str, Any]:
        return {key: value for key, value in (TINY | {"model_type": "duo"} | changes).items() if value is not None}

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., dict[str, Any]]) -> Callable[..., Model]:
    """``tiny_model(seed=0, **changes)``: a model with random weights; asked again it is the same object."""
    made: dict[str, Model] = {}

    def make(seed: int = 0, **changes: Any) -> Model:
        key = repr((seed, sorted(changes.items())))
        if key not in made:
            model = Model(ModelArgs.from_dict(tiny_config(**changes)))
            shapes = {name: value.shape for name, value in tree_flatten(model.parameters())}
            weights = random_weights(shapes, seed)
            model.load_weights([(name, mx.array(value)) for name, value in weights.items()])
            mx.eval(model.parameters(), model(mx.array([[0]])))  # the pass also settles rotary tables
            cpu.quicken(model)
            made[key] = model
        return made[key]

    return make


@pytest.fixture(scope="session")
def llama_twin() -> Callable[..., llama.Model]:
    """``llama_twin(model, module="big")``: mlx-lm's llama with a Duo model's own weights and that module as its FFN."""

    def make(model: Model, module: str = "big") -> llama.Model:
        config = {name: getattr(model.args, name) for name in llama.ModelArgs.__dataclass_fields__}
        if module == "small":
            config["intermediate_size"] = model.config.small_intermediate_size
        twin = llama.Model(llama.ModelArgs(**config | {"model_type": "llama"}))
        weights = dict(tree_flatten(model.parameters()))
        other = {"big": ".small.", "small": ".big."}[module]
        twin.load_weights([(k.replace(f"mlp.{module}.", "mlp."), v) for k, v in weights.items() if other not in k])
        mx.eval(twin(mx.array([[0]])))
        return twin

    return make


@pytest.fixture(scope="session")
def in_passes() -> Callable[..., np.ndarray]:
    """``in_passes(model, tokens, routes, cuts, known_by, strategy)``: logits of passes over ``cuts`` tokens each.

    ``cuts`` None is a single pass without a cache. ``known_by`` is "host" (NumPy routes) or "device" (`mx.array`).
    """

    def run(
        model: Model,
        tokens: np.ndarray,
        routes: np.ndarray,
        cuts: tuple[int, ...] | None = None,
        known_by: str = "host",
        strategy: str = "auto",
        cache: list[Any] | None = None,
    ) -> np.ndarray:
        hand_over = {"host": np.asarray, "device": mx.array}[known_by]
        if cuts is None:
            return np.array(model(mx.array(tokens), routes=hand_over(routes), strategy=strategy))
        cache = model.make_cache() if cache is None else cache
        parts, start = [], 0
        for cut in cuts:
            stop = start + cut
            part = routes if routes.ndim == 1 else routes[:, start:stop]
            logits = model(mx.array(tokens[:, start:stop]), cache=cache, routes=hand_over(part), strategy=strategy)
            parts.append(np.array(logits))
            start = stop
        assert start == tokens.shape[1]
        return np.concatenate(parts, axis=1)

    return run


@pytest.fixture(scope="session")
def write_tokenizer() -> Callable[[Path], None]:
    """``write_tokenizer(directory)``: tokenizer files of a vocabulary of 32 words, ``<unk> </s> w0 w1 ...``."""

    def write(directory: Path) -> None:
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(directory / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "unk_token": "<unk>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    return write


@pytest.fixture(scope="session")
def saved(
    tiny_model: Callable[..., Model],
    tiny_config: Callable[..., dict[str, Any]],
    write_tokenizer: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., tuple[Path, Model]]:
    """``saved(**changes)``: the model directory of a tiny model, not to be changed, and that model."""
    made: dict[str, tuple[Path, Model]] = {}

    def make(**changes: Any) -> tuple[Path, Model]:
        key = repr(sorted(changes.items()))
        if key not in made:
            directory, model = tmp_path_factory.mktemp("model"), tiny_model(**changes)
            checkpoint.save(directory, tiny_config(eos_token_id=1, **changes), checkpoint.parameters(model))
            write_tokenizer(directory)
            made[key] = directory, model
        return made[key]

    return make


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The emulator of Metal in tests/kernels/emulator.py, which see; kernels it compiled are kept in pytest's cache."""
    spec = importlib.util.spec_from_file_location("emulator", Path(__file__).parent / "kernels" / "emulator.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    compiler = module.compiler()
    if compiler is None:
        pytest.skip("no C++ compiler to emulate Metal with")
    emulator = module.Emulator(compiler, request.config.cache.mkdir("emulator"))
    yield emulator
    emulator.close()


@pytest.fixture(scope="session")
def verdicts_kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where what self-checks find in the emulator is kept for the session, so that each is made once."""
    return tmp_path_factory.mktemp("verdicts")


@pytest.fixture
def emulated(emulator: Any, monkeypatch: pytest.MonkeyPatch, verdicts_kept: Path) -> Iterator[Any]:
    """The emulator, fresh, in which Metal kernels run during a test."""
    emulator.reset()
    monkeypatch.setattr(launch, "execute", emulator.execute)
    monkeypatch.setattr(launch, "unavailable", lambda: None)
    monkeypatch.setenv(verdicts.CACHE, str(verdicts_kept))
    verdicts.record.cache_clear()
    yield emulator
    verdicts.record.cache_clear()


@pytest.fixture(autouse=True)
def _emulate_fused(request: pytest.FixtureRequest) -> None:
    """Every test of a ``strategy`` meets ``fused`` in the emulator."""
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("strategy") == "fused":
        request.getfixturevalue("emulated")
