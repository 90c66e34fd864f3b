"""``duo-mlx bench project``: it says that it projects, agrees with the library, and refuses what it cannot project."""

import json

import pytest
from click.testing import CliRunner

from duo_mlx import checkpoint, work
from duo_mlx.bench import projected_speculation
from duo_mlx.cli import main
from duo_mlx.projection import ASSUMPTIONS, MIXES, SHAPES, machines, project
from duo_mlx.routes import parse_pattern


def run(*arguments):
    return CliRunner().invoke(main, ["bench", "project", *map(str, arguments)], prog_name="duo-mlx")


def told(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture
def model(saved):
    return saved(hidden_size=64, intermediate_size=128, small_intermediate_size=64)


def test_the_tables_say_what_they_are(monkeypatch):
    monkeypatch.setattr("duo_mlx.projection.SHAPES", {"Llama 3.2 1B": SHAPES["Llama 3.2 1B"]})
    done = run("--chip", "M4 Max", "--chip", "M1")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("PROJECTION, not a measurement. It assumes:\n")
    assert all(f"  - {assumption}\n" in done.stdout for assumption in ASSUMPTIONS)
    for heading in ("the embedded model, weights as stored", "M4 Max (410 GB/s)", "M4 Max (546 GB/s)", "M1 (68 GB/s)"):
        assert heading in done.stdout
    assert "M1 (68 GB/s): leaving out less than 0.26 MB saves less than a dispatch" in done.stdout
    assert "half or more is kept at 4 bits by: Llama 3.2 1B" in done.stdout and "Prefill by a router" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 140


def test_the_object_holds_what_the_library_projects(model):
    directory, _ = model
    result = told("--model", directory, "--chip", "M1", "--context", 9)
    assert result["projection"] == list(ASSUMPTIONS) and "shapes" not in result
    assert result["model"]["name"] == f"{directory}, weights as stored" and result["model"]["context"] == 9
    expected = work.works(
        work.without_weights(checkpoint.read_model(directory)), MIXES, 9, ["planned", "fused", "masked", "sync"]
    )
    assert len(result["model"]["rows"]) == 16
    for row in result["model"]["rows"]:
        found = expected[row["strategy"]][row["routes"]]
        assert {key: row[key] for key in found._fields} == found._asdict()
        seconds = row["seconds"]["M1 (68 GB/s)"]
        times, big = (project(each, machines(["M1"])[0]) for each in (found, expected[row["strategy"]]["big"]))
        assert {key: seconds[key] for key in times._fields} == pytest.approx(times._asdict())
        assert seconds["speed_up"] == pytest.approx(big.typical / times.typical)


def test_bits_are_those_of_the_same_shape(model):
    directory, held = model
    result = told("--model", directory, "--bits", "4", "--context", 9)
    imagined = work.imagined(held.config, 4)
    expected = work.works(imagined, MIXES, 9, ["planned"])["planned"]["small"]
    rows = {(row["strategy"], row["routes"]): row for row in result["model"]["rows"]}
    assert rows["planned", "small"]["bytes"] == expected.bytes
    assert not any(strategy == "masked" for strategy, _ in rows)  # it has no quantised form


@pytest.mark.parametrize(
    ("spec", "small", "skip"), [("Bs--", 1, 2), ("random:0.5,0.25,0.25", 1, 1), ("big@0,1", 2, 0), ("budget:3", 1, 0)]
)
def test_a_route_is_compared_with_all_big(saved, spec, small, skip):
    known = [{"pattern": "BBBs", "loss": 1.0}]
    directory, _ = saved(best_patterns=known)
    result = told("--model", directory, "--route", spec, "--strategy", "planned", "--context", 9)
    big, routed = result["model"]["rows"]
    assert (big["routes"], routed["routes"]) == ("big", spec)
    table = work.reads(work.without_weights(checkpoint.read_model(directory)), "planned", 9).by_route[0]
    assert big["bytes"] - routed["bytes"] == small * (table[2] - table[1]) + skip * (table[2] - table[0])


def test_replayed_routes_count_as_their_mean(saved, tmp_path):
    directory, _ = saved()
    (tmp_path / "routes.txt").write_text("BBBB\nssss\n")
    replayed, half = (
        told("--model", directory, "--route", spec, "--strategy", "planned")["model"]["rows"][1]
        for spec in (tmp_path / "routes.txt", "random:0.5,0.5,0")
    )
    assert replayed["bytes"] == half["bytes"]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("--chip 'M9 Max' is not in the table; it has M5 Max", ["--chip", "M9 Max"]),
        ("strategy 'masked': MLX's masked product has no quantised form", ["--bits", "4", "--strategy", "masked"]),
        ("--context 513: the model's context is 512", ["--context", "513"]),
        ("its mix is not known before it has run; give random:BIG,SMALL,SKIP", ["--route", "router"]),
        ("route 'BB' has 2 characters, but the model has 12 layers", ["--route", "BB"]),
        ("nowhere/at/all: there is no such directory", ["--model", "nowhere/at/all"]),
        ("'--bits': '5' is not one of", ["--bits", "5"]),
    ],
)
def test_what_cannot_be_projected_is_refused_in_one_line(line, arguments):
    done = run(*arguments)
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
    assert line in done.stderr


