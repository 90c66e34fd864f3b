"""What a cell's decoding would take on an Apple GPU, counted: bytes, kernels and waits of a token.

Not a measurement, and no time: `duo_mlx.projection` makes times of it, with constants that others report.
"""

from typing import Any

import numpy as np

from duo_mlx.errors import DuoError
from duo_mlx.model import Model
from duo_mlx.routes import Routes
from duo_mlx.work import imagined, shares, works

FLOAT = 16  # bits of a float there


def gpu_work(model: Model, quantisation: str, routes: Routes, context: int, by_router: bool) -> dict[str, Any] | None:
    """A decoded token's work under ``planned``, or under ``fused`` by a router; None for a batch.

    Args:
        model: a Duo.
        quantisation: of the cell; floats count with 16 bits.
        routes: ``[passes, batch, layers]`` as realised.
        context: positions attended to.
        by_router: whether the model's router decides.
    """
    if routes.shape[1] != 1:
        return None
    bits = int(quantisation.removesuffix("-bit")) if quantisation.endswith("-bit") else FLOAT
    try:
        made = imagined(model.config, bits)
    except DuoError:  # its width cannot be quantised by the groups that are projected
        return None
    strategy = "fused" if by_router else "planned"
    mix = np.mean(shares(routes[:, 0]), axis=0)
    found = works(made, {"cell": mix}, context, [strategy])[strategy]["cell"]
    return {"strategy": strategy, "bits": bits} | found._asdict()
