"""``duo-mlx bench draft``: what it prints, writes and stores, what ``--speculate default`` makes of it, mistakes."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx import checkpoint, cost, files
from duo_mlx.bench import reading
from duo_mlx.bench.acceptance import Acceptance
from duo_mlx.cli import main
from duo_mlx.routes import parse_pattern
from duo_mlx.sampling import Sampling

QUICK = ("--text-tokens=256", "--passes=12", "--best=2", "--rounds=1", "--tokens=8", "--costs=bytes")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    words = np.random.default_rng(0).integers(0, 30, 600)
    file.write_text(" ".join(f"w{word}" for word in words))
    return file


@pytest.fixture
def model(saved, tmp_path):
    """``model(**changes)``: a copy of a tiny model's directory."""

    def copy(**changes):
        return shutil.copytree(saved(**changes)[0], tmp_path / "duo")

    return copy


def run(command, *arguments):
    return CliRunner().invoke(main, [*command.split(), *map(str, arguments)])


def test_the_best_measured_pattern_is_shown_written_and_stored(model, text, tmp_path):
    directory, out = model(), tmp_path / "draft.json"
    before, of_model = (directory / "config.json").read_text(), checkpoint.fingerprint(directory)
    arguments = (text, "--model", directory, *QUICK, "--choices", "sB", "--out", out, "--store")
    done = run("bench draft", *arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert found["verify"] == "BBBB" and found["model"]["name"] == "duo" and found["text"]["tokens"] == 256
    patterns = [each["pattern"] for each in found["candidates"]]
    assert len(patterns) <= 12 and "BBBB" not in patterns and set("".join(patterns)) == {"s", "B"}
    assert set(found["measured"]) == {*patterns[:2], "ssss"}
    speed_ups = {pattern: each["speed_up"]["median"] for pattern, each in found["measured"].items()}
    assert found["best"] == max(speed_ups, key=speed_ups.get)
    assert found["faster"] == (found["measured"][found["best"]]["speed_up"]["low"] > 1)
    for each in found["candidates"]:
        row = next(line for line in done.stdout.splitlines() if line.startswith(each["pattern"]))
        assert f"{each['greedy']:.1%}" in row and f"{each['speed_up']:.2f} x" in row
        assert row.endswith("]") == (each["pattern"] in found["measured"])
        if each["pattern"] == patterns[0]:
            break
    assert f"best: {found['best']}" in done.stdout
    assert ("none is faster" in done.stdout) != found["faster"]

    after = json.loads((directory / "config.json").read_text())
    assert after.pop("default_draft") == found["best"] and after == json.loads(before)
    assert checkpoint.fingerprint(directory) == of_model == found["model"]["sha256"]
    assert run("bench draft", *arguments).exit_code == 2
    assert run("bench draft", *arguments, "--force").exit_code == 0  # may replace the file and the key


def test_figures_are_those_of_the_held_out_windows(model, text, tmp_path):
    directory, out = model(), tmp_path / "draft.json"
    options = ("--temp", "0.5", "--verify", "BBsB", "--out", out)
    done = run("bench draft", text, "--model", directory, *QUICK, *options)
    assert done.exit_code == 0, done.output
    loaded, tokenizer = checkpoint.load(directory)
    windows = reading.windows(reading.read(text, "held_out"), tokenizer, 256, 128)[:, :-1]
    accepting = Acceptance(loaded, parse_pattern("BBsB", 4), windows, (Sampling(), Sampling(0.5)))
    found = json.loads(out.read_text())
    for each in found["candidates"]:
        greedy, sampled = accepting.of(parse_pattern(each["pattern"], 4))
        assert each["greedy"] == pytest.approx(greedy.mean()) and each["sampled"] == pytest.approx(sampled.mean(), 1e-4)
        assert each["acceptance"][0] == pytest.approx(sampled[:, :-6].mean(), 1e-4)  # rounds of seven fit in a window
    assert "default_draft" not in json.loads((directory / "config.json").read_text())


def test_fewer_tokens_to_draft_are_stored_with_the_pattern(model, text, tmp_path):
    directory, out = model(), tmp_path / "draft.json"
    options = ("--model", directory, *QUICK, "--draft-vocabulary", "20", "--store", "--out", out)
    done = run("bench draft", text, *options)
    assert done.exit_code == 0, done.output
    config, found = json.loads((directory / "config.json").read_text()), json.loads(out.read_text())
    assert config["draft_vocabulary"] == found["draft_vocabulary"] == 20 and config["default_draft"] == found["best"]
    assert checkpoint.load(directory)[0].config.draft_vocabulary == 20
    share = next(each["bytes"] for each in found["candidates"] if each["pattern"] == "ssss")
    whole = checkpoint.load(directory)[0]
    drafts, all_of_it = cost.draft_bytes(whole), cost.weight_bytes(whole)
    assert share == drafts.of(parse_pattern("ssss", 4)) / all_of_it.of(parse_pattern("big", 4))
    assert drafts.fixed < all_of_it.fixed


def test_speculate_default_is_the_stored_pattern(model):
    directory = model(default_draft="Bsss")
    arguments = ("--model", directory, "w1 w2 w3", "--max-tokens", "12", "--json", "--draft-tokens", "2", "--speculate")
    named, default = (json.loads(run("generate", *arguments, spec).stdout) for spec in ("Bsss", "default"))
    assert default["speculation"]["route"] == "Bsss"
    assert default["speculation"] == named["speculation"] and default["text"] == named["text"]


def test_speculate_default_of_a_model_without_one_is_one_line(model):
    done = run("generate", "--model", model(), "w1", "--speculate", "default")
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "this model's config.json has no default_draft; duo-mlx bench draft" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--verify", "router"), "this model has no router"),
        (("--verify", "random"), "--verify random: must be one pattern for all tokens"),
        (("--verify", "BB"), "route 'BB' has 2 characters"),
        (("--verify", "skip"), "no pattern reads fewer weights than --verify ----"),
        (("--choices", "B"), "Invalid value for '--choices'"),
        (("--out", "draft.txt"), "--out draft.txt: the name must end in .json"),
        (("--draft-vocabulary", "999"), "--draft-vocabulary 999: the model's vocabulary has "),
        (("--tokens", "40"), "--tokens 40: after prompts of 32 tokens the model's context of 64 is full"),
        (("--store",), "has the default_draft Bsss; give --force to replace it"),
    ],
)
def test_mistakes_are_one_line(model, text, arguments, line):
    directory = model(max_position_embeddings=64, default_draft="Bsss")
    before = (directory / "config.json").read_bytes()
    done = run("bench draft", text, "--model", directory, *QUICK, *arguments)
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert line in done.stderr and (directory / "config.json").read_bytes() == before


@pytest.mark.parametrize("path", [(), ("--model", "someone/duo")], ids=["embedded", "hub"])
def test_nothing_is_stored_where_there_is_no_directory(path):
    done = run("bench draft", *path, "--store")
    assert done.exit_code == 2 and "--store writes into a model directory; give one with --model DIR" in done.stderr


def test_a_directory_that_cannot_be_written_is_refused_before_anything_is_measured(model, monkeypatch):
    directory = model()
    monkeypatch.setattr(os, "access", lambda path, mode: (str(path), mode) != (str(directory), os.W_OK))
    done = run("bench draft", "--model", directory, "--store")
    assert done.exit_code == 2 and re.search(r"--store: \S+ cannot be written", done.stderr)


def test_an_interrupted_store_leaves_the_configuration(model, monkeypatch):
    """The new one gets its name when it is on the disk."""
    directory = model()
    before = (directory / "config.json").read_bytes()

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "settle", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_default_draft(directory, "ssss")
    assert (directory / "config.json").read_bytes() == before and not list(directory.glob(".*"))
