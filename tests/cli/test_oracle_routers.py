"""``duo-mlx oracle routers``: from an oracle and a trained router to claims and figures, and refusals of one line."""

import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx.cli import main
from duo_mlx.routes import Route
from duo_mlx.study import plots, results

LAYERS, SEQUENCES, LENGTH = 4, 6, 8
STEPS = "--length 16 --batch 4 --tokens 640 --warmup 2 --eval-every 10 --lr 0.02 --final-windows 4"


def run(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], prog_name="duo-mlx")


def done(*arguments):
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    return found


@pytest.fixture(scope="module")
def made(saved, tmp_path_factory):
    """A folder with an ``oracle`` of budgets 1 to 3 and a model ``gains`` with a trained router; not to be changed."""
    folder, model = tmp_path_factory.mktemp("made"), saved()[0]
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{number * number % 29}" for number in range(700)))
    budgets = [word for k in (1, 2, 3) for word in ("--budget", k)]
    done("oracle", "--model", model, "--text", text, "--sequences", SEQUENCES, "--length", LENGTH, *budgets,
         "--out", folder / "oracle")  # fmt: skip
    done("train", "router", text, "--model", model, "--objective", "gains", *STEPS.split(), "--out", folder / "gains")
    return folder


@pytest.fixture
def refused(tmp_path):
    """``refused(line, *arguments)``: a command says no in one line, and leaves everything as it was."""

    def all_files():
        return {file: file.read_bytes() if file.is_file() else None for file in tmp_path.rglob("*")}

    def check(line, *arguments):
        before = all_files()
        found = run(*arguments)
        assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.output
        assert line in found.stderr
        assert all_files() == before

    return check


@pytest.mark.usefixtures("as_typed")
def test_a_router_is_measured_judged_and_drawn(made, tmp_path, monkeypatch):
    out = tmp_path / "deep" / "routers"
    found = done("oracle", "routers", made / "oracle", made / "gains", "--out", out)
    assert found.stderr == f"wrote {out}\n"
    assert {file.name for file in out.iterdir()} == {"gains.npz", "routers.json"}
    record, oracle = json.loads((out / "routers.json").read_text()), results.read(made / "oracle")
    assert record.keys() == {"schema", "command", "versions", "oracle", "uniform", "routers"}
    assert (record["schema"], record["command"]) == ("duo-mlx-routers/1", "duo-mlx as typed")
    assert record["versions"].keys() == {"duo-mlx", "mlx", "mlx-lm", "numpy"}
    assert record["oracle"]["model"] == oracle.summary["model"] and record["oracle"]["sequences"] == SEQUENCES
    assert record["uniform"] == oracle.summary["uniform"]
    (router,) = record["routers"]
    assert router["router"] == "gains" and router["budgets"].keys() == {"1", "2", "3"}
    with np.load(out / "gains.npz") as table:
        assert table["routes"].shape == (3, SEQUENCES, LENGTH, LAYERS)
        for place, (k, of) in enumerate(router["budgets"].items()):
            big = table["routes"][place] == Route.BIG
            assert of.keys() == {
                "share", "loss", "loss_by_sequence", "fixed", "fixed_split", "random", "oracle", "share_by_layer",
                "skip_by_layer", "share_by_position",
            }  # fmt: skip
            assert of["loss"] == pytest.approx(table["loss"][place].mean()) and of["share"] == pytest.approx(big.mean())
            assert of["oracle"] == oracle.summary["budgets"][k]["oracle"] < of["loss"]
    lines = [line.split() for line in found.stdout.splitlines()]
    assert lines[0][-2:] == ["gains", "(share)"] and [line[0] for line in lines[1:]] == ["1", "2", "3"]
    middle = router["budgets"]["2"]
    assert lines[2][-2:] == [f"{middle['loss']:.4f}", f"({middle['share']:.3f})"]

    done("oracle", "claims", made / "oracle", "--routers", out, "--out", tmp_path / "claims.json")
    judged = json.loads((tmp_path / "claims.json").read_text())
    assert judged["sources"]["routers"] == [
        {"name": "gains", "ks": [1, 2, 3], "share": [of["share"] for of in router["budgets"].values()]}
    ]
    assert judged["thresholds"]["like_random_share"] == 0.1
    figures = {claim["number"]: claim["without_control"]["figures"] for claim in judged["claims"]}
    below = {each["at"]: each["value"] for each in figures[1] if each["name"] == "gains: less oracle"}
    assert below == pytest.approx({f"k={k}": of["loss"] - of["oracle"] for k, of in router["budgets"].items()})
    assert not any("needs a trained router" in str(claim) for claim in judged["claims"] if claim["number"] < 9)

    monkeypatch.setattr(plots, "rendered", lambda figure: {"svg": b"<svg/>", "png": b"png"})  # noqa: ARG005
    drawn = done("oracle", "plot", made / "oracle", "--routers", out, "--out", tmp_path / "figures")
    assert {"routers.svg", "router_layers.png"} <= {file.name for file in (tmp_path / "figures").iterdir()}
    assert "router" not in drawn.stderr
    assert f"gains: at k = 2 of 4 it takes {middle['share']:.3f}" in (tmp_path / "figures" / "captions.md").read_text()


