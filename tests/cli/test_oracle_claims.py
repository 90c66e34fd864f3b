"""``duo-mlx oracle claims``: a table and sentences for people, one object for programs, and refusals of one line."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.cli import main
from duo_mlx.study.table import SCHEMA, table_name

LAYERS, SEQUENCES, LENGTH = 4, 7, 8


def run(*arguments):
    return CliRunner().invoke(main, ["oracle", "claims", *map(str, arguments)], prog_name="duo-mlx")


def refused(line, *arguments):
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr


@pytest.fixture
def oracle(tmp_path):
    """``oracle(name, **changes)``: the folder of an oracle without controls; ``changes`` are of its summary."""

    def make(name="oracle", **changes):
        folder, random = tmp_path / name, np.random.default_rng(0)
        folder.mkdir()
        losses = random.normal(3, 0.1, (SEQUENCES, LENGTH))
        budgets = ["none", *map(str, range(LAYERS + 1))]
        summary = {
            "schema": SCHEMA, "choices": "sB", "prefix": "shared", "search": "exhaustive", "seed": 3,
            "model": {"name": "tiny", "sha256": "one"}, "text": {"source": "novel.txt"},
            "sequences": SEQUENCES, "length": LENGTH, "budgets": {budget: {} for budget in budgets},
        } | changes  # fmt: skip
        for budget in budgets:
            arrays = {
                "inputs": np.zeros((SEQUENCES, LENGTH), np.int32), "targets": np.zeros((SEQUENCES, LENGTH), np.int32),
                "loss_big": losses, "loss_small": losses + 1, "oracle_loss": losses - 1,
                "oracle_routes": random.integers(0, 3, (SEQUENCES, LENGTH, LAYERS)).astype(np.uint8),
                "model_sha256": np.array(summary["model"]["sha256"]),
            }  # fmt: skip
            np.savez(folder / table_name(budget, len(budgets)), **arrays)
        (folder / "summary.json").write_text(json.dumps(summary))
        return folder

    return make


@pytest.fixture
def stage1(tmp_path):
    """``stage1(record)``: a file with it; by default what examples/compare_stage1.py writes of two seeds."""

    def make(record=None):
        patterns = ("big", "random", "small", "first_half", "alternating")
        runs = [
            {"method": method, "seed": seed, "tokens": 100, "validation_nats_per_token": dict.fromkeys(patterns, loss)}
            for method, loss in (("random", 2.0), ("big_then_small", 2.5))
            for seed in (0, 1)
        ]
        file = tmp_path / "runs.json"
        file.write_text(json.dumps({"runs": runs}) if record is None else record)
        return file

    return make


def test_a_table_and_two_sentences_a_claim(oracle, stage1):
    done = run(oracle(), "--skips", oracle("skips", choices="-sB"), "--stage1", stage1())
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["without", "control", "with", "control", "claim"]
    assert [line.split()[0] for line in lines[1:11]] == [str(number) for number in range(1, 11)]
    assert lines[3].split()[1:3] == ["holds", "undecided"] and lines[3].endswith("beats big in all layers")
    assert lines[9].split()[1:4] == ["holds,", "router", "open"]
    assert lines[10].split()[1:3] == ["holds", "undecided"]
    assert "7 sequences of 8 tokens, 4 layers; in brackets 95 % intervals" in lines
    sentences = {line.split(": ")[0]: line for line in lines[14:] if line}
    assert len(sentences) == 20
    assert sentences["3 without control"].endswith("beats all: all big less oracle at k=1 1 [1, 1] nats")
    assert sentences["10 without control"].split("; ")[0].endswith("big first less random, random 0.5 nats")
    assert sentences["5 with control"] == "5 with control: undecided: needs a trained router"


@pytest.mark.usefixtures("as_typed")
def test_the_file_holds_everything(oracle, stage1, tmp_path):
    out = tmp_path / "made" / "claims.json"
    arguments = (oracle(), "--skips", oracle("skips", choices="-sB"), "--stage1", stage1(), "--out", out)
    done = run(*arguments)
    assert (done.exit_code, done.stderr) == (0, f"wrote {out}\n"), done.output
    found = json.loads(out.read_text())
    assert (found["schema"], set(found["versions"])) == ("duo-mlx-claims/1", {"duo-mlx", "mlx", "numpy"})
    assert found["command"] == "duo-mlx as typed"
    sources = found["sources"]
    assert (sources["oracle"]["folder"], sources["skips"]["folder"]) == ("oracle", "skips")
    assert sources["oracle"]["model"] == {"name": "tiny", "sha256": "one"} and sources["skips"]["choices"] == "-sB"
    assert sources["stage1"] == {"file": "runs.json", "runs": 4}
    assert str(tmp_path) not in json.dumps(sources)
    claims = {claim["number"]: claim for claim in found["claims"]}
    assert list(claims) == list(range(1, 11))
    shown = {line.split(": ")[0]: line.split(": ", 1)[1] for line in done.stdout.splitlines()[14:] if line}
    for number, claim in claims.items():
        for reading in ("without", "with"):
            of = claim[f"{reading}_control"]
            assert of["sentence"] == shown[f"{number} {reading} control"]
            assert of["verdict"] in ("holds", "fails", "undecided") and of["figures"]
    assert claims[3]["without_control"]["figures"][0]["interval"] == pytest.approx([1, 1])
    assert found["thresholds"]["fewest_sequences"] == 6
    refused("exists already; give --force", *arguments)
    assert json.loads(out.read_text()) == found
    assert run(*arguments, "--force").exit_code == 0


def test_alone_an_oracle_leaves_the_rest_undecided(oracle, tmp_path):
    out = tmp_path / "claims.json"
    done = run(oracle(), "--out", out)
    assert done.exit_code == 0, done.output
    assert "9 without control: undecided: needs an oracle that may skip" in done.stdout
    assert "10 with control: undecided: needs runs of both ways to train" in done.stdout
    sources = json.loads(out.read_text())["sources"]
    assert (sources["skips"], sources["stage1"]) == (None, None)


def test_an_oracle_of_other_choices_or_of_another_model_is_refused(oracle, tmp_path):
    found, skips = oracle(), oracle("skips", choices="-sB")
    refused(f"DIR {skips}: is an oracle with --choices -sB; give one with --choices sB", skips)
    refused(f"--skips {found}: is an oracle with --choices sB; give one with --choices -sB", found, "--skips", found)
    other = oracle("other", choices="-sB", model={"name": "tiny", "sha256": "two"})
    refused(f"--skips {other}: is of another model than {found}", found, "--skips", other)
    refused("summary.json: cannot be read; give the folder of a finished duo-mlx oracle", tmp_path / "none")


@pytest.mark.parametrize(
    "record",
    ["{", "[]", "{}", '{"runs": 3}', '{"runs": [{}]}', '{"runs": [{"method": "random", "seed": 0, "tokens": "many"}]}',
     '{"runs": [{"method": "random", "seed": 0, "tokens": 1, "validation_nats_per_token": [1]}]}'],
)  # fmt: skip
def test_what_are_no_runs_is_refused(oracle, stage1, record):
    file = stage1(record)
    refused(f"--stage1 {file}: is no runs.json of examples/compare_stage1.py", oracle(), "--stage1", file)


def test_runs_that_are_missing_or_not_done(oracle, stage1, tmp_path):
    found = oracle()
    refused("none.json: cannot be read", found, "--stage1", tmp_path / "none.json")
    done = run(found, "--stage1", stage1('{"runs": []}'))
    assert "10 without control: undecided: needs runs of both ways to train" in done.stdout
