"""The plan of a conversion: rows, misfits and the shapes that a configuration implies."""

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from duo_mlx.convert import keymaps, plan
from duo_mlx.convert.plan import Misfit, Row
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.model import ModelArgs


def tensors(shapes, dtype="float32"):
    def refuse():
        raise AssertionError("was loaded")

    return {name: Tensor(shape, dtype, refuse) for name, shape in shapes.items()}


@pytest.fixture
def args(tiny_config):
    return ModelArgs.from_dict(tiny_config())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
        {"head_dim": 6, "num_key_value_heads": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "skip_scope": "layer"},
    ],
)
def test_shapes_are_those_of_the_model(tiny_model, changes):
    model = tiny_model(**changes)
    duo = {name: value.shape for name, value in tree_flatten(model.parameters())}
    assert plan.expected_shapes(model.config) == duo


@pytest.mark.parametrize("changes", [{"small_layers": [0, 2]}, {"small_bias": True}, {"small_layers": []}])
def test_shapes_of_small_ffns_alone(tiny_model, changes):
    model = tiny_model(**changes)
    expected = plan.expected_shapes(model.config)
    assert expected == {name: value.shape for name, value in tree_flatten(model.parameters())}


def test_settings_that_make_no_model(tiny_config):
    args = ModelArgs.from_dict(tiny_config(rope_scaling={"type": "linear"}))
    with pytest.raises(DuoError, match="config.json: no llama can be made of it: 'factor'"):
        plan.expected_shapes(args)


def test_what_is_dropped_is_what_the_model_drops(tiny_model):
    names = ("lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight", "a.lm_head.weight")
    given = tensors(dict.fromkeys(names, (1,)))
    for tied in (True, False):
        wanted = tiny_model(tie_word_embeddings=tied).sanitize(dict.fromkeys(names, mx.ones(1)))
        assert plan.kept(given, tied).keys() == wanted.keys()


def test_rows_of_a_source_that_fits(args):
    expected = plan.expected_shapes(args)
    llama_map = keymaps.named("llama")
    source = llama_map.from_canonical(tensors(expected, "float16"), {"num_attention_heads": 4, "hidden_size": 16})
    source |= tensors({"rope.freqs": (2,), "output.weight": (32, 16)})
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16}
    mapped = plan.mapped(source, llama_map, config, Path("w.pt"))
    rows = plan.plan(source, plan.kept(mapped, tied=True), expected)
    assert not any(row.problem for row in rows)
    assert {row.target for row in rows if row.target} == expected.keys()
    assert {row.source for row in rows} == source.keys() and len(rows) == len(source)
    assert Row("layers.3.attention.wk.weight", "model.layers.3.self_attn.k_proj.weight", (8, 16), "float16") in rows
    assert rows[-2:] == [
        Row("output.weight", None, (32, 16), "float32"),
        Row("rope.freqs", None, (2,), "float32"),
    ]


def test_split_and_joined_tensors_name_what_they_are_made_of(args):
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    fused = keymaps.named("fused")
    source = tensors({"model.layers.0.self_attn.qkv_proj.weight": (32, 16)})
    mapped = plan.mapped(source, fused, config, Path("w"))
    rows = [row for row in plan.plan(source, mapped, plan.expected_shapes(args)) if not row.problem]
    assert [(row.source, (row.target or "").split(".")[-2], row.shape) for row in rows] == [
        ("model.layers.0.self_attn.qkv_proj.weight", "k_proj", (8, 16)),
        ("model.layers.0.self_attn.qkv_proj.weight", "q_proj", (16, 16)),
        ("model.layers.0.self_attn.qkv_proj.weight", "v_proj", (8, 16)),
    ]
    (joined,) = fused.from_canonical(mapped, config).values()
    assert joined.name == " + ".join([*source] * 3)


def test_misfits_have_both_shapes(args):
    expected = plan.expected_shapes(args)
    given = tensors(expected | {"model.norm.weight": (5,), "model.layers.10.mlp.big.up_proj.weight": (3, 2)})
    del given["model.layers.2.mlp.small.up_proj.weight"]
    given = plan.mapped(given, keymaps.named("canonical"), {}, Path("w"))
    found = plan.misfits(given, expected)
    assert found == [
        Misfit("model.layers.10.mlp.big.up_proj.weight", (3, 2), None),
        Misfit("model.layers.2.mlp.small.up_proj.weight", None, (8, 16)),
        Misfit("model.norm.weight", (5,), (16,)),
    ]
    assert [str(misfit) for misfit in found] == [
        "left over   model.layers.10.mlp.big.up_proj.weight [3, 2]",
        "missing     model.layers.2.mlp.small.up_proj.weight [8, 16]",
        "wrong shape model.norm.weight [5], config.json implies [16]",
    ]
    error = plan.MisfitError(Path("w"), found)
    assert isinstance(error, DuoError) and error.misfits == found
    assert str(error) == "w: 3 tensors do not fit config.json; nothing was written"
    rows = [row for row in plan.plan(given, given, expected) if row.problem]
    assert rows == [  # layer 10 after layer 2
        Row(None, "model.layers.2.mlp.small.up_proj.weight", (8, 16), "", "missing"),
        Row(
            "model.layers.10.mlp.big.up_proj.weight",
            "model.layers.10.mlp.big.up_proj.weight",
            (3, 2),
            "float32",
            "left over",
        ),
        Row("model.norm.weight", "model.norm.weight", (5,), "float32", "wrong shape, config.json implies [16]"),
    ]


def test_a_key_map_that_cannot_be_applied_names_the_source():
    given = tensors({"model.layers.0.self_attn.qkv_proj.weight": (9, 4)})
    config = {"num_attention_heads": 2, "hidden_size": 4}
    with pytest.raises(
        DuoError, match=r"^models/w.pt: model.layers.0.self_attn.qkv_proj.weight \[9, 4\] cannot be split"
    ):
        plan.mapped(given, keymaps.named("fused"), config, Path("models/w.pt"))


def test_the_table_is_plain_columns():
    rows = [
        Row("norm.weight", "model.norm.weight", (16,), "bfloat16"),
        Row("output.weight", "lm_head.weight", (32, 16), "float16", "wrong shape, config.json implies [32, 8]"),
        Row(None, "model.embed_tokens.weight", (32, 16), "", "missing"),
        Row("step", None, (), "float32"),
    ]
    assert plan.table(rows).split("\n") == [
        "source         target                     shape   dtype",
        "norm.weight    model.norm.weight          16      bfloat16",
        "output.weight  lm_head.weight             32x16   float16   wrong shape, config.json implies [32, 8]",
        "-              model.embed_tokens.weight  32x16   -         missing",
        "step           -                          scalar  float32   left out",
    ]


def test_names_and_provenance_do_not_make_tensors_different():
    one = mx.ones(1)
    tensor = Tensor.of(one)
    (named,) = plan.mapped({"a": tensor}, keymaps.named("canonical"), {}, Path("w")).values()
    assert named.name == "a" and named == tensor and named.load() is one
