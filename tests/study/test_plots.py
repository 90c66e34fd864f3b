"""Figures of an oracle: what is drawn and said is what brute force finds in the tables, and the files are the same."""

import itertools
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest

from duo_mlx.errors import DuoError
from duo_mlx.intervals import interval
from duo_mlx.routes import Route
from duo_mlx.study import plots
from duo_mlx.study.plots import maps, style, tokens
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed

LAYERS, SEQUENCES, LENGTH = 4, 5, 70
WORDS = [f"w{number}" for number in range(LENGTH)]
BY_CHANCE = {0: 1, 1: 4, 2: 6, 3: 4, 4: 1}  # patterns of k big layers


def with_bigs(random, k):
    """Routes ``[sequences, length, layers]`` of exactly k big layers."""
    order = random.random((SEQUENCES, LENGTH, LAYERS)).argsort(axis=-1)
    return np.where(order < k, Route.BIG, Route.SMALL).astype(np.uint8)


def made(budgets=("none", "0", "1", "2", "3", "4"), controls=True, choices="sB", **changes):
    """A finished oracle of made-up losses, in which the lowest is that of k = 3, and noise is lower at k = 1 only."""
    random = np.random.default_rng(7)
    small = random.gamma(2, 2, (SEQUENCES, LENGTH)).astype(np.float32)
    same = {
        "inputs": np.zeros(small.shape, np.int32), "targets": np.zeros(small.shape, np.int32),
        "loss_small": small, "loss_big": small * random.random(small.shape, np.float32) * 1.2,
    }  # fmt: skip
    tables, summaries = {}, {}
    for budget in budgets:
        k = int(budget) if budget.isdecimal() else 2
        share = {0: 1.0, 1: 0.6, 2: 0.5, 3: 0.4, 4: 0.9}[k]
        oracle = (small * share * random.uniform(0.9, 1, small.shape)).astype(np.float32)
        tables[budget] = same | {"oracle_loss": oracle, "oracle_routes": with_bigs(random, k)}
        if controls:
            nothing = np.full(small.shape, np.nan, np.float32)
            tables[budget] |= {
                "worst_routes": with_bigs(random, k), "mean_loss": small,
                "best_of_12": oracle + np.float32(0.5) if 0 < k < 4 else nothing,
                "noise_12": oracle + np.float32(0.25 if k == 1 else 0.75) if 0 < k < 4 else nothing,
                "best_of_66": nothing, "noise_66": nothing,
            }  # fmt: skip
        names = ("fixed", "fixed_split", "random", "random_by_token")
        summaries[budget] = dict.fromkeys(names, 3.0 - k / 10) | {"patterns_seen": float(BY_CHANCE[k])}
    summary = {
        "choices": choices, "prefix": "shared", "text": {"source": "made"}, "model": {"name": "tiny"},
        "budgets": summaries,
    }  # fmt: skip
    return Found(Path("folder"), summary | changes, tables)


@pytest.fixture(autouse=True)
def as_drawn():
    with style.drawing():
        yield


def meshes(figure):
    """Values of heat maps by panel, colour bars left out."""
    return [
        np.array(axes.collections[0].get_array()).reshape(LAYERS, -1)
        for axes in figure.axes
        if axes.get_label() != "<colorbar>"
    ]


def line(axes, label):
    return next(each for each in axes.lines if each.get_label() == label)


