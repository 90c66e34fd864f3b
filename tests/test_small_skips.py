"""Layers in which small means skip: every way to carry out such routes gives what skip gives."""

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx import cost
from duo_mlx.config import Config
from duo_mlx.convert import references
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.flops import flops
from duo_mlx.open_layers import OpenLayers
from duo_mlx.router import Follow
from duo_mlx.routes import Route
from duo_mlx.study import tree
from duo_mlx.training.passes import Passes

SCOPES = ["ffn", "layer"]
SKIPS = [1, 2]
TOKENS = np.random.default_rng(0).integers(0, 32, (2, 9))
ROUTES = np.random.default_rng(1).integers(0, 3, (2, 9, 4)).astype(np.uint8)


@pytest.fixture(params=SCOPES)
def model(tiny_model, request):
    return tiny_model(skip_scope=request.param, small_skips=SKIPS)


def by_hand(routes):
    """Skip for small in the two layers."""
    found = np.array(routes)
    found[..., SKIPS] = np.where(found[..., SKIPS] == Route.SMALL, Route.SKIP, found[..., SKIPS])
    return found


def test_routes_are_realised(model):
    np.testing.assert_array_equal(model.config.realised(ROUTES), by_hand(ROUTES))
    assert [model.config.small_means(layer) for layer in range(4)] == [1, 0, 0, 1]
    assert all(("small" in ffn) == (ffn.index not in SKIPS) for ffn in model.ffns)


@pytest.mark.parametrize("known_by", ["host", "device", "router"])
@pytest.mark.parametrize("strategy", ["dense", "planned", "sorted", "sync", "masked", "auto"])
@pytest.mark.parametrize("cuts", [(9,), (4, 1, 1, 3)])
def test_small_is_skip_there(model, strategy, known_by, cuts):
    if strategy == "planned" and known_by == "router":
        pytest.skip("planned needs routes that are known before the pass")
    expected = model(mx.array(TOKENS), routes=by_hand(ROUTES), strategy="dense")
    cache, found, start = model.make_cache(), [], 0
    for count in cuts:
        part = ROUTES[:, start : start + count]
        given = {"host": lambda p: p, "device": mx.array, "router": Follow}[known_by](part)
        tokens = mx.array(TOKENS[:, start : start + count])
        found.append(model(tokens, cache, routes=given, strategy=strategy))
        start += count
    np.testing.assert_allclose(np.array(mx.concatenate(found, axis=1)), np.array(expected), atol=1e-5)


def test_one_pattern_for_all_tokens(model):
    tokens = mx.array(TOKENS)
    for strategy in ("dense", "planned", "sorted"):
        small, meant = (model(tokens, routes=routes, strategy=strategy) for routes in ([1, 1, 1, 1], [1, 0, 0, 1]))
        np.testing.assert_allclose(np.array(small), np.array(meant), atol=1e-5)


def test_the_oracle_has_no_small_beside_skip(model):
    options = tree.layer_options(model, tuple(Route))
    assert options[0] == (0, 1, 2) and options[1] == (0, 2)
    assert tree.layer_options(model, (Route.SMALL, Route.BIG))[1] == (1, 2)


def test_an_open_layer_gives_the_input_for_small(model):
    layers = OpenLayers(model, mx.array(TOKENS[:1]))
    h = mx.random.normal((3, 9, model.config.hidden_size), key=mx.random.key(0))
    kept = {Route.SKIP: np.arange(3), Route.SMALL: np.array([0, 2]), Route.BIG: np.array([1])}
    found = layers.children(1, h, kept)
    assert found.shape[0] == 6
    np.testing.assert_allclose(np.array(found[3:5]), np.array(found[:3][mx.array([0, 2])]), atol=1e-6)
    np.testing.assert_allclose(np.array(found[5]), np.array(layers.run(1, h, Route.BIG)[1]), atol=1e-5)


def test_costs_are_those_of_skip(model):
    for table in (flops(model)(9), cost.weight_bytes(model), cost.cache_bytes(model, 9)):
        np.testing.assert_array_equal(table.by_route[SKIPS, Route.SMALL], table.by_route[SKIPS, Route.SKIP])
        assert (table.by_route[[0, 3], Route.SMALL] >= table.by_route[[0, 3], Route.SKIP]).all()


def test_pytorch_has_the_same_meaning(model):
    torch = pytest.importorskip("torch")
    from duo_mlx import checkpoint

    weights = {
        name: Tensor(value.shape, "float32", lambda value=value: value)
        for name, value in checkpoint.parameters(model).items()
    }
    theirs, taken = references.made(model.config.to_dict(), weights).routed(torch.tensor(TOKENS), torch.tensor(ROUTES))
    np.testing.assert_allclose(np.array(model(mx.array(TOKENS), routes=ROUTES)), theirs.numpy(), atol=1e-4)
    np.testing.assert_array_equal(taken.numpy(), ROUTES)


def test_it_is_kept_in_config_json(model):
    again = Config.from_dict(model.config.to_dict())
    assert again == model.config and again.small_skips == (1, 2) and again.to_dict()["small_skips"] == (1, 2)


def test_a_mixture_refuses(model):
    with pytest.raises(DuoError, match="a mixture of routes is not known for a model with small_skips"):
        Passes().mixture(model, mx.array(TOKENS), (0, 1, 2), lambda *_: None)


@pytest.mark.parametrize("value", [[4], [-1], "1", [True], 1])
def test_they_are_layer_numbers(tiny_config, value):
    with pytest.raises(DuoError, match=r"^config\.json: small_skips must be a list of layer numbers from 0 to 3$"):
        Config.from_dict(tiny_config(small_skips=value))
