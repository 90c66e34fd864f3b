"""Gemma 3n as a Duo: all big, all small and everything between against transformers, in float and in four bits."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import quantize_model
from safetensors.torch import load_file

import duo_mlx
from duo_mlx import checkpoint, cost
from duo_mlx.config import Config
from duo_mlx.convert import matformer, parity
from duo_mlx.convert.directory import Bits, Watch, convert
from duo_mlx.convert.export import export
from duo_mlx.convert.source import open_source
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import Route

torch = pytest.importorskip("torch")
from tests.convert import gemma3n_reference as reference  # noqa: E402

LAYERS, TOKENS = 10, 13
SLICINGS = {
    # as E2B: one width, layers that share keys and values are skipped
    "skips shared layers": ([64] * 7, [6, 7, 9]),
    # widths by layer, one of them whole, and a layer with keys and values of its own is skipped
    "skips a layer with keys": ([64, 32, INNER := reference.INNER, 96, 64, 64, 32, 64], [1, 8]),
    "skips none": ([64] * 5 + [INNER] * 4 + [96], []),
}
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
CUTS = {"whole": (TOKENS,), "one by one": (1,) * TOKENS, "chunks": (4, 1, 3, 1, 4)}


class Made:
    """A Duo that was written and read again, and what it was made of."""

    def __init__(self, name: str, folder: Path, write_tokenizer: Any):
        self.state = reference.random_state()
        self.source = reference.write(folder / "dense", self.state)
        write_tokenizer(self.source)
        self.kept, self.skips = SLICINGS[name]
        self.slicing = folder / "slicing.json"
        self.slicing.write_text(json.dumps({"ffn_hidden_dims": self.kept, "layers_to_skip": self.skips}))
        self.directory = folder / "duo"
        convert(self.source, self.directory, slicing=str(self.slicing))
        self.model = checkpoint.read_model(self.directory)
        random = np.random.default_rng(1)
        self.tokens = random.integers(3, reference.TEXT["vocab_size"], (2, TOKENS))
        self.routes = random.integers(0, 3, (2, TOKENS, LAYERS))

    @property
    def widths(self) -> list[int]:
        """Of small, one a layer."""
        return [self.model.config.small_width(layer) for layer in range(LAYERS)]

    def logits(
        self, routes: Any, cuts: tuple[int, ...] = (TOKENS,), strategy: str = "auto", model: Any = None
    ) -> np.ndarray:
        """Logits with a cache, which alone has Gemma 3n's shared keys and values in mlx-lm."""
        model = self.model if model is None else model
        cache, found = model.make_cache(), []
        for start, stop in pairwise(np.cumsum([0, *cuts])):
            part = routes[:, start:stop] if len(routes.shape) == 3 else routes
            given = mx.array(self.tokens[:, start:stop])
            found.append(model(given, cache=cache, routes=part, strategy=strategy))
        return np.array(mx.concatenate(found, axis=1))


def everywhere(route: Route) -> np.ndarray:
    return np.full(LAYERS, route)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(ours - theirs).max() <= tolerance)


@pytest.fixture(scope="module", params=SLICINGS)
def made(request, tmp_path_factory, write_tokenizer) -> Made:
    return Made(request.param, tmp_path_factory.mktemp("gemma3n"), write_tokenizer)


@pytest.fixture(scope="module")
def like_e2b(tmp_path_factory, write_tokenizer) -> Made:
    return Made("skips shared layers", tmp_path_factory.mktemp("gemma3n"), write_tokenizer)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_all_big_is_the_whole_model(made, cuts):
    whole = reference.loaded(reference.text_config(), made.state)
    theirs = reference.cached(whole, made.tokens, cuts)
    assert close(made.logits(everywhere(Route.BIG), cuts), theirs)
    assert np.abs(theirs).max() > 1


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_all_small_is_the_sliced_model(made, cuts):
    theirs = reference.cached(reference.cut(made.state, made.kept, made.skips), made.tokens, cuts)
    assert close(made.logits(everywhere(Route.SMALL), cuts), theirs)
    assert not close(made.logits(everywhere(Route.BIG), cuts), theirs, 0.1)