def test_layers_are_shares_by_budget_and_what_chance_leaves():
    found = made()
    plot = plots.layers(found)
    oracle, excess, worst, worst_excess = meshes(plot.figure)
    for k, layer in itertools.product(range(5), range(LAYERS)):
        for name, share, less in (("oracle_routes", oracle, excess), ("worst_routes", worst, worst_excess)):
            routes = found.tables[str(k)][name][..., layer]
            expected = sum(int(route) == Route.BIG for route in routes.ravel()) / routes.size
            assert share[layer, k] == pytest.approx(expected) and less[layer, k] == pytest.approx(expected - k / LAYERS)
    right = plot.figure.axes[3]
    assert right.get_xlabel() == "k, big layers of 4"
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "1", "2", "3", "4"]
    low, high = right.collections[0].get_clim()
    assert low == -high and high == pytest.approx(max(np.abs(excess).max(), np.abs(worst_excess).max()))
    at = excess[:, 1].argmax()
    assert f"most above chance is layer {at} ({excess[at, 1]:+.3f})" in plot.caption
    inner = np.s_[:, 1:4]
    r = np.corrcoef(excess[inner].ravel(), worst_excess[inner].ravel())[0, 1]
    assert f"r = {r:+.2f}" in plot.caption
    assert len(meshes(plots.layers(made(controls=False)).figure)) == 2


def test_the_later_half_is_counted_by_sequence():
    routes = np.ones((2, 2, 5), np.uint8)
    routes[0, 0, [0, 2]] = routes[0, 1, 4] = Route.BIG  # half of one in the middle, and one of three
    routes[1, 0, [3, 4]] = Route.BIG
    found = maps.later_half(routes)
    assert found.median == pytest.approx((1.5 / 3 + 1) / 2) and (found.low, found.high) == pytest.approx((0.5, 1))
    assert maps.later_half(np.concatenate([routes, np.ones((1, 2, 5), np.uint8)])).median == found.median
    even = np.tile(np.array([2, 1, 2, 2], np.uint8), (1, 3, 1))
    assert maps.later_half(even).median == pytest.approx(2 / 3)


@pytest.mark.parametrize("length", [1, 7, 16, 70, 128])
def test_bins_of_positions_share_out_the_sequence(length):
    edges = maps.position_bins(length)
    widths = np.diff(edges)
    assert (edges[0], edges[-1], len(widths)) == (0, length, min(16, length)) and np.ptp(widths) <= 1


def test_positions_are_shares_in_bins_and_what_the_layer_has_anywhere():
    found = made()
    plot = plots.positions(found)
    edges = maps.position_bins(LENGTH)
    panels = meshes(plot.figure)
    assert [axes.get_title("left") for axes in plot.figure.axes[:3]] == ["k = 1 of 4", "k = 2 of 4", "k = 3 of 4"]
    for column, k in enumerate((1, 2, 3)):
        big = found.tables[str(k)]["oracle_routes"] == Route.BIG
        for at, (start, stop) in enumerate(itertools.pairwise(edges)):
            expected = big[:, start:stop].reshape(-1, LAYERS).mean(axis=0)
            np.testing.assert_allclose(panels[column][:, at], expected)
            np.testing.assert_allclose(panels[3 + column][:, at], expected - big.reshape(-1, LAYERS).mean(axis=0))
        rms = (panels[3 + column] ** 2).mean() ** 0.5
        assert f"k = {k} of 4: these differences have an RMS of {rms:.3f}" in plot.caption
    random = np.random.default_rng(0)  # what tokens that do not care for their position give
    drawn = [with_bigs(random, 2) for _ in range(400)]
    each = [maps.shares_by_position(routes, edges) - maps.shares(routes)[:, None] for routes in drawn]
    stated = float(plot.caption.partition("k = 2")[2].partition("would give about ")[2].partition(";")[0])
    assert stated == pytest.approx(float(np.sqrt(np.mean(np.square(each)))), rel=0.02)


def test_other_budgets_stand_in_for_exact_ones():
    assert maps.position_budgets(made()) == ["1", "2", "3"]
    assert maps.position_budgets(made(("none", "0", "3"))) == ["3"]
    assert maps.position_budgets(made(("0", "none", "at-most:2"))) == ["none", "at-most:2"]
    assert maps.position_budgets(made(("0",))) == ["0"]
    assert tokens.token_budget(made(("0", "none"))) == "none"
    assert tokens.token_budget(made(("0", "3", "4"))) == "3"
    assert tokens.token_budget(made(("1", "3"))) == "1"
    assert tokens.token_budget(made(("bytes:0.5",))) == "bytes:0.5"


