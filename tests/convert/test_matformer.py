"""Gemma 3n as a Duo: all big, all small and everything between against transformers, in float and in four bits."""

import json
import re
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.utils import quantize_model
from safetensors.torch import load_file

import duo_mlx
from duo_mlx import checkpoint, cost
from duo_mlx.convert import matformer, parity
from duo_mlx.convert.directory import Bits, Watch, convert
from duo_mlx.convert.export import export
from duo_mlx.convert.source import open_source
from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import Route

torch = pytest.importorskip("torch")
from tests.convert import gemma3n_reference as reference  # noqa: E402
from tests.convert.gemma3n_duo import INNER, LAYERS, SLICINGS, TOKENS, Made  # noqa: E402

CUTS = {"whole": (TOKENS,), "one by one": (1,) * TOKENS, "chunks": (4, 1, 3, 1, 4)}


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


def test_small_drafts_for_big(like_e2b, write_tokenizer, tmp_path):
    """E2B and E4B from one copy of the weights, as long as the window of sliding attention is not full."""
    write_tokenizer(source := reference.write(tmp_path / "dense", like_e2b.state, sliding_window=64))
    convert(source, tmp_path / "duo", slicing=str(like_e2b.slicing))
    model, tokenizer = duo_mlx.load(tmp_path / "duo")

    def said(**options: Any) -> list[int]:
        found = duo_mlx.stream_generate(model, tokenizer, "w1 w2 w3", route="big", max_tokens=20, **options)
        return [each.token for each in found]

    assert said(speculate="small", draft_tokens=3) == said()


@pytest.mark.parametrize("route", ["small", "s-Bs-sssBs"])
def test_stock_mlx_lm_runs_it_alone_and_in_batches(like_e2b, tmp_path, route):
    convert(like_e2b.source, tmp_path / "duo", slicing=str(like_e2b.slicing), default_route=route)
    model, tokenizer = mlx_lm.load(str(tmp_path / "duo"), trust_remote_code=True)
    prompts = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12]]
    batch = mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=8, return_token_ids=True)
    for prompt, ours in zip(prompts, batch.token_ids, strict=True):
        alone = [each.token for each in mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=8)]
        assert [token for token in alone if token != 1] == ours
