"""Figures of an oracle that several of Duo-LLM's claims rest on."""

import numpy as np

from duo_mlx.intervals import of_means
from duo_mlx.routes import Route
from duo_mlx.study.controls import SIZES
from duo_mlx.study.results import Found
from duo_mlx.study.verdict import Estimate, Figure, Values, alone, mean, resampled, words

MEET = (-1e-4, 1e-4)  # nats that make no difference


def third(layers: int) -> int:
    """Of the budgets; the other side, which has equally many patterns, is what is left."""
    return max(1, round(layers / 3))


def oracle_loss(found: Found, k: int) -> Values:
    return Values.of(found, k, "oracle_loss")


def mean_only(found: Found, k: int, name: str) -> Estimate:
    """How much a baseline is above the oracle, of which the summary has the mean over all tokens and no more."""
    loss, oracle = found.summary["budgets"].get(str(k), {}).get(name), oracle_loss(found, k)
    if loss is None or oracle.array is None:
        return Estimate(None, f"the summary has no {words(name)} of budget {k}")
    return alone(loss - float(oracle.array.mean()))


def at_equal_n(found: Found, one: tuple[int | str, str], other: tuple[int | str, str]) -> tuple[Values, str]:
    """The difference of two minima over the same N, each of a budget and a name, and N: the largest that both have."""
    for size in reversed(SIZES):
        less = Values.of(found, one[0], f"{one[1]}_{size}") - Values.of(found, other[0], f"{other[1]}_{size}")
        if less.array is not None:
            break
    return less, f"best of {size}"


def noise_less_routes(found: Found, k: int) -> Figure:
    """The minimum over draws of noise less that over as many routes, in texts in which noise can cost as much."""
    less, of = at_equal_n(found, (k, "noise"), (k, "best_of"))
    spread = Values.of(found, k, "noise_mean") - Values.of(found, k, f"noise_{SIZES[0]}")
    if less.array is not None and spread.array is not None:
        noisy = spread.array.max(axis=1) > MEET[1]  # none is added where a budget's patterns cost no more than all big
        less = Values(less.array[noisy]) if noisy.any() else Values(None, f"all big costs no less than budget {k}")
    return Figure("noise less routes", mean(less), at=f"k={k}, {of}")


def lowest(found: Found, curve: str) -> Figure:
    """The interior budget at which a curve is lowest."""
    ks = np.arange(1, found.layers)
    values = [Values.of(found, k, curve) for k in ks.tolist()]
    if why := next((each.why for each in values if each.why), "" if values else "there is no budget between"):
        lowest = Estimate(None, why)
    else:
        columns = np.concatenate([each.by_sequence() for each in values], axis=1)
        lowest = resampled(of_means(columns, lambda curves: ks[curves.argmin(axis=-1)]), len(columns))
    middle = (-(-found.layers // 3) - 0.5, 2 * found.layers // 3 + 0.5)  # L/2 and L/6 to either side
    return Figure(f"k of the lowest {words(curve)}", lowest, middle, unit="")


def late(found: Found, k: int, name: str) -> Values:
    """The share of a token's big layers that lie in the late half; a middle layer is in neither half."""
    routes, half = Values.of(found, k, name), found.layers // 2
    if routes.array is None:
        return routes
    big = routes.array == Route.BIG
    early, late = big[..., :half].sum(axis=-1), big[..., -half:].sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return Values(late / (early + late))
