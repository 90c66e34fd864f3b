"""One contract for every architecture in the table: a Duo of big FFNs alone is the base, and routes do their work.

A row's model is built once; pytest runs all tests of one row before the next.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from zlib import crc32

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner import linear_to_lora_layers
from mlx_lm.utils import quantize_model

from duo_mlx import checkpoint, cost
from duo_mlx.config import Config
from duo_mlx.errors import DuoError
from duo_mlx.hosting import primitives, without
from duo_mlx.model import Model
from duo_mlx.open_layers import can_open
from duo_mlx.routes import Route
from tests.architectures import ARCHITECTURES, INSIDE, Architecture, modules

TOKENS = 11
PROMPTS = [[3, 4, 5], [9, 8, 7, 6, 5, 4, 3]]
CHUNKS = (4, 1, 3, 3)
HOSTED = [kind for kind, row in ARCHITECTURES.items() if not row.refused]
REFUSED = [kind for kind, row in ARCHITECTURES.items() if row.refused]


def duo_config(kind: str) -> dict[str, Any]:
    """A row's config.json as a Duo's."""
    own = {"model_type": "duo", "base_model_type": kind, "small_intermediate_size": 32}
    return ARCHITECTURES[kind].config | own


def made(kind: str) -> Model:
    """A row's Duo with random weights."""
    model = Model(Config.from_dict(duo_config(kind)))
    keys = iter(mx.random.split(mx.random.key(0), 2000))

    def draw(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        scale = array.shape[-1] ** -0.5 if array.ndim > 1 else 0.2
        return mx.random.normal(array.shape, key=next(keys)) * scale + (array.ndim == 1)

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


@dataclass
class Hosted:
    """A row with its Duo, and what several tests compare with."""

    kind: str
    row: Architecture
    model: Model
    base: Any
    tokens: mx.array
    routes: np.ndarray  # random, one for each token and layer

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @cached_property
    def expected(self) -> mx.array:
        """The base's logits."""
        return self.base(self.tokens)

    @cached_property
    def routed(self) -> mx.array:
        """The logits of `routes` in one pass of the strategy dense."""
        return self.model(self.tokens, routes=self.routes, strategy="dense")

    def in_chunks(self, model: Any, cuts: tuple[int, ...], routes: np.ndarray | None = None, **named: Any) -> mx.array:
        """Logits of passes over ``cuts`` tokens each, with a cache."""
        cache, logits, start = self.model.make_cache(), [], 0
        for cut in cuts:
            if routes is not None:
                named["routes"] = routes[:, start : start + cut]
            logits.append(model(self.tokens[:, start : start + cut], cache=cache, **named))
            start += cut
        return mx.concatenate(logits, axis=1)

    def caches_exactly(self) -> bool:
        """Whether the base's passes with a cache give the numbers of its whole pass."""
        return close(self.in_chunks(self.base, (1,) * TOKENS), self.expected)


@pytest.fixture(scope="module", params=HOSTED)
def hosted(request: pytest.FixtureRequest) -> Hosted:
    model = made(request.param)
    random = np.random.default_rng(0)
    tokens = mx.array(random.integers(3, model.config.vocab_size, (2, TOKENS)))
    routes = random.integers(0, 3, (2, TOKENS, model.config.num_hidden_layers))
    return Hosted(request.param, ARCHITECTURES[request.param], model, without(model), tokens, routes)


def close(ours: mx.array, theirs: mx.array) -> bool:
    """Whether two arrays of logits agree up to 1e-4 of the largest one."""
    ours, theirs = possible(ours), possible(theirs)
    return mx.allclose(ours, theirs, rtol=0, atol=1e-4 * mx.abs(theirs).max().item()).item()


def possible(logits: mx.array) -> mx.array:
    """Logits with 0 for the tokens that a base rules out."""
    return mx.where(logits == -mx.inf, 0, logits)


def same(ours: mx.array, theirs: mx.array) -> bool:
    """Whether two arrays have the same bits."""
    return mx.array_equal(ours, theirs).item()


def test_all_big_is_the_base(hosted):
    assert mx.isfinite(possible(hosted.expected)).all().item() and possible(hosted.expected).std().item() > 1e-3
    assert same(hosted.model(hosted.tokens), hosted.expected)
    assert primitives(hosted.model(hosted.tokens)) == primitives(hosted.base(hosted.tokens))


@pytest.mark.parametrize("cuts", [CHUNKS, (1,) * TOKENS], ids=["chunks", "one by one"])
def test_all_big_is_the_base_with_a_cache(hosted, cuts):
    assert same(hosted.in_chunks(hosted.model, cuts), hosted.in_chunks(hosted.base, cuts))


def test_every_strategy_gives_what_dense_gives(hosted):
    model, layers = hosted.model, hosted.layers
    mixed = np.arange(layers) % 3
    whole = [np.full(layers, Route.SMALL), np.full(layers, Route.SKIP), mixed]
    for routes in (*whole, hosted.routes):
        dense = model(hosted.tokens, routes=routes, strategy="dense")
        assert not close(dense, hosted.expected)
        for strategy in ("planned", "sorted", "sync"):
            assert close(model(hosted.tokens, routes=routes, strategy=strategy), dense), strategy
    for strategy in ("sorted", "sync"):  # the host does not know these routes
        assert close(model(hosted.tokens, routes=mx.array(hosted.routes), strategy=strategy), hosted.routed), strategy


def test_rows_of_a_batch_do_not_meet(hosted):
    for row in range(2):
        alone = hosted.model(hosted.tokens[row : row + 1], routes=hosted.routes[row : row + 1])
        assert close(alone, hosted.routed[row : row + 1])


def test_decoding_with_routes_is_the_whole_pass(hosted):
    cuts = (5, *(1,) * (TOKENS - 5))
    cached = hosted.in_chunks(hosted.model, cuts, hosted.routes)
    if hosted.caches_exactly():
        assert hosted.row.caches and close(cached, hosted.routed)
    else:  # the base itself computes something else with a cache
        assert not hosted.row.caches
        assert close(cached, hosted.in_chunks(hosted.model, cuts, hosted.routes, strategy="dense"))


@pytest.mark.parametrize("bits", [4, 8])
def test_all_big_is_the_base_when_quantised(hosted, bits):
    model = made(hosted.kind)
    if not hosted.row.quantises:
        with pytest.raises(TypeError, match="to_quantized"):
            quantize_model(without(model), {}, 32, bits)
        return
    quantised, config = quantize_model(model, {}, 32, bits)
    names = {name for name, value in checkpoint.parameters(quantised).items() if name.endswith("scales")}
    assert any(".big." in name for name in names) and config["quantization"]["bits"] == bits
    base = without(quantised)
    assert same(quantised(hosted.tokens), base(hosted.tokens))
    assert not same(quantised(hosted.tokens), hosted.expected)
    dense = quantised(hosted.tokens, routes=hosted.routes, strategy="dense")
    assert close(quantised(hosted.tokens, routes=hosted.routes, strategy="sorted"), dense)


def test_a_saved_model_loads_with_and_without_this_package(hosted, tmp_path):
    checkpoint.save(tmp_path, duo_config(hosted.kind), checkpoint.parameters(hosted.model))
    ours = checkpoint.read_model(tmp_path)
    assert same(ours(hosted.tokens), without(ours)(hosted.tokens)) and close(ours(hosted.tokens), hosted.expected)
    assert close(ours(hosted.tokens, routes=hosted.routes), hosted.routed)
    stock, _ = mlx_lm_utils.load_model(tmp_path, trust_remote_code=True)
    assert same(stock(hosted.tokens), ours(hosted.tokens))


def outcome(tool: Callable[..., Any], *args: Any) -> Any:
    """What a tool of mlx-lm gives, or the error of one that a base does not support."""
    try:
        return tool(*args)
    except (AttributeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def batch(model: Any, tokenizer: Any) -> list[list[int]]:
    """The tokens that mlx-lm's batch generation says."""
    return mlx_lm.batch_generate(model, tokenizer, PROMPTS, max_tokens=5, return_token_ids=True).token_ids


def lora(model: Any, base_name: Callable[[str], str]) -> mx.array:
    """Logits after one step of mlx-lm's LoRA training whose matrices were fused; they begin by their names."""
    names = set(checkpoint.parameters(model))
    tokens = mx.array(PROMPTS[1:])
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), {"rank": 2, "scale": 2.0, "dropout": 0.0})
    start = [
        (name, mx.random.normal(value.shape, scale=0.1, key=mx.random.key(crc32(base_name(name).encode()))))
        for name, value in tree_flatten(model.trainable_parameters())
        if "lora_a" in name
    ]
    model.update(tree_unflatten(start))

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(model)
    optim.SGD(1.0).update(model, gradients)
    fused = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(fused))
    assert start and set(checkpoint.parameters(model)) == names
    return model(tokens)


