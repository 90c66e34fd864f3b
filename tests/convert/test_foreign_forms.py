"""Forms in which trainers, wrappers and Meta leave a model, and files that are none."""

import json

import pytest
import torch
from safetensors.torch import save_file, save_model

from duo_mlx.convert.readers import open_checkpoint
from duo_mlx.convert.readers.names import unwrapped
from duo_mlx.convert.source import open_source
from duo_mlx.errors import DuoError

ONE = torch.ones(2)


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "is a web page"),
        (b"\x12\x34" * 500, "is damaged or no"),
        (b"GGUF\x03\0\0\0", "is a .gguf file by its content"),
    ],
)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_what_is_no_model_is_named(directory, name, content, what):
    (directory / name).write_bytes(content)
    with pytest.raises(DuoError, match=what) as error:
        open_checkpoint(directory)
    assert "run code" not in str(error.value)


def test_what_trainers_leave_beside_a_model(directory):
    torch.save({"lr": 1}, directory / "training_args.bin")
    with pytest.raises(DuoError, match="holds no weights file"):
        open_checkpoint(directory)
    with pytest.raises(DuoError, match="training_args.bin: holds a trainer's settings"):
        open_checkpoint(directory / "training_args.bin")
    (directory / "adapter_config.json").write_text('{"base_model_name_or_path": "o/base"}')
    save_file({"a": ONE}, directory / "adapter_model.safetensors")
    with pytest.raises(DuoError, match=r"holds an adapter \(adapter_config.json\) of o/base"):
        open_checkpoint(directory)
    save_file({"a": ONE}, directory / "model.safetensors")
    assert "the adapter is left out" in open_checkpoint(directory).notes[0]


def test_several_files_are_named(directory):
    for name in ("a.gguf", "b.gguf"):
        (directory / name).write_bytes(b"GGUF")
    with pytest.raises(DuoError, match=r"\(a.gguf, b.gguf\); name one, such as .*a.gguf"):
        open_checkpoint(directory)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_without_an_index(directory, suffix):
    save = save_file if suffix == "safetensors" else torch.save
    for number in (1, 2):
        save({f"t{number}": ONE * number}, directory / f"model-0000{number}-of-00002.{suffix}")
    found = open_checkpoint(directory)
    assert [file.name[:11] for file in found.files] == ["model-00001", "model-00002"]
    assert {name: tensor.load().tolist() for name, tensor in found.tensors.items()} == {"t1": [1, 1], "t2": [2, 2]}
    (directory / f"model-00001-of-00002.{suffix}").unlink()
    with pytest.raises(DuoError, match="is one of 2 shards, but model-00001"):
        open_checkpoint(directory)


def test_a_tied_model_of_save_model(directory):
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(4, 3), "head": torch.nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    save_model(model, str(directory / "model.safetensors"))
    found = open_checkpoint(directory).tensors
    assert found.keys() == {"embed.weight", "head.weight"}
    assert found["embed.weight"].load().tolist() == found["head.weight"].load().tolist()


WRAPPED = {
    "FSDP": "_fsdp_wrapped_module.model._fsdp_wrapped_module.{}",
    "checkpoints": "model._checkpoint_wrapped_module.{}",
    "DDP": "module.model.{}",
    "Lightning": "model.model.{}",
    "compiled Lightning": "model._orig_mod.model.{}",
}


@pytest.mark.parametrize("form", WRAPPED)
def test_wrappers_names_are_taken_off(form):
    names = {WRAPPED[form].format(name): name for name in ("embed_tokens.weight", "layers.0.mlp.up_proj.weight")}
    assert unwrapped(names) == {f"model.{name}": name for name in names.values()}
    plain = {"model.embed_tokens.weight": 1, "model.norm.weight": 2}
    assert unwrapped(plain) == plain  # of a tied model all names begin so


