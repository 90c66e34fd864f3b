"""transformers' models as Duos: big is the model itself, routes act per token, names lead there and back."""

import re
import threading
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlx_lm import utils as mlx_lm_utils
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from duo_mlx.convert import torch_names
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.tensors import Tensor, to_mlx, to_torch
from duo_mlx.convert.torch_host import ACTIVATIONS, TorchDuoFFN, decoder_layers, host, routed
from duo_mlx.convert.torch_names import plain, to_transformers
from duo_mlx.convert.torch_reference import AS_MLX_LM, TorchDuo, dense_model, quiet, reference_logits
from duo_mlx.errors import DuoError
from tests.convert.torch_kinds import BOTH, OPT, POST_NORM

TOKENS = torch.arange(3, 35).reshape(2, 16)
CONFIGS = {**{kind: {"model_type": kind, **keys} for kind, keys in BOTH.items()}, "opt": {"model_type": "opt", **OPT}}
CONFIGS["post-norm opt"] = {"model_type": "opt", **POST_NORM}
ROUTES = np.random.default_rng(0).integers(0, 3, (2, 16, 3))


@cache
def dense(kind):
    """The names and values of a checkpoint of random weights: those that transformers writes."""
    config = dict(CONFIGS[kind])
    torch.manual_seed(0)
    with quiet():
        made = AutoConfig.for_model(config.pop("model_type"), **config)
        model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for value in model.parameters():
            drawn = torch.randn_like(value)
            value.copy_(value + drawn / 5 if value.ndim == 1 else drawn / value.shape[-1] ** 0.5)
    tied = set(model.all_tied_weights_keys or ())
    state = {name: value.clone() for name, value in model.state_dict().items() if name not in tied}
    return revert_weight_conversion(model, state)


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def small_weights(layers=(0, 1, 2), width=24, bias=False, router=0, inputs=64):
    random = torch.Generator().manual_seed(1)
    shapes = {"small.gate_proj": (width, 64), "small.up_proj": (width, 64), "small.down_proj": (64, width)}
    shapes |= {"router": (router, inputs)} if router else {}
    weights = {}
    for layer in layers:
        for name, shape in shapes.items():
            path = f"model.layers.{layer}.mlp.{name}"
            weights[f"{path}.weight"] = torch.randn(shape, generator=random) / shape[1] ** 0.5
            if bias:
                weights[f"{path}.bias"] = torch.randn(shape[0], generator=random)
    return weights


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_big_is_transformers_own_model(kind):
    own = logits(dense_model(CONFIGS[kind], dense(kind)))
    duo = TorchDuo(CONFIGS[kind], dense(kind), small_weights())
    found, taken = duo.routed(TOKENS, torch.tensor([2, 2, 2]))
    assert torch.equal(found, own) and taken.unique().tolist() == [2]
    assert torch.equal(logits(duo.model), own)  # outside of any pass
    others = [duo.routed(TOKENS, torch.tensor(routes))[0] for routes in ([2, 1, 2], [2, 0, 2], [1, 1, 1], [0, 0, 0])]
    assert all((a - b).abs().max() > 0.01 for a in others for b in [own, *others] if a is not b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_small_ffn_is_gated_by_its_activation(activation):
    form = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + np.vectorize(__import__("math").erf)(x / 2**0.5)) / 2,
        "gelu_tanh": lambda x: x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "relu": lambda x: np.maximum(x, 0),
        "relu2": lambda x: np.maximum(x, 0) ** 2,
    }[activation]
    x = np.linspace(-3, 3, 50)
    np.testing.assert_allclose(ACTIVATIONS[activation](torch.tensor(x)).numpy(), form(x), atol=1e-12)


