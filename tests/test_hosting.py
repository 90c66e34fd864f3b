"""What an open pass is: routes reach the FFNs of the pass that they were given to, and nothing of it stays behind."""

import sys
import threading

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen3

from duo_mlx import bases, hosting
from duo_mlx.config import Config
from duo_mlx.errors import DuoError
from duo_mlx.ffn import DuoFFN
from duo_mlx.hosting import current, primitives, without
from duo_mlx.model import Model
from duo_mlx.open_layers import OpenLayers, can_open
from duo_mlx.routes import Route

LAYERS = 3
TOKENS = mx.array([[5, 2, 9, 1], [7, 7, 0, 3]])
QWEN = {
    "model_type": "duo",
    "base_model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "small_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "vocab_size": 40,
}


def filled(model, seed=0):
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def draw(array):
        scale = array.shape[-1] ** -0.5 if array.ndim > 1 else 0.2
        return mx.random.normal(array.shape, key=next(keys)) * scale + (array.ndim == 1)

    model.update(tree_map(draw, model.parameters()))
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def model():
    return filled(Model(Config.from_dict(QWEN)))


def test_a_duo_is_mlx_lm_s_own_model(model):
    assert isinstance(model, qwen3.Model) and isinstance(model.layers[0], qwen3.TransformerBlock)
    assert isinstance(model.layers[0].mlp.big, qwen3.MLP) and model.args.rope_theta == 1e4


def test_without_gives_the_base_back_with_the_same_arrays(model):
    base = without(model)
    assert type(base) is qwen3.Model and type(base.layers[0]) is qwen3.TransformerBlock
    assert not any(isinstance(module, DuoFFN) for module in base.modules())
    assert base.layers[1].mlp.up_proj.weight is model.layers[1].mlp.big.up_proj.weight
    assert mx.array_equal(base(TOKENS), model(TOKENS)).item()
    assert primitives(base(TOKENS)) == primitives(model(TOKENS))  # all big adds nothing to the graph
    assert isinstance(model.layers[0].mlp, DuoFFN)  # the model itself is as it was


def test_a_pass_ends_with_its_call(model):
    assert current() is None
    with model.opened(2, 4, routes=[0] * LAYERS):
        assert current() is not None
    assert current() is None


def test_an_exception_in_a_layer_ends_the_pass(model):
    def fail(index, run, h):
        if index == 1:
            raise RuntimeError("in the middle")
        return run(h)

    with pytest.raises(RuntimeError, match="in the middle"):
        model(TOKENS, routes=[Route.SKIP] * LAYERS, on_block=fail)
    assert current() is None
    assert mx.array_equal(model(TOKENS), without(model)(TOKENS)).item()


def test_a_call_within_a_call_has_routes_of_its_own(model):
    alone = [model(TOKENS, routes=[route] * LAYERS) for route in Route]
    inner = []

    def nested(index, run, h):
        if index == 1:
            inner.append(model(TOKENS, routes=[Route.SMALL] * LAYERS))
        return run(h)

    outer = model(TOKENS, routes=[Route.SKIP] * LAYERS, on_block=nested)
    assert mx.array_equal(outer, alone[Route.SKIP]).item() and mx.array_equal(inner[0], alone[Route.SMALL]).item()


def test_threads_have_routes_of_their_own(model):
    """Each thread waits in its first layer until the other one is there, and builds the rest after it."""
    alone = {route: np.array(model(TOKENS, routes=[route] * LAYERS)) for route in Route}
    barrier, found = threading.Barrier(len(Route)), {}

    def together(_, run, h):
        barrier.wait(timeout=60)
        return run(h)

    def work(route):
        with mx.stream(mx.cpu):
            found[route] = np.array(model(TOKENS, routes=[route] * LAYERS, on_block=together))

    threads = [threading.Thread(target=work, args=(route,)) for route in Route]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for route in Route:
        np.testing.assert_array_equal(found[route], alone[route])


