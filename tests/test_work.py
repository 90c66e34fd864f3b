"""What decoding a token takes: kernels against the graphs of real passes, bytes against real arrays."""

import io
import re
from threading import Thread

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import quantize_model

from duo_mlx import checkpoint, conditional, cost, cpu, dispatches, work
from duo_mlx.errors import DuoError
from duo_mlx.kernels import launch, selfcheck, verdicts
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import Route
from tests.architectures import ARCHITECTURES
from tests.test_architectures import duo_config as architecture

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "small_intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "router_choices": "-sB",
}
CASES = {  # of a Llama
    "plain": {},
    "untied, biases": {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "biases of small": {"small_bias": True},
    "a layer without small": {"small_layers": [0]},
    "skip_scope layer": {"skip_scope": "layer"},
}


BASES = {
    "qwen3": {"head_dim": 32, "max_position_embeddings": 64, "rope_theta": 1e4, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 32},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 64,
        "n_ctx": 64,
        "num_key_value_heads": 2,
        "layer_norm_epsilon": 1e-5,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
UNKNOWN_FFN = ("olmoe",)  # which the strategies with kernels of their own do not take


def made(bits=32, **changes):
    return work.imagined(ModelArgs.from_dict(SHAPE | changes), bits)


def of_base(base, bits=16):
    return made(bits, base_model_type=base, **BASES[base])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Graphs as MLX builds them for a GPU: its fast operations are one primitive each, launches are counted.

    Gives the list of launches.
    """
    launches = []

    def execute(launched):
        launches.append(launched.kernel)
        outputs = [mx.zeros(shape, dtype) for _, shape, dtype in launched.outputs]
        mx.eval(outputs)
        return mx.depends(outputs, [array for _, array in launched.inputs])

    def dequantize(packed, scales, biases, bits, **_):
        out = mx.zeros((*packed.shape[:-1], packed.shape[-1] * 32 // bits), scales.dtype)
        mx.eval(out)
        return mx.abs(mx.depends([out], [packed, scales, biases])[0])

    def attend(queries, keys, values, **_):
        return mx.depends([mx.abs(queries)], [keys, values])[0]

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "dequantize", dequantize)
    monkeypatch.setattr(mx.fast, "rms_norm", lambda x, *_: mx.abs(x))
    monkeypatch.setattr(mx.fast, "layer_norm", lambda x, *_: mx.abs(x))
    monkeypatch.setattr(mx.fast, "rope", lambda x, *_, **__: mx.abs(x))
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(launch, "execute", execute)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)  # what was evaluated would leave the graph
    monkeypatch.setattr(selfcheck, "verdict", lambda *_: verdicts.Verdict(True))
    monkeypatch.setattr(selfcheck, "router_verdict", lambda *_: verdicts.Verdict(True))
    return launches


def kernels(model, strategy, route, launches, monkeypatch):
    """Kernels of one decoding step, counted in the graph of its whole pass."""
    shape, dtype = (1, model.config.num_key_value_heads, 256, 32), model.dtype
    cache = model.make_cache()
    for layer in cache:
        layer.keys, layer.values, layer.offset = mx.zeros(shape, dtype), mx.zeros(shape, dtype), 5
        mx.eval(layer.keys, layer.values)
    launches.clear()
    read = []

    def answer(array):
        read.append(array)
        return (
            np.full((1, 1), route) if strategy == "sync" else np.array([route == Route.SKIP, route == Route.SMALL], int)
        )

    monkeypatch.setattr(conditional, "read", answer)
    routes = np.full(model.config.num_hidden_layers, route, np.uint8) if strategy == "planned" else model.router()
    if strategy != "planned":
        mx.eval(routes.offsets)
    logits = model(mx.array([[1]]), cache=cache, routes=routes, strategy=strategy)[:, -1]
    token = mx.argmax(logits - mx.logsumexp(logits, keepdims=True), axis=-1)
    file = io.StringIO()
    mx.export_to_dot(file, token, *read)
    text = file.getvalue()
    primitives = re.findall(r'(\d+) \[label ="([^"]*)", shape=rectangle\]', text)
    inputs = re.findall(r'^"\w+" -> (\d+)', text, re.MULTILINE)
    assert len(read) == (len(model.layers) if strategy in ("sync", "sorted") else 0)
    # a concatenation copies its inputs one by one
    return len(launches) + sum(
        inputs.count(node) if name == "Concatenate" else name not in dispatches.VIEWS for node, name in primitives
    )


@pytest.mark.parametrize(
    ("strategy", "bits"),
    [(each, bits) for each in work.STRATEGIES for bits in (32, 16, 4) if (each, bits) != ("masked", 4)],
)
@pytest.mark.parametrize("case", CASES)
def test_dispatches_are_those_of_the_graph(case, strategy, bits, as_on_a_gpu, monkeypatch):
    model = made(bits, **CASES[case])
    found = work.dispatches(model, strategy)
    for route in Route:
        assert found.of(np.full(2, route)) == kernels(model, strategy, route, as_on_a_gpu, monkeypatch)


@pytest.mark.parametrize("strategy", work.STRATEGIES)
@pytest.mark.parametrize("base", BASES)
def test_dispatches_of_any_base_are_those_of_the_graph(base, strategy, as_on_a_gpu, monkeypatch):
    model = of_base(base)
    assert (strategy in work.usable(model)) == (base not in UNKNOWN_FFN or strategy not in ("fused", "masked"))
    if strategy not in work.usable(model):
        with pytest.raises(DuoError, match=f"'{strategy}': .*OlmoeSparseMoeBlock is not known .*; use planned, sync"):
            work.works(model, {}, 9, [strategy])
        return
    found = work.dispatches(model, strategy)
    for route in Route:
        assert found.of(np.full(2, route)) == kernels(model, strategy, route, as_on_a_gpu, monkeypatch)


def test_dispatches_of_a_llama_by_hand():
    attention = 1 + 3 + 2 + 2 + 1 + 1 + 1  # norm; q, k, v; two rotations; two writes; attention; o; residual
    module = 1 + 2 + 1 + 1 + 1  # norm; gate, up; activation; down; residual
    outside = 1 + 1 + 1 + 3  # embedding; norm; head; logsumexp, its subtraction and argmax
    planned, fused = (work.dispatches(made(16), strategy) for strategy in ("planned", "fused"))
    assert planned.fixed == fused.fixed == outside
    assert work.dispatches(made(4), "planned").fixed == outside + 3  # the embedding's row is put together
    np.testing.assert_array_equal(planned.by_route, [[attention + 2, attention + module, attention + module]] * 2)
    np.testing.assert_array_equal(fused.by_route, [[attention + 1 + 3 + 1] * 3] * 2)  # router and two halves of FFNs


def test_counting_leaves_mlx_as_it_was(monkeypatch):
    before = mx.fast.rms_norm, mx.fast.rope, mx.dequantize, conditional.read, launch.execute
    work.dispatches(made(4), "fused")
    monkeypatch.setattr(dispatches, "_Step", None)  # so that the next count fails in the middle
    with pytest.raises(TypeError):
        work.dispatches(made(4), "fused")
    assert (mx.fast.rms_norm, mx.fast.rope, mx.dequantize, conditional.read, launch.execute) == before


def test_another_thread_computes_while_one_counts(tiny_model, monkeypatch):
    model, found = tiny_model(), []
    expected = model(mx.array([[1, 2, 3]]))
    mx.eval(expected)

    def compute():
        found.append(mx.array_equal(model(mx.array([[1, 2, 3]])), expected).item())

    class Interrupted(dispatches._Step):
        def block(self, *given):
            if not found:
                thread = Thread(target=compute)
                thread.start()
                thread.join()
            return super().block(*given)

    monkeypatch.setattr(dispatches, "_Step", Interrupted)
    work.dispatches(made(), "planned")
    assert found == [True]


def test_what_a_cpu_replaced_is_counted_as_on_a_gpu(tiny_model):
    model = tiny_model()
    expected = model(mx.array([[1]]))
    counted = work.dispatches(work.without_weights(model), "planned")
    cpu.quicken(model, fuse=True)
    np.testing.assert_array_equal(work.dispatches(work.without_weights(model), "planned").by_route, counted.by_route)
    assert mx.allclose(model(mx.array([[1]])), expected, atol=1e-5)  # nothing that is compiled has kept a stand-in


@pytest.mark.parametrize("kind", [kind for kind, row in ARCHITECTURES.items() if not row.refused])
def test_kernels_of_every_architecture(kind):
    """A skipped FFN starts fewer kernels than big, and every layer of the same make as many as another."""
    model = work.imagined(ModelArgs.from_dict(architecture(kind)))
    if kind == "iquestloopcoder":
        with pytest.raises(DuoError, match=f"kernels of a {kind} cannot be counted layer by layer"):
            work.dispatches(model, "planned")
        return
    table = work.dispatches(model, "planned")
    assert table.fixed >= 6  # embedding, norm, head, and three to sample
    assert (table.by_route[:, Route.SKIP] < table.by_route[:, Route.BIG]).all()
    assert (table.by_route[:, Route.SMALL] - table.by_route[:, Route.SKIP] >= 3).all()


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("case", CASES)
def test_bytes_of_an_imagined_model_are_those_of_arrays(case, bits):
    args = ModelArgs.from_dict(SHAPE | CASES[case])
    before = mx.get_active_memory()
    imagined = work.imagined(args, bits)
    planned, asked = (work.reads(imagined, strategy, 9) for strategy in ("planned", "sync"))
    assert mx.get_active_memory() - before < 10_000  # nothing was computed
    model = Model(args)
    model.set_dtype(mx.float32 if bits == 32 else mx.bfloat16)
    if bits < 16:
        mx.eval(model.parameters())
        model, _ = quantize_model(model, {}, 64, bits)
    mx.eval(model.parameters())
    for found, by_router in ((planned, False), (asked, True)):
        expected = cost.weight_bytes(model, by_router) + cost.cache_bytes(model, 9)
        assert found.fixed == expected.fixed
        np.testing.assert_array_equal(found.by_route, expected.by_route)


def test_what_a_group_does_not_divide_stays_in_float():
    odd, even = (made(4, small_intermediate_size=width).layers[0].mlp.small.down_proj for width in (40, 64))
    assert odd.weight.dtype == mx.bfloat16 and even.weight.dtype == mx.uint32
    with pytest.raises(DuoError, match="4 bits: hidden size 48 is no multiple of the group size 64"):
        made(4, hidden_size=48)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_what_strategies_read_that_learn_the_route_late(skip_scope):
    model = made(skip_scope=skip_scope)
    sizes = {name: value.nbytes for name, value in checkpoint.parameters(model).items()}
    late = {strategy: work.reads(model, strategy, 9).by_route for strategy in ("fused", "masked", "sorted", "dense")}
    asked = work.reads(model, "sync", 9).by_route
    big, small = (
        sum(size for name, size in sizes.items() if f"layers.0.mlp.{which}." in name) for which in ("big", "small")
    )
    for strategy in ("fused", "masked", "sorted"):
        np.testing.assert_array_equal(late[strategy][:, Route.SMALL :], asked[:, Route.SMALL :])
        np.testing.assert_array_equal(late[strategy][:, Route.SKIP], asked[:, Route.BIG] - big)
    np.testing.assert_array_equal(late["dense"], np.tile(asked[:, [Route.BIG]] + small, 3))


def test_works_are_expectations_and_count_waits():
    model = made()
    pattern = np.array([Route.BIG, Route.SMALL])
    mixes = {"pattern": work.shares(pattern), "half": np.array([0, 0.5, 0.5])}
    found = work.works(model, mixes, 9)
    assert list(found) == list(work.STRATEGIES)
    for strategy, each in found.items():
        assert each["pattern"] == each["half"]  # the layers are alike
        assert each["pattern"].bytes == work.reads(model, strategy, 9).of(pattern)
        assert each["pattern"].dispatches == work.dispatches(model, strategy).of(pattern)
        assert each["pattern"].waits == (2 if strategy in ("sync", "sorted") else 0)


def test_a_model_without_routers_gets_them_for_its_projection():
    plain = work.without_weights(Model(ModelArgs.from_dict(SHAPE | {"router_choices": ""})))
    three_rows = 3 * 64 * 4
    by_host, asked = (work.reads(plain, strategy, 9).by_route for strategy in ("planned", "sync"))
    np.testing.assert_array_equal(asked - by_host, np.full((2, 3), three_rows))
    chosen = made(router_choices="sB").layers[0].mlp.router.weight
    assert chosen.shape == (2, 64)  # what a model has is kept


def test_masked_takes_no_quantised_model():
    with pytest.raises(
        DuoError, match="'masked': MLX's masked product has no quantised form; use planned, fused, sync"
    ):
        work.works(made(4), {}, 9, ["masked"])
    with pytest.raises(DuoError, match="'auto' cannot be projected; there are planned"):
        work.works(made(4), {}, 9, ["auto"])
