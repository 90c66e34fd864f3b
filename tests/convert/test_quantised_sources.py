"""Sources that MLX quantised: big stays byte for byte what it was, in every mode and in mixtures of them."""

import json

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import load_model, quantize_model, save_model

from duo_mlx import checkpoint, guard
from duo_mlx.convert import inspection
from duo_mlx.convert.directory import Bits, Watch
from duo_mlx.convert.source import open_source
from duo_mlx.errors import DuoError
from tests.convert.dense_kinds import weights_of

RECIPES = {
    "4 bits": {"bits": 4, "group_size": 32},
    "8 bits": {"bits": 8, "group_size": 32},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "mxfp8": {"bits": 8, "group_size": 32, "mode": "mxfp8"},
    "nvfp4": {"bits": 4, "group_size": 16, "mode": "nvfp4"},
    "mixed bits": {"bits": 4, "group_size": 32},
    "mixed modes": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "each layer its own": {"bits": 4, "group_size": 32},
}


def mixed_bits(path, _):
    if "down_proj" in path or "lm_head" in path:
        return {"group_size": 32, "bits": 6, "mode": "affine"}
    return "v_proj" not in path


def mixed_modes(path, _):
    if "lm_head" in path:
        return False
    return {"group_size": 16, "bits": 4, "mode": "nvfp4"} if "up_proj" in path else "layers.1" not in path


def each_layer(path, _):
    """As DWQ and dynamic quantisation do: config.json has an entry for each module, without a mode."""
    return {"group_size": 32, "bits": 8 if ".0." in path or "down_proj" in path else 4}


PREDICATES = {"mixed bits": mixed_bits, "mixed modes": mixed_modes, "each layer its own": each_layer}


@pytest.fixture
def quantised(source, write_tokenizer, tmp_path):
    """``quantised(kind, recipe)``: a directory in which mlx-lm quantised a model."""

    def make(kind, recipe):
        directory, _ = source(kind)
        said = open_source(directory, graft=True).config
        model, config = load_model(directory, model_config={"rope_theta": said["rope_theta"]})
        model, config = quantize_model(model, config, **RECIPES[recipe], quant_predicate=PREDICATES.get(recipe))
        made = tmp_path / "quantised"
        made.mkdir()
        save_model(made, model)
        (made / "config.json").write_text(json.dumps(config))
        write_tokenizer(made)
        return made

    return make


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("small_bits", [None, 8])
def test_big_stays_byte_for_byte_what_mlx_lm_quantised(quantised, grafted, recipe, small_bits):
    directory = quantised("qwen2", recipe)
    duo = grafted(directory, bits=Bits(None, small_bits, 32) if small_bits else None)
    theirs, ours = weights_of(directory), weights_of(duo)
    for name, value in theirs.items():
        found = ours[name.replace(".mlp.", ".mlp.big.")]
        assert found.dtype == value.dtype and mx.array_equal(found, value).item(), name
    assert {ours[name].dtype for name in ours if ".small." in name} <= {mx.float32, mx.uint32}
    assert ("model.layers.0.mlp.small.up_proj.scales" in ours) is (small_bits is not None)
    assert sum(".small." not in name for name in ours) == len(theirs)
    model, tokens = checkpoint.read_model(duo), mx.array([[3, 9, 4, 20]])
    assert mx.array_equal(guard.all_big(model, tokens), load_model(directory)[0](tokens)).item()
    assert mx.array_equal(mlx_lm.load(str(duo), trust_remote_code=True)[0](tokens), guard.all_big(model, tokens)).item()


def test_entries_of_single_modules_follow_their_names(quantised, grafted):
    directory = quantised("qwen3", "each layer its own")
    config = json.loads((directory / "config.json").read_text())
    config["quantization"]["model.norm"] = False  # as some tools write it
    (directory / "config.json").write_text(json.dumps(config))
    said = json.loads((grafted(directory, bits=Bits(None, 4, 32)) / "config.json").read_text())["quantization"]
    assert said["model.layers.0.mlp.big.up_proj"] == {"group_size": 32, "bits": 8}
    assert said["model.layers.1.self_attn.q_proj"] == {"group_size": 32, "bits": 4}
    assert said["model.norm"] is False and "model.layers.0.mlp.up_proj" not in said


def test_a_quantised_source_takes_neither_bits_nor_a_type(quantised, grafted, tmp_path):
    directory = quantised("llama", "4 bits")
    with pytest.raises(DuoError, match="--bits: .* is quantised, and big stays as it is stored"):
        grafted(directory, bits=Bits(4, None, 32))
    with pytest.raises(DuoError, match="--dtype float16: .* is quantised"):
        grafted(directory, dtype="float16")
    assert not (tmp_path / "duo").exists()


@pytest.fixture
def by_awq(source, write_tokenizer, tmp_path):
    """A directory of weights as AutoAWQ packs them: inputs first, the numbers of eight outputs in 32 bits."""
    directory, _ = source("qwen3")
    made = tmp_path / "awq"
    made.mkdir()
    random, found = np.random.default_rng(0), {}
    for name, value in weights_of(directory).items():
        if name.endswith("proj.weight"):
            outputs, inputs = value.shape
            prefix = name.removesuffix(".weight")
            for part, rows in (("qweight", inputs), ("qzeros", inputs // 32)):
                found[f"{prefix}.{part}"] = mx.array(random.integers(0, 2**32, (rows, outputs // 8), np.uint32))
            found[f"{prefix}.scales"] = mx.array(random.uniform(0.01, 0.02, (inputs // 32, outputs)).astype(np.float32))
        else:
            found[name] = value
    mx.save_safetensors(str(made / "model.safetensors"), found, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"rope_theta": 10000.0}
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    (made / "config.json").write_text(json.dumps(config))
    write_tokenizer(made)
    return made


def test_what_mlx_lm_packs_anew_is_as_it_packs_it(by_awq, grafted):
    told = []
    duo = grafted(by_awq, watch=Watch(note=told.append))
    assert "weights are packed for MLX as mlx-lm loads them (awq)" in told
    theirs, ours = load_model(by_awq)[0], checkpoint.read_model(duo)
    weights = checkpoint.parameters(ours)
    for name, value in checkpoint.parameters(theirs).items():
        assert mx.array_equal(weights[ours.big_name(name)], value).item(), name
    tokens = mx.array([[3, 9, 4, 20]])
    assert mx.array_equal(guard.all_big(ours, tokens), theirs(tokens)).item()
    assert inspection.describe(by_awq).problems == ()


def test_what_mlx_lm_does_not_pack_is_refused(by_awq, grafted):
    config = json.loads((by_awq / "config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (by_awq / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        DuoError, match=r"its weights are quantised \(awq\); convert the model that .*Only bits=8"
    ) as error:
        grafted(by_awq)
    assert "\n" not in str(error.value)
