"""An oracle in which all claims of Duo-LLM hold, and what every figure must keep; fixtures that hand out functions."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from duo_mlx.routes import Route
from duo_mlx.study.results import Found

LAYERS, SEQUENCES, LENGTH = 6, 12, 20
CURVE = {"0": 5.0, "1": 3.8, "2": 3.5, "3": 3.2, "4": 3.5, "5": 3.8, "6": 4.0, "none": 3.0, "4..2": 3.4, "2..4": 3.4}
LATE = {"1": 0.9, "2": 0.8, "3": 0.5, "4": 0.4, "5": 0.4}  # share of the oracle's big layers


@cache
def _placed(k, share, layers=LAYERS, sequences=SEQUENCES, length=LENGTH):
    """Patterns of k big layers, ``share`` of which lie in the late half, as nearly as each token allows."""
    routes = np.full((sequences, length, layers), Route.SMALL, np.uint8)
    half, owed = layers // 2, np.full(sequences, 0.0)
    for token in range(length):
        owed += k * share
        for sequence in range(sequences):
            late = int(np.clip(round(owed[sequence]), max(0, k - half), min(k, half)))
            routes[sequence, token, half : half + late] = Route.BIG
            routes[sequence, token, : k - late] = Route.BIG
            owed[sequence] -= late
    return routes


def _made(levels=None, unsure=None, drop=(), sequences=SEQUENCES):
    """An oracle in which all claims hold.

    Args:
        levels: mean losses by (budget, array) that replace those in which they do.
        unsure: by (budget, array), how much is added in every other sequence and taken away in the others.
        drop: budgets, or (budget, array), that are left out.
    """
    random = np.random.default_rng(0)
    of_sequence, of_token = random.normal(0, 0.5, (sequences, 1)), random.normal(0, 0.2, (sequences, LENGTH))
    swing = np.where(np.arange(sequences) % 2, 1.0, -1.0)[:, None]
    high = np.zeros((sequences, LENGTH), bool)
    high[:, :2] = True  # tokens of the highest all-small losses

    def array(level, uncertain):
        noise = random.normal(0, 0.01, (sequences, LENGTH))
        return (level + of_sequence + of_token + noise + uncertain * swing).astype(np.float32)

    tables, summary = {}, {}
    for budget, level in CURVE.items():
        if budget in drop:
            continue
        names = {
            "oracle_loss": level, "mean_loss": level + 1, "best_of_12": level + 0.1, "noise_mean": level + 1,
            "noise_12": level + 0.3, "to_short": level + 0.2, "from_short": level + 0.1,
            "fixed_split": 4.6 - int(budget) / 10 if budget.isdecimal() else np.nan, "random": 4.7,
        }  # fmt: skip
        levels_here = {name: (levels or {}).get((budget, name), value) for name, value in names.items()}
        arrays = {name: array(value, (unsure or {}).get((budget, name), 0)) for name, value in levels_here.items()}
        arrays["loss_big"] = 4.0 + of_sequence + of_token
        arrays["short_loss_big"] = arrays["loss_big"] + 0.3
        arrays["loss_small"] = 5.0 + of_sequence + of_token + 9 * high
        if budget == "0" and ("0", "oracle_loss") not in (levels or {}):
            arrays["oracle_loss"] = arrays["loss_small"]
        if budget == "6" and ("6", "oracle_loss") not in (levels or {}):
            arrays["oracle_loss"] = arrays["loss_big"]
        if budget == "none":
            arrays["oracle_loss"] = arrays["oracle_loss"] + 9 * high  # their gap is no higher than others'
            arrays["oracle_loss"][:, 0] += 0.5
        arrays["best_of_66"] = np.full((sequences, LENGTH), np.nan, np.float32)
        k = int(budget) if budget.isdecimal() else 3
        arrays["oracle_routes"] = _placed(k, LATE.get(budget, 0.5), sequences=sequences)
        arrays["worst_routes"] = _placed(k, 0.5, sequences=sequences)
        by_sequence = {
            f"{name}_by_sequence": arrays.pop(name).mean(axis=1).tolist() for name in ("fixed_split", "random")
        }
        summary[budget] = by_sequence | {"fixed": 4.5, "random_by_token": 4.2}
        tables[budget] = {
            name: each for name, each in arrays.items() if name not in drop and (budget, name) not in drop
        }
    return Found(Path("made"), {"budgets": summary}, tables)


@pytest.fixture(scope="session")
def made():
    """``made(levels, unsure, drop, sequences)``: see `_made`; 12 sequences of 20 tokens, 6 layers."""
    return _made


@pytest.fixture(scope="session")
def placed():
    """``placed(k, share)``: routes with k big layers, that share of which lie in the late half."""
    return _placed


@pytest.fixture(scope="session")
def laid_out():
    """``laid_out(figure)``: nothing is cut off, and no title or legend is covered."""
    from matplotlib.text import Text

    def check(figure):
        figure.draw_without_rendering()
        whole = figure.bbox.padded(1)
        texts = [each for each in figure.findobj(Text) if each.get_visible() and each.get_text()]
        inside = [each for each in texts if each.get_window_extent().width and each.figure is figure]
        assert len(inside) > 10
        ticks = {
            id(label) for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for label in axis.get_ticklabels()
        }
        for each in inside:
            box = each.get_window_extent()
            if id(each) not in ticks:  # those beyond an axis' ends are not drawn
                assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, each
        titles = {axes.get_title("left") for axes in figure.axes} - {""}
        places = [each.get_window_extent() for each in inside if each.get_text() in titles]
        places += [legend.get_window_extent() for legend in figure.legends]
        places += [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))

    return check
