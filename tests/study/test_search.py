"""An oracle's folder: tables that are what brute force finds, resumed and refused where that is right."""

import json

import mlx.core as mx
import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.policies import read_routes
from duo_mlx.routes import Route
from duo_mlx.study import oracle, search, sequence, table, tree
from duo_mlx.study.losses import token_losses

LENGTH = 6
WINDOWS = np.random.default_rng(3).integers(0, 32, (3, LENGTH + 1))


def question(**changes):
    asked = {
        "choices": "sB", "prefix": "shared", "budgets": ("none", "2", "3..1"), "seed": 0,
        "text": {"source": "here"}, "model": {"name": "tiny"},
    }  # fmt: skip
    return sequence.Question(**asked | changes)


@pytest.fixture
def run(tiny_model, tmp_path):
    """``run(question, windows, force=False)``: the summary, in the folder ``tmp_path / "out"``."""

    def go(asked=None, windows=WINDOWS, **options):
        return search.run(tiny_model(), windows, asked or question(), tmp_path / "out", "typed", 1 << 24, **options)

    return go


def losses_of(model, windows, pattern):
    logits = model(mx.array(windows[:, :-1]), routes=pattern)
    return np.stack([token_losses(logits[row : row + 1], windows[row, 1:])[0] for row in range(len(windows))])


def test_tables_and_summary_are_those_of_brute_force(run, tiny_model, tmp_path):
    summary, model = run(), tiny_model()
    space = oracle.Space(model, tree.layer_options(model, (Route.SMALL, Route.BIG)))
    losses = np.stack(
        [losses_of(model, WINDOWS, pattern) for pattern in space.patterns]
    )  # [patterns, sequences, tokens]
    bigs = (space.patterns == Route.BIG).sum(axis=1)
    exact = np.array([3, 3, 2, 2, 1, 1])  # 3 to 1 over six tokens, halves to the even
    allowed = {"none": np.ones((16, LENGTH), bool), "2": np.repeat(bigs[:, None] == 2, LENGTH, axis=1)}
    allowed["3..1"] = bigs[:, None] == np.array([round(3 - 2 * token / 5) for token in range(LENGTH)])
    assert set(exact) == {1, 2, 3}
    for name, may in allowed.items():
        with np.load(tmp_path / "out" / table.table_name(name, 3)) as found:
            expected = np.where(may[:, None], losses, np.inf).min(axis=0)
            np.testing.assert_allclose(found["oracle_loss"], expected, rtol=0, atol=1e-5)
            np.testing.assert_array_equal(found["inputs"], WINDOWS[:, :-1])
            np.testing.assert_array_equal(found["targets"], WINDOWS[:, 1:])
            small = losses_of(model, WINDOWS, np.full(4, Route.SMALL))
            np.testing.assert_allclose(found["loss_small"], small, rtol=0, atol=1e-5)
            np.testing.assert_allclose(found["difficulty"], small - expected, rtol=0, atol=1e-5)
            numbers = space.numbers(found["oracle_routes"].reshape(-1, 4)).reshape(3, LENGTH)
            np.testing.assert_allclose(
                np.take_along_axis(losses, numbers[None], axis=0)[0], expected, rtol=0, atol=1e-5
            )
        of = summary["budgets"][name]
        assert of["oracle"] == pytest.approx(expected.mean(), abs=1e-5)
        assert of["oracle_by_sequence"] == pytest.approx(expected.mean(axis=1), abs=1e-5)
        assert of["patterns_seen"] == pytest.approx(may.sum(axis=0).mean())
    means = losses.mean(axis=2).T[:, bigs == 2]
    two = summary["budgets"]["2"]
    assert two["fixed"] == two["random"] == pytest.approx(means.mean(axis=0).min(), abs=1e-5)  # six are all drawn
    first, second = means[::2], means[1::2]
    split = [*second[:, first.mean(axis=0).argmin()], *first[:, second.mean(axis=0).argmin()]]
    assert two["fixed_split"] == pytest.approx(np.mean(split), abs=1e-5)
    assert two["random_by_token"] == pytest.approx(two["oracle"], abs=1e-6)
    assert summary["budgets"]["3..1"]["fixed"] is None
    assert summary["work_a_sequence"] == {"attention": 15, "ffn": 30, "head": 16}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["budgets"] == summary["budgets"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "question.json", "summary.json", "tokens-2.npz", "tokens-3-to-1.npz", "tokens-none.npz",
    ]  # fmt: skip


