"""The model: what a config.json may say, and mlx-lm's llama as the measure of everything that is not routing."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache
from mlx_lm.utils import quantize_model
from safetensors import safe_open

import duo_mlx
from duo_mlx import checkpoint, cpu
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes
from duo_mlx.model import Model, ModelArgs
from duo_mlx.routes import Route

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,  # so that tiny heads have plain, blended and fully scaled frequencies
}
WIDE = {"hidden_size": 64, "intermediate_size": 96, "small_intermediate_size": 32}  # quantisable
VARIANTS = {
    "plain": {},
    "theta": {"rope_theta": 500.0},
    "traditional rope": {"rope_traditional": True},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3 rope": {"rope_scaling": LLAMA3, "head_dim": 8},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "untied": {"tie_word_embeddings": False},
    "MHA": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 6},
    "sliding": {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5},
}


# --- config.json -------------------------------------------------------------------------------------------------


def test_keys_of_a_config_become_arguments(tiny_config):
    args = ModelArgs.from_dict(tiny_config(skip_scope="layer", default_route="Bs-B", rope_theta=5e5))
    assert (args.hidden_size, args.small_intermediate_size, args.base["rope_theta"]) == (16, 8, 5e5)
    assert args.skip_scope == "layer" and args.default_pattern.tolist() == [2, 1, 0, 2]
    assert args.layer_types == ("full_attention",) * 4


def test_keys_of_no_concern_are_passed_over(tiny_config):
    concerns = ModelArgs.from_dict(tiny_config())
    more = {"architectures": ["X"], "torch_dtype": "float32", "eos_token_id": 2}
    config = ModelArgs.from_dict(tiny_config(**more, model_file="x.py"))
    assert config.base == concerns.base | more
    assert config.to_dict() == concerns.to_dict() | more


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "rope_scaling", "layer_types"])
def test_null_is_the_default(tiny_config, key):
    config = tiny_config(num_key_value_heads=None)
    given, left_out = ModelArgs.from_dict(config | {key: None}), ModelArgs.from_dict(config)
    assert given.base == left_out.base | {key: None}  # the base's own word for its default
    for name in ("num_key_value_heads", "head_dim", "layer_types", "max_position_embeddings"):
        assert getattr(given, name) == getattr(left_out, name)
    assert given.num_key_value_heads == 4
    assert vars(Model(given).args) == vars(Model(left_out).args)


@pytest.mark.parametrize("key", ["hidden_size", "small_intermediate_size", "vocab_size"])
def test_a_missing_key_is_named(tiny_config, key):
    with pytest.raises(DuoError, match=f"lacks {key}$"):
        ModelArgs.from_dict(tiny_config(**{key: None}))


def test_a_key_that_the_base_misses_is_named(tiny_config):
    with pytest.raises(DuoError, match=r"^config\.json: mlx-lm's llama does not take it: .*'rms_norm_eps'$"):
        Model(ModelArgs.from_dict(tiny_config(rms_norm_eps=None)))


def test_all_missing_keys_are_named(tiny_config):
    with pytest.raises(DuoError, match=r"lacks hidden_size, vocab_size$"):
        ModelArgs.from_dict(tiny_config(hidden_size=None, vocab_size=None))


@pytest.mark.parametrize(
    "key", ["small_size", "skip_scopes", "default_routes", "default_drafts", "draft_tokens", "routing", "router_budget"]
)
def test_an_unknown_routing_key_is_an_error(tiny_config, key):
    with pytest.raises(DuoError, match=f"routing keys that are not known: {key}$"):
        ModelArgs.from_dict(tiny_config(**{key: 1}))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "small_intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", [0, -1, "64", 2.0, True, [4]])
def test_sizes_are_positive_integers(tiny_config, key, value):
    with pytest.raises(DuoError, match=rf"{key} is .* must be a positive integer"):
        ModelArgs.from_dict(tiny_config(**{key: value}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"hidden_size": 18}, "hidden_size 18 is no multiple of num_attention_heads 4, and there is no head_dim"),
        ({"skip_scope": "attention"}, "skip_scope is 'attention'; it must be 'ffn' or 'layer'"),
        ({"layer_types": ["full_attention"] * 3}, "for each of the 4 layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "sliding_window must say how many tokens"),
        ({"default_route": "Bs"}, "default_route: .* has 2 characters, but the model has 4 layers"),
        ({"default_route": "random"}, "default_route: .* each of the 4 layers"),
        ({"default_route": 5}, "default_route is 5; it must be a pattern as text"),
        ({"default_draft": "Bs"}, "default_draft: .* has 2 characters, but the model has 4 layers"),
        ({"default_draft": "router"}, "default_draft: .* each of the 4 layers"),
        ({"default_draft": ["BBss"]}, "default_draft is .*; it must be a pattern as text"),
        ({"default_draft": 0}, "default_draft is 0; it must be a pattern as text"),
        ({"draft_vocabulary": 33}, "draft_vocabulary is 33; it must be a whole number up to vocab_size 32"),
        ({"draft_vocabulary": -1}, "draft_vocabulary is -1; it must be a whole number"),
        ({"draft_vocabulary": True}, "draft_vocabulary is True; it must be a whole number"),
    ],
)
def test_what_does_not_fit_together(tiny_config, changes, message):
    with pytest.raises(DuoError, match=rf"^config\.json: .*{message}"):
        ModelArgs.from_dict(tiny_config(**changes))


@pytest.mark.parametrize(
    "value", [3, True, "012", {"0": 1}, [4], [-1], [0, 1.0], [True], ["0"], [None], [[0]]], ids=repr
)
def test_small_layers_are_layer_numbers(tiny_config, value):
    with pytest.raises(DuoError, match=r"^config\.json: small_layers must be a list of layer numbers from 0 to 3$"):
        ModelArgs.from_dict(tiny_config(small_layers=value))


def test_small_layers_in_any_order_mean_the_same(tiny_config):
    args = ModelArgs.from_dict(tiny_config(small_layers=[3, 1, 3]))
    assert args == ModelArgs.from_dict(tiny_config(small_layers=[1, 3])) and args.small_layers == (1, 3)
    assert [args.has_small(layer) for layer in range(4)] == [False, True, False, True]
    assert not any(ModelArgs.from_dict(tiny_config(small_layers=[])).has_small(layer) for layer in range(4))
    assert all(ModelArgs.from_dict(tiny_config(small_layers=None)).has_small(layer) for layer in range(4))


@pytest.mark.parametrize("value", [1, 0, "true", [True]], ids=repr)
def test_small_bias_is_true_or_false(tiny_config, value):
    with pytest.raises(DuoError, match=r"^config\.json: small_bias is .*; it must be true or false$"):
        ModelArgs.from_dict(tiny_config(small_bias=value))


@pytest.mark.parametrize(
    "value",
    [
        3,
        True,
        "BBBB",
        {"pattern": "BBBB", "loss": 1.0},
        ["BBBB"],
        [["BBBB", 1.0]],
        [{"pattern": "BBBB"}],
        [{"loss": 1.0}],
        [{"pattern": "BBBB", "loss": None}],
        [{"pattern": "BBBB", "loss": "1.0"}],
        [{"pattern": "BBBB", "loss": True}],
        [{"pattern": "BBBB", "loss": float("nan")}],
        [{"pattern": "BBBB", "loss": float("inf")}],
        [{"pattern": None, "loss": 1.0}],
        [{"pattern": 2222, "loss": 1.0}],
        [{"pattern": [2, 2, 2, 2], "loss": 1.0}],
        [{"pattern": "BBB", "loss": 1.0}],
        [{"pattern": "BBBB", "loss": 1.0}, {"pattern": "BBxB\n", "loss": 1.0}],
    ],
    ids=repr,
)
def test_best_patterns_are_patterns_with_losses(tiny_config, value):
    with pytest.raises(
        DuoError, match=r"^config\.json: best_patterns must be a list of objects with a pattern"
    ) as error:
        ModelArgs.from_dict(tiny_config(best_patterns=value))
    assert "\n" not in str(error.value)


def test_best_patterns_may_say_more_than_this_package_reads(tiny_config):
    known = [{"pattern": "BBBB", "loss": 3, "bytes": 1.0}, {"pattern": "big@1", "loss": 4.5}]
    assert list(ModelArgs.from_dict(tiny_config(best_patterns=known)).best_patterns) == known
    assert ModelArgs.from_dict(tiny_config(best_patterns=[])).best_patterns == ()


@pytest.mark.parametrize("changes", [{"small_layers": 3}, {"small_bias": "no"}, {"best_patterns": "BBBB"}], ids=str)
def test_a_directory_with_a_damaged_key_is_named(saved, tmp_path, changes):
    directory = tmp_path / "model"
    shutil.copytree(saved()[0], directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(DuoError) as error:
        duo_mlx.load(directory)
    assert str(error.value).startswith(f"{directory}: config.json: {next(iter(changes))} ")
    assert "\n" not in str(error.value)


def test_head_dim_frees_the_hidden_size(tiny_config):
    model = Model(ModelArgs.from_dict(tiny_config(hidden_size=18, head_dim=4)))
    assert model.layers[0].self_attn.q_proj.weight.shape == (16, 18)
    assert model(mx.array([[1, 2]])).shape == (1, 2, 32)


# --- against llama -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "route"), [("big", Route.BIG), ("small", Route.SMALL)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_route_everywhere_is_llama(tiny_model, llama_twin, variant, module, route):
    model = tiny_model(**VARIANTS[variant])
    twin = llama_twin(model, module)
    tokens = mx.array(np.random.default_rng(0).integers(0, 32, (2, 11)))
    assert mx.array_equal(model(tokens, routes=[route] * 4), twin(tokens)).item()
    ours, theirs = model.make_cache(), twin.make_cache()
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    for start, stop in ((0, 4), (4, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
        part = tokens[:, start:stop]
        found = model(part, cache=ours, routes=[route] * 4)
        assert mx.allclose(found, twin(part, cache=theirs), rtol=0, atol=1e-5).item()


def test_variants_differ(tiny_model):
    tokens = mx.array(np.random.default_rng(0).integers(0, 32, (1, 11)))
    rotary = [np.array(tiny_model(**VARIANTS[name])(tokens)) for name in VARIANTS if "rope" in name or name == "theta"]
    rotary += [np.array(tiny_model(**changes)(tokens)) for changes in ({}, {"head_dim": 8}, VARIANTS["sliding"])]
    for index, a in enumerate(rotary):
        for b in rotary[index + 1 :]:
            assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("layer_types", [["sliding_attention"] * 4, VARIANTS["sliding"]["layer_types"]])
def test_a_rotating_cache_forgets_what_the_window_forgets(tiny_model, in_passes, layer_types, skip_scope):
    model = tiny_model(layer_types=layer_types, sliding_window=5, skip_scope=skip_scope)
    random = np.random.default_rng(0)
    tokens, routes = random.integers(0, 32, (2, 14)), random.integers(0, 3, (2, 14, 4))
    whole = in_passes(model, tokens, routes)
    for cuts in ((6, *[1] * 8), (4, 4, 4, 2), (1,) * 14):
        np.testing.assert_allclose(in_passes(model, tokens, routes, cuts), whole, rtol=0, atol=1e-4)


# --- layers without a small FFN, and biases of small alone -------------------------------------------------------


@pytest.mark.parametrize("small_layers", [[], [1], [0, 2, 3], None])
def test_small_is_in_the_tree_where_there_is_one_and_nowhere_twice(tiny_model, small_layers):
    model = tiny_model(small_layers=small_layers)
    everywhere = set(dict(tree_flatten(tiny_model().parameters())))
    layers = range(4) if small_layers is None else small_layers
    without = {
        name for name in everywhere if ".small." in name and not any(f".{layer}.mlp" in name for layer in layers)
    }
    assert len(without) == 3 * (4 - len(layers))
    assert set(dict(tree_flatten(model.parameters()))) == everywhere - without
    assert set(dict(tree_flatten(model.trainable_parameters()))) == everywhere - without
    for index, layer in enumerate(model.layers):
        assert (layer.mlp.small is layer.mlp.big) == (index not in layers)


@pytest.mark.parametrize("route", [Route.BIG, Route.SMALL])
def test_without_any_small_both_routes_are_llama(tiny_model, llama_twin, route):
    model = tiny_model(small_layers=[])
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5]])
    assert mx.array_equal(model(tokens, routes=[route] * 4), llama_twin(model)(tokens)).item()


@pytest.mark.parametrize("bits", [None, 4])
def test_stock_mlx_lm_loads_layers_without_small(tiny_config, write_tokenizer, tmp_path, bits):
    config = tiny_config(**WIDE, small_layers=[1, 2], small_bias=True, default_route="ssss")
    model = Model(ModelArgs.from_dict(config))
    if bits:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    checkpoint.save(tmp_path, config, checkpoint.parameters(model))
    write_tokenizer(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        names = list(file.keys())
    assert {name.partition(".mlp.")[0] for name in names if ".mlp.small." in name} == {
        "model.layers.1",
        "model.layers.2",
    }
    loaded, _ = mlx_lm.load(str(tmp_path), trust_remote_code=True)
    ours, _ = duo_mlx.load(tmp_path)
    tokens = mx.array([[3, 1, 4, 1, 5]])
    for other in (loaded, ours):
        assert set(dict(tree_flatten(other.parameters()))) == set(names)
        assert mx.allclose(other(tokens), model(tokens, routes=[2, 1, 1, 2]), rtol=0, atol=1e-5).item()
    assert mx.array_equal(ours(tokens, routes=[1] * 4), ours(tokens, routes=[2, 1, 1, 2])).item()
    assert not mx.allclose(ours(tokens), ours(tokens, routes=[2] * 4), atol=1e-3).item()


@pytest.mark.parametrize(
    ("stored", "said"), [({}, {"small_layers": [1, 2]}), ({"small_layers": [1, 2]}, {}), ({}, {"small_bias": True})]
)
def test_weights_and_what_config_says_of_small_must_agree(saved, tmp_path, stored, said):
    directory = tmp_path / "model"
    shutil.copytree(saved(**stored)[0], directory)
    config = json.loads((directory / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in stored}
    (directory / "config.json").write_text(json.dumps(kept | said))
    with pytest.raises(DuoError, match=r"config\.json and weights disagree: .*mlp\.small\.") as error:
        duo_mlx.load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_small_bias_gives_biases_to_small_alone(tiny_model, mlp_bias):
    model = tiny_model(small_bias=True, mlp_bias=mlp_bias, small_layers=[0, 1, 3])
    biases = {name for name in dict(tree_flatten(model.parameters())) if name.endswith(".bias")}
    assert biases == {
        f"model.layers.{layer}.mlp.{module}.{kind}_proj.bias"
        for layer in range(4)
        for module in ("big", "small")
        for kind in ("gate", "up", "down")
        if (module == "small" and layer != 2) or (module == "big" and mlp_bias)
    }


@given(hnp.arrays(np.uint8, (2, 3, 4), elements=st.integers(0, 2)), st.none() | st.lists(st.integers(0, 3)))
def test_routes_are_realised_layer_by_layer(tiny_config, routes, small_layers):
    args = ModelArgs.from_dict(tiny_config(small_layers=small_layers))
    before = routes.copy()
    realised = args.realised(routes)
    assert realised.dtype == np.uint8 and (routes == before).all()
    for place, route in np.ndenumerate(routes):
        big = route == Route.SMALL and not args.has_small(place[-1])
        assert realised[place] == (Route.BIG if big else route)
    assert (args.realised(routes[0, 0]) == realised[0, 0]).all()


# --- the rest of the interface -----------------------------------------------------------------------------------


def test_default_route_is_what_runs_when_nobody_says(tiny_model):
    tokens = mx.array([[3, 1, 4, 1, 5]])
    model = tiny_model(default_route="Bs-B")
    assert mx.array_equal(model(tokens), model(tokens, routes=[2, 1, 0, 2])).item()
    assert not mx.allclose(model(tokens), model(tokens, routes=[2, 2, 2, 2]), atol=1e-3).item()


def test_embeddings_may_stand_in_for_tokens(tiny_model):
    model, tokens = tiny_model(), mx.array([[3, 1, 4]])
    given = model(tokens, input_embeddings=model.model.embed_tokens(tokens))
    assert mx.array_equal(given, model(tokens)).item()


@pytest.mark.parametrize("tied", [True, False])
def test_sanitize_drops_rotary_tables_and_a_second_copy_of_a_tied_head(tiny_model, tied):
    model = tiny_model(tie_word_embeddings=tied)
    kept = {"model.embed_tokens.weight": mx.zeros(1), "model.layers.0.mlp.small.up_proj.weight": mx.zeros(1)}
    head = {"lm_head.weight": mx.zeros(1)}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.zeros(1)}
    given = kept | head | rotary
    assert model.sanitize(given).keys() == (kept if tied else kept | head).keys()
    assert len(given) == 4  # the caller's dictionary is left alone


# --- fused projections -------------------------------------------------------------------------------------------


def copy_of(model, quantise=None):
    other = Model(model.config)
    other.load_weights(tree_flatten(model.parameters()))
    if quantise:
        nn.quantize(other, 32, quantise, class_predicate=lambda _, module: isinstance(module, nn.Linear))
    return other


@pytest.mark.parametrize("skip_scope", ["ffn", "layer"])
@pytest.mark.parametrize("quantise", [None, 4, 8])
@pytest.mark.parametrize("variant", ["plain", "attention bias", "mlp bias", "MHA", "sliding", "head_dim"])
def test_fused_projections_give_the_same_numbers(tiny_model, variant, quantise, skip_scope):
    changes = {"skip_scope": skip_scope} | VARIANTS[variant] | (WIDE | {"head_dim": 16} if quantise else {})
    model, fused = (copy_of(tiny_model(**changes), quantise) for _ in range(2))
    cpu.quicken(fused, fuse=True)
    assert nbytes(fused) == nbytes(model)
    before, after = (dict(tree_flatten(each.parameters())) for each in (model, fused))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]).item() for name in before)
    tokens = mx.array(np.random.default_rng(0).integers(0, 32, (2, 11)))
    ours, theirs = fused.make_cache(), model.make_cache()
    assert mx.array_equal(fused(tokens), model(tokens)).item()
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 11)):
        part = tokens[:, start:stop]
        found, expected = fused(part, cache=ours, routes=[2, 1, 0, 2]), model(part, cache=theirs, routes=[2, 1, 0, 2])
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=1e-5)


def padded_cache():
    """Of two sequences, the second one token shorter than the first."""
    return BatchKVCache([0, 1])


def window_cache():
    return RotatingKVCache(max_size=8)


def quantised_cache():
    return QuantizedKVCache(group_size=32, bits=8)


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("make", [KVCache, padded_cache, window_cache, quantised_cache])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_few_tokens_after_any_cache_are_llama(tiny_model, llama_twin, kv_heads, make, fuse):
    """Of those that mlx-lm has, full or not: llama knows nothing of the shorter way that few tokens take."""
    model = tiny_model(**WIDE, head_dim=32, num_attention_heads=4, num_key_value_heads=kv_heads)
    twin = llama_twin(model)
    if fuse:
        cpu.quicken(model, fuse=True)
    near = 5e-3 if make is quantised_cache else 1e-5  # the last bit of a key may lie on either side of a rounding
    tokens = mx.array(np.random.default_rng(kv_heads).integers(0, 32, (2, 24)))
    ours, theirs = ([make() for _ in range(4)] for _ in range(2))
    for start, stop in ((0, 10), (10, 12), (12, 13), (13, 17), (17, 24)):
        part = tokens[:, start:stop]
        found, expected = model(part, cache=ours, routes=[2] * 4), twin(part, cache=theirs)
        np.testing.assert_allclose(np.array(found), np.array(expected), rtol=0, atol=near)


def test_fusing_takes_no_memory(tiny_config):
    model = Model(ModelArgs.from_dict(tiny_config(hidden_size=256, intermediate_size=1024)))
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    cpu.quicken(model, fuse=True)
    mx.eval(model.parameters())
    assert mx.get_active_memory() < before + nbytes(model) / 50


def test_projections_that_are_stored_differently_stay_as_they_are(tiny_model):
    model = copy_of(tiny_model(**WIDE, head_dim=16))
    mixed = ("layers.1.self_attn.v_proj", "layers.2.mlp.big.up_proj")
    nn.quantize(model, 32, 4, class_predicate=lambda name, _: name.endswith(mixed))
    before = model(mx.array([[3]]))
    cpu.quicken(model, fuse=True)
    assert ["_qkv" in layer.self_attn for layer in model.layers] == [True, False, True, True]
    assert ["_gate_up" in layer.mlp.big for layer in model.layers] == [True, True, False, True]
    assert mx.allclose(model(mx.array([[3]])), before, rtol=0, atol=1e-5).item()


def test_loading_can_fuse(saved):
    directory, model = saved()
    fused, _ = duo_mlx.load(directory, fuse=True)
    assert "_qkv" in fused.layers[0].self_attn and "_gate_up" in fused.layers[0].mlp.small
    assert mx.allclose(fused(mx.array([[3]])), model(mx.array([[3]])), rtol=0, atol=1e-5).item()
