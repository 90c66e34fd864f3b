"""``duo-mlx convert --graft`` and ``--calibrate``: a dense model becomes a Duo, is resumed and measured."""

import json
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import duo_mlx
from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.convert import directory as converting
from duo_mlx.convert.reference import DuoConfig, DuoModel
from duo_mlx.convert.tensors import Tensor
from duo_mlx.errors import DuoError
from duo_mlx.study import patterns

WIDE = {"hidden_size": 64, "intermediate_size": 128, "small_intermediate_size": 32}


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


# the graft


def test_a_dense_model_becomes_a_duo(dense, graft, text, tmp_path, succeed):
    directory = dense("bfloat16")
    options = ("--small-ratio", 6, "--small-layers", "1-3", "--calibration-tokens", 300, "--seed", 7, "--verify")
    done = succeed(directory, tmp_path / "model", "--graft", "--calibrate", text, *options, "--measure-tokens", 128)
    ((settings, ids, _),) = graft.calls
    assert (settings.small_ratio, settings.small_layers, settings.tokens, settings.seed) == (6, (1, 2, 3), 300, 7)
    expected = [int(word[1:]) + 2 for word in text.read_text().split()]
    assert ids.dtype == np.int32 and ids.tolist() == expected[:300]

    model, _ = duo_mlx.load(tmp_path / "model", dtype=mx.bfloat16)
    args, weights = model.config, checkpoint.parameters(model)
    assert (args.small_intermediate_size, args.small_bias, args.small_layers) == (4, True, (1, 2, 3))
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    theirs = {}
    for file in directory.glob("*.safetensors"):
        theirs |= mx.load(str(file))
    for name, value in theirs.items():
        assert mx.array_equal(weights[name.replace(".mlp.", ".mlp.big.")], value).item()
    assert mx.array_equal(
        weights["model.layers.1.mlp.small.up_proj.weight"], theirs["model.layers.1.mlp.up_proj.weight"][:4]
    ).item()
    assert [row.split()[0] for row in done.stdout.splitlines()] == ["route", "big"] and "100.00%" in done.stdout
    assert "wrote" in done.stderr and names(tmp_path) == ["dense", "model", "text.txt"]

    record = json.loads((tmp_path / "model" / "patterns.json").read_text())
    assert record["tokens"] == 128 and record["loss"]["small_in_one_layer"][0] is None
    float32, _ = duo_mlx.load(tmp_path / "model")
    windows = mx.array(np.array(expected[-130:]).reshape(2, 65))
    assert config_of(tmp_path / "model")["best_patterns"] == patterns.measure(float32, windows).patterns


def test_all_big_is_the_dense_model_in_mlx_lm(dense, graft, text, tmp_path, succeed):
    directory = dense()
    succeed(directory, tmp_path / "model", "--graft", "--calibrate", text, "--small-ratio", 6, "--measure-tokens", 0)
    ours, _ = mlx_lm.load(str(tmp_path / "model"), trust_remote_code=True)
    theirs, _ = mlx_lm.load(str(directory))
    tokens = mx.array([[3, 9, 4, 20, 31, 2]])
    np.testing.assert_allclose(np.array(ours(tokens)), np.array(theirs(tokens)), atol=1e-5)
    assert not (tmp_path / "model" / "patterns.json").exists()
    assert "best_patterns" not in config_of(tmp_path / "model") and len(graft.calls) == 1


@pytest.mark.usefixtures("graft")
def test_a_graft_is_verified_without_pytorch_and_a_wrong_one_is_not_written(
    dense, text, tmp_path, monkeypatch, invoke, succeed
):
    monkeypatch.setitem(sys.modules, "torch", None)
    options = ("--graft", "--calibrate", text, "--small-ratio", 6, "--measure-tokens", 0, "--verify")
    directory = dense()
    write = converting.write_weights

    def spoil(target, weights, **keywords):
        name = "model.layers.1.mlp.big.up_proj.weight"
        write(target, {**weights, name: Tensor.of(weights[name].load() + 0.01)}, **keywords)

    with monkeypatch.context() as patched:
        patched.setattr(converting, "write_weights", spoil)
        done = invoke(directory, tmp_path / "model", *options)
    assert done.exit_code == 2 and "does not compute what mlx-lm's own model computes" in done.stderr
    assert "goes on from there" not in done.stderr and not (tmp_path / "model").exists()
    succeed(directory, tmp_path / "model", *options)


@pytest.mark.parametrize(
    ("fail", "code"), [(KeyboardInterrupt(), 130), (DuoError("layer 2: no"), 2), (RuntimeError("a defect"), 1)]
)
def test_an_interrupted_graft_goes_on(dense, graft, text, tmp_path, fail, code, invoke, succeed):
    options = (dense(), tmp_path / "model", "--graft", "--calibrate", text, "--small-ratio", 6, "--measure-tokens", 0)
    graft.fail = fail
    done = invoke(*options)
    assert done.exit_code == code
    state = tmp_path / ".model.graft"
    assert f"what was grafted is kept in {state}; the same command goes on from there\n" in done.stderr
    assert names(tmp_path) == [".model.graft", "dense", "text.txt"] and names(state) == ["0", "1"]
    graft.fail = None
    succeed(*options)
    assert [resumed for _, _, resumed in graft.calls] == [0, 2]
    assert names(tmp_path) == ["dense", "model", "text.txt"]


