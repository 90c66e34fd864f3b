"""The PyTorch reference: against Hugging Face's Llama, on its own, and the MLX model against it."""

import itertools

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from duo_mlx import conditional
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.model import Model, ModelArgs
from duo_mlx.router import Recorder
from duo_mlx.routes import LETTERS

TOLERANCE = 1e-4  # maximum absolute difference of fp32 logits
LAYERS, VOCAB = 4, 32
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # so that tiny heads have plain, blended and fully scaled frequencies
}
ROPE = {
    "plain": {},
    "traditional": {"rope_traditional": True},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3, "head_dim": 8, "rope_theta": 5000.0},
}
ROUTES = {
    "big": np.full(LAYERS, 2),
    "small": np.full(LAYERS, 1),
    "skip": np.full(LAYERS, 0),
    "random per token": np.random.default_rng(1).integers(0, 3, (2, 11, LAYERS)),
}
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 11))


def reference_of(model, config):
    """The reference with the MLX model's weights, moved by name."""
    reference = DuoModel(DuoConfig.from_dict(config)).eval()
    weights = {name: torch.from_numpy(np.array(value)) for name, value in tree_flatten(model.parameters())}
    if not config.get("tie_word_embeddings", True):
        assert "lm_head.weight" in weights
    reference.load_state_dict(weights, strict=True)
    return reference


@pytest.fixture(scope="module")
def pair(tiny_model, tiny_config):
    """``pair(**changes)``: the MLX model and the reference with the same weights."""
    made = {}

    def make(**changes):
        key = repr(sorted(changes.items()))
        if key not in made:
            model = tiny_model(**changes)
            made[key] = model, reference_of(model, tiny_config(**changes))
        return made[key]

    return make


def logits_of(reference, tokens, routes):
    with torch.no_grad():
        return reference(torch.as_tensor(tokens), torch.as_tensor(routes)).numpy()


# --- the MLX model against the reference -------------------------------------------------------------------------


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("biases", [False, True], ids=["no bias", "biases"])
@pytest.mark.parametrize("heads", [2, 4], ids=["GQA", "MHA"])
def test_mlx_gives_the_reference_logits(pair, heads, biases, tied, rope, skip_scope):
    changes = {
        "num_key_value_heads": heads,
        "attention_bias": biases,
        "mlp_bias": biases,
        "tie_word_embeddings": tied,
        "skip_scope": skip_scope,
    }
    model, reference = pair(**changes, **ROPE[rope])
    for kind, routes in ROUTES.items():
        found = np.array(model(mx.array(TOKENS), routes=routes))
        expected = logits_of(reference, TOKENS, routes)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=kind)


LEFT_OUT = {
    "no small in 0 and 3": {"small_layers": [1, 2]},
    "no small at all": {"small_layers": []},
    "biases of small": {"small_bias": True},
    "both, untied": {"small_layers": [0, 2], "small_bias": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("known_by", ["host", "device"])
@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
@pytest.mark.parametrize("what", LEFT_OUT)
def test_layers_without_small_and_biases_of_small(pair, in_passes, what, strategy, known_by, skip_scope):
    model, reference = pair(**LEFT_OUT[what], skip_scope=skip_scope)
    for kind, routes in ROUTES.items():
        found = in_passes(model, TOKENS, routes, (8, 1, 2), known_by, strategy)
        np.testing.assert_allclose(found, logits_of(reference, TOKENS, routes), rtol=0, atol=TOLERANCE, err_msg=kind)


def test_the_reference_has_no_small_where_there_is_none(pair):
    _, reference = pair(small_layers=[1, 2])
    assert {name.split(".")[2] for name in reference.state_dict() if ".small." in name} == {"1", "2"}
    small, big, realised = (
        logits_of(reference, TOKENS, np.array(routes)) for routes in ([1] * 4, [2] * 4, [2, 1, 1, 2])
    )
    np.testing.assert_array_equal(small, realised)
    assert np.abs(small - big).max() > 100 * TOLERANCE


def test_biases_of_small_count(pair):
    _, reference = pair(small_bias=True)
    biases = [name for name in reference.state_dict() if name.endswith("bias")]
    assert len(biases) == 3 * LAYERS and all(".mlp.small." in name for name in biases)
    small, big = (logits_of(reference, TOKENS, ROUTES[kind]) for kind in ("small", "big"))
    without = DuoModel(reference.config).eval()
    without.load_state_dict(
        {name: torch.zeros_like(value) if name in biases else value for name, value in reference.state_dict().items()}
    )
    assert np.abs(logits_of(without, TOKENS, ROUTES["small"]) - small).max() > 100 * TOLERANCE
    np.testing.assert_array_equal(logits_of(without, TOKENS, ROUTES["big"]), big)


@pytest.mark.parametrize("strategy", conditional.STRATEGIES)
def test_quantised_biases_of_small(tiny_config, strategy):
    config = tiny_config(
        hidden_size=64, intermediate_size=96, small_intermediate_size=32, small_bias=True, small_layers=[0, 1, 3]
    )
    model = Model(ModelArgs.from_dict(config))
    for index in (0, 1, 3):
        for place, kind in enumerate(("gate_proj", "up_proj", "down_proj")):
            projection = model.layers[index].mlp.small[kind]
            projection.bias = mx.random.normal(projection.bias.shape, key=mx.random.key(3 * index + place)) / 5
    mlx_nn.quantize(model, group_size=32, bits=4)
    assert set(model.layers[0].mlp.small.up_proj) >= {"weight", "scales", "biases", "bias"}
    assert set(model.layers[0].mlp.big.up_proj) >= {"weight", "scales", "biases"} - {"bias"}
    logits = {kind: np.array(model(mx.array(TOKENS), routes=each, strategy=strategy)) for kind, each in ROUTES.items()}
    reference = reference_of(dequantize_model(model), config)
    for kind, routes in ROUTES.items():
        expected = logits_of(reference, TOKENS, routes)
        np.testing.assert_allclose(logits[kind], expected, rtol=0, atol=TOLERANCE, err_msg=kind)


@pytest.mark.parametrize("changes", [{}, LEFT_OUT["both, untied"]], ids=["plain", "both, untied"])
@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_dense_gives_the_reference_gradients(pair, skip_scope, changes):
    model, reference = pair(skip_scope=skip_scope, **changes)
    routes = ROUTES["random per token"][:, :-1]

    def loss(tokens):
        logits = model(tokens[:, :-1], routes=mx.array(routes), strategy="dense")
        return mlx_nn.losses.cross_entropy(logits, tokens[:, 1:]).mean()

    value, grads = mlx_nn.value_and_grad(model, loss)(mx.array(TOKENS))
    tokens = torch.as_tensor(TOKENS)
    logits = reference(tokens[:, :-1], torch.as_tensor(routes))
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    reference.zero_grad()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), abs=1e-5)
    found = dict(tree_flatten(grads))
    for name, parameter in reference.named_parameters():
        np.testing.assert_allclose(np.array(found[name]), parameter.grad.numpy(), rtol=0, atol=1e-5, err_msg=name)