def test_a_folder_is_replaced_whole_and_only_by_force(made, tmp_path, refused):
    out, other = tmp_path / "routers", tmp_path / "Mixture"
    shutil.copytree(made / "gains", other)
    done("oracle", "routers", made / "oracle", made / "gains", other, "--out", out)
    assert {file.name for file in out.iterdir()} == {"gains.npz", "Mixture.npz", "routers.json"}
    again = ("oracle", "routers", made / "oracle", other, "--out", out)
    refused(f"--out {out}: exists already; give --force", *again)
    done(*again, "--force")
    assert {file.name for file in out.iterdir()} == {"Mixture.npz", "routers.json"}
    assert [each["router"] for each in json.loads((out / "routers.json").read_text())["routers"]] == ["Mixture"]


def test_what_cannot_be_measured(made, saved, tmp_path, refused):
    oracle, gains, out = tmp_path / "oracle", made / "gains", ("--out", tmp_path / "routers")
    shutil.copytree(made / "oracle", oracle)
    shutil.copytree(gains, tmp_path / "gains")
    plain, other = saved()[0], saved(num_hidden_layers=3)[0]
    for line, *arguments in (
        ("has no measured router; duo-mlx train router trains and measures one", oracle, plain, *out),
        ("has no measured router", oracle, gains, plain, *out),  # the first one leaves nothing either
        ("has 3 layers, and the oracle's model 4", oracle, other, *out),
        ("losses are not the oracle's, so its model is another one", oracle, saved(small_intermediate_size=4)[0], *out),
        ("two routers are called gains; give directories of different names", oracle, gains, tmp_path / "gains", *out),
        ("there is no such directory", oracle, tmp_path / "no" / "such" / "model", *out),
        ("summary.json: cannot be read; give the folder of a finished duo-mlx oracle", gains, gains, *out),
        ("exists already; give --force to replace it", oracle, gains, "--out", oracle),
        ("holds no routers.json, so --force does not replace it", oracle, gains, "--out", oracle, "--force"),
        ("Missing argument 'MODEL...'", oracle, *out),
        ("Missing option '--out'", oracle, gains),
    ):
        refused(line, "oracle", "routers", *arguments)


def test_budgets_out_of_reach(made, tmp_path, refused):
    narrow = tmp_path / "narrow"
    shutil.copytree(made / "gains", narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"router_offsets": [[0.3, 0.0], [0.4, 0.1]]}))
    refused("narrow: the oracle has no budgets of k big layers within reach, 0.30 to 0.40",
            "oracle", "routers", made / "oracle", narrow, "--out", tmp_path / "routers")  # fmt: skip


def test_what_is_no_folder_of_routers_is_judged_and_drawn_by_nobody(made, tmp_path, refused):
    for command in ("claims", "plot"):
        out = ("--out", tmp_path / "out")
        (tmp_path / "routers").mkdir(exist_ok=True)
        (tmp_path / "routers" / "gains.npz").unlink(missing_ok=True)
        for folder in (tmp_path / "routers", tmp_path / "nowhere"):
            refused(f"--routers {folder}: holds no table of duo-mlx oracle routers",
                    "oracle", command, made / "oracle", "--routers", folder, *out)  # fmt: skip
        (tmp_path / "routers" / "gains.npz").write_bytes(b"no table")
        refused("gains.npz: is no table of a router", "oracle", command, made / "oracle", "--routers",
                tmp_path / "routers", *out)  # fmt: skip
        refused("tokens-1.npz: is no table of a router", "oracle", command, made / "oracle", "--routers",
                made / "oracle", *out)  # fmt: skip
