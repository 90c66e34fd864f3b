"""``duo-mlx convert --slicing`` on the command line."""

import json

import pytest

from duo_mlx.checkpoint import read_config

pytest.importorskip("torch")
from tests.convert import gemma3n_reference as reference


@pytest.fixture
def source(tmp_path, write_tokenizer):
    """A dense Gemma 3n."""
    write_tokenizer(directory := reference.write(tmp_path / "dense", reference.random_state()))
    return directory


@pytest.fixture
def slicing(tmp_path):
    file = tmp_path / "slicing.json"
    file.write_text(json.dumps({"ffn_hidden_dims": [64] * 8, "layers_to_skip": [6, 7]}))
    return file


def test_it_makes_a_duo(succeed, source, slicing, tmp_path):
    succeed(source, tmp_path / "duo", "--slicing", slicing, "--bits", 4, "--group-size", 32, "--verify")
    config = read_config(tmp_path / "duo")
    keys = ("small_kind", "small_intermediate_size", "small_skips", "skip_scope")
    assert [config[key] for key in keys] == ["nested", 64, [6, 7], "layer"]


def test_a_dry_run_says_where_small_comes_from(succeed, source, slicing):
    lines = succeed(source, "unwritten", "--slicing", slicing, "--dry-run").stdout.splitlines()
    down = "model.language_model.layers.0.mlp.{}down_proj.weight"
    assert [down.format(""), down.format("small."), "32x64", "float32"] in [line.split() for line in lines]
    assert any("vision_tower" in line and "left out" in line for line in lines)


def test_inspect_names_the_command(succeed, source):
    assert f"duo-mlx convert {source} DST --slicing E2B" in succeed("inspect", source).stdout


def test_what_does_not_go_together(fails, source, tmp_path):
    fails(
        "--slicing takes small FFNs from Gemma 3n's own, and --graft makes", source, "x", "--slicing", "E2B", "--graft"
    )
    fails("--slicing does not go with --to torch", source, "x", "--slicing", "E2B", "--to", "torch")
    fails("the model has 10; --slicing FILE takes other widths", source, tmp_path / "x")