@pytest.mark.parametrize("strategy", ["dense", "planned", "sorted", "sync", "auto"])
def test_routes_by_token_are_those_of_a_loop_over_tokens(made, strategy):
    whole = reference.loaded(reference.text_config(), made.state)
    theirs = np.stack(
        [
            reference.token_by_token(whole, tokens, routes, made.widths, made.skips)
            for tokens, routes in zip(made.tokens, made.routes, strict=True)
        ]
    )
    for cuts in CUTS.values():
        assert close(made.logits(made.routes, cuts, strategy), theirs)
        if strategy not in ("planned", "auto"):  # these read routes of the device before the pass
            assert close(made.logits(mx.array(made.routes), cuts, strategy), theirs)


def test_the_loop_over_tokens_is_transformers_own_pass(made):
    whole = reference.loaded(reference.text_config(), made.state)
    big = np.full((TOKENS, LAYERS), Route.BIG)
    theirs = reference.cached(whole, made.tokens, (TOKENS,))
    assert close(reference.token_by_token(whole, made.tokens[0], big, made.widths, made.skips), theirs[0])


def test_a_router_may_decide(made):
    from duo_mlx.router import Follow

    found = made.model(mx.array(made.tokens), made.model.make_cache(), routes=Follow(made.routes))
    assert close(np.array(found), made.logits(made.routes))