def test_losses_by_budget_with_bands_baselines_and_controls():
    found = made()
    plot = plots.losses(found)
    left, right = plot.figure.axes
    by_budget = {k: found.tables[str(k)]["oracle_loss"].astype(float).mean(axis=1) for k in range(5)}
    x, y = line(left, "oracle, 95 % band").get_data()
    np.testing.assert_allclose((x, y), (list(by_budget), [each.mean() for each in by_budget.values()]), rtol=1e-6)
    drawn = left.collections[0].get_paths()[0].vertices
    band = interval(by_budget[2].tolist(), np.mean)
    at = drawn[drawn[:, 0] == 2, 1]
    assert (at.min(), at.max()) == pytest.approx((band.low, band.high))
    np.testing.assert_allclose(line(left, "best fixed pattern").get_ydata(), 3 - np.arange(5) / 10)
    for route in ("small", "big"):
        level = found.any[f"loss_{route}"].astype(float).mean()
        assert line(left, f"all {route}").get_ydata() == pytest.approx([level] * 2)
    top = left.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == [str(count) for count in BY_CHANCE.values()]
    best, noise = (line(right, f"{name}, best of 12").get_ydata() for name in ("patterns", "noise"))
    assert np.isnan(best[[0, 4]]).all()
    np.testing.assert_allclose(best[1:4], [by_budget[k].mean() + 0.5 for k in (1, 2, 3)], rtol=1e-5)
    np.testing.assert_allclose(noise[1:4] - best[1:4], [-0.25, 0.25, 0.25], atol=1e-5)
    assert left.get_ylabel() == "loss (nats a token)"


def test_the_caption_of_losses_says_what_is_drawn():
    found = made()
    caption = plots.losses(found).caption
    by_budget = {k: found.tables[str(k)]["oracle_loss"].astype(float).mean(axis=1) for k in range(5)}
    means = {k: each.mean() for k, each in by_budget.items()}
    assert min(means, key=means.get) == 3
    assert f"lowest at k = 3 with {means[3]:.3f} [" in caption
    gain = by_budget[1] - found.any["loss_big"].astype(float).mean(axis=1)
    of = interval(gain.tolist(), np.mean)
    assert f"one big layer the oracle has {gain.mean():+.3f} [{of.low:+.3f}, {of.high:+.3f}] against all big" in caption
    assert (
        f"From k = 1 to k = 3 it changes by {means[3] - means[1]:+.3f}" in caption
        and "both choose from N = 4" in caption
    )
    spread = means[1] - means[3]
    assert "Of 12 patterns the best is lowest at k = 3, and between k = 1 and 3 its highest" in caption
    assert f"differ by {spread:.3f}, the oracle's by {spread:.3f}." in caption
    assert "12 noisy passes is lower than that at 1 of 3 budgets; on average it lies +0.083 [+0.083, +0.083]" in caption
    assert "Of 66" not in caption  # no budget has so many patterns


def test_losses_without_controls_and_without_baselines():
    found = made(controls=False)
    for of in found.summary["budgets"].values():
        of |= dict.fromkeys(("fixed", "fixed_split", "random", "random_by_token"))
    found.summary["budgets"]["2"]["random"] = 2.5
    plot = plots.losses(found)
    (axes,) = plot.figure.axes
    labels = {each.get_label() for each in axes.lines}
    assert "best fixed pattern" not in labels and "Right" not in plot.caption
    np.testing.assert_array_equal(line(axes, "best random pattern").get_ydata(), [np.nan, np.nan, 2.5, np.nan, np.nan])


