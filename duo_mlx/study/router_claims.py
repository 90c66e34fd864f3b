"""What Duo-LLM's claims say of trained routers, as figures: for each router, at each budget within its reach."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duo_mlx.intervals import of_means
from duo_mlx.routes import Route
from duo_mlx.study.results import Found
from duo_mlx.study.routers import Routed
from duo_mlx.study.verdict import Estimate, Figure, Values, mean, resampled

ALIKE = 0.1  # of the way from random to the oracle: so near to random is about as good
EARLY = 4  # the first one of so many parts of a sequence, its first quarter, is early
ONE_BUDGET = Estimate(None, "it has one budget")

Bounds = tuple[float, float]


def above_oracle(found: Found, routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 1."""
    return _each(
        routers, "less oracle", lambda loss, _, k: mean(Values(loss) - Values.of(found, k, "oracle_loss")), (0, inf)
    )


def improves(routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 2."""
    figures = []
    for router in routers:
        first, last = router.ks[0], router.ks[-1]
        gained = mean(Values(router.loss[0]) - Values(router.loss[-1])) if first < last else ONE_BUDGET
        figures.append(Figure(f"{router.name} at k={first} less that at k={last}", gained))
    return figures


def late(routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 5: big in the late half of the layers, of all big in both; a middle layer is in neither."""

    def share(_: NDArray[np.float32], routes: NDArray[np.uint8], __: int) -> Estimate:
        big, half = routes == Route.BIG, routes.shape[-1] // 2
        early, late = big[..., :half].sum(axis=(1, 2)), big[..., -half:].sum(axis=(1, 2))
        return _ratio(late, early + late, "it takes no big")

    return _each(routers, "share of big in the late half", share, (0.5, inf), "")


def early(routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 5: big among a sequence's first tokens less that among the others."""

    def more(_: NDArray[np.float32], routes: NDArray[np.uint8], __: int) -> Estimate:
        big = (routes == Route.BIG).mean(axis=-1)
        first = max(1, big.shape[1] // EARLY)
        return mean(Values((big[:, :first].mean(axis=1) - big[:, first:].mean(axis=1))[:, None]))

    return _each(routers, "share of big in the first quarter less that in the rest", more, (0, inf), "")


def towards_oracle(found: Found, routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 6: how much of the way from the best of 100 random patterns to the oracle a router goes."""

    def way(loss: NDArray[np.float32], _: NDArray[np.uint8], k: int) -> Estimate:
        random, oracle = Values.baseline(found, k, "random"), Values.of(found, k, "oracle_loss")
        if random.array is None or oracle.array is None:
            return Estimate(None, random.why or oracle.why)
        columns = np.concatenate([random.array, Values(loss).by_sequence(), oracle.by_sequence()], axis=1)
        return resampled(of_means(columns, _way), len(columns))

    return _each(routers, "way from random to the oracle", way, (-ALIKE, ALIKE), "")


def skips_late(routers: Sequence[Routed]) -> list[Figure]:
    """Of claim 9: the mean depth of skips, 0 to 1, of the routers that skip."""

    def depth(_: NDArray[np.float32], routes: NDArray[np.uint8], __: int) -> Estimate:
        skipped = (routes == Route.SKIP).sum(axis=1)
        return _ratio(skipped @ np.linspace(0, 1, routes.shape[-1]), skipped.sum(axis=-1), "it skips nothing there")

    skipping = [router for router in routers if (router.routes == Route.SKIP).any()]
    return _each(skipping, "mean depth of its skips", depth, (0.5, inf), "")


def _ratio(part: NDArray[Any], whole: NDArray[Any], nothing: str) -> Estimate:
    """A ratio of sums over all sequences, of each of which there is a part and a whole ``[sequences]``."""
    of = of_means(np.stack([part, whole], axis=-1), lambda sums: sums[..., 0] / sums[..., 1])
    return resampled(of, len(part), Estimate(None, nothing))


def _way(columns: NDArray[np.float64]) -> NDArray[np.float64]:
    random, router, oracle = (columns[..., column] for column in range(3))
    return (random - router) / (random - oracle)


def _each(
    routers: Sequence[Routed],
    name: str,
    estimate: Callable[[NDArray[np.float32], NDArray[np.uint8], int], Estimate],
    bounds: Bounds,
    unit: str = "nats",
) -> list[Figure]:
    """A figure for each router and budget."""
    return [
        Figure(f"{router.name}: {name}", estimate(loss, routes, k), bounds, f"k={k}", unit)
        for router in routers
        for k, loss, routes in zip(router.ks, router.loss, router.routes, strict=True)
    ]
