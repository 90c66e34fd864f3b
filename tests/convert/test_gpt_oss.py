"""gpt-oss as a source: experts as transformers saves them in float, and as they are published, in MXFP4."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model

import duo_mlx
from duo_mlx import checkpoint, guard
from duo_mlx.convert.directory import Bits
from duo_mlx.convert.source import open_source
from tests.convert.dense_kinds import weights_of

EXPERTS = ("gate_up_proj", "down_proj")


@pytest.fixture
def published(source, write_tokenizer, tmp_path):
    """A directory with experts in MXFP4, as OpenAI publishes them: outputs first, in blocks of 32 with scales."""
    directory, _ = source("gpt_oss", torch.bfloat16)
    made = tmp_path / "published"
    made.mkdir()
    found = {}
    for name, value in weights_of(directory).items():
        if name.endswith(EXPERTS):
            blocks, scales = mx.quantize(value.swapaxes(1, 2), group_size=32, bits=4, mode="mxfp4")
            found[f"{name}_blocks"] = blocks.view(mx.uint8).reshape(*scales.shape, 16)
            found[f"{name}_scales"] = scales
        else:
            found[name] = value
    mx.save_safetensors(str(made / "model.safetensors"), found, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text()) | {"rope_theta": 10000.0}
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (made / "config.json").write_text(json.dumps(config))
    write_tokenizer(made)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_experts_of_transformers(source, grafted, dtype):
    directory, theirs = source("gpt_oss", dtype)
    duo = grafted(directory)
    ours, saved = weights_of(duo), weights_of(directory)
    prefix = "model.layers.1.mlp"
    both, down = (saved[f"{prefix}.experts.{name}"] for name in EXPERTS)
    for name, part in (("gate", both[..., ::2]), ("up", both[..., 1::2]), ("down", down)):
        assert mx.array_equal(ours[f"{prefix}.big.experts.{name}_proj.weight"], part.swapaxes(1, 2)).item()
    assert "model.layers.0.mlp.experts.gate_up_proj" in open_source(directory, graft=True).table()
    if dtype == torch.bfloat16:  # transformers' rotation would be in bfloat16, too
        return
    tokens = np.random.default_rng(1).integers(0, 32, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    logits = np.array(guard.all_big(duo_mlx.load(duo)[0], mx.array(tokens)))
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("small_bits", [None, 8])
def test_published_experts_stay_as_they_are(published, grafted, small_bits):
    duo = grafted(published, bits=Bits(None, small_bits, 32) if small_bits else None)
    ours, theirs = weights_of(duo), weights_of(published)
    prefix = "model.layers.0.mlp"
    for part, rows in (("gate", slice(0, None, 2)), ("up", slice(1, None, 2))):
        blocks = theirs[f"{prefix}.experts.gate_up_proj_blocks"][:, rows].flatten(-2)
        assert mx.array_equal(ours[f"{prefix}.big.experts.{part}_proj.weight"].view(mx.uint8), blocks).item()
        scales = theirs[f"{prefix}.experts.gate_up_proj_scales"][:, rows]
        assert mx.array_equal(ours[f"{prefix}.big.experts.{part}_proj.scales"], scales).item()
    assert ours["model.layers.0.self_attn.q_proj.weight"].dtype == mx.bfloat16
    model, tokens = checkpoint.read_model(duo), mx.array([[3, 9, 4, 20]])
    assert mx.array_equal(guard.all_big(model, tokens), load_model(published)[0](tokens)).item()
    kind = mx.uint32 if small_bits else mx.bfloat16
    assert ours[f"{prefix}.small.up_proj.weight"].dtype == kind