def test_a_text_token_by_token_in_rows():
    found = made()
    plot = plots.text(found, 3, WORDS)
    above, below, above_2, below_2 = plot.figure.axes
    table = found.tables["none"]
    small, oracle = (table[name][3] for name in ("loss_small", "oracle_loss"))
    heights = [bar.get_height() for axes in (below, below_2) for bar in axes.patches]
    np.testing.assert_allclose(heights, small - oracle, rtol=1e-5)
    np.testing.assert_allclose(above.patches[1].get_data().values, oracle[:35])
    for name, label in (("loss_small", "all small"), ("loss_big", "all big")):
        drawn = np.concatenate([line(axes, label).get_ydata() for axes in (above, above_2)])
        np.testing.assert_allclose(drawn, table[name][3])
    assert [label.get_text() for axes in (below, below_2) for label in axes.get_xticklabels()] == WORDS
    hardest = int((small - oracle).argmax())
    assert f"`w{hardest}`, token {hardest} ({(small - oracle)[hardest]:.3f})" in plot.caption
    assert "sequence 3, oracle's budget none" in above.get_title("left")
    share = np.sort(small - oracle)[-7:].sum() / (small - oracle).sum()
    assert f"holds {share:.2f} of" in plot.caption
    assert f"worse than small in every layer for {(table['loss_big'][3] > small).sum()} of" in plot.caption


@pytest.mark.parametrize(
    ("word", "label"),
    [(" will", "will"), ("\n", "\u23ce"), (" ", "\u2423"), ("", "\u2205"), ("a\x00b", "a?b"), ("x" * 99, "x" * 16)],
)
def test_any_token_has_a_label(word, label):
    assert tokens.shown(word) == label


def test_difficulty_counts_every_token_and_its_quantiles():
    found = made()
    plot = plots.difficulty(found)
    table = found.tables["none"]
    small = table["loss_small"].astype(float)
    gain = small - table["oracle_loss"]
    for axes in plot.figure.axes[:2]:
        assert axes.collections[0].get_array().sum() == small.size
        assert axes.get_xlabel() == "loss of all small (nats a token)"
    order = np.argsort(small.ravel())
    parts = np.array_split(order, 17)  # of 350 tokens, 20 or more in each
    for quantile in (10, 50, 90):
        x, y = line(plot.figure.axes[0], f"{quantile} % quantile").get_data()
        np.testing.assert_allclose(x, [np.median(small.ravel()[part]) for part in parts])
        np.testing.assert_allclose(y, [np.percentile(gain.ravel()[part], quantile) for part in parts])
    ranks = [each.ravel().argsort().argsort() for each in (small, gain)]
    assert f"with difficulty: {np.corrcoef(*ranks)[0, 1]:+.3f} [" in plot.caption
    top = small >= np.quantile(small, 0.9)
    easy = (gain[top] < np.median(gain)).mean()
    assert f"10 % of tokens with the highest loss, {easy:.3f} are less difficult" in plot.caption


def test_skips_are_shares_of_routes_and_early_exits_are_told_from_chance():
    found = made(("none", "1"), controls=False, choices="-sB")
    random = np.random.default_rng(1)
    routes = random.integers(0, 3, (SEQUENCES, LENGTH, LAYERS)).astype(np.uint8)
    routes[:, ::3] = (2, 1, 0, 0)
    found.tables["none"]["oracle_routes"] = routes
    plot = plots.skips(found)
    of_none = meshes(plot.figure)[0]
    for layer, route in itertools.product(range(LAYERS), Route):
        assert of_none[layer, route] == pytest.approx(
            np.mean([token[layer] == route for token in routes.reshape(-1, 4)])
        )
    kinds = [tuple(token == 0) for token in routes.reshape(-1, 4)]
    some = [each for each in kinds if 0 < sum(each) < LAYERS]
    share = np.mean([each == tuple(sorted(each)) for each in some])
    orders = {each: set(itertools.permutations(each)) for each in set(some)}
    chance = np.mean([1 / len(orders[each]) for each in some])
    assert maps.early_exits(routes) == pytest.approx((share, chance)) and share > chance
    assert f"early exits are {share:.4f} of the tokens that skip some layers, by chance {chance:.4f}." in plot.caption
    assert "Budget 1: nothing is skipped." in plot.caption
    assert np.isnan(maps.early_exits(np.zeros((1, 2, 4), np.uint8))).all()