def test_a_lightning_checkpoint(directory):
    state = {"model.model.norm.weight": ONE, "model.lm_head.weight": ONE}
    torch.save({"state_dict": state, "epoch": 1, "loops": {}}, directory / "last.ckpt")
    assert open_checkpoint(directory).tensors.keys() == {"model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize(
    ("name", "what"),
    [("model.q_proj.lora_A.default.weight", "holds an adapter"), ("_flat_param", "many tensors in one")],
)
def test_parts_of_models_are_named(name, what):
    with pytest.raises(DuoError, match=what):
        unwrapped({name: 1})


def meta(directory, shards=1, **params):
    whole = {
        "tok_embeddings.weight": (torch.arange(40.0).reshape(10, 4), 1),
        "norm.weight": (torch.ones(4), None),
        "output.weight": (torch.arange(40.0).reshape(10, 4), 0),
    }
    layer = "layers.0."
    for name, shape, axis in (("wq", (4, 4), 0), ("wk", (4, 4), 0), ("wv", (4, 4), 0), ("wo", (4, 4), 1)):
        whole[f"{layer}attention.{name}.weight"] = torch.arange(16.0).reshape(shape), axis
    for name, shape, axis in (("w1", (6, 4), 0), ("w3", (6, 4), 0), ("w2", (4, 6), 1)):
        whole[f"{layer}feed_forward.{name}.weight"] = torch.arange(24.0).reshape(shape), axis
    for name in ("attention_norm", "ffn_norm"):
        whole[f"{layer}{name}.weight"] = torch.ones(4), None
    for number in range(shards):
        part = {
            name: value if axis is None else value.chunk(shards, axis)[number].clone()
            for name, (value, axis) in whole.items()
        }
        torch.save(part, directory / f"consolidated.{number:02}.pth")
    given = {"dim": 4, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "vocab_size": -1, "multiple_of": 2}
    (directory / "params.json").write_text(json.dumps(given | params))
    return {name: value for name, (value, _) in whole.items()}


@pytest.mark.parametrize("shards", [1, 2])
def test_metas_own_checkpoint(tmp_path, shards):
    whole = meta(tmp_path, shards)
    found = open_source(tmp_path, graft=True)
    found.check()
    assert found.config["vocab_size"] == 10 and found.config["intermediate_size"] == 6
    assert found.config["num_key_value_heads"] == 2 and found.config["rope_theta"] == 10000
    for name, value in whole.items():
        assert found.checkpoint.tensors[name].load().tolist() == value.tolist(), name


def test_what_metas_params_do_not_say_is_refused(tmp_path):
    meta(tmp_path, use_scaled_rope=True)
    with pytest.raises(DuoError, match="use_scaled_rope, but not by which factor"):
        open_source(tmp_path, graft=True)
    meta(tmp_path, moe={"num_experts": 8})
    with pytest.raises(DuoError, match="has the unknown key moe"):
        open_source(tmp_path, graft=True)


def test_a_tensor_of_another_type_is_refused_when_it_would_be_written(tmp_path):
    meta(tmp_path)
    state = torch.load(tmp_path / "consolidated.00.pth", weights_only=True) | {"cache.table": torch.ones(2).bool()}
    torch.save(state, tmp_path / "consolidated.00.pth")
    for name in ("mask", "sparse"):
        found = open_checkpoint(tmp_path).tensors["cache.table"]
        assert found.dtype == "bool", name
    with pytest.raises(DuoError, match="cache.table is bool; weights must be float32"):
        open_source(tmp_path, graft=True, key_map="llama").check()
    with pytest.raises(DuoError, match="cache.table is bool"):
        found.load()


def test_quantised_weights_are_judged_by_config_json(directory):
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({"model.layers.0.mlp.up_proj.qweight": torch.ones(2, 2).int()}, directory / "model.safetensors")
    with pytest.raises(DuoError, match=r"its weights are quantised \(gptq\)"):
        open_source(directory, graft=True)
    (directory / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(DuoError, match="no architecture 'bert'"):
        open_source(directory, graft=True)
