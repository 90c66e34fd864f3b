"""``duo-mlx oracle plot``: figures of a tiny model's oracle, what is left out, and refusals in one line."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner

from duo_mlx import checkpoint
from duo_mlx.cli import main
from duo_mlx.study import plots, search
from duo_mlx.study.plots import style
from duo_mlx.study.results import read

SEQUENCES, LENGTH = 3, 6
MODEL = {"num_hidden_layers": 2}
NO_ROUTERS = "".join(
    f"left out {name}: needs trained routers; give --routers what duo-mlx oracle routers wrote\n"
    for name in ("routers", "router_layers")
)


def run(*arguments):
    return CliRunner().invoke(main, ["oracle", "plot", *map(str, arguments)], prog_name="duo-mlx")


@pytest.fixture(scope="module")
def oracle(saved, tmp_path_factory):
    """``oracle(choices)``: the folder of a finished oracle of the tiny model, not to be changed."""
    made = {}

    def make(choices="sB"):
        if choices not in made:
            directory, model = saved(**MODEL)
            made[choices] = tmp_path_factory.mktemp("oracle") / "out"
            windows = np.random.default_rng(0).integers(2, 32, (SEQUENCES, LENGTH + 1))
            named = {"name": "tiny", "sha256": checkpoint.fingerprint(directory)}
            asked = search.Question(choices, "shared", ("0", "1", "2"), 0, {"source": "made"}, named)
            search.run(model, windows, asked, made[choices], "typed", 1 << 24)
        return made[choices]

    return make


@pytest.fixture
def quick(monkeypatch):
    """Figures are made, and not rendered, which takes longest."""
    monkeypatch.setattr(plots, "rendered", lambda figure: {"svg": b"<svg/>", "png": b"png"})  # noqa: ARG005


def test_figures_of_an_oracle_with_the_text_of_its_tokens(oracle, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(style, "DPI", 20)
    out = tmp_path / "figures"
    done = run(oracle(), "--model", saved(**MODEL)[0], "--sequence", 1, "--out", out)
    assert done.exit_code == 0, done.output
    first, _, rest = done.stderr.partition("\n")
    assert first.startswith("left out skips: ") and "--skips" in first and rest == NO_ROUTERS
    assert sorted(done.stdout.splitlines()) == sorted(str(file) for file in out.iterdir())
    names = [name for name in plots.NAMES if name not in ("skips", "routers", "router_layers")]
    assert {file.name for file in out.iterdir()} == {"captions.md"} | {
        f"{name}.{kind}" for name in names for kind in ("svg", "png")
    }
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = {each.text for each in ElementTree.parse(out / "text.svg").iter("{http://www.w3.org/2000/svg}text")}
    targets = read(oracle()).any["targets"][1]
    assert {f"w{target - 2}" for target in targets} <= drawn  # the tiny tokenizer's words
    assert "sequence 1" in (out / "captions.md").read_text()


@pytest.mark.usefixtures("quick")
def test_skips_are_another_oracles(oracle, saved, tmp_path):
    out = tmp_path / "figures"
    done = run(oracle(), "--skips", oracle("-sB"), "--model", saved(**MODEL)[0], "--out", out)
    assert (done.exit_code, done.stderr) == (0, NO_ROUTERS), done.output
    assert {file.name for file in out.iterdir()} == {name for name in plots.FILES if "router" not in name}
    again = (oracle(), "--model", saved(**MODEL)[0], "--out", out)
    refused = run(*again)
    assert refused.exit_code == 2 and "exists already; give --force" in refused.stderr
    assert run(*again, "--force").exit_code == 0 and not (out / "skips.svg").exists()


@pytest.mark.usefixtures("quick")
def test_the_text_is_left_out_where_the_default_model_is_another(oracle, tmp_path):
    done = run(oracle("-sB"), "--out", tmp_path / "figures")
    assert done.exit_code == 0, done.output
    said = "left out text: the tokens' text takes the oracle's own model, tiny; give --model\n"
    assert done.stderr == said + NO_ROUTERS
    assert (tmp_path / "figures" / "skips.svg").exists() and not (tmp_path / "figures" / "text.svg").exists()


def test_bad_input_is_one_line_and_writes_nothing(oracle, saved, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    out = ("--out", tmp_path / "figures")
    for arguments, line in (
        ((tmp_path / "nowhere", *out), "give the folder of a finished duo-mlx oracle"),
        ((oracle(), *out, "--sequence", SEQUENCES), "--sequence 3: "),
        ((oracle(), *out, "--skips", tmp_path / "nowhere"), "summary.json: cannot be read"),
        ((oracle(), *out, "--model", saved(num_hidden_layers=3)[0]), "is not the oracle's, tiny"),
        ((oracle(), "--out", tmp_path / "other", "--force"), "holds notes.txt"),
    ):
        done = run(*arguments)
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.output
        assert line in done.stderr
        assert [file.name for file in tmp_path.iterdir()] == ["other"]


def test_skips_of_another_model_are_refused(oracle, tmp_path, saved):
    directory, model = saved(num_hidden_layers=3)
    named = {"name": "other", "sha256": checkpoint.fingerprint(directory)}
    asked = search.Question("-sB", "shared", ("1",), 0, {"source": "made"}, named)
    search.run(model, np.zeros((1, 3), int), asked, tmp_path / "skips", "typed", 1 << 24)
    done = run(oracle(), "--skips", tmp_path / "skips", "--out", tmp_path / "figures")
    assert done.exit_code == 2 and "is of another model than" in done.stderr
    assert not (tmp_path / "figures").exists()


def test_matplotlib_is_asked_for(oracle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run(oracle(), "--out", tmp_path / "figures")
    assert done.exit_code == 2 and "pip install 'duo-mlx[plot]'" in done.stderr
    assert not (tmp_path / "figures").exists()
