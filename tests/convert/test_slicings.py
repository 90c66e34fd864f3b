"""Slicings of Gemma 3n: the published ones, files, and what does not fit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from duo_mlx import cost
from duo_mlx.config import Config
from duo_mlx.convert import matformer
from duo_mlx.convert.directory import convert
from duo_mlx.convert.source import open_source
from duo_mlx.cost import RouteTable
from duo_mlx.errors import DuoError
from duo_mlx.ffn import nbytes
from duo_mlx.model import Model
from duo_mlx.routes import Route
from duo_mlx.work import imagined

torch = pytest.importorskip("torch")
from tests.convert import gemma3n_reference as reference  # noqa: E402
from tests.convert.gemma3n_duo import Made  # noqa: E402

FULL = {  # Gemma 3n E4B's shape
    "vocab_size": 262400,
    "vocab_size_per_layer_input": 262144,
    "hidden_size": 2048,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "layer_types": ([reference.LOCAL] * 4 + [reference.GLOBAL]) * 7,
    "num_kv_shared_layers": 15,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "hidden_size_per_layer_input": 256,
    "laurel_rank": 64,
}


@pytest.fixture(scope="module")
def like_e2b(tmp_path_factory, write_tokenizer) -> Made:
    return Made("skips shared layers", tmp_path_factory.mktemp("gemma3n"), write_tokenizer)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "--slicing E2B: is for 35 layers, 5 of them skipped, and the model has 10; --slicing FILE takes"),
        ("E9", "--slicing E9: is no file, and no slicing that is known: E2B, E1.96B-layer"),
        ({"ffn_hidden_dims": [64] * 9}, "is for 9 layers, 0 of them skipped, and the model has 10"),
        ({"ffn_hidden_dims": [64] * 9, "layers_to_skip": [10]}, "is for 10 layers, 1 of them skipped"),
        ({"ffn_hidden_dims": [129] * 10}, "layer 0 has 128 neurons, not 129"),
        ({"ffn_hidden_dims": [128] * 10}, "nothing is small"),
        ({"ffn_hidden_dims": [64] * 9, "layers_to_skip": [4]}, "read the keys and values of layer 4, so it must stay"),
        ({"ffn_hidden_dims": [64] * 9, "layers_to_skip": [5]}, "read the keys and values of layer 5, so it must stay"),
        ({"ffn_hidden_dims": [0] * 10}, "with widths of at least 1"),
        ({"ffn_hidden_dims": [64] * 8, "layers_to_skip": [6, 6]}, "each skipped layer once"),
        ({"ffn_hidden_dims": ["64"] * 10}, "with lists of whole numbers"),
        ({"widths": [64] * 10}, 'must be JSON like {"ffn_hidden_dims"'),
        ([64] * 10, 'must be JSON like {"ffn_hidden_dims"'),
    ],
)
def test_what_does_not_fit_is_refused(like_e2b, tmp_path, given, said):
    if isinstance(given, dict | list):
        (tmp_path / "slicing.json").write_text(json.dumps(given))
        given = str(tmp_path / "slicing.json")
    with pytest.raises(DuoError, match=re.escape(said)):
        convert(like_e2b.source, tmp_path / "duo", slicing=given)
    assert not (tmp_path / "duo").exists()


def test_a_slicing_is_for_a_dense_gemma_3n(like_e2b, saved, tmp_path):
    with pytest.raises(DuoError, match="is a Duo model already, so there is nothing to slice; leave out --slicing"):
        convert(like_e2b.directory, tmp_path / "duo", slicing="E2B")
    config = json.loads((saved()[0] / "config.json").read_text())
    dense = {key: value for key, value in config.items() if not key.startswith("small") and key != "model_file"}
    reference.save_file({"model.embed_tokens.weight": torch.zeros(32, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dense | {"model_type": "llama"}))
    with pytest.raises(DuoError, match="is for gemma3n alone, and this is a llama; --graft makes a Duo of it"):
        open_source(tmp_path, slicing="E2B")


@pytest.mark.parametrize(("given", "skips"), [(None, [20, 21, 22, 23, 24]), ("E2.98B-block", None)])
def test_published_names_and_the_default(tmp_path, given, skips):
    """On 35 layers as wide inside as Gemma 3n's, whose weights nobody reads."""
    size = {"hidden_size": 8, "head_dim": 8, "num_attention_heads": 1, "hidden_size_per_layer_input": 8}
    changes = {**FULL, **size, "laurel_rank": 2, "vocab_size": 32, "vocab_size_per_layer_input": 24}
    changes |= {"intermediate_size": [16384] * 35, "num_key_value_heads": 1}
    with torch.device("meta"):
        shapes = reference.Gemma3nForCausalLM(reference.text_config(**changes)).state_dict()
    state = {
        name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in shapes.items() if "head" not in name
    }
    for layer in range(20, 35):
        for part in ("k_proj", "v_proj", "k_norm"):
            name = f"model.layers.{{}}.self_attn.{part}.weight"
            state[name.format(layer)] = state[name.format(0)].clone()
    found = open_source(reference.write(tmp_path / "dense", state, **changes), slicing=given)
    found.check()
    config = Config.from_dict(found.config)
    assert found.config.get("small_skips") == skips and config.skip_scope == "layer"
    letters = matformer.PUBLISHED[given or "E2B"].replace(" ", "")
    small = {"s": Route.SMALL, "B": Route.BIG, "-": Route.SKIP}
    assert [config.small_means(layer) for layer in range(35)] == [small[letter] for letter in letters]
    assert {config.small_width(layer) for layer in range(35)} == {8192, 0}


