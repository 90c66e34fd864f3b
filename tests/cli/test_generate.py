"""``duo-mlx generate``: text, JSON, statistics, routes shown, and mistakes in one line."""

import json
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from duo_mlx import conditional
from duo_mlx.cli import generate, main

PROMPT = "w1 w2 w3"


@pytest.fixture
def run(saved):
    """``run(*arguments, input=None, **changes)``: the command on a tiny model."""

    def invoke(*arguments, text=None, **changes):
        directory, _ = saved(**changes)
        return CliRunner().invoke(main, ["generate", "--model", str(directory), *arguments], input=text)

    return invoke


def result(run, *arguments, **changes):
    done = run("--json", *arguments, **changes)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_choices_are_the_strategies_that_exist():
    assert tuple(conditional.STRATEGIES) == generate.STRATEGIES


@pytest.mark.parametrize(
    ("route", "each"), [("big", [8, 0, 0]), ("small", [0, 8, 0]), ("skip", [0, 0, 8]), ("Bs-B", None)]
)
def test_json_counts_are_right(run, route, each):
    found = result(run, PROMPT, "--route", route, "--max-tokens", "8", "--stop-token", "w0")
    tokens = found["generation_tokens"]
    assert found["prompt_tokens"] == 3 and tokens <= 8 and found["host_syncs"] == tokens
    per_layer = [list(layer.values()) for layer in found["routes_per_layer"]]
    if each:
        assert per_layer == [[count * tokens // 8 for count in each]] * 4
    else:
        assert per_layer == [[tokens, 0, 0], [0, tokens, 0], [0, 0, tokens], [tokens, 0, 0]]
    assert found["routes"] == {
        name: sum(layer[name] for layer in found["routes_per_layer"]) for name in ("big", "small", "skip")
    }
    assert found["energy_j"] is None and found["energy_meter"] == "none"
    assert found["strategy"] == "planned" and found["route"] == route
    for key in ("ttft_s", "prompt_tps", "generation_tps", "peak_memory_bytes", "bytes_per_token"):
        assert found[key] > 0


def test_fewer_bytes_for_small_and_skip(run):
    costs = [result(run, PROMPT, "--route", route)["bytes_per_token"] for route in ("big", "Bs-B", "small", "skip")]
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == 4


def test_text_is_what_json_says_and_statistics_go_to_stderr(run):
    said = result(run, PROMPT, "--route", "random", "--seed", "3", "--max-tokens", "6")["text"]
    done = run(PROMPT, "--route", "random", "--seed", "3", "--max-tokens", "6")
    assert done.stdout == said + "\n"
    assert re.search(r"^routes .*% big, .*% small, 0% skip \(random, planned\)$", done.stderr, re.MULTILINE)
    assert "first token after" in done.stderr and "MB read a token" in done.stderr


@pytest.mark.parametrize("arguments", [("-",), ()])
def test_the_prompt_may_come_from_standard_input(run, arguments):
    assert run(*arguments, text=PROMPT).stdout == run(PROMPT).stdout


def test_sampling_follows_the_seed(run):
    def text(seed):
        return result(run, PROMPT, "--temp", "2", "--top-p", "0.9", "--seed", seed, "--max-tokens", "20")["text"]

    assert text("1") == text("1") != text("2")


@pytest.mark.parametrize("strategy", generate.STRATEGIES)
def test_every_strategy_says_the_same(run, strategy):
    found = result(run, PROMPT, "--route", "Bs-B", "--strategy", strategy)
    assert found["text"] == result(run, PROMPT, "--route", "Bs-B")["text"]
    assert found["strategy"] == ("planned" if strategy == "auto" else strategy)


def test_routes_are_listed_where_colours_cannot_be_shown(run):
    found = result(run, PROMPT, "--route", "Bs-B", "--max-tokens", "5")
    done = run(PROMPT, "--route", "Bs-B", "--max-tokens", "5", "--show-routes")
    assert done.stdout.strip() == found["text"].strip() and "\x1b" not in done.output
    rows = [line.split() for line in done.stderr.splitlines() if line.startswith("Bs-B")]
    assert len(rows) == found["generation_tokens"]
    assert "".join(row[1].strip("'") for row in rows) == found["text"]


def test_generation_stops_at_the_end_of_the_context(run):
    done = run(PROMPT, "--max-tokens", "50", max_position_embeddings=6)
    assert done.exit_code == 0 and "only 4 of 50 tokens fit after the prompt" in done.stderr


KNOWN = [
    {"pattern": "BBBB", "loss": 3.0},
    {"pattern": "BsBB", "loss": 3.1},
    {"pattern": "BssB", "loss": 3.2},
    {"pattern": "B--s", "loss": 3.9},
]


@pytest.mark.parametrize(
    ("budget", "pattern"), [("2", "BssB"), ("1", "B--s"), ("12", "BBBB"), ("1.0", "BBBB"), ("0.85", "BssB")]
)
def test_a_budget_runs_the_best_known_pattern(run, budget, pattern):
    found = result(run, PROMPT, "--route", f"budget:{budget}", "--max-tokens", "6", best_patterns=KNOWN)
    named = result(run, PROMPT, "--route", pattern, "--max-tokens", "6", best_patterns=KNOWN)
    assert (found["route"], named["route"]) == (f"budget:{budget}", pattern)
    for key in ("text", "generation_tokens", "routes", "routes_per_layer", "bytes_per_token", "host_syncs", "strategy"):
        assert found[key] == named[key]
    assert found["routes"]["big"] == pattern.count("B") * found["generation_tokens"]


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("0", "route 'budget:0': the cheapest known pattern of this model has 1 big layer"),
        ("0.1", "route 'budget:0.1': the cheapest known pattern of this model has 0.63 of the bytes"),
        *(
            (text, f"route 'budget:{text}': after budget: comes a number of big layers such as 12, or a share")
            for text in ("1.5", "x", "-1", "", "nan", "0.0", "1,2")
        ),
    ],
)
def test_no_budget_is_one_line(run, budget, line):
    done = run(PROMPT, "--route", f"budget:{budget}", best_patterns=KNOWN)
    assert done.exit_code == 2 and done.stdout == ""
    assert line in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_small_counts_as_big_where_there_is_no_small(run):
    changes = {"small_layers": [1, 3]}
    found = result(run, PROMPT, "--route", "ssss", "--max-tokens", "6", **changes)
    named = result(run, PROMPT, "--route", "BsBs", "--max-tokens", "6", **changes)
    for key in ("text", "routes", "routes_per_layer", "bytes_per_token"):
        assert found[key] == named[key]
    tokens = found["generation_tokens"]
    assert found["routes"] == {"big": 2 * tokens, "small": 2 * tokens, "skip": 0}
    assert [layer["small"] for layer in found["routes_per_layer"]] == [0, tokens, 0, tokens]
    everywhere = result(run, PROMPT, "--route", "random", "--max-tokens", "6", small_layers=[])
    assert everywhere["routes"] == {"big": 4 * everywhere["generation_tokens"], "small": 0, "skip": 0}
    shown = run(PROMPT, "--route", "ssss", "--max-tokens", "2", "--show-routes", **changes)
    assert shown.exit_code == 0 and "BsBs" in shown.stderr and "ssss" not in shown.stderr.partition("routes ")[0]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("",), "the prompt is empty"),
        ((PROMPT, "--route", "BBB"), "has 3 characters, but the model has 4 layers"),
        ((PROMPT, "--route", "huge"), "route 'huge' is neither big"),
        ((PROMPT, "--route", "budget:2"), "route 'budget:2': this model's config.json has no best_patterns; measure"),
        ((PROMPT, "--route", "absent.npz"), "no such file to replay"),
        ((PROMPT, "--route", "random:1,1,1"), "must sum to 1"),
        ((PROMPT, "--strategy", "fast"), "'fast' is not one of"),
        ((PROMPT, "--max-tokens", "0"), "max-tokens"),
        ((PROMPT, "--seed", "-1"), "seed"),
        ((PROMPT, "--stop-token", "w1 w2"), "is 2 tokens in this model's vocabulary"),
        ((PROMPT, "--chat"), "has no chat template"),
        (("w1 " * 20,), "the prompt has 20 tokens, but the model's context is 16"),
    ],
)
def test_mistakes_are_one_line(run, arguments, line):
    done = run(*arguments, max_position_embeddings=16)
    assert done.exit_code == 2 and done.stdout == ""
    assert line in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_directory_that_is_no_model_is_one_line(tmp_path):
    done = CliRunner().invoke(main, ["generate", "--model", str(tmp_path), PROMPT])
    assert done.exit_code == 2 and "holds no config.json, so it is no model directory" in done.stderr


INTERRUPTED = """
import itertools, os, signal, sys
from duo_mlx import generation
from duo_mlx.cli import main

whole = generation.stream_generate

def interrupted(*args, **kwargs):
    for number, response in enumerate(whole(*args, **kwargs)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        yield response

generation.stream_generate = interrupted
main(["generate", "--model", sys.argv[1], "w1 w2 w3", "--route", "Bs-B", *sys.argv[2:]])
"""


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_ctrl_c_ends_with_what_was_generated(saved, options):
    command = [sys.executable, "-c", INTERRUPTED, str(saved()[0]), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert signal.SIGINT == 2 and done.returncode == 130
    assert "Traceback" not in done.stderr
    if options:
        found = json.loads(done.stdout)
        assert found["finish_reason"] == "interrupted" and found["generation_tokens"] == 3
    else:
        assert done.stdout.strip() and "(interrupted)" in done.stderr