def recorded(model, tokens):
    """Logits, and the routes ``[batch, tokens, layers]`` that the model's own router took."""
    recorder = Recorder(model.router())
    logits = np.array(model(mx.array(tokens), routes=recorder))
    return logits, np.stack([np.array(taken) for taken in recorder.taken], axis=-1)


def routed(reference, tokens, routes=None):
    with torch.no_grad():
        logits, taken = reference.routed(torch.as_tensor(tokens), None if routes is None else torch.as_tensor(routes))
    return logits.numpy(), taken.numpy()


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("choices", ["sB", "-B", "-sB", "Bs-"])
def test_mlx_routes_as_the_reference_does(pair, choices, bias, skip_scope):
    model, reference = pair(router_choices=choices, router_bias=bias, skip_scope=skip_scope)
    tokens = np.random.default_rng(2).integers(0, VOCAB, (3, 40))
    (found, routes), (expected, taken) = recorded(model, tokens), routed(reference, tokens)
    np.testing.assert_array_equal(routes, taken)
    assert set(np.unique(taken)) == {LETTERS.index(letter) for letter in choices}
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    with torch.no_grad():
        np.testing.assert_array_equal(reference(torch.as_tensor(tokens)).numpy(), expected)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_a_router_where_there_is_no_small(pair, skip_scope):
    model, reference = pair(router_choices="-sB", small_layers=[1, 2], skip_scope=skip_scope)
    (found, routes), (expected, taken) = recorded(model, TOKENS), routed(reference, TOKENS)
    np.testing.assert_array_equal(routes, taken)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("choices", ["sB", "Bs", "-sB", "B-s"])
def test_of_equal_logits_the_first_counts(tiny_config, choices):
    config = tiny_config(router_choices=choices)
    model = Model(ModelArgs.from_dict(config))  # its routers are zeros
    for taken in (recorded(model, TOKENS)[1], routed(reference_of(model, config), TOKENS)[1]):
        assert (taken == LETTERS.index(choices[0])).all()


