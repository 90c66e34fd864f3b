"""``duo-mlx train texts``: what a model says after windows of a text, as documents for train small."""

import json
import re

import pytest
from click.testing import CliRunner

import duo_mlx
from duo_mlx.cli import main
from duo_mlx.training import continued


def texts(*arguments):
    return CliRunner().invoke(main, ["train", "texts", *map(str, arguments)], prog_name="duo-mlx")


def documents(file):
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


SIZES = ("--count", 6, "--prompt-tokens", 5, "--max-tokens", 4)


def test_documents_are_windows_and_what_generate_says_after_them(saved, text, tmp_path):
    directory, _ = saved()
    out = tmp_path / "said.jsonl"
    done = texts(text, "--model", directory, "--out", out, *SIZES, "--held-out", 0.5, "--batch", 4)
    assert done.exit_code == 0 and done.stdout == "" and done.stderr == f"wrote {out}: 6 texts\n", done.output
    model, tokenizer = duo_mlx.load(directory)
    learnt = text.read_text()[: len(text.read_text()) // 2]
    for document in documents(out):
        words = re.findall(r"w\d+", document)
        prompt = " ".join(words[:5])
        assert prompt in learnt
        said = duo_mlx.generate(model, tokenizer, prompt, max_tokens=4, route="big")
        assert words[5:] == re.findall(r"w\d+", said)


def test_drafts_learn_from_them(saved, text, tmp_path):
    directory, _ = saved()
    said, drafts = tmp_path / "said.jsonl", tmp_path / "drafts"
    assert texts(text, "--model", directory, "--out", said, "--count", 40, *SIZES[2:]).exit_code == 0
    options = "--objective draft --tokens 64 --batch 2 --length 8 --held-out 0.4 --draft-vocabulary 20"
    command = f"train small {said} --model {directory} --out {drafts} {options}"
    done = CliRunner().invoke(main, command.split(), prog_name="duo-mlx")
    assert done.exit_code == 0, done.output
    assert duo_mlx.load(drafts)[0].config.draft_vocabulary == 20


def test_what_is_interrupted_is_kept(saved, text, tmp_path, monkeypatch):
    def two(*_):
        yield from ([1, 2], [3, 4])
        raise KeyboardInterrupt

    def at_once(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(continued, "continued", two)
    done = texts(text, "--model", saved()[0], "--out", tmp_path / "said.jsonl", *SIZES)
    assert done.exit_code == 130 and "2 texts, interrupted" in done.stderr
    assert len(documents(tmp_path / "said.jsonl")) == 2
    monkeypatch.setattr(continued, "continued", at_once)
    done = texts(text, "--model", saved()[0], "--out", tmp_path / "none.jsonl", *SIZES)
    assert done.exit_code == 2 and "interrupted before the first text" in done.stderr
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--out", "said.txt"), "--out said.txt: the name must end in .jsonl"),
        (("--out", "absent/said.jsonl"), "--out absent/said.jsonl: there is no directory absent"),
        (("--max-tokens", 60), "--prompt-tokens and --max-tokens come to 65; the model's context is 64"),
        (("--prompt-tokens", 50, "--held-out", 0.99), "--prompt-tokens 50: there are "),
        (("--route", "random"), "--route random: must be one pattern for all tokens"),
        (("--route", "BB"), "--route BB: route 'BB' has 2 characters"),
        (("--model", "absent"), "there is no such directory"),
    ],
)
def test_mistakes_are_one_line(saved, text, tmp_path, monkeypatch, options, line):
    monkeypatch.chdir(tmp_path)
    directory, _ = saved(max_position_embeddings=64)
    done = texts(text, "--model", directory, "--out", "out.jsonl", *SIZES, *options)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr and not (tmp_path / "out.jsonl").exists()


def test_an_existing_file_stays_without_force(saved, text, tmp_path):
    directory, out = saved()[0], tmp_path / "said.jsonl"
    out.write_text("mine")
    done = texts(text, "--model", directory, "--out", out, *SIZES)
    assert done.exit_code == 2 and "exists already; give --force" in done.stderr and out.read_text() == "mine"
    done = texts(tmp_path / "no.txt", "--model", directory, "--out", out, "--force", *SIZES)
    assert done.exit_code == 2 and "no.txt: there is no such file" in done.stderr and out.read_text() == "mine"
    assert texts(text, "--model", directory, "--out", out, "--force", *SIZES).exit_code == 0
    assert len(documents(out)) == 6