def test_a_group_that_does_not_divide_is_refused(saved):
    done = run("--model", saved()[0], "--bits", "4")
    assert done.exit_code == 2 and "4 bits: hidden size 16 is no multiple of the group size 64" in done.stderr


def test_the_strategies_are_the_librarys():
    from duo_mlx.cli.bench_project import STRATEGIES

    assert work.STRATEGIES == STRATEGIES


def test_speculation_is_projected_with_all_its_assumptions(model, monkeypatch):
    directory, _ = model
    monkeypatch.setattr("duo_mlx.projection.SHAPES", {"Llama 3.2 1B": SHAPES["Llama 3.2 1B"]})
    monkeypatch.setattr("duo_mlx.bench.projected_speculation.SHAPES", {"Llama 3.2 1B": SHAPES["Llama 3.2 1B"]})
    asked = ["--model", directory, "--speculate", "small", "--acceptance", "0.9,0.8", "--chip", "M3 Max 400"]
    found = told(*asked)
    assert found["projection"] == [*ASSUMPTIONS, *projected_speculation.ASSUMPTIONS] and "model" not in found
    speculation = found["speculation"]
    assert speculation["pattern"] == "ssss" and speculation["acceptance"] == [0.9] + [0.8] * 6
    models = {f"{directory}, weights as stored": work.without_weights(checkpoint.read_model(directory))} | {
        "Llama 3.2 1B, 4 bits": work.imagined(SHAPES["Llama 3.2 1B"], 4)
    }
    pattern, on = parse_pattern("ssss", 4), machines(["M3 Max 400"])
    expected = projected_speculation.project(models, pattern, speculation["acceptance"], 512, on)
    assert speculation["rows"] == json.loads(json.dumps(expected))
    done = run(*asked)
    assert all(f"  - {assumption}\n" in done.stdout for assumption in projected_speculation.ASSUMPTIONS)
    best = expected[1]["on"]["M3 Max (400 GB/s)"]["read once"]
    assert f"x{best['speed_up']:.2f} ({best['draft_tokens']})" in done.stdout
    assert "x1.5 from 1 B parameters on, read per row: none" in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 140

    fewer = told(*asked, "--draft-vocabulary", 32_000)["speculation"]
    assert fewer["draft_vocabulary"] == 32_000 and speculation["draft_vocabulary"] is None
    assert fewer["rows"][0] == speculation["rows"][0]  # the model has fewer
    models["Llama 3.2 1B, 4 bits"].draft_from(32_000)
    (row,) = projected_speculation.project(dict([models.popitem()]), pattern, speculation["acceptance"], 512, on)
    assert fewer["rows"][1] == json.loads(json.dumps(row))
    assert row["draft_bytes_share"] < expected[1]["draft_bytes_share"]


def test_a_model_s_own_draft_vocabulary_stays(saved):
    asked = ["--speculate", "small", "--acceptance", "0.9", "--chip", "M3 Max 400", "--model"]
    directory = saved()[0]
    arguments = {
        "own": [saved(draft_vocabulary=8)[0]],
        "given": [directory, "--draft-vocabulary", 8],
        "all": [directory],
    }
    rows = {name: told(*asked, *more)["speculation"]["rows"][0] for name, more in arguments.items()}
    shares = {name: row["draft_bytes_share"] for name, row in rows.items()}
    assert shares["own"] == shares["given"] < shares["all"] and rows["own"]["on"] == rows["given"]["on"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--speculate", "small"], "--speculate and --acceptance go together"),
        (["--acceptance", "0.5"], "--speculate and --acceptance go together"),
        (["--speculate", "small", "--acceptance", "0.5", "--route", "big"], "leave out --route and --strategy"),
        (["--speculate", "random", "--acceptance", "0.5"], "--speculate random: must be one pattern for all tokens"),
        (["--draft-vocabulary", "9"], "--draft-vocabulary goes with --speculate"),
        (["--speculate", "small", "--acceptance", "high"], "--acceptance high: must be shares from 0 to 1"),
    ],
)
def test_speculation_that_cannot_be_projected_is_refused(options, line):
    done = run(*options)
    assert done.exit_code != 0 and line in done.stderr + str(done.exception)