def test_a_committed_table_is_replayed_as_it_was_scored(run, tiny_model, tmp_path):
    summary = run(question(prefix="committed", budgets=("2",), choices="-sB"))
    with np.load(tmp_path / "out" / "tokens.npz") as found:
        scored = found["oracle_loss"]
    for row in range(3):
        routes = read_routes(tmp_path / "out" / "tokens.npz", 4, row)
        assert ((routes == Route.BIG).sum(axis=1) == 2).all()
        replayed = losses_of(tiny_model(), WINDOWS[row : row + 1], routes[None])[0]
        np.testing.assert_allclose(replayed, scored[row], rtol=0, atol=1e-5)
    two, space = summary["budgets"]["2"], oracle.Space(tiny_model(), tree.layer_options(tiny_model(), tuple(Route)))
    assert two["fixed"] is None and "shared" in two["why_no_fixed"]
    within = space.patterns[(space.patterns == Route.BIG).sum(axis=1) == 2]  # all 24 are drawn
    losses = np.stack([losses_of(tiny_model(), WINDOWS, pattern) for pattern in within])
    assert two["random"] == pytest.approx(losses.mean(axis=(1, 2)).min(), abs=1e-5)
    assert two["random_by_token"] == pytest.approx(losses.min(axis=0).mean(), abs=1e-5)


def test_an_interrupted_run_goes_on_and_gives_the_same_table(run, tmp_path):
    whole = run()
    (tmp_path / "out").rename(tmp_path / "whole")

    def stop(_stage, done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    kept = sorted((tmp_path / "out" / "sequences").iterdir())
    assert [file.name for file in kept] == ["00000.npz", "00001.npz"] and not (
        tmp_path / "out" / "summary.json"
    ).exists()
    times = [file.stat().st_mtime_ns for file in kept]
    again = run(
        progress=lambda *_: [file.stat().st_mtime_ns for file in kept] == times or pytest.fail("computed again")
    )
    assert again["budgets"] == whole["budgets"] and again["seconds"]["of_sequences"] == 1
    for name in ("tokens-none.npz", "tokens-2.npz"):
        with np.load(tmp_path / "whole" / name) as one, np.load(tmp_path / "out" / name) as other:
            assert all(np.array_equal(one[key], other[key]) for key in one.files)


def test_what_is_there_is_not_overwritten(run, tmp_path):
    run()
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(DuoError, match="holds a finished oracle; give --force"):
        run()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    (tmp_path / "out" / "notes.txt").write_text("mine")
    run(question(budgets=("1",)), force=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "question.json", "summary.json", "tokens.npz", "notes.txt",
    }  # fmt: skip


def test_another_question_or_a_foreign_or_damaged_folder_is_refused(run, tmp_path):
    def stop(_stage, done, _total):
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    with pytest.raises(DuoError, match="unfinished oracle of other choices and seed; give --force"):
        run(question(choices="-B", seed=2))
    with pytest.raises(DuoError, match="unfinished oracle of other sequences"):
        run(windows=WINDOWS[:2])
    with pytest.raises(DuoError, match="of other model"):
        run(question(model={"name": "tiny", "sha256": "another"}))
    file = tmp_path / "out" / "sequences" / "00000.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DuoError, match="00000.npz: is damaged; delete it"):
        run()
    (tmp_path / "out" / "question.json").write_text("{")
    with pytest.raises(DuoError, match="question.json: is damaged"):
        run()
    (tmp_path / "out" / "question.json").unlink()
    with pytest.raises(DuoError, match="is not empty and holds no question.json"):
        run()


def test_a_kept_sequence_of_another_text_is_refused(run):
    def stop(_stage, done, _total):
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(progress=stop)
    with pytest.raises(DuoError, match="00000.npz: is of another text"):
        run(windows=WINDOWS[::-1])


def test_what_cannot_be_searched_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(DuoError, match="no pattern of '-s' is within it"):
        run(question(choices="-s", budgets=("2",)))
    with pytest.raises(DuoError, match="no token can have 9"):
        run(question(budgets=("9",)))
    assert not (tmp_path / "out").exists()
