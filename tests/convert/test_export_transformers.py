"""``--to torch`` in transformers' names: that package loads the base, and the way back gives the same Duo."""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from duo_mlx import checkpoint
from duo_mlx.config import Config
from duo_mlx.convert import dense, parity, references
from duo_mlx.convert.directory import convert
from duo_mlx.convert.export import export
from duo_mlx.convert.torch_reference import quiet
from duo_mlx.errors import DuoError
from duo_mlx.guard import all_big
from duo_mlx.model import Model
from tests.architectures import ARCHITECTURES
from tests.conftest import random_weights

TOKENS = np.arange(3, 19).reshape(1, 16)


def written(kind, directory, write_tokenizer):
    config = {
        "model_type": "duo",
        "base_model_type": kind,
        "small_intermediate_size": 24,
        **{key: value for key, value in ARCHITECTURES[kind].config.items() if key != "model_type"},
    }
    directory.mkdir()
    model = Model(Config.from_dict(config))
    shapes = {name: value.shape for name, value in checkpoint.parameters(model).items()}
    weights = {name: mx.array(value) for name, value in random_weights(shapes, 0).items()}
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    checkpoint.save(directory, config, weights)
    write_tokenizer(directory)
    return checkpoint.read_model(directory)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gpt2"])
def test_transformers_loads_the_base_and_the_way_back_is_the_same(kind, write_tokenizer, tmp_path):
    model = written(kind, tmp_path / "model", write_tokenizer)
    export(tmp_path / "model", tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["model_type"] == kind and not {"base_model_type", "model_file"} & config.keys()
    with quiet():
        theirs, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "exported", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not info["missing_keys"] and references.lacking(checkpoint.read_config(tmp_path / "model")) == ""
    assert len(info["unexpected_keys"]) == 9 and all(".small." in name for name in info["unexpected_keys"])
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(np.array(all_big(model, mx.array(TOKENS))) - expected).max() < 1e-4
    assert not parity.failures(parity.measure_export(tmp_path / "exported", tmp_path / "model", tokens=16))
    convert(tmp_path / "exported", tmp_path / "back")
    routes = [1, 2, 0]
    again = checkpoint.read_model(tmp_path / "back")
    given = mx.array(TOKENS)
    assert mx.array_equal(again(given, routes=routes), model(given, routes=routes)).item()


def test_an_architecture_that_transformers_lacks_is_compared_with_mlx_lms_own(write_tokenizer, tmp_path):
    written("qwen", tmp_path / "model", write_tokenizer)
    config = checkpoint.read_config(tmp_path / "model")
    assert "transformers cannot read a configuration of qwen" in references.note(config)
    weights = dense.written(tmp_path / "model")
    (row,) = found = parity.measure(tmp_path / "model", config, weights, tokens=16)
    assert row.route == "big" and not parity.failures(found, identical_argmax=True)


def test_what_transformers_lacks_is_said_with_the_way_out(saved, tmp_path):
    directory, _ = saved(rope_traditional=True)
    with pytest.raises(DuoError, match="transformers' llama has no rope_traditional; --names canonical writes it"):
        export(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