def test_small_has_its_down_projection_alone(made):
    weights = load_file(made.directory / "model.safetensors")
    small = {name: value for name, value in weights.items() if ".small." in name}
    assert len(small) == sum(width > 0 for width in made.widths)
    for name, value in small.items():
        layer = int(re.findall(r"\d+", name)[0])
        whole = made.state[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert torch.equal(value, whole[:, : made.widths[layer]])
    assert not any("vision" in name or "audio" in name for name in weights)


def test_a_skipped_layer_reads_nothing(like_e2b):
    read = cost.weight_bytes(like_e2b.model).by_route
    assert (read[[6, 7, 9], Route.SMALL] == 0).all() and (read[[6, 7, 9], Route.BIG] > 0).all()
    assert (read[:6, Route.SKIP] > 0).all()  # keys and values are still written
    fixed = cost.weight_bytes(like_e2b.model).fixed
    table = like_e2b.state["model.embed_tokens_per_layer.weight"]
    assert fixed < table.nbytes + like_e2b.state["model.embed_tokens.weight"].nbytes  # a row of it is read


def test_routes_are_told_as_they_are_carried_out(like_e2b):
    assert like_e2b.model.config.realised(everywhere(Route.SMALL)).tolist() == [1, 1, 1, 1, 1, 1, 0, 0, 1, 0]


def test_a_pass_that_skips_a_layer_has_nothing_of_it_in_its_graph(like_e2b):
    ran = []
    model, tokens = like_e2b.model, mx.array(like_e2b.tokens)

    def count(ffn: Any, x: mx.array) -> mx.array:
        ran.append(ffn.index)
        return x

    with model.opened(2, TOKENS, everywhere(Route.SMALL)) as opened:
        opened._after_ffn = lambda index, run: count(model.ffns[index], run())
        model.trunk(tokens, cache=model.make_cache())
    assert ran == [0, 1, 2, 3, 4, 5, 8]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(like_e2b, tmp_path, bits):
    """Against a float Duo of the numbers that the packed weights stand for."""
    convert(like_e2b.source, tmp_path / "q", slicing=str(like_e2b.slicing), bits=Bits(bits, None, 32))
    quantised = checkpoint.read_model(tmp_path / "q")
    stored = checkpoint.parameters(quantised)
    numbers = {}
    for name, value in stored.items():
        path = name.rpartition(".")[0]
        if f"{path}.scales" in stored and name.endswith(".weight"):
            parts = (stored[f"{path}.{part}"] for part in ("scales", "biases"))
            numbers[name] = mx.dequantize(value, *parts, 32, bits)
        elif f"{path}.scales" not in stored:
            numbers[name] = value
    restored = Model(like_e2b.model.config)
    restored.load_weights(list(numbers.items()))
    assert "scales" in quantised.ffns[0]["small"].down_proj and "scales" in quantised.ffns[0].small.gate_proj
    for routes in (everywhere(Route.SMALL), everywhere(Route.BIG), like_e2b.routes):
        for strategy in ("dense", "sorted", "planned"):
            ours = like_e2b.logits(routes, CUTS["chunks"], strategy, quantised)
            assert close(ours, like_e2b.logits(routes, model=restored))


def test_a_quantised_source_keeps_its_packed_weights(like_e2b, write_tokenizer, tmp_path):
    """As mlx-lm quantises Gemma 3n; what small takes of a down projection ends with a group."""
    from mlx_lm import utils as mlx_lm_utils

    model, config = (
        mlx_lm_utils.load_model(like_e2b.source)[0],
        json.loads((like_e2b.source / "config.json").read_text()),
    )
    model, config = quantize_model(model, config, 32, 4)
    dense = tmp_path / "dense"
    dense.mkdir()
    mlx_lm_utils.save_model(dense, model)
    (dense / "config.json").write_text(json.dumps(config))
    write_tokenizer(dense)
    convert(dense, tmp_path / "duo", slicing=str(like_e2b.slicing))
    duo = checkpoint.read_model(tmp_path / "duo")
    big, small = duo.ffns[0].big.down_proj, duo.ffns[0]["small"].down_proj
    unpacked = [mx.dequantize(each.weight, each.scales, each.biases, 32, 4) for each in (big, small)]
    assert mx.array_equal(unpacked[0][:, :64], unpacked[1])
    like_e2b.slicing.with_name("odd.json").write_text(json.dumps({"ffn_hidden_dims": [40] * 10}))
    with pytest.raises(DuoError, match="end within a group of quantised weights; convert a float model"):
        convert(dense, tmp_path / "odd", slicing=str(like_e2b.slicing.with_name("odd.json")))


def test_a_written_directory_generates(like_e2b, tmp_path):
    convert(like_e2b.source, tmp_path / "duo", slicing=str(like_e2b.slicing), bits=Bits(8, None, 32))
    model, tokenizer = duo_mlx.load(tmp_path / "duo")
    texts = {
        route: "".join(
            each.text for each in duo_mlx.stream_generate(model, tokenizer, "w1 w2 w3", route=route, max_tokens=9)
        )
        for route in ("big", "small", "random")
    }
    assert all(texts.values()) and texts["big"] != texts["small"]


def test_other_slicings_are_patterns_of_one_duo(like_e2b):
    """As every published slicing is a route of E2B's Duo."""
    pattern = np.array([2, 1, 1, 2, 1, 2, 2, 2, 1, 2])
    widths = [64 if route == 1 else INNER for route in pattern]
    theirs = reference.cached(reference.cut(like_e2b.state, widths, []), like_e2b.tokens, CUTS["chunks"])
    assert close(like_e2b.logits(pattern, CUTS["chunks"]), theirs)
    for letters in matformer.PUBLISHED.values():
        blocks = letters.split()
        assert blocks[4] in ("-----", "BBBBB") and set("".join(blocks[:4] + blocks[5:])) <= {"s", "B"}


def test_verify_compares_every_route_with_transformers(like_e2b, tmp_path):
    found = {}
    watch = Watch(parity=lambda what, rows: found.setdefault(what, rows))
    convert(
        like_e2b.source,
        tmp_path / "duo",
        slicing=str(like_e2b.slicing),
        verify=True,
        bits=Bits(4, None, 32),
        watch=watch,
    )
    assert [row.route for row in found["the model"]] == ["big", "small", "skip", "random"]
    assert all(row.max_abs_difference < 1e-4 for rows in found.values() for row in rows) and len(found) == 2


def test_verify_finds_a_wrong_prefix(like_e2b, tmp_path, monkeypatch):
    last = lambda tensor, width, _: tensor.apply(lambda array: array[:, -width:], (tensor.shape[0], width))  # noqa: E731
    monkeypatch.setattr(matformer, "_first_columns", last)
    duo = tmp_path / "duo"
    convert(like_e2b.source, duo, slicing=str(like_e2b.slicing))
    right = open_source(like_e2b.directory).tensors
    rows = {row.route: row.max_abs_difference for row in parity.measure(duo, like_e2b.model.config.to_dict(), right)}
    assert rows["big"] < 1e-4 and rows["small"] > 1e-2


def test_it_goes_to_pytorch_and_back(like_e2b, tmp_path):
    export(like_e2b.directory, tmp_path / "torch")
    names = load_file(tmp_path / "torch" / "model.safetensors").keys()
    assert {name for name in names if ".small." not in name} == {
        name.replace("model.", "model.language_model.", 1) for name in like_e2b.state
    }
    convert(tmp_path / "torch", tmp_path / "again")
    again = checkpoint.read_model(tmp_path / "again")
    assert np.array_equal(like_e2b.logits(like_e2b.routes, model=again), like_e2b.logits(like_e2b.routes))


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