def by_hand(kind, parts, routes):
    """The dense model's logits, with each FFN's output replaced as it leaves."""
    model = dense_model(CONFIGS[kind], dense(kind))
    for layer, block in enumerate(decoder_layers(model)):
        path = f"model.layers.{layer}.mlp.small"
        weights = [(parts[f"{path}.{name}_proj.weight"], parts.get(f"{path}.{name}_proj.bias")) for name in
                   ("gate", "up", "down")]  # fmt: skip
        seen = []

        def choose(_, given, out, layer=layer, weights=weights, seen=seen):
            x = seen[0] if seen else given[0]
            gate, up, down = weights
            small = F.linear(F.relu(F.linear(x, *gate)) * F.linear(x, *up), *down)
            route = routes[..., layer].reshape(x.shape[:-1]).unsqueeze(-1)
            return (route == 2) * out + (route == 1) * small

        if hasattr(block, "mlp"):
            block.mlp.register_forward_hook(choose)
        else:
            block.fc1.register_forward_hook(lambda _, given, out, seen=seen: seen.append(given[0]))
            block.fc2.register_forward_hook(choose)
    return logits(model)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi", "opt", "post-norm opt"])  # the forms of blocks
@pytest.mark.parametrize("bias", [False, True])
def test_routes_of_tokens_act_as_computed_by_hand(kind, bias):
    parts = small_weights(bias=bias)
    config = CONFIGS[kind] | {"small_activation": "relu"}
    for routes in (ROUTES, np.zeros_like(ROUTES), np.ones_like(ROUTES)):
        found = reference_logits(config, {**dense(kind), **parts}, TOKENS.numpy(), routes)
        np.testing.assert_allclose(found, by_hand(kind, parts, torch.tensor(routes)), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "own"),
    [
        ({}, {}),
        ({"small_layers": [0, 2]}, {"layers": (0, 2)}),
        ({"small_bias": True}, {"bias": True}),
        ({"skip_scope": "layer"}, {}),
        ({"router_choices": "s-B"}, {"router": 3}),
        ({"router_choices": "sB", "small_bias": True, "router_bias": True}, {"router": 2, "bias": True}),
        ({"router_choices": "-B", "skip_scope": "layer"}, {"router": 2}),
        ({"router_choices": "-sB", "router_looks_ahead": True}, {"router": 3, "inputs": 128}),
    ],
)
def test_a_llama_is_the_readable_reference(changes, own):
    config = CONFIGS["llama"] | {"small_intermediate_size": 24, **changes}
    parts = small_weights(**own)
    reference = DuoModel(DuoConfig.from_dict(config)).eval()
    reference.load_state_dict(
        {re.sub(r"(mlp)\.(?=\w+_proj)", r"\1.big.", k): v for k, v in dense("llama").items()} | parts
    )
    duo = TorchDuo(config, dense("llama"), parts)
    for routes in [torch.tensor(ROUTES), torch.tensor([0, 1, 2]), *([None] if "router_choices" in changes else [])]:
        with torch.no_grad():
            expected, taken = reference.routed(TOKENS, routes)
        found, ours = duo.routed(TOKENS, routes)
        assert torch.equal(ours, taken) and (found - expected).abs().max() < 1e-4
    assert "router_choices" not in changes or len(ours.unique()) > 1


def canonical(kind):
    """mlx-lm's model of a checkpoint and its weights by mlx-lm's names."""
    model, arguments = mlx_lm_utils._get_classes(CONFIGS[kind])
    made = model(arguments.from_dict(CONFIGS[kind]))
    given = {name: to_mlx(value) for name, value in dense(kind).items()}
    if kind == "gpt2":  # checkpoints are written without a head
        given = {name.removeprefix("transformer."): value for name, value in given.items()}
    if kind == "gpt_oss":  # as published: outputs first
        split = re.compile(r"(gate_up|down)_proj$")
        given = {
            f"{name}.weight" if split.search(name) else name: value.swapaxes(1, 2) if split.search(name) else value
            for name, value in given.items()
        }
    weights = made.sanitize(given) if hasattr(made, "sanitize") else given
    made.load_weights(list(weights.items()))
    return made, weights


def hosted(weights):
    """A Duo's names of a base's weights."""
    return {re.sub(r"(\.\d+\.(?:mlp|block_sparse_moe))\.", r"\1.big.", name): value for name, value in weights.items()}


