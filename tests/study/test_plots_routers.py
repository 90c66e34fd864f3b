"""Figures of routers beside an oracle: what is drawn and said is what brute force finds in the tables."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from duo_mlx.intervals import interval
from duo_mlx.routes import Route
from duo_mlx.study import plots
from duo_mlx.study.plots import maps, style
from duo_mlx.study.plots.routers import at_share, curve, middle
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed

LAYERS, SEQUENCES, LENGTH = 4, 7, 40
ORACLE = {0: 5.0, 1: 3.0, 2: 2.5, 3: 3.2, 4: 4.0}
FIXED, RANDOM, NOISE = ({1: 4.6, 2: 4.4, 3: 4.1}, {1: 4.7, 2: 4.45, 3: 4.2}, {2: 2.8})
OWN = np.linspace(-0.5, 0.5, SEQUENCES)  # what a sequence's losses are above the mean


def with_bigs(random, k):
    """Routes ``[sequences, length, layers]`` of exactly k big layers."""
    order = random.random((SEQUENCES, LENGTH, LAYERS)).argsort(axis=-1)
    return np.where(order < k, Route.BIG, Route.SMALL).astype(np.uint8)


def made(choices="sB", tables=("none", "1", "2", "3"), controls=True):
    """A finished oracle, some of whose tables may be missing."""
    random = np.random.default_rng(7)
    loss = np.tile(OWN[:, None], (1, LENGTH)).astype(np.float32)
    same = {"inputs": np.zeros(loss.shape, np.int32), "targets": np.zeros(loss.shape, np.int32),
            "loss_small": loss + 5, "loss_big": loss + 4}  # fmt: skip
    budgets = {"none": {"oracle_by_sequence": (OWN + 2).tolist()}, "3..1": {}}
    for k, level in ORACLE.items():
        budgets[str(k)] = {"oracle_by_sequence": (OWN + level).tolist()} | {
            f"{name}_by_sequence": (OWN * 1.1 + of[k]).tolist() if k in of else None
            for name, of in (("fixed_split", FIXED), ("random", RANDOM))
        }
        noisy = {"noise_66": {"mean": NOISE[k]}} if k in NOISE else {}
        budgets[str(k)]["controls"] = noisy or None if controls else None
    found = {name: same | {"oracle_routes": with_bigs(random, int(name) if name.isdecimal() else 2)} for name in tables}
    return Found(Path("folder"), {"choices": choices, "budgets": budgets}, found)


def router(name="mine", ks=(1, 2, 3), seed=0):
    """One that takes a little more big than it should, the later the layer the more, and loses 0.1 less by each k."""
    random = np.random.default_rng(seed)
    shares = [np.linspace(0.5, 1.7, LAYERS) * k / LAYERS for k in ks]
    drawn = [np.where(random.random((SEQUENCES, LENGTH, LAYERS)) < of, Route.BIG, Route.SMALL) for of in shares]
    losses = [np.tile(OWN[:, None] + 4.5 - 0.1 * k, (1, LENGTH)) + random.normal(0, 0.1, LENGTH) for k in ks]
    return Routed(name, tuple(ks), np.array(losses, np.float32), np.array(drawn, np.uint8))


@pytest.fixture(autouse=True)
def as_drawn():
    with style.drawing():
        yield


def line(axes, label):
    return next(each for each in axes.lines if each.get_label() == label)


def stated(values, sign=""):
    """A mean over sequences as captions say it."""
    of = interval(list(values), np.mean)
    return f"{np.mean(values):{sign}.3f} [{of.low:{sign}.3f}, {of.high:{sign}.3f}]"


def test_losses_stand_at_the_share_that_was_taken():
    routed = [router(), router("other", (1, 3), seed=1)]
    (axes,) = plots.routers(made(), routed).figure.axes
    for each in routed:
        drawn = line(axes, each.name)
        shares = [np.mean([route == Route.BIG for route in routes.ravel()]) for routes in each.routes]
        np.testing.assert_allclose(drawn.get_xdata(), shares)
        np.testing.assert_allclose(drawn.get_ydata(), [loss.mean() for loss in each.loss], rtol=1e-6)
        assert shares[0] != pytest.approx(0.25, abs=0.01)
    assert axes.get_ylabel() == "loss (nats a token)" and axes.get_xlim() == (-0.02, 1.02)


def test_the_oracle_and_baselines_go_from_all_small_to_all_big():
    (axes,) = plots.routers(made(), [router()]).figure.axes
    for label, levels in (
        ("oracle, 95 % band", ORACLE),
        ("best fixed pattern of the other half", {0: 5.0} | FIXED | {4: 4.0}),
        ("best random pattern", {0: 5.0} | RANDOM | {4: 4.0}),
        ("noise, best of 66 (control)", NOISE),
    ):
        x, y = line(axes, label).get_data()
        np.testing.assert_allclose((x, y), ([k / LAYERS for k in levels], list(levels.values())), rtol=1e-6)
    vertices = axes.collections[0].get_paths()[0].vertices
    band, at = interval((OWN + 2.5).tolist(), np.mean), vertices[vertices[:, 0] == 0.5, 1]
    assert (at.min(), at.max()) == pytest.approx((band.low, band.high))
    for name, level in (("small", 5), ("big", 4)):
        assert line(axes, f"all {name}").get_ydata() == pytest.approx([level] * 2)
    labels = [each.get_text() for each in axes.get_legend().get_texts()]
    assert len(labels) == 7 and labels[-1] == "mine"


def test_routers_are_told_apart():
    routed = [router(f"r{number}", seed=number) for number in range(9)]
    (axes,) = plots.routers(made(), routed).figure.axes
    looks = {(each.get_color(), each.get_marker(), each.get_linestyle()) for each in axes.lines}
    assert len(looks) == len(axes.lines) == 6 + 9


def test_the_caption_compares_at_the_share_that_was_taken():
    mine, found = router(), made()
    share, losses = mine.share[1], mine.loss[1].mean(axis=1)
    caption = plots.routers(found, [mine]).caption
    assert f"mine: at k = 2 of 4 it takes {share:.3f} of big and loses {stated(losses)}, " in caption
    assert 0.5 < share < 0.75
    for levels, own, name in ((ORACLE, OWN, "the oracle"), (FIXED, OWN * 1.1, "the best fixed pattern"),
                              (RANDOM, OWN * 1.1, "the best random one")):  # fmt: skip
        between = levels[2] + (share - 0.5) / 0.25 * (levels[3] - levels[2])
        assert f"{stated(losses - between - own, '+')} from {name}" in caption
    assert "is lowest at k = 2 with 2.800" in caption


def test_without_controls_baselines_or_tables_the_rest_is_drawn():
    found = made(tables=("none",), controls=False)
    for name in ORACLE:
        found.summary["budgets"][str(name)] |= {"fixed_split_by_sequence": None}
    plot = plots.routers(found, [router()])
    labels = {each.get_label() for each in plot.figure.axes[0].lines}
    assert not any("noise" in label for label in labels) and "noise" not in plot.caption
    np.testing.assert_allclose(line(plot.figure.axes[0], "oracle, 95 % band").get_ydata(), list(ORACLE.values()))
    assert line(plot.figure.axes[0], "best fixed pattern of the other half").get_xdata().tolist() == [0, 1]


def test_only_of_big_and_small_all_small_and_all_big_are_the_ends():
    at, losses = curve(made(choices="-sB"), "fixed_split")
    np.testing.assert_allclose(at, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(losses, [OWN * 1.1 + level for level in FIXED.values()])
    assert at_share(made(choices="-sB"), "fixed_split", 0.2) is None
    assert at_share(made(), "fixed_split", 0.125) == pytest.approx((OWN * 2.1 + 5.0 + 4.6) / 2)
    caption = plots.routers(made(choices="-sB"), [replace(router(), routes=router().routes * 0 + 2)]).caption
    assert "from the oracle" in caption and "from the best fixed" not in caption and "nan" not in caption


def test_the_middle_budget():
    assert [middle(router(ks=ks), 4) for ks in ((1, 2, 3), (3,), (1, 3), (0, 3))] == [1, 0, 0, 1]


def test_maps_are_shares_by_layer_and_position():
    routed, found = [router(), router("late", (3,), seed=1)], made()
    figure = plots.router_layers(found, routed).figure
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    edges = maps.position_bins(LENGTH)
    for row, (each, place, k) in enumerate(((routed[0], 1, 2), (routed[1], 0, 3))):
        heat, bars = panels[2 * row : 2 * row + 2]
        big = each.routes[place] == Route.BIG
        drawn = np.array(heat.collections[0].get_array()).reshape(LAYERS, -1)
        for at, (start, stop) in enumerate(pairwise(edges)):
            np.testing.assert_allclose(drawn[:, at], big[:, start:stop].reshape(-1, LAYERS).mean(axis=0))
        assert heat.collections[0].get_clim() == (0, 1)
        assert heat.get_title("left") == f"{each.name}, k = {k} of 4, took {big.mean():.3f}"
        for layer, bar in enumerate(bars.patches):
            assert (bar.get_y() + bar.get_height() / 2, bar.get_width()) == pytest.approx(
                (layer, big[..., layer].mean())
            )
        oracle = (found.tables[str(k)]["oracle_routes"] == Route.BIG).reshape(-1, LAYERS).mean(axis=0)
        np.testing.assert_allclose(line(bars, "the oracle").get_data(), (oracle, range(LAYERS)))
    assert [each.get_text() for each in figure.legends[0].get_texts()] == ["the oracle"]


def test_the_caption_of_maps_says_where_big_is():
    mine, found = router(), made()
    big, caption = mine.routes[1] == Route.BIG, plots.router_layers(found, [mine]).caption
    by_layer = big.reshape(-1, LAYERS).mean(axis=0)
    late = [each[:, 2:].sum() / each.sum() for each in big]
    assert f"mine, k = 2: {stated(late)} of its big stand in the later half" in caption
    most, least = by_layer.argmax(), by_layer.argmin()
    assert f"most in layer {most} ({by_layer[most]:.3f}), fewest in layer {least} ({by_layer[least]:.3f})" in caption
    first = big[:, :10].mean(axis=(1, 2)) - big[:, 10:].mean(axis=(1, 2))
    assert f"the first quarter of a sequence takes {stated(first, '+')} more than the rest" in caption
    oracle = found.tables["2"]["oracle_routes"] == Route.BIG
    apart = np.abs(by_layer - oracle.reshape(-1, LAYERS).mean(axis=0)).mean()
    assert f"of the oracle's big {stated([each[:, 2:].sum() / each.sum() for each in oracle])} stand" in caption
    assert f"the shares of the two differ by {apart:.3f} on average." in caption


def test_no_big_no_table_and_short_sequences_are_said():
    none, short = router("none"), router("short")
    none.routes[:] = Route.SMALL
    caption = plots.router_layers(made(), [none]).caption
    assert "none, k = 2: it takes no big." in caption and "nan" not in caption
    partial = plots.router_layers(made(tables=("none", "1")), [router()])
    assert "the oracle's table of this budget is missing" in partial.caption and not partial.figure.legends
    found = made()
    tables = {name: {key: each[:, :3] for key, each in table.items()} for name, table in found.tables.items()}
    short = replace(short, loss=short.loss[:, :, :3], routes=short.routes[:, :, :3])
    caption = plots.router_layers(replace(found, tables=tables), [short]).caption
    assert "first quarter" not in caption and "nan" not in caption


def test_without_routers_both_are_left_out_with_why():
    for of in (plots.routers, plots.router_layers):
        with pytest.raises(style.LackingError, match="needs trained routers; give --routers"):
            of(made(), ())


@pytest.mark.parametrize("of", [plots.routers, plots.router_layers])
@pytest.mark.parametrize("count", [1, 4])
def test_nothing_is_cut_off_and_no_title_or_legend_is_covered(of, count, laid_out):
    laid_out(of(made(), [router(f"a router with a name, {number}") for number in range(count)]).figure)
