"""``duo-mlx oracle``: a table on the embedded model, bad input in one line, and Ctrl-C."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.cli import main
from duo_mlx.study import search


def run(*arguments):
    return CliRunner().invoke(main, ["oracle", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture
def tiny(saved, tmp_path):
    """Arguments for a tiny model and a text of its words."""
    words = np.random.default_rng(0).integers(0, 30, 1200)
    (tmp_path / "text.txt").write_text(" ".join(f"w{word}" for word in words))
    return ("--model", saved()[0], "--text", tmp_path / "text.txt", "--out", tmp_path / "out")


def test_a_table_that_generate_replays(tiny, tmp_path, saved):
    done = run(*tiny, "--sequences", 2, "--length", 5, "--choices", "Bs-", "--budget", 2, "--budget", "none")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0].startswith("nats a token: all skip") and "fixed split" in done.stdout
    assert done.stderr == f"results in {tmp_path / 'out'}\n"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["choices"] == "-sB"
        and summary["budgets"].keys() == {"2", "none"}
        and len(summary["model"]["sha256"]) == 64
    )
    route = f"{tmp_path / 'out' / 'tokens-2.npz'}:1"
    replayed = CliRunner().invoke(
        main, ["generate", "w1 w2", "--model", str(saved()[0]), "--route", route, "--max-tokens", "3", "--json"]
    )
    assert replayed.exit_code == 0, replayed.output
    assert json.loads(replayed.stdout)["routes"]["big"] == 3 * 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--budget", "9"), "the model has 4 layers"),
        (("--budget", "lots"), "give none, a number of big layers"),
        (("--choices", "sbx"), "give some of B (big), s (small) and - (skip)"),
        (("--choices", ""), "give some of B"),
        (("--choices", "s", "--budget", "1"), "no pattern of 's' is within it"),
        (("--length", "1000"), "text.txt: has 1 sequences of 1000 tokens; 8 were asked for"),
        (("--sequences", "1000"), "sequences of 128 tokens; 1000 were asked for"),
        (("--text", "nowhere.txt"), "nowhere.txt: cannot be read"),
        (("--model", "nowhere/at/all"), "nowhere/at/all"),
        (("--search", "luck"), "--search 'luck': give exhaustive, beam[:WIDTH] or descent[:STARTS]"),
        (("--search", "beam", "--controls"), "--controls: only --prefix shared with --search exhaustive"),
        (("--prefix", "random"), "'random' is not one of 'shared', 'committed'"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, arguments, line):
    done = run(*tiny, *arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr and not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_is_done(tiny, tmp_path, monkeypatch):
    sequence, calls = search.Searcher.sequence, []

    def once(*arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return sequence(*arguments)

    monkeypatch.setattr(search.Searcher, "sequence", once)
    done = run(*tiny, "--sequences", 2, "--length", 5)
    assert done.exit_code == 130 and "keeps the sequences that are done" in done.stderr
    assert [file.name for file in (tmp_path / "out" / "sequences").iterdir()] == ["00000.npz"]
    monkeypatch.setattr(search.Searcher, "sequence", sequence)
    assert run(*tiny, "--sequences", 2, "--length", 5).exit_code == 0
