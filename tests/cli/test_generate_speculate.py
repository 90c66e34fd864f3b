"""``duo-mlx generate --speculate``: the same text, drafts in JSON, statistics and marks, mistakes in one line."""

import io
import json
import re

import pytest
from click.testing import CliRunner
from rich.console import Console

import duo_mlx
from duo_mlx.cli import main
from duo_mlx.cli.painter import RoutePainter

PROMPT = "w1 w2 w3"


@pytest.fixture
def run(saved):
    """``run(*arguments, **changes)``: the command on a tiny model."""

    def invoke(*arguments, **changes):
        directory, _ = saved(**changes)
        return CliRunner().invoke(main, ["generate", "--model", str(directory), PROMPT, *arguments])

    return invoke


def result(run, *arguments, **changes):
    done = run("--json", *arguments, **changes)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("draft_tokens", ["0", "1", "5", "auto", None])
@pytest.mark.parametrize("draft", ["small", "Bsss", "random:.3,.5,.2"])
def test_the_text_is_that_of_the_route(run, draft, draft_tokens):
    options = ("--route", "BBsB", "--max-tokens", "20", "--stop-token", "w0")
    more = () if draft_tokens is None else ("--draft-tokens", draft_tokens)
    plain, found = result(run, *options), result(run, *options, "--speculate", draft, *more)
    for key in ("text", "generation_tokens", "finish_reason", "routes", "routes_per_layer", "route", "strategy"):
        assert found[key] == plain[key]
    assert plain["speculation"] is None


def test_json_says_what_came_of_drafts(run):
    found = result(run, "--route", "big", "--speculate", "Bsss", "--draft-tokens", "3", "--max-tokens", "20")
    plain = result(run, "--route", "big", "--max-tokens", "20")
    drafts = found["speculation"]
    assert drafts["route"] == "Bsss" and found["host_syncs"] == drafts["verifications"] < 20
    assert sum(drafts["drafted_by_position"]) == drafts["drafted"] > drafts["accepted"] > 0
    assert drafts["verifications"] + drafts["accepted"] == found["generation_tokens"] == 20
    assert drafts["tokens_per_verification"] == pytest.approx(20 / drafts["verifications"])
    stood = zip(drafts["acceptance_by_position"], drafts["drafted_by_position"], strict=True)
    assert sum(share * drafted for share, drafted in stood) == pytest.approx(drafts["accepted"])
    assert 0 < drafts["weight_bytes_per_token"] < found["bytes_per_token"]
    nothing = result(run, "--route", "big", "--speculate", "Bsss", "--draft-tokens", "0", "--max-tokens", "20")
    assert nothing["bytes_per_token"] == pytest.approx(plain["bytes_per_token"], rel=0.01)
    assert nothing["speculation"]["drafted"] == 0 and nothing["speculation"]["acceptance_by_position"] == []


def test_statistics_say_it_to_a_person(run):
    done = run("--route", "big", "--speculate", "Bsss", "--draft-tokens", "3", "--max-tokens", "20")
    assert re.search(
        r"^speculation \d+ of \d+ tokens drafted by Bsss accepted, \d\.\d\d tokens a verification$",
        done.stderr,
        re.MULTILINE,
    )
    assert "speculation" not in run("--route", "big").stderr


def test_sampling_follows_the_seed_where_the_number_of_drafts_is_given(run):
    def text(seed):
        options = ("--speculate", "Bsss", "--draft-tokens", "2", "--temp", "2", "--max-tokens", "20", "--seed", seed)
        return result(run, *options)["text"]

    assert text("1") == text("1") != text("2")


def test_a_list_of_tokens_says_what_was_drafted(run, saved):
    options = ("--route", "big", "--max-tokens", "16", "--show-routes")
    done = run(*options, "--speculate", "Bsss", "--draft-tokens", "3")
    model, tokenizer = duo_mlx.load(saved()[0])
    responses = duo_mlx.stream_generate(
        model, tokenizer, PROMPT, route="big", speculate="Bsss", draft_tokens=3, max_tokens=16
    )
    expected = [
        ["BBBB", *["accepted"] * each.from_draft, *["corrected"] * each.corrected, repr(each.text)]
        for each in responses
        if each.finish_reason != "stop"
    ]
    assert [line.split() for line in done.stderr.splitlines() if line.startswith("BBBB")] == expected
    assert {row[1] for row in expected} >= {"accepted", "corrected"}
    assert "accepted" not in run(*options).stderr and "draft " not in run(*options).stderr


def test_a_terminal_shows_it_by_the_letters(saved):
    model, tokenizer = duo_mlx.load(saved()[0])
    tokenizer.eos_token_ids = set()
    out, notes = io.StringIO(), io.StringIO()
    painter = RoutePainter(tokenizer, [3], out)
    painter.console, painter.notes = (
        Console(file=file, force_terminal=True, color_system="truecolor", soft_wrap=True) for file in (out, notes)
    )
    responses = list(
        duo_mlx.stream_generate(model, tokenizer, [3, 4], route="big", speculate="Bsss", draft_tokens=3, max_tokens=16)
    )
    for response in responses:
        painter.add(response)
    painter.finish()
    looks = [codes.split(";") for codes in re.findall(r"\x1b\[([\d;]+)m", out.getvalue()) if codes != "0"]
    assert len(looks) == len(responses)
    for codes, response in zip(looks, responses, strict=True):
        assert ("4" in codes[:1], "1" in codes[:1]) == (response.from_draft, response.corrected)
    assert re.search("drafts: .*accepted.*corrected", notes.getvalue())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--speculate", "router"), "a router cannot draft: it decides within the pass"),
        (("--route", "router", "--speculate", "small"), "a router cannot verify: it decides token by token"),
        (("--route", "small", "--speculate", "big"), "bytes of weights a token and the verifying ones"),
        (("--speculate", "huge"), "route 'huge' is neither big"),
        (("--speculate", "budget:2"), "route 'budget:2': this model's config.json has no best_patterns"),
        (
            ("--speculate", "small", "--draft-tokens", "-1"),
            "draft_tokens is -1; it must be auto or a whole number from 0",
        ),
        (
            ("--speculate", "small", "--draft-tokens", "x"),
            "draft_tokens is x; it must be auto or a whole number from 0",
        ),
        (("--speculate", "small", "--draft-tokens", "16"), "draft_tokens is 16, but the model's context is 16"),
        (("--draft-tokens", "3"), "draft_tokens without speculate; say which route drafts"),
    ],
)
def test_mistakes_are_one_line(run, arguments, line):
    done = run(*arguments, "--max-tokens", "8", max_position_embeddings=16, router_choices="sB")
    assert done.exit_code == 2 and done.stdout == ""
    assert line in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_window_that_is_too_short_is_one_line(run):
    sliding = {"layer_types": ["sliding_attention"] * 4, "sliding_window": 16}
    assert run("--speculate", "Bsss", "--max-tokens", "14", **sliding).exit_code == 0
    done = run("--speculate", "Bsss", "--max-tokens", "15", **sliding)
    assert done.exit_code == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "its window is 16 tokens, and prompt and max_tokens come to 17" in done.stderr