def test_what_cannot_be_drawn_is_left_out_with_why(monkeypatch):
    monkeypatch.setattr(plots, "rendered", lambda figure: {"svg": b"<svg/>", "png": b"png"})  # noqa: ARG005
    drawn = plots.draw(made(("none",), controls=False), None, 0, None)
    assert drawn.left_out.keys() == {"layers", "losses", "text", "skips", "routers", "router_layers"}
    assert "tiny" in drawn.left_out["text"] and "--skips" in drawn.left_out["skips"]
    assert drawn.files.keys() == {
        "positions.svg", "positions.png", "difficulty.svg", "difficulty.png", plots.CAPTIONS,
    }  # fmt: skip
    routed = Routed("mine", (2,), made().any["loss_big"][None], with_bigs(np.random.default_rng(0), 2)[None])
    whole = plots.draw(made(), made(choices="-sB"), 0, WORDS, [routed])
    assert not whole.left_out and whole.files.keys() == plots.FILES
    captions = whole.files[plots.CAPTIONS].decode()
    assert [each for each in captions.splitlines() if each.startswith("## ")] == [f"## {name}" for name in plots.NAMES]
    assert "Model tiny, text made, 5 sequences of 70 tokens, choices sB" in captions and "nan" not in captions


def test_one_sequence_and_the_ends_alone_can_be_drawn():
    found = made(("0", "4"))
    tables = {name: {key: each[:1] for key, each in table.items()} for name, table in found.tables.items()}
    few = Found(found.folder, found.summary, tables)
    for plot in (plots.layers(few), plots.positions(few), plots.losses(few), plots.difficulty(few)):
        plot.figure.draw_without_rendering()
        assert "nan" not in plot.caption


FIGURES = {
    "layers": lambda: plots.layers(made()),
    "positions": lambda: plots.positions(made()),
    "losses": lambda: plots.losses(made()),
    "text": lambda: plots.text(
        made(), 0, ["a long token's text" if at % 9 == 0 else word for at, word in enumerate(WORDS)]
    ),
    "difficulty": lambda: plots.difficulty(made()),
    "skips": lambda: plots.skips(made(choices="-sB")),
}


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_off_and_no_title_or_legend_is_covered(name, laid_out):
    laid_out(FIGURES[name]().figure)


def test_the_same_figure_is_the_same_file_whatever_settings_are(monkeypatch):
    first = style.rendered(FIGURES["losses"]().figure)
    monkeypatch.setitem(mpl.rcParams, "lines.linewidth", 9)
    monkeypatch.setitem(mpl.rcParams, "svg.hashsalt", "other")
    with style.drawing():
        again = FIGURES["losses"]()
        assert style.rendered(again.figure) == first
    texts = [each.text for each in ElementTree.fromstring(first["svg"]).iter("{http://www.w3.org/2000/svg}text")]
    assert {"loss (nats a token)", "oracle, 95 % band", "N, patterns that the oracle chooses from"} <= set(texts)
    assert b"<dc:date>" not in first["svg"]
    size = np.frombuffer(first["png"][16:24], ">u4")
    assert size.tolist() == [round(each * 150) for each in again.figure.get_size_inches()]


def test_a_folder_of_figures_is_replaced_only_by_force_and_only_if_it_is_one(tmp_path):
    out = tmp_path / "deep" / "figures"
    drawn = plots.Drawn({"losses.svg": b"new", plots.CAPTIONS: b"said"}, {})
    assert plots.write(drawn, out, False) == [out / "losses.svg", out / plots.CAPTIONS]
    with pytest.raises(DuoError, match="figures: exists already; give --force"):
        plots.write(drawn, out, False)
    (out / "skips.png").write_bytes(b"old")
    plots.write(drawn, out, True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == drawn.files
    assert [file.name for file in out.parent.iterdir()] == ["figures"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(DuoError, match="holds notes.txt, which is no figure's"):
        plots.write(drawn, out, True)
    assert len(list(out.iterdir())) == 3
    with pytest.raises(DuoError, match="is a file"):
        plots.write(drawn, out / "notes.txt", True)