def test_layers_run_one_by_one_and_their_children_at_once(model):
    assert can_open(model)
    layers = OpenLayers(model, TOKENS)
    h = layers.root
    for index in range(LAYERS - 1):
        h = layers.run(index, h, Route.BIG)
    children = layers.children(LAYERS - 1, h, {route: np.arange(len(h)) for route in Route})
    assert children.shape == (len(Route) * len(h), *h.shape[1:])
    for number, route in enumerate(Route):
        expected = model(TOKENS, routes=[Route.BIG] * (LAYERS - 1) + [route])
        logits = layers.logits(children[number * len(h) : (number + 1) * len(h)])
        np.testing.assert_allclose(np.array(logits), np.array(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_states_of_some_layers_are_those_of_the_whole_pass(model, start, cached):
    routes = [Route.BIG, Route.SMALL, Route.BIG]
    caches = [model.make_cache() if cached else None for _ in range(2)]
    for cache in caches if cached else ():
        mx.eval(model(TOKENS, cache, routes=routes))
    whole = model.states(TOKENS, caches[0], routes, "planned")
    before = model.states(TOKENS, caches[1], routes, "planned", 0, start) if start else None
    after = model.states(TOKENS, caches[1], routes, "planned", start, hidden=before)
    np.testing.assert_allclose(np.array(after), np.array(whole), rtol=0, atol=1e-5)
    logits = model.head(after)
    assert mx.allclose(logits, model.head(whole), rtol=0, atol=1e-5).item() and logits.shape == (2, 4, 40)


def test_an_architecture_that_mlx_lm_lacks_is_named():
    with pytest.raises(DuoError, match=r"^the installed mlx-lm has no architecture 'nothing'"):
        Model(Config.from_dict(QWEN | {"base_model_type": "nothing"}))


def test_a_base_without_a_known_ffn_is_named(monkeypatch):
    monkeypatch.setattr(hosting, "FFN_NAMES", ("feed_forward",))
    with pytest.raises(DuoError, match=r"^no Duo can be hosted in a qwen3: a layer has no FFN that this package knows"):
        Model(Config.from_dict(QWEN))


def test_layers_that_share_an_ffn_are_refused(monkeypatch):
    class Sharing(llama.Model):
        def __init__(self, args):
            super().__init__(args)
            self.model.layers[1]["mlp"] = self.model.layers[0]["mlp"]

    monkeypatch.setattr("duo_mlx.bases.classes", lambda _: (Sharing, llama.ModelArgs))
    with pytest.raises(DuoError, match=r"^no Duo can be hosted in a llama: layers share an FFN$"):
        Model(Config.from_dict(QWEN | {"base_model_type": "llama"}))


def test_skipping_whole_layers_is_refused_where_their_parts_are_not_known():
    config = QWEN | {"base_model_type": "gemma2", "query_pre_attn_scalar": 8, "skip_scope": "layer"}
    with pytest.raises(DuoError, match=r"skip_scope 'layer' is not known for a gemma2"):
        Model(Config.from_dict(config))


@pytest.mark.parametrize("strategy", ["auto", "dense", "sorted", "sync"])
def test_skipping_a_whole_layer_is_leaving_it_out_but_for_keys_and_values(strategy):
    """Tokens that skip keep their state; those that do not attend to all of them."""
    model = filled(Model(Config.from_dict(QWEN | {"skip_scope": "layer"})))
    routes = np.random.default_rng(3).integers(0, 3, (2, 4, LAYERS))
    whole, cache, one_by_one = model(TOKENS, routes=routes, strategy="dense"), model.make_cache(), []
    for place in range(4):
        step = routes[:, place : place + 1]
        one_by_one.append(model(TOKENS[:, place : place + 1], cache, routes=step, strategy=strategy))
    np.testing.assert_allclose(np.array(mx.concatenate(one_by_one, axis=1)), np.array(whole), rtol=0, atol=1e-5)
    alone = model(TOKENS[:, :1], routes=[Route.SKIP] * LAYERS)
    untouched = model.head(model.trunk.norm(model.embedding(TOKENS[:, :1])))
    np.testing.assert_allclose(np.array(alone), np.array(untouched), rtol=0, atol=1e-5)


def test_an_architecture_that_wants_another_package_is_refused_in_one_line(monkeypatch, capsys):
    """mlx-lm's module of OLMo 1 ends the process when it is imported without one."""
    monkeypatch.setitem(sys.modules, "hf_olmo", None)
    monkeypatch.delitem(sys.modules, "mlx_lm.models.olmo", raising=False)
    with pytest.raises(DuoError, match=r"^mlx-lm's olmo cannot be imported \(To run olmo install ai2-olmo") as error:
        bases.classes({"model_type": "olmo"})
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""