def test_what_a_graft_gives_must_be_a_duo(dense, graft, text, tmp_path, monkeypatch, invoke):
    whole = graft.graft

    def part(*arguments):
        made = whole(*arguments)
        made.config["small_bias"] = False
        return made

    monkeypatch.setattr(graft, "graft", part)
    done = invoke(dense(), tmp_path / "model", "--graft", "--calibrate", text, "--small-ratio", 6)
    assert done.exit_code == 2 and "12 tensors do not fit config.json; nothing was written" in done.stderr
    assert not (tmp_path / "model").exists()


def test_a_graft_in_fewer_bits_and_back_in_pytorch(dense, graft, text, tmp_path, succeed, fails):
    grafting = ("--graft", "--calibrate", text, "--small-ratio", 4, "--small-layers", "0,2", "--measure-tokens", 128)
    bits = ("--bits", 4, "--small-bits", 8, "--group-size", 32, "--verify")
    directory = dense(**{key: WIDE[key] for key in ("hidden_size", "intermediate_size")})
    done = succeed(directory, tmp_path / "model", *grafting, *bits, "--calibration-tokens", 200)
    assert len(graft.calls) == 1 and "bits per weight" in done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[0] for row in rows if row] == [*("route", "big", "the", "route", "big", "small", "skip", "random")]
    config = config_of(tmp_path / "model")
    assert config["quantization"]["bits"] == 4 and len(config["best_patterns"]) > 4
    beside = {"config.json", "duo_model.py", "patterns.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(names(tmp_path / "model")) == beside | {"model.safetensors", "model.safetensors.index.json"}
    fails("is quantised; give --dequantise", tmp_path / "model", tmp_path / "duo.pt", "--to", "torch")
    succeed(
        tmp_path / "model", tmp_path / "duo.pt", "--to", "torch", "--names", "canonical", "--dequantise", "--verify"
    )
    reference = DuoModel(DuoConfig.from_dict(config))
    reference.load_state_dict(torch.load(tmp_path / "duo.pt", weights_only=True))


# measuring


def test_measuring_a_duo_gives_budgets_that_survive_what_comes_after(saved, text, tmp_path, succeed):
    directory, model = saved(**WIDE)
    (tmp_path / "more.txt").write_text("w1 w2 w3")
    texts = ("--calibrate", text, "--calibrate", tmp_path / "more.txt")
    done = succeed(directory, tmp_path / "model", *texts, "--measure-tokens", 400)
    assert "the texts have" not in done.stderr
    ids = [*(int(word[1:]) + 2 for word in text.read_text().split()), 3, 4, 5]
    best = patterns.measure(model, mx.array(np.array(ids[-401:][:400]).reshape(2, 200))).patterns
    assert config_of(tmp_path / "model")["best_patterns"] == best
    record = json.loads((tmp_path / "model" / "patterns.json").read_text())
    assert [entry["name"] for entry in record["texts"]] == ["text.txt", "more.txt"]

    succeed(tmp_path / "model", tmp_path / "again", "--bits", 8)
    assert config_of(tmp_path / "again")["best_patterns"] == best
    assert json.loads((tmp_path / "again" / "patterns.json").read_text()) == record
    generate = ["generate", "--model", str(tmp_path / "again"), "w1 w2", "--route", "budget:2", "--json"]
    said = CliRunner().invoke(main, [*generate, "--max-tokens", "2", "--stop-token", "w0"])
    assert said.exit_code == 0, said.output
    counts = json.loads(said.stdout)["routes"]
    assert counts["big"] <= 2 * json.loads(said.stdout)["generation_tokens"]

    succeed(directory, tmp_path / "plain")
    assert "best_patterns" not in config_of(tmp_path / "plain") and "patterns.json" not in names(tmp_path / "plain")


def test_short_texts_are_used_as_far_as_they_go(dense, saved, graft, tmp_path, succeed, fails):
    text = tmp_path / "short.txt"
    text.write_text("w1 " * 300)
    done = succeed(saved()[0], tmp_path / "model", "--calibrate", text)
    assert "duo-mlx: the texts have 300 tokens: 298 are measured (of 1024)\n" in done.stderr
    done = succeed(dense(), tmp_path / "duo", "--graft", "--calibrate", text, "--small-ratio", 6)
    assert "the texts have 300 tokens: 170 are grafted on (of 20000), 128 are measured (of 1024)\n" in done.stderr
    assert (graft.calls[0][0].tokens, len(graft.calls[0][1])) == (20_000, 170)
    text.write_text("w1 " * 129)
    line = "--calibrate: the texts have 129 tokens; at least 130 are needed"
    fails(line, saved()[0], tmp_path / "none", "--calibrate", text)
    text.write_bytes(b"\xff" * 2000)
    fails("short.txt: is not UTF-8 (byte 0)", saved()[0], tmp_path / "none", "--calibrate", text)
    assert names(tmp_path) == ["dense", "duo", "model", "short.txt"]