# --- the reference alone -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, ROPE["llama3"], {"attention_bias": True, "mlp_bias": True}], ids=str)
@pytest.mark.parametrize(("module", "route"), [("big", 2), ("small", 1)])
def test_one_route_everywhere_is_hugging_face_llama(pair, changes, module, route):
    from transformers import LlamaConfig, LlamaForCausalLM

    _, reference = pair(tie_word_embeddings=False, **changes)
    config = reference.config
    rope = {"rope_type": "default"} | (config.rope_scaling or {}) | {"rope_theta": config.rope_theta}
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size if module == "big" else config.small_intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_width,
            rms_norm_eps=config.rms_norm_eps,
            attention_bias=config.attention_bias,
            mlp_bias=config.mlp_bias,
            rope_parameters=rope,
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {
        name.replace(f"mlp.{module}.", "mlp."): value
        for name, value in reference.state_dict().items()
        if "mlp." not in name or f"mlp.{module}." in name
    }
    other.load_state_dict(weights, strict=True)
    with torch.no_grad():
        expected = other(torch.as_tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(logits_of(reference, TOKENS, [route] * LAYERS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
def test_no_token_sees_a_later_one_nor_its_route(pair, skip_scope):
    _, reference = pair(skip_scope=skip_scope)
    routes = ROUTES["random per token"]
    before = logits_of(reference, TOKENS, routes)
    for place in (1, 6, 10):
        tokens, changed = TOKENS.copy(), routes.copy()
        tokens[:, place] = (tokens[:, place] + 1) % VOCAB
        changed[:, place] = (changed[:, place] + 1) % 3
        for after in (logits_of(reference, tokens, routes), logits_of(reference, TOKENS, changed)):
            np.testing.assert_allclose(after[:, :place], before[:, :place], rtol=0, atol=1e-5)
            assert (np.abs(after[:, place:] - before[:, place:]).max(axis=-1) > 1e-5).all()


def test_every_route_counts_in_every_layer(pair):
    _, reference = pair()
    patterns = list(itertools.product(range(3), repeat=LAYERS))
    tokens = np.repeat(TOKENS[:1], len(patterns), axis=0)
    routes = np.repeat(np.array(patterns)[:, None], tokens.shape[1], axis=1)
    logits = logits_of(reference, tokens, routes)[:, -1]
    distances = np.abs(logits[:, None] - logits[None]).max(axis=-1) + np.eye(len(patterns))
    assert distances.min() > 1e-4


def test_skipping_every_layer_leaves_the_embedding(pair):
    _, reference = pair(skip_scope="layer")
    embed = reference.model.embed_tokens
    with torch.no_grad():
        expected = F.linear(reference.model.norm(embed(torch.as_tensor(TOKENS))), embed.weight).numpy()
    np.testing.assert_array_equal(logits_of(reference, TOKENS, ROUTES["skip"]), expected)


@pytest.mark.parametrize("shape", [(3,), (11, 4), (1, 11, 4), (2, 10, 4), (2, 11, 3)])
def test_routes_of_another_shape(pair, shape):
    _, reference = pair()
    with pytest.raises(ValueError, match=r"fit neither \[4\] nor \[batch, tokens, 4\]"):
        logits_of(reference, TOKENS, np.ones(shape, np.int64))


def test_routes_that_were_taken_give_the_same_again(pair):
    _, reference = pair(router_choices="-sB")
    logits, taken = routed(reference, TOKENS)
    np.testing.assert_array_equal(logits_of(reference, TOKENS, taken), logits)
    for routes in ROUTES.values():
        logits, taken = routed(reference, TOKENS, routes)
        np.testing.assert_array_equal(logits_of(reference, TOKENS, routes), logits)
        np.testing.assert_array_equal(taken, np.broadcast_to(routes, taken.shape))


def test_no_routes_and_no_router(pair):
    _, reference = pair()
    assert not any("router" in name for name in reference.state_dict())
    with pytest.raises(ValueError, match="give routes: the config has no router_choices"):
        reference(torch.as_tensor(TOKENS))


@pytest.mark.parametrize("choices", ["B", "xB", "sBs"])
def test_choices_that_are_none(tiny_config, choices):
    with pytest.raises(ValueError, match=f"router_choices is '{choices}'; it must name two or three routes"):
        DuoModel(DuoConfig.from_dict(tiny_config(router_choices=choices)))


def test_a_scope_or_rope_that_it_does_not_know(tiny_config):
    with pytest.raises(ValueError, match="it must be 'ffn' or 'layer'"):
        DuoModel(DuoConfig.from_dict(tiny_config(skip_scope="attention")))
    with pytest.raises(ValueError, match="'yarn' is not in the reference"):
        DuoModel(DuoConfig.from_dict(tiny_config(rope_scaling={"type": "yarn", "factor": 2.0})))


def test_initialisation_follows_its_words(tiny_config):
    torch.manual_seed(0)
    router = {"router_choices": "-sB", "router_bias": True}
    config = tiny_config(hidden_size=256, intermediate_size=128, attention_bias=True, num_hidden_layers=2, **router)
    model = DuoModel(DuoConfig.from_dict(config))
    model.initialise(std=0.02)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() == 0
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            std = 0.01 if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02  # 0.02 / sqrt(2 * 2)
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name


def test_dropout_acts_only_while_training(tiny_config):
    torch.manual_seed(0)
    model = DuoModel(DuoConfig.from_dict(tiny_config()), dropout=0.5)
    tokens, routes = torch.as_tensor(TOKENS), torch.full((LAYERS,), 2)
    assert not torch.equal(model(tokens, routes), model(tokens, routes))
    model.eval()
    assert torch.equal(model(tokens, routes), model(tokens, routes))
