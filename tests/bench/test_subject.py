"""The model of bench run: what its record says, and the same model in other quantisations."""

import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, processors

from duo_mlx import checkpoint
from duo_mlx.bench import subject
from duo_mlx.bench.subject import Subject
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 48}
BIASES = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False, "router_choices": "-sB"}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SHAPES = {
    "plain": {},
    "biases, untied, routers": WIDE | BIASES,
    "small's biases": WIDE | {"small_bias": True},
    "two small": WIDE | {"small_layers": [1, 2]},
}
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def copied(saved, tmp_path):
    """``copied(name, **changes)``: a copy of a tiny model's directory, to be changed."""

    def make(name, **changes):
        return shutil.copytree(saved(**changes)[0], tmp_path / name)

    return make


@pytest.fixture
def stored_quantised(saved, tiny_config, write_tokenizer, tmp_path):
    """A directory whose weights have eight bits."""
    model, _ = checkpoint.load(saved(**WIDE)[0])
    nn.quantize(model, 32, 8, class_predicate=lambda path, _: path.endswith(("gate_proj", "up_proj", "k_proj")))
    config = tiny_config(eos_token_id=1, **WIDE) | {"quantization": {"group_size": 32, "bits": 8}}
    checkpoint.save(tmp_path, config, checkpoint.parameters(model))
    write_tokenizer(tmp_path)
    return tmp_path


def stored_parameters(directory):
    return sum(array.size for file in directory.glob("*.safetensors") for array in load_file(file).values())


def test_the_embedded_model():
    found = Subject(None, None)
    assert (found.name, found.stored, found.first) == ("embedded", "float32", None)
    assert found.record["parameters"] == stored_parameters(checkpoint.EMBEDDED)
    assert (found.record["name"], found.record["revision"], found.record["layers"]) == ("embedded", None, 12)
    plain, _ = checkpoint.load()
    assert mx.allclose(found.model("float32")(IDS), plain(IDS), atol=1e-4).item()
    for bits in (8, 4):
        assert subject.parameters(found.model(f"{bits}-bit")) == found.record["parameters"]


def test_a_directory_goes_by_its_last_name_and_is_loaded_fused(saved):
    directory, model = saved(**WIDE)
    found = Subject(str(directory), None)
    assert found.record["name"] == found.name == directory.name and "/" not in found.name
    assert found.args.to_dict().items() >= model.config.to_dict().items()
    assert all(layer.mlp.big._gate_up is not None for layer in found.model("float32").layers)
    assert found.tokenizer.encode("w0 w1") == [2, 3]


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_in_the_files_in_any_quantisation(saved, name):
    directory, _ = saved(**SHAPES[name])
    found = Subject(str(directory), None)
    count = stored_parameters(directory)
    assert found.record["parameters"] == subject.parameters(found.model("float32")) == count
    if SHAPES[name]:
        for quantisation in ("8-bit", "4-bit", "float32"):
            assert subject.parameters(found.model(quantisation)) == count


def test_a_rotations_frequencies_are_no_parameters(tiny_model):
    assert subject.parameters(tiny_model(**LLAMA3)) == subject.parameters(tiny_model())


@pytest.mark.parametrize("width", [64, 96], ids=["groups of 64", "groups of 32"])
def test_quantised_it_is_near_and_smaller(saved, width):
    directory, model = saved(**WIDE | {"hidden_size": width})
    found = Subject(str(directory), None)
    logits, sizes = {}, {}
    for quantisation in ("float32", "8-bit", "4-bit", "float32"):
        made = found.model(quantisation)
        assert subject.stored_format(made) == quantisation and found.model(quantisation) is made
        assert all(layer.mlp.big._gate_up is not None for layer in made.layers)
        logits[quantisation], sizes[quantisation] = made(IDS), nbytes(made)
    assert found.stored == "float32"
    assert made.layers[0].mlp.big.gate_proj.weight.dtype == mx.float32
    assert mx.allclose(logits["float32"], model(IDS), atol=1e-5).item()
    whole = mx.linalg.norm(logits["float32"])
    distance = {each: (mx.linalg.norm(logits[each] - logits["float32"]) / whole).item() for each in ("8-bit", "4-bit")}
    assert 0 < distance["8-bit"] < 0.05 < distance["4-bit"] < 0.8
    assert sizes["4-bit"] < sizes["8-bit"] < sizes["float32"] / 2


def test_the_quantised_weights_are_mlxs_own_and_what_no_group_divides_stays(saved):
    directory, model = saved(**WIDE)
    found = Subject(str(directory), None).model("4-bit").layers[1].mlp
    ours = model.layers[1].mlp
    quantised, scales, biases = mx.quantize(ours.big.down_proj.weight, 64, 4)
    assert mx.array_equal(found.big.down_proj.weight, quantised).item()
    assert mx.array_equal(found.big.down_proj.scales, scales).item()
    assert mx.array_equal(found.big.down_proj.biases, biases).item()
    assert mx.array_equal(found.small.down_proj.weight, ours.small.down_proj.weight).item()  # 48 wide


def test_a_width_that_no_group_divides_is_refused(saved):
    directory, _ = saved()
    with pytest.raises(DuoError) as caught:
        Subject(str(directory), None).model("4-bit")
    assert str(caught.value) == "--bits 4: the hidden size 16 is no multiple of 32"


def test_a_model_that_is_stored_quantised_stays_so(stored_quantised, saved):
    found = Subject(str(stored_quantised), None)
    assert found.stored == subject.stored_format(found.model("8-bit")) == "8-bit"
    assert found.record["parameters"] == stored_parameters(saved(**WIDE)[0])
    with pytest.raises(DuoError) as caught:
        found.model("4-bit")
    assert str(caught.value) == "--bits 4: this model is stored with 8-bit weights; leave --bits out"
    assert subject.stored_format(found.model("8-bit")) == "8-bit"


def test_the_digest_is_of_the_model_wherever_it_stands(copied, tiny_config):
    first, second, trained, other = (copied(name) for name in ("first", "second", "trained", "other"))
    weights = load_file(trained / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, trained / "model.safetensors", {"format": "mlx"})
    checkpoint.save_config(other, tiny_config(eos_token_id=1, rms_norm_eps=1e-6))
    digests = [Subject(str(directory), None).record["sha256"] for directory in (first, second, trained, other)]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize(("template", "first"), [("</s> $A", 1), ("$A </s>", None), ("</s> $A </s>", 1), ("$A", None)])
def test_the_token_that_begins_a_text_is_the_tokenizers(copied, template, first):
    directory = copied("model")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("</s>", 1)])
    tokenizer.save(str(directory / "tokenizer.json"))
    assert Subject(str(directory), None).first == first


def test_a_model_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DuoError, match="holds no config.json"):
        Subject(str(tmp_path), None)