@pytest.mark.parametrize("name", matformer.PUBLISHED)
def test_published_slicings_have_the_effective_parameters_of_their_names(name):
    """Counted from shapes, without embeddings as Google counts; that of E3.79B by block is stated as 3.74."""
    config = reference.text_config(**FULL, intermediate_size=[16384] * 35)
    with torch.device("meta"):
        whole = reference.Gemma3nForCausalLM(config)
    layer = sum(value.numel() for value in whole.model.layers[20].parameters())
    keys = 2 * 2048 * 512 + 256  # which the hub's layers have, too
    outside = 6 * 2048 * 2048 + 2048 + 256
    letters = matformer.PUBLISHED[name].replace(" ", "")
    projection = 256 * 2048  # of a layer's own input
    count = outside + sum(
        layer + keys + projection - (3 * 2048 * 8192 if letter == "s" else 0) for letter in letters if letter != "-"
    )
    stated = 3.74 if name == "E3.79B-block" else float(re.findall(r"\d\.?\d*", name)[0] if "." in name else 1.91)
    assert len(letters) == 35 and abs(count / 1e9 - stated) < 0.02
    assert name != "E2B" or count == 1_905_495_648  # which the notebook prints


def counted(bits: int) -> tuple[Model, RouteTable]:
    """E2B's Duo of shapes alone, and the bytes that a token reads."""
    text = reference.TEXT | FULL | {"intermediate_size": [16384] * 35}
    keys = {"model_type": "duo", "base_model_type": "gemma3n", "text_config": text}
    model = imagined(Config.from_dict(keys | matformer.read("E2B", text["intermediate_size"]).keys), bits)
    for ffn in model.ffns:
        ffn.pop("router")  # which an imagined one has
    return model, cost.weight_bytes(model)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f}"


@pytest.mark.parametrize(("bits", "name"), [(16, "bfloat16"), (8, "8 bits"), (4, "4 bits")])
def test_the_docs_say_the_bytes_that_are_counted(bits, name):
    model, table = counted(bits)
    own = sum(nbytes(ffn["small"]) for ffn in model.ffns if "small" in ffn)
    inputs = nbytes(model.trunk.embed_tokens_per_layer)
    big, small = (int(table.of(np.full(35, route))) for route in (Route.BIG, Route.SMALL))
    row = " | ".join(map(gigabytes, (nbytes(model), inputs, own, big, small)))
    docs = (Path(__file__).parents[2] / "docs" / "gemma3n.md").read_text()
    assert f"| {name} | {row} |\n" in docs
    for slicing, letters in matformer.PUBLISHED.items() if bits == 4 else ():
        small = {"s": Route.SMALL, "B": Route.BIG, "-": Route.SMALL}
        read = gigabytes(int(table.of(np.array([small[letter] for letter in letters.replace(" ", "")]))))
        route = "small" if slicing == "E2B" else letters.replace("-", "s")
        assert re.search(rf"^\| {slicing} \| `{route}` \| [\d.]+ \| [\d.]+ % \| {read} \|$", docs, re.MULTILINE)