@pytest.mark.parametrize("kind", BOTH)
def test_mlx_lm_computes_what_the_reference_does(kind):
    theirs = logits(dense_model(CONFIGS[kind], dense(kind))).numpy()
    assert np.abs(np.array(canonical(kind)[0](mx.array(TOKENS.numpy()))) - theirs).max() < 1e-4


@pytest.mark.parametrize("kind", AS_MLX_LM)
def test_what_follows_mlx_lm_would_not_be_the_same_otherwise(kind, monkeypatch):
    ours = np.array(canonical(kind)[0](mx.array(TOKENS.numpy())))
    monkeypatch.delitem(AS_MLX_LM, kind)
    theirs = logits(dense_model(CONFIGS[kind], dense(kind))).numpy()
    assert 1e-4 < np.abs(ours - theirs).max() < 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", BOTH)
def test_canonical_names_and_layouts_are_undone(kind, dtype):
    weights = {name: Tensor.of(value).astype(dtype) for name, value in hosted(canonical(kind)[1]).items()}
    parts = {name: Tensor.of(to_mlx(value)) for name, value in small_weights().items()}
    assert sum(".big." in name for name in weights) >= 3
    found = to_transformers(CONFIGS[kind], weights | parts)
    expected = {**dense(kind), **small_weights()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        loaded = to_torch(tensor.load())
        assert tensor.shape == loaded.shape and tensor.dtype == str(loaded.dtype).removeprefix("torch."), name
        assert torch.equal(loaded, expected[name].to(loaded.dtype)), name


class Renaming:
    """A base that mlx-lm lacks."""

    def sanitize(self, weights):
        return {re.sub(r"\.(fc[12])\.", r".mlp.\1.", name): value for name, value in weights.items()}


def test_a_base_of_ones_own_is_undone_too():
    weights = Renaming().sanitize({name: Tensor.of(to_mlx(value)) for name, value in dense("opt").items()})
    assert any(".mlp.big.fc1." in name for name in hosted(weights))
    assert to_transformers(CONFIGS["opt"], hosted(weights), Renaming).keys() == dense("opt").keys()


def test_a_change_of_values_is_refused():
    class Adding(Renaming):
        def sanitize(self, weights):
            return {name: value + 1 if "norm" in name else value for name, value in weights.items()}

    weights = {name: Tensor.of(to_mlx(value)) for name, value in dense("llama").items()}
    with pytest.raises(DuoError, match="cannot be undone"):
        to_transformers(CONFIGS["llama"], weights, Adding)
    with pytest.raises(DuoError, match="weights of a llama cannot be undone"):
        to_transformers(CONFIGS["llama"], {**weights, "more.weight": weights["model.norm.weight"]})


def test_experts_routers_and_a_duos_cannot_be_told_apart_in_one_file():
    weights = {name: Tensor.of(value) for name, value in hosted(canonical("gpt_oss")[1]).items()}
    parts = {name: Tensor.of(to_mlx(value)) for name, value in small_weights(router=2).items()}
    assert "model.layers.0.mlp.big.router.weight" in weights
    with pytest.raises(DuoError, match="model.layers.0.mlp.router.weight is a weight of the Duo and"):
        to_transformers(CONFIGS["gpt_oss"] | {"router_choices": "sB"}, weights | parts)


def test_only_the_name_of_a_big_ffn_is_made_plain():
    assert plain("model.layers.0.mlp.big.router.weight") == "model.layers.0.mlp.router.weight"
    assert plain("model.big.weight") == "model.big.weight"


def test_whether_the_head_is_tied_is_said_by_the_weights_where_the_config_does_not():
    config = {key: value for key, value in CONFIGS["llama"].items() if key != "tie_word_embeddings"}
    tied = {name: value for name, value in dense("llama").items() if name != "lm_head.weight"}
    assert dense_model(config, tied).config.tie_word_embeddings
    assert not dense_model(config, dense("llama")).config.tie_word_embeddings
    assert "lm_head.weight" not in torch_names.checkpoint_shapes(config, tied)


def without(name):
    return {key: value for key, value in dense("llama").items() if key != name}


@pytest.mark.parametrize(
    ("config", "weights", "parts", "message"),
    [
        ({}, without("model.norm.weight"), {}, "llama: the reference lacks weights: model.norm.weight"),
        ({}, {**dense("llama"), "a.weight": torch.ones(1)}, {}, "has unknown weights: a.weight"),
        ({}, {**dense("llama"), "model.norm.weight": torch.ones(3)}, {}, "transformers cannot load the weights"),
        ({"model_type": "no such"}, {}, {}, "transformers cannot read a configuration of no such"),
        ({"model_type": "vit", "rope_scaling": None}, {}, {}, "no causal language model of type vit"),
        ({"hidden_size": "wide"}, {}, {}, "transformers cannot read a configuration of llama"),
        ({"small_activation": "sin"}, dense("llama"), {}, "small_activation is 'sin'"),
        ({}, dense("llama"), small_weights((3,)), "weights for layer 3, the last layer is 2"),
        ({}, dense("llama"), small_weights(router=2), "layer 0: the reference has unknown weights: router.weight"),
        ({"router_choices": "sB"}, dense("llama"), small_weights(), "layer 0: the reference lacks weights: router"),
        ({"router_choices": "sB"}, dense("llama"), small_weights(router=3), r"router.weight is \[3, 64\], not \[2, 64"),
        ({}, dense("llama"), {"model.norm.weight": torch.ones(1)}, "model.norm.weight is no weight of a small FFN"),
    ],
)
def test_what_cannot_be_a_reference_is_refused_in_one_line(config, weights, parts, message):
    with pytest.raises(DuoError, match=message) as caught:
        TorchDuo(CONFIGS["llama"] | config, weights, parts)
    assert "\n" not in str(caught.value)


def test_routes_that_fit_no_tokens_and_passes_without_any_are_refused():
    duo = TorchDuo(CONFIGS["llama"], dense("llama"), small_weights())
    with pytest.raises(DuoError, match=r"routes are for tokens \[2, 15\], its FFN got \[2, 16\]"):
        duo.routed(TOKENS, torch.tensor(ROUTES[:, 1:]))
    with pytest.raises(DuoError, match="no routes were given, and it has no router"):
        duo.routed(TOKENS)


@pytest.mark.parametrize(
    ("kind", "message"), [("bloom", "takes more than hidden states"), ("granitemoeshared", "more than one FFN"),
                          ("mamba", "no decoder layers with an FFN")]
)  # fmt: skip
def test_architectures_that_cannot_be_routed_are_refused(kind, message):
    keys = {
        "hidden_size": 64,
        "vocab_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "shared_intermediate_size": 8,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys, intermediate_size=96))
    with pytest.raises(DuoError, match=message):
        host(model, 0)
        logits(model)


def test_widths_are_one_a_layer():
    model = dense_model(CONFIGS["llama"], dense("llama"))
    with pytest.raises(DuoError, match="2 small FFNs are for 3 layers"):
        host(model, [8, 0])
    ffns = host(model, [8, 0, 4], "relu")
    assert [ffn.small and len(ffn.small.gate_proj.weight) for ffn in ffns] == [8, None, 4]
    assert "model.layers.2.mlp.small.down_proj.weight" in model.state_dict()
    assert all(isinstance(ffn, TorchDuoFFN) for ffn in ffns)


def test_passes_do_not_leak_into_each_other():
    duo = TorchDuo(CONFIGS["llama"], dense("llama"), small_weights())
    routes = [torch.tensor(each) for each in ([0, 1, 2], [1, 1, 1], [2, 0, 0], [2, 2, 2])]
    alone = [duo.routed(TOKENS, each)[0] for each in routes]
    found = {}

    def work(number):
        for _ in range(5):
            found[number] = duo.routed(TOKENS, routes[number])[0]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], alone[number]) for number in range(4))
    with pytest.raises(RuntimeError, match="in the middle"), routed(routes[0]), routed(routes[1]):
        raise RuntimeError("in the middle")
    assert torch.equal(logits(duo.model), alone[3])
