"""transformers' models as Duos: big is the model itself, and routes act per token."""

import math
import re
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from duo_mlx.config import Config
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.torch_host import ACTIVATIONS, TorchDuoFFN, decoder_layers, host, routed
from duo_mlx.convert.torch_reference import TorchDuo, dense_model, reference_logits
from duo_mlx.errors import DuoError
from tests.convert.torch_kinds import BOTH, CONFIGS, HOSTED, TOKENS, dense, logits, small_weights

ROUTES = np.random.default_rng(0).integers(0, 3, (2, 16, 3))


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in BOTH.keys() - HOSTED])
def test_all_big_is_transformers_own_model(kind):
    own = logits(dense_model(CONFIGS[kind], dense(kind)))
    layers = Config.from_dict(
        {**CONFIGS[kind], "base_model_type": CONFIGS[kind]["model_type"], "small_layers": []}
    ).num_hidden_layers
    duo = TorchDuo(CONFIGS[kind], dense(kind), small_weights(range(layers)))
    found, taken = duo.routed(TOKENS, torch.full((layers,), 2))
    assert torch.equal(found, own) and taken.unique().tolist() == [2]
    assert torch.equal(logits(duo.model), own)  # outside of any pass
    patterns = [([2, 1] * layers)[:layers], ([2, 0] * layers)[:layers], [1] * layers, [0] * layers]
    others = [duo.routed(TOKENS, torch.tensor(routes))[0] for routes in patterns]
    assert all((a - b).abs().max() > 0.01 for a in others for b in [own, *others] if a is not b)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_small_ffn_is_gated_by_its_activation(activation):
    form = {
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
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
            block.fc1.register_forward_hook(lambda _, given, __, seen=seen: seen.append(given[0]))
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
        ({"rope_traditional": True}, {}, {}, "transformers' llama has no rope_traditional"),
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
        TorchDuo(
            {key: value for key, value in (CONFIGS["llama"] | config).items() if value is not None}, weights, parts
        )
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
