"""A router's threshold: what is added to big's logit, so that a share of the layers' tokens takes big.

``router_offsets`` in config.json has measured pairs of share and offset, and lies between them on straight lines. So a
router that was trained once serves any budget: ``router:0.3`` is its own order of tokens and layers, cut at three
tenths.
"""

import mlx.core as mx
import numpy as np

from duo_mlx.config import Config
from duo_mlx.errors import DuoError
from duo_mlx.routes import LETTERS, Route

PREFIX = "router:"


def offsets(args: Config, spec: str) -> mx.array:
    """What ``router:SHARE`` adds to the logits, ``[choices]``.

    Raises:
        DuoError: no such share, the router was not measured, or its choices are none with big.
    """
    try:
        share = float(spec.removeprefix(PREFIX))
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise DuoError(f"route {spec!r}: after router: comes a share of big from 0 to 1, such as 0.3")
    if not args.router_offsets:
        raise DuoError(
            f"route {spec!r}: this model's config.json has no router_offsets; "
            "train its router with duo-mlx train router, or use router without a share"
        )
    shares, moved = np.array(args.router_offsets).T
    if not shares[0] <= share <= shares[-1]:
        raise DuoError(
            f"route {spec!r}: this model's router was measured from {shares[0]:.2f} to {shares[-1]:.2f} of big; "
            "for none or all of it use small or big"
        )
    return of_big(args, float(np.interp(share, shares, moved)))


def of_big(args: Config, offset: float) -> mx.array:
    """``[choices]``, with ``offset`` for big and nothing for the others."""
    return mx.array([offset * (LETTERS.index(letter) == Route.BIG) for letter in args.router_choices], mx.float32)