def test_stock_tools_give_what_they_give_for_the_base(hosted, tmp_path, write_tokenizer):
    """Where a tool fails for the base, it fails for the Duo in the same way."""
    checkpoint.save(tmp_path, duo_config(hosted.kind), checkpoint.parameters(hosted.model))
    write_tokenizer(tmp_path)
    stock, tokenizer = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    tokenizer._eos_token_ids = set()
    base = without(stock)
    said = [list(mlx_lm.stream_generate(model, tokenizer, "w1 w2 w9", max_tokens=5)) for model in (stock, base)]
    assert len({tuple(response.token for response in each) for each in said}) == 1 and len(said[0]) == 5
    assert outcome(batch, stock, tokenizer) == outcome(batch, base, tokenizer)
    untrained = stock(mx.array(PROMPTS[1:]))
    theirs = outcome(lora, base, str)
    ours = outcome(lora, stock, stock.base_name)
    assert ours == theirs if isinstance(theirs, str) else close(ours, theirs) and not close(ours, untrained)


def test_the_table_says_whether_layers_run_one_by_one(hosted):
    assert can_open(hosted.model) == hosted.row.opens


def test_bytes_fall_from_big_to_skip(hosted):
    table = cost.weight_bytes(hosted.model)
    for layer, costs in enumerate(table.by_route):
        big = hosted.model.ffns[layer].big
        assert costs[Route.BIG] - costs[Route.SMALL] == cost.active_bytes(big) - cost.active_bytes(
            hosted.model.ffns[layer].small
        )
        assert costs[Route.SMALL] > costs[Route.SKIP] and cost.active_bytes(big) > 0
        experts = [part for part in big.modules() if isinstance(part, SwitchLinear)]
        total = sum(value.nbytes for value in checkpoint.parameters(big).values())
        assert (cost.active_bytes(big) < total) == bool(experts)
        if experts:
            assert 0 < cost.chosen_experts(big) < experts[0].weight.shape[0]
    cached = [cost.cache_bytes(hosted.model, context).of(np.full(hosted.layers, Route.BIG)) for context in (4, 8)]
    assert 0 <= cached[0] <= cached[1]
    routes = np.full((1, hosted.layers), Route.BIG)
    assert cost.pass_cache_bytes(hosted.model)(routes, 8) == cached[1]


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if ARCHITECTURES[kind].raises])
def test_a_refused_architecture_is_named_with_the_reason(kind):
    with pytest.raises(DuoError, match=f"^no Duo can be hosted in a {kind}: {ARCHITECTURES[kind].raises}"):
        Model(Config.from_dict(duo_config(kind)))


def test_every_module_of_mlx_lm_has_a_row():
    """A module that a newer mlx-lm brings must get one: `docs/architectures.md` says how."""
    assert sorted(modules() - INSIDE - set(ARCHITECTURES)) == []
    assert modules() > INSIDE
    assert set(ARCHITECTURES) - modules() == {
        "mistral",
        "opt",
    }  # mlx-lm takes mistral for a llama; duo_mlx/bases has opt
