"""Verifying: each path's numbers agree with another implementation's, and a wrong weight is found."""

import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from duo_mlx import checkpoint, guard
from duo_mlx.cli import main
from duo_mlx.convert import parity, references, stored
from duo_mlx.convert.export import export
from duo_mlx.convert.parity import Parity
from duo_mlx.convert.quantise import quantise
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from tests.test_architectures import duo_config, made

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}
VARIANTS = [
    {},
    {"skip_scope": "layer", "default_route": "Bs-B"},
    {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    {"num_key_value_heads": 4, "rope_traditional": True},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
]
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention"] * 4}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 2


def tensors(model):
    return {name: Tensor.of(value) for name, value in checkpoint.parameters(model).items()}


def config_of(directory):
    return checkpoint.read_config(directory)


def spoiled(weights, name, by=0.01):
    return {**weights, name: Tensor.of(weights[name].load() + by)}


def agrees(found, routes=("big", "small", "skip", "random")):
    assert [row.route for row in found] == list(routes)
    for row in found:
        assert row.max_abs_difference <= 1e-4 and abs(row.mean_kl) < 1e-6 and row.argmax_agreement == 1
    return parity.failures(found, identical_argmax=True) == []


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_directory_agrees_with_the_reference(saved, changes):
    directory, model = saved(**changes)
    assert agrees(parity.measure(directory, config_of(directory), tensors(model), tokens=24))


@pytest.mark.parametrize(
    ("name", "routes"),
    [
        ("model.layers.1.mlp.small.up_proj.weight", {"small", "random"}),
        ("model.layers.1.mlp.big.down_proj.weight", {"big", "random"}),
        ("model.norm.weight", {"big", "small", "skip", "random"}),
    ],
)
def test_a_wrong_weight_is_found_where_it_acts(saved, name, routes):
    directory, model = saved()
    found = parity.measure(directory, config_of(directory), spoiled(tensors(model), name), tokens=24)
    assert {row.route for row in parity.failures(found)} == routes


@pytest.mark.parametrize("spoil", ["", "model.layers.1.mlp.big.down_proj.weight"])
def test_where_mlx_lm_itself_is_not_transformers(tmp_path, spoil):
    """mlx-lm's GLM rotates whole heads whatever the config says. A wrong weight is found none the less."""
    kind, told = "glm", []
    config = duo_config(kind) | {"partial_rotary_factor": 0.5}
    model = made(kind)
    checkpoint.save(tmp_path, config, checkpoint.parameters(model))
    weights = tensors(model)
    if spoil:
        weights = spoiled(weights, spoil)
    found = parity.measure(tmp_path, config, weights, tokens=24, note=told.append)
    if spoil:
        assert told == [] and {row.route for row in parity.failures(found)} >= {"big"}
        return
    assert [row.route for row in found] == ["big"] and not parity.failures(found)
    assert len(told) == 1 and "mlx-lm and transformers differ on a glm" in told[0]


def test_what_float32_costs_is_no_difference_and_a_wrong_weight_still_is(saved, tmp_path):
    directory, model = saved()
    weights = checkpoint.parameters(model)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 300  # logits of hundreds
    checkpoint.save(tmp_path, config_of(directory), weights)
    large = {name: Tensor.of(value) for name, value in weights.items()}
    found = parity.measure(tmp_path, config_of(directory), large, tokens=24)
    assert not parity.failures(found)
    assert max(row.max_abs_difference for row in found) > parity.TOLERANCE
    wrong = spoiled(large, "model.layers.1.mlp.small.up_proj.weight")
    found = parity.measure(tmp_path, config_of(directory), wrong, tokens=24)
    assert {row.route for row in parity.failures(found)} == {"small", "random"}


@pytest.mark.parametrize(
    ("row", "fails", "strictly"),
    [
        (Parity("big", 1e-4, 1.0, 1.0), False, False),
        (Parity("big", 1e-4, 0.0, 0.5), False, True),
        (Parity("big", 2e-3, 4e-8, 1.0), False, True),
        (Parity("big", 2e-3, 6e-8, 1.0), True, True),
        (Parity("big", 2e-3, 4e-8, 0.99), True, True),
        (Parity("big", 0.2, 0.0, 1.0), True, True),
        (Parity("big", float("nan"), 0.0, 1.0), True, True),
        (Parity("big", 2e-3, float("nan"), 1.0), True, True),
    ],
)
def test_what_is_beyond_the_tolerance(row, fails, strictly):
    assert parity.failures([row]) == [row] * fails
    assert parity.failures([row], identical_argmax=True) == [row] * strictly


def test_weights_that_the_reference_lacks_or_misses_are_an_error(saved):
    directory, model = saved()
    weights = tensors(model)
    weights["model.other.weight"] = weights.pop("model.norm.weight")
    with pytest.raises(
        DuoError, match=r"--verify: the weights do not fit the reference: .*model.(norm|other).weight"
    ) as error:
        parity.measure(directory, config_of(directory), weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bits", [(4, 8), (8, 16), (None, 4)])
def test_a_quantised_directory_agrees_with_what_its_weights_stand_for(saved, tmp_path, bits):
    directory, _ = saved(**WIDE, attention_bias=True)
    quantise(directory, tmp_path, bits=bits[0], small_bits=bits[1], group_size=32)
    assert agrees(parity.measure_quantised(tmp_path, tokens=24))
    found = parity.measure_quantised(tmp_path, tokens=24, seed=1)
    original = parity.measure(tmp_path, config_of(tmp_path), tensors(checkpoint.read_model(directory)), tokens=24)
    assert parity.failures(original) and not parity.failures(found)  # the quantised one is another model


def test_scales_of_the_wrong_module_are_found(saved, tmp_path):
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.mkdir(), wrong.mkdir()
    quantise(saved(**WIDE)[0], right, bits=8, group_size=32)
    weights = checkpoint.parameters(checkpoint.read_model(right))
    one, two = (f"model.layers.{layer}.mlp.big.up_proj.scales" for layer in (0, 1))
    checkpoint.save(wrong, config_of(right), weights | {one: weights[two], two: weights[one]})
    found = parity.measure(wrong, config_of(right), stored.weights(right, dequantise="float32"), tokens=24)
    assert {row.route for row in parity.failures(found)} == {"big", "random"}


@pytest.mark.parametrize("names", ["transformers", "canonical", "llama", "fused"])
@pytest.mark.parametrize("form", ["out.pt", "out"])
def test_an_export_agrees_with_what_it_was_made_of(saved, tmp_path, form, names):
    directory, _ = saved(mlp_bias=True)
    export(directory, tmp_path / form, names=names)
    assert agrees(parity.measure_export(tmp_path / form, directory, names=names, tokens=24))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dequantised_export_agrees_although_it_is_rounded(saved, tmp_path, dtype):
    directory, model = saved(**WIDE)
    half, quantised = tmp_path / "half", tmp_path / "quantised"
    half.mkdir(), quantised.mkdir()
    shutil.copytree(directory, half, dirs_exist_ok=True)
    weights = checkpoint.parameters(model)
    checkpoint.save(
        half, config_of(directory), {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    )
    quantise(half, quantised, bits=4, group_size=32)
    export(quantised, tmp_path / "out.pt", dequantise=True, names="canonical")
    assert agrees(parity.measure_export(tmp_path / "out.pt", quantised, tokens=24, names="canonical"))


def test_a_wrong_export_is_found(saved, tmp_path):
    directory, _ = saved()
    export(directory, tmp_path / "out.pt", names="canonical")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    state["model.layers.3.self_attn.v_proj.weight"] += 0.01
    torch.save(state, tmp_path / "out.pt")
    assert (
        len(parity.failures(parity.measure_export(tmp_path / "out.pt", directory, tokens=24, names="canonical"))) == 4
    )


@pytest.mark.parametrize("changes", [*VARIANTS, {"sliding_window": 5, "layer_types": LAYER_TYPES}, SLIDING])
def test_all_big_agrees_with_the_base(saved, monkeypatch, changes):
    directory, _ = saved(**changes)
    monkeypatch.setitem(sys.modules, "torch", None)  # a graft is verified without
    assert agrees(parity.measure_dense(directory, tokens=24), ["big"])
    monkeypatch.setattr(guard, "all_big", lambda model, tokens: model(tokens, routes=[2, 2, 1, 2]))
    assert parity.failures(parity.measure_dense(directory, tokens=24))


def test_a_row_is_what_pytorch_computes():
    random = np.random.default_rng(0)
    theirs, ours = (random.standard_normal((2, 5, 7)).astype(np.float32) for _ in range(2))
    row = parity.compare("big", theirs, ours)
    log_theirs, log_ours = (torch.from_numpy(logits).double().log_softmax(-1) for logits in (theirs, ours))
    divergence = torch.nn.functional.kl_div(log_ours, log_theirs, log_target=True, reduction="none").sum(-1).mean()
    assert row.mean_kl == pytest.approx(divergence.item())
    assert row.max_abs_difference == pytest.approx(np.abs(theirs - ours).max())
    assert row.argmax_agreement == (theirs.argmax(-1) == ours.argmax(-1)).mean()


def test_what_fails():
    near, nan, other = (
        Parity("big", 1e-4, 0.0, 1.0),
        Parity("small", float("nan"), 0.0, 1.0),
        Parity("skip", 1e-5, 0.0, 0.99),
    )
    assert parity.failures([near, nan, other]) == [nan]
    assert parity.failures([near, nan, other], identical_argmax=True) == [nan, other]
    infinite = parity.compare("big", np.array([[np.inf, 0.0]]), np.array([[np.inf, 0.0]]))
    assert parity.failures([infinite]) == [infinite]


def test_what_the_reference_cannot_do_is_compared_with_mlx_lms_own(saved):
    window = {"layer_types": LAYER_TYPES, "sliding_window": 5}
    directory, model = saved(**window)
    reason = references.lacking(config_of(directory))
    assert reason == "transformers' llama has no sliding_attention"
    assert references.note(config_of(directory)).endswith(f"no other routes: {reason}")
    assert agrees(parity.measure(directory, config_of(directory), tensors(model), tokens=24), ["big"])
    wrong = spoiled(tensors(model), "model.layers.1.mlp.big.down_proj.weight")
    assert parity.failures(parity.measure(directory, config_of(directory), wrong, tokens=24))


def test_a_llama_that_slides_in_all_layers_is_a_mistral_there(saved):
    directory, model = saved(**SLIDING)
    assert references.note(config_of(directory)) == ""
    assert agrees(parity.measure(directory, config_of(directory), tensors(model), tokens=24))


def test_without_pytorch_nothing_is_verified(saved, monkeypatch):
    directory, model = saved()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DuoError, match=r"--verify needs PyTorch and transformers: pip install 'duo-mlx\[torch\]'"):
        parity.measure(directory, config_of(directory), tensors(model))


@pytest.mark.parametrize("what", ["convert", "quantise", "export"])
def test_what_is_not_compared_is_said_in_a_note(saved, tmp_path, what):
    directory, _ = saved(layer_types=LAYER_TYPES, sliding_window=8, **WIDE)
    options = {"convert": [], "quantise": ["--bits", "4", "--group-size", "32"], "export": ["--to", "torch"]}[what]
    names = ["--names", "canonical"] if what == "export" else []
    arguments = ["convert", str(directory), str(tmp_path / "out"), "--verify", *options, *names]
    result = CliRunner().invoke(main, arguments, prog_name="duo-mlx")
    assert result.exit_code == 0, result.stderr
    assert "compares all big with mlx-lm's own model, and no other routes: transformers' llama has no" in result.stderr
