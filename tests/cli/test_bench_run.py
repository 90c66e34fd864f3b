"""``duo-mlx bench run``: what is typed is measured and recorded; mistakes are one line, and nothing is written."""

import getpass
import json
import platform
import re
import shutil
import socket
import sys

import pytest
from click.testing import CliRunner

from duo_mlx import conditional
from duo_mlx.bench import figures, parts, results, rounds
from duo_mlx.bench.figures import Effort
from duo_mlx.cli import bench_run, main
from duo_mlx.cli.typed import typed

BRIEF = (
    "--prompt-tokens", "3", "--tokens", "2", "--rounds", "1", "--quality-tokens", "8", "--meter", "none",
)  # fmt: skip
ROUTES = ("--route", "big", "--route", "Bs-B")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Nothing is measured that is not the subject here, and the working directory is empty."""
    each = dict.fromkeys(("embedding", "attention", "big", "small", "head", "sampling"), 0.001)
    monkeypatch.setattr(parts, "measure", lambda *_: {"seconds": each, "whole": {}})
    monkeypatch.setattr(figures, "effort", lambda: Effort(2, 3, 1 << 20))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def directory(saved):
    return saved(max_position_embeddings=48)[0]


@pytest.fixture
def run(directory, text, monkeypatch):
    """``run(*arguments, model=directory, brief=BRIEF)``: the command on a tiny model with a text that it knows."""

    def invoke(*arguments, model=directory, brief=BRIEF):
        given = ["bench", "run", "--model", model, "--prompts", text, "--text", text, *brief, *arguments]
        typed = [str(each) for each in given]
        monkeypatch.setattr(sys, "argv", ["/opt/bin/duo-mlx", *typed])
        return CliRunner().invoke(main, typed, prog_name="duo-mlx")

    return invoke


def measured(done, out):
    assert done.exit_code == 0, done.output
    return results.read(out)


@pytest.fixture
def fails(run, tmp_path):
    """``fails(line, *arguments)``: refused with one line that holds ``line``; nothing is written or changed."""

    def check(line, *arguments, **more):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        done = run(*arguments, **more)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert done.stderr.startswith("duo-mlx: error: ") and line in done.stderr
        assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before

    return check


def test_the_choices_are_those_that_there_are():
    assert set(bench_run.STRATEGIES) == set(conditional.STRATEGIES)
    assert set(bench_run.LIMITS) == set(bench_run.PRESETS)


def test_it_writes_the_folder_and_prints_the_table(run, quick):
    done = run(*ROUTES, "--against", "mlx-lm", "--out", "some/out")
    result = measured(done, quick / "some" / "out")
    assert result["complete"] and [cell["engine"] for cell in result["cells"]] == ["duo-mlx", "duo-mlx", "mlx-lm"]
    assert done.stdout == (quick / "some" / "out" / "results.md").read_text() + "\n"
    assert "## Speed" in done.stdout and "| Bs-B | duo-mlx |" in done.stdout
    # no progress, as this is no terminal
    assert done.stderr == "results in some/out; see them with duo-mlx bench report some/out\n"
    assert len((quick / "some" / "out" / "results.csv").read_text().splitlines()) == 4


def test_the_folder_is_named_after_model_and_preset(run, quick, directory):
    done = run(*ROUTES)
    assert measured(done, quick / f"bench-{directory.name}-quick")["settings"]["preset"] == "quick"
    assert [path.name for path in quick.iterdir()] == [f"bench-{directory.name}-quick"]


def test_the_recorded_command_is_what_was_typed(run, quick, directory, text):
    result = measured(run("--route", "random:0.5,0.3,0.2", "--out", "with space"), quick / "with space")
    assert result["command"] == (
        f"duo-mlx bench run --model {directory} --prompts {text} --text {text} --prompt-tokens 3 --tokens 2 --rounds 1 "
        "--quality-tokens 8 --meter none --route random:0.5,0.3,0.2 --out 'with space'"
    )


@pytest.mark.parametrize(("word", "recorded"), [
    ("/home/zaphod/models/duo", "~/models/duo"),
    ("--model=/home/zaphod/duo", "--model=~/duo"),
    ("powermetrics:/home/zaphod/stream", "powermetrics:~/stream"),
    ("/home/zaphod", "~"),
    ("/home/zaphod/my models", "'~/my models'"),
    ("/home/zaphod2/duo", "/home/zaphod2/duo"),
    ("/mnt/home/zaphod/duo", "/mnt/home/zaphod/duo"),
])  # fmt: skip
def test_the_home_directory_is_not_recorded(monkeypatch, word, recorded):
    monkeypatch.setenv("HOME", "/home/zaphod")
    assert typed(["bench", "run", word]) == f"duo-mlx bench run {recorded}"


def test_a_home_that_is_the_root_changes_nothing(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert typed(["--out", "/data/x"]) == "duo-mlx --out /data/x"


def test_nobody_is_named_in_what_people_share(run, monkeypatch, tmp_path, directory, text):
    home = tmp_path / "zaphod"
    shutil.copytree(directory, home / "models" / "duo")
    shutil.copy(text, home / "words.txt")
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOST", "COMPUTERNAME"):
        monkeypatch.setenv(name, "zaphod")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MLX_METAL_PATH", f"{home}/kernels")
    monkeypatch.setattr(socket, "gethostname", lambda: "zaphod")
    monkeypatch.setattr(platform, "node", lambda: "zaphod")
    monkeypatch.setattr(getpass, "getuser", lambda: "zaphod")
    given = ("--prompts", home / "words.txt", "--text", home / "words.txt", "--out", home / "out")
    result = measured(run(*ROUTES, *given, model=home / "models" / "duo"), home / "out")
    assert result["model"]["name"] == "duo" and "--out ~/out" in result["command"]
    assert result["texts"]["prompts"]["source"] == "words.txt"
    for file in (home / "out").iterdir():
        assert "zaphod" not in file.read_text().lower(), file


def test_repeated_options_replace_the_presets_lists(run, quick):
    done = run(
        "--route", "small", "--route", "big", "--route", "small", "--strategy", "dense", "--strategy", "auto",
        "--prompt-tokens", "5", "--tokens", "3", "--batch", "2", "--context", "4", "--context", "0",
        "--preset", "paper", "--out", "out", "--minutes", "0.001",
    )  # fmt: skip
    cells = measured(done, quick / "out")["cells"]
    names = ("context", "prompt_tokens", "generated_tokens", "route", "strategy", "batch")
    assert [tuple(cell[name] for name in names) for cell in cells] == [
        (context, prompt, tokens, route, strategy, 2)
        for prompt in (3, 5)
        for tokens in (2, 3)
        for context in (4, 0)
        for route in ("small", "big")
        for strategy in ("dense", "auto")
    ]


def test_drafts_are_measured_beside_their_route(run, quick):
    done = run("--route", "BBs-", "--speculate", "s-s-", "--draft-tokens", "2", "--tokens", "6", "--out", "out")
    cells = measured(done, quick / "out")["cells"]
    assert [(cell["route"], cell["speculate"], cell["draft_tokens"], cell["generated_tokens"]) for cell in cells] == [
        ("BBs-", draft, many, tokens) for tokens in (2, 6) for draft, many in (("", ""), ("s-s-", "2"))
    ]
    assert "| BBs-, 2 drafts by s-s- | duo-mlx |" in done.stdout and "## Speculation" in done.stdout


def test_a_models_own_draft(run, fails, quick, saved):
    model = saved(max_position_embeddings=96, default_draft="Bss-")[0]
    named = run("--route", "big", "--speculate", "default", "--out", "a", model=model)
    preset = run("--preset", "paper", "--minutes", "0.001", "--out", "b", model=model)
    other = run("--preset", "paper", "--minutes", "0.001", "--route", "small", "--out", "c", model=model)
    drafts = [{cell["speculate"] for cell in measured(done, quick / out)["cells"]}
              for done, out in zip((named, preset, other), "abc", strict=True)]  # fmt: skip
    assert drafts == [{"", "Bss-"}, {"", "Bss-"}, {""}]
    fails("speculate default: this model's config.json has no default_draft", "--speculate", "default")


def test_a_preset_measures_what_it_says_where_nothing_is_asked(run, quick):
    brief = ("--prompt-tokens", "3", "--tokens", "2", "--minutes", "0.001", "--meter", "none", "--quality-tokens", "8")
    result = measured(run("--out", "out", brief=brief), quick / "out")
    assert [cell["route"] for cell in result["cells"]] == ["big", "big@0,2", "small"]
    settings = {"least_rounds": 3, "most_rounds": 12, "minutes": 0.001, "window": 3.0, "quality_tokens": 8}
    assert result["settings"] == settings | {
        "preset": "quick", "precision": 0.02, "cool_down": 0.0, "quality_length": 256, "seed": 0,
    }  # fmt: skip


def test_a_presets_bits_are_left_out_where_the_model_cannot_be_quantised(run, quick):
    done = run("--route", "big", "--preset", "full", "--batch", "1", "--strategy", "auto", "--context", "0",
               "--out", "out")  # fmt: skip
    assert {cell["quantisation"] for cell in measured(done, quick / "out")["cells"]} == {"float32"}


REFUSED = {
    "unknown route": (("--route", "huge"), "huge"),
    "a pattern of other length": (("--route", "BB"), "BB"),
    "no router": (("--route", "router"), "no router"),
    "bits on odd sizes": (("--bits", "8"), "--bits 8: the hidden size 16 is no multiple of 32"),
    "prompt longer than the context": (("--prompt-tokens", "60"), "is 62 positions; the model has 48"),
    "no text file": (("--text", "none.txt"), "none.txt: cannot be read (No such file or directory)"),
    "no prompts file": (("--prompts", "none.txt"), "none.txt: cannot be read (No such file or directory)"),
    "unknown meter": (("--meter", "wattmeter"), "--meter wattmeter: no such meter"),
    "unknown preset": (("--preset", "huge"), "'huge'"),
    "no rounds": (("--rounds", "0"), "'--rounds'"),
    "no tokens": (("--tokens", "1"), "'--tokens'"),
    "no file of routes": (("--route", "@none.npy"), "none.npy"),
    "an unknown draft": (("--speculate", "huge"), "--speculate huge: "),
    "a router that drafts": (("--speculate", "router"), "--speculate router: "),
    "a dearer draft": (("--route", "small", "--speculate", "big"), "--speculate big: the draft's routes read "),
    "drafts of a batch": (("--speculate", "small", "--batch", "2"), "--speculate small: speculation is measured one"),
    "how many of no drafts": (("--draft-tokens", "3"), "--draft-tokens without --speculate"),
    "no number of drafts": (("--speculate", "small", "--draft-tokens", "-1"), "draft_tokens is -1; it must be auto"),
    "a strategy without kernels": (("--route", "random", "--strategy", "fused"), "strategy 'fused' cannot run here"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(fails, what):
    arguments, line = REFUSED[what]
    fails(line, *(("--route", "big") if "--route" not in arguments else ()), *arguments)


def test_a_missing_model_is_one_line(fails, quick):
    fails("none", model=quick / "none")


@pytest.mark.parametrize("content", ["", " \n\n \n"])
def test_a_file_without_prompts_is_one_line(fails, quick, content):
    (quick / "empty.txt").write_text(content)
    fails("empty.txt: holds no prompt", "--prompts", "empty.txt")


def test_a_text_that_is_too_short_is_one_line(fails, quick):
    (quick / "short.txt").write_text("w1 w2 w3")
    fails("short.txt: has 3 tokens; quality is measured on 49 or more", "--text", "short.txt")


def test_a_meter_that_cannot_measure_here_is_one_line(fails, monkeypatch):
    from duo_mlx.bench.meters import Unavailable, rapl

    def unavailable(_):
        raise Unavailable("only root may read it")

    monkeypatch.setattr(rapl, "open_meter", unavailable)
    fails("--meter rapl: only root may read it", "--meter", "rapl")


def test_a_router_cannot_be_planned(fails, saved):
    model = saved(router_choices="-sB")[0]
    fails("--route router: strategy 'planned' needs", "--route", "router", "--strategy", "planned", model=model)


def test_folders_that_cannot_be_used_are_one_line(run, fails, quick):
    (quick / "file").write_text("mine")
    fails("--out file: is a file", *ROUTES, "--out", "file")
    (quick / "foreign").mkdir()
    (quick / "foreign" / "thesis.tex").write_text("mine")
    fails("--out foreign: is not empty", *ROUTES, "--out", "foreign", "--force")
    fails("file/out", *ROUTES, "--out", "file/out")
    first = measured(run(*ROUTES, "--out", "out"), quick / "out")
    fails("--out out: holds a finished result; give --force", *ROUTES, "--out", "out")
    again = measured(run(*ROUTES, "--out", "out", "--force"), quick / "out")
    assert again["complete"] and again["cells"][0]["runs"] != first["cells"][0]["runs"]


def test_ctrl_c_keeps_the_rounds_and_the_same_command_goes_on(run, fails, quick, monkeypatch):
    real, runs = rounds.run, []

    def interrupted(*arguments):
        if len(runs) == 6:  # the second round's third run
            raise KeyboardInterrupt
        runs.append(real(*arguments))
        return runs[-1]

    asked = (*ROUTES, "--out", "out", "--rounds", "3")
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "run", interrupted)
        done = run(*asked)
    assert (done.exit_code, done.stdout) == (130, "")
    assert done.stderr == "interrupted; out has the rounds that were done, and the same command goes on from there\n"
    left = results.read(quick / "out")
    assert not left["complete"] and [len(cell["runs"]) for cell in left["cells"]] == [2, 2]
    fails("holds an unfinished run with other settings", *asked, "--seed", "1")
    later = measured(run(*asked), quick / "out")
    assert later["complete"] and [len(cell["runs"]) for cell in later["cells"]] == [6, 6]
    assert [cell["runs"][:2] for cell in later["cells"]] == [cell["runs"] for cell in left["cells"]]


def test_help_lists_presets_and_examples():
    done = CliRunner().invoke(main, ["bench", "run", "--help"], prog_name="duo-mlx")
    assert done.exit_code == 0
    for preset in bench_run.PRESETS:
        assert re.search(rf"^ +{preset}  ", done.stdout, re.MULTILINE)
    for said in ("duo-mlx bench run --model models/duo --preset paper --against mlx-lm", "--out", "Ctrl-C", "no root"):
        assert said in done.stdout


def test_the_embedded_model_and_its_texts_are_there_unasked(monkeypatch, quick):
    typed = ["bench", "run", *BRIEF, "--route", "small"]
    monkeypatch.setattr(sys, "argv", ["duo-mlx", *typed])
    done = CliRunner().invoke(main, typed, prog_name="duo-mlx")
    result = measured(done, quick / "bench-embedded-quick")
    assert result["model"]["name"] == "embedded" and result["texts"]["held_out"]["source"] == "bundled"
    assert 2 < result["cells"][0]["quality"]["loss"]["median"] < 6
    json.dumps(result, allow_nan=False)
