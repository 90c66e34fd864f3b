"""``duo-mlx oracle difficulty``: a summary and its JSON from an oracle of a tiny model, and refusals in one line."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.study import search
from duo_mlx.study.difficulty import CLASSES
from duo_mlx.study.sequence import Question

SEQUENCES, LENGTH = 5, 6


def run(*arguments):
    return CliRunner().invoke(main, ["oracle", "difficulty", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture(scope="module")
def oracle(saved, tmp_path_factory):
    """``oracle(*budgets)``: the folder of an oracle of the tiny model, not to be changed."""
    made = {}

    def make(*budgets):
        if budgets not in made:
            directory, model = saved()
            made[budgets] = tmp_path_factory.mktemp("oracle") / "out"
            windows = np.random.default_rng(0).integers(2, 32, (SEQUENCES, LENGTH + 1))
            named = {"name": "tiny", "sha256": checkpoint.fingerprint(directory)}
            text = {"source": "made"}
            asked = Question(choices="sB", prefix="shared", budgets=budgets, seed=0, text=text, model=named)
            search.run(model, windows, asked, made[budgets], "typed", 1 << 24)
        return made[budgets]

    return make


@pytest.fixture
def arguments(oracle, saved):
    """A folder with the budgets none and 2, and its model."""
    return (oracle("none", "2"), "--model", saved()[0])


@pytest.mark.usefixtures("as_typed")
def test_a_summary_and_the_same_figures_as_json(arguments, tmp_path):
    done = run(*arguments, "--out", tmp_path / "difficulty.json")
    assert done.exit_code == 0, done.output
    assert done.stderr == f"wrote {tmp_path / 'difficulty.json'}\n"
    found = json.loads((tmp_path / "difficulty.json").read_text())
    with np.load(arguments[0] / "tokens-none.npz") as table:
        gap, inputs, targets = (table[name] for name in ("difficulty", "inputs", "targets"))
    assert found["whole"]["means"]["difficulty"]["value"] == pytest.approx(gap.mean(), abs=1e-5)
    assert found["command"] == "duo-mlx as typed" and found["versions"].keys() == {
        "duo-mlx", "mlx", "mlx-lm", "numpy",
    }  # fmt: skip
    assert (found["schema"], found["budget"]) == ("duo-mlx-difficulty/1", "none")
    assert found["oracle"]["model"]["name"] == "tiny" and found["oracle"]["sequences"] == SEQUENCES
    assert sum(each["tokens"] for each in found["classes"]) == SEQUENCES * LENGTH
    assert found["token_classes"].keys() == CLASSES.keys() >= {each["name"] for each in found["classes"]}
    lines = done.stdout.splitlines()
    assert lines[0] == f"tiny on made, budget none: {SEQUENCES} sequences of {LENGTH} tokens"
    of = found["whole"]["means"]["difficulty"]
    shown = f"{of['value']:.2f} [{of['interval'][0]:.2f}, {of['interval'][1]:.2f}]"
    assert shown in next(line for line in lines if line.startswith("difficulty"))
    begun = ("gap to big", "correlation", "0-0", "5-5", *(each["name"] for each in found["classes"]), "a middling loss")
    assert all(any(line.startswith(name) for line in lines) for name in begun)
    example = found["middling_but_difficult_examples"][0]
    row, at = example["sequence"], example["position"]
    assert example["context"] == "".join(f"w{token - 2}" for token in inputs[row, : at + 1])
    assert example["target"] == f"w{targets[row, at] - 2}"
    line = next(line for line in lines if line.startswith(f"{row}:{at} "))
    assert line.endswith(f"{example['context']}[{example['target']}]") and example["pattern"] in line


def test_without_out_nothing_is_written(arguments):
    before = sorted(arguments[0].iterdir())
    done = run(*arguments)
    assert (done.exit_code, done.stderr) == (0, "") and sorted(arguments[0].iterdir()) == before


def test_the_budget_is_none_or_the_one_asked_for_or_the_lowest(arguments, oracle, saved, tmp_path):
    shutil.copytree(arguments[0], tmp_path / "low")
    with np.load(tmp_path / "low" / "tokens-2.npz") as table:
        lower = {name: table[name] for name in table.files} | {"oracle_loss": table["oracle_loss"] - 9}
    np.savez(tmp_path / "low" / "tokens-2.npz", **lower)
    assert ", budget none: " in run(tmp_path / "low", *arguments[1:]).stdout
    assert ", budget 2: " in run(*arguments, "--budget", "2").stdout
    folder = oracle("0", "1", "2", "4")
    losses = {budget: np.load(folder / f"tokens-{budget}.npz")["oracle_loss"].mean() for budget in "0124"}
    lowest = min(losses, key=losses.get)
    assert lowest not in ("0", "4")  # neither the first nor the last
    assert f", budget {lowest}: " in run(folder, "--model", saved()[0]).stdout


def test_a_figure_that_there_is_not_is_a_dash(oracle, saved, tmp_path):
    done = run(oracle("0", "1", "2", "4"), "--model", saved()[0], "--budget", "0", "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    row = next(line for line in done.stdout.splitlines() if line.split()[:3] == ["difficulty", "loss", "small"])
    assert row.split()[3:] == ["-", "-"] and "nan" not in done.stdout
    assert "difficulty below the median: no token\n" in done.stdout
    assert "NaN" not in (tmp_path / "out.json").read_text()


def test_odd_characters_stay_on_one_line(arguments, saved, tmp_path):
    """The fingerprint is of the weights, so that a tokenizer may be another."""
    directory = tmp_path / "odd"
    shutil.copytree(saved()[0], directory)
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    odd = ["\n", "\r", "\x1b[31m", "\u2028", "\u202e", "é"]
    tokenizer["model"]["vocab"] = {
        f"{odd[index % len(odd)]}{index}" if index > 1 else word: index for word, index in vocabulary.items()
    }
    file.write_text(json.dumps(tokenizer))
    done = run(arguments[0], "--model", directory, "--out", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    lines = done.stdout.split("\n")
    assert all(line.isprintable() for line in lines) and any("é" in line for line in lines)
    examples = json.loads((tmp_path / "out.json").read_text())["middling_but_difficult_examples"]
    assert any("\n" in each["context"] for each in examples)
    for each in examples:
        line = next(line for line in lines if line.startswith(f"{each['sequence']}:{each['position']} "))
        for odd_one, shown in {
            "\n": "\\n",
            "\r": "\\r",
            "\x1b": "\\x1b",
            "\u2028": "\\u2028",
            "\u202e": "\\u202e",
        }.items():
            assert line.count(shown) == (each["context"] + each["target"]).count(odd_one)


def test_what_is_there_is_not_overwritten_without_force(arguments, tmp_path):
    out = tmp_path / "difficulty.json"
    out.write_text("mine")
    done = run(*arguments, "--out", out)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "exists already; give --force" in done.stderr and out.read_text() == "mine"
    assert run(*arguments, "--out", out, "--force").exit_code == 0 and json.loads(out.read_text())


def test_another_model_is_refused(arguments, saved):
    for others in ((), ("--model", saved(small_layers=[1, 2])[0])):
        done = run(arguments[0], *others)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert f"{arguments[0]}: was made by another model (tiny)" in done.stderr and "as --model" in done.stderr


def test_bad_input_is_one_line(arguments, tmp_path):
    def refused(line, *given):
        done = run(*given)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert line in done.stderr

    refused("no such table; it has none, 2", *arguments, "--budget", "3")
    refused("summary.json: cannot be read; give the folder of a finished duo-mlx oracle", tmp_path)
    refused("nowhere/at/all", arguments[0], "--model", "nowhere/at/all")
    refused("is a directory", *arguments, "--out", tmp_path)
    old = tmp_path / "old"
    shutil.copytree(arguments[0], old)
    with np.load(old / "tokens-none.npz") as table:
        kept = {name: table[name] for name in table.files if name != "entropy_small"}
    np.savez(old / "tokens-none.npz", **kept)
    refused(f"{old}: its tables hold no entropy_small; run duo-mlx oracle again", old, *arguments[1:])
