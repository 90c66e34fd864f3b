"""Energy of repeated work: a window in which the work is counted."""

from typing import Any

from duo_mlx.bench.meters import Meter
from duo_mlx.bench.meters.window import Energy, Window


class Counted:
    """A window over repeated work, and how many tokens were worked through in it.

    Args:
        meter: a meter; without rails (`duo_mlx.bench.meters.none`) the window is over at once.
        minimum: s that the window lasts at least.
    """

    def __init__(self, meter: Meter, minimum: float):
        self._meter = meter
        self._window = Window(meter, minimum if meter.rails else 0.0)
        self._window.open()
        self.tokens = 0
        self.over = False

    def add(self, tokens: int) -> None:
        """So many tokens are done; what is done after the window's end does not count."""
        if not self.over:
            self.tokens += tokens
            self.over = self._window.look()

    def record(self, idle: Energy | None) -> dict[str, Any] | None:
        """The window's energy for a result's JSON, with ``net_j`` of ``idle``; None without a meter."""
        if not self._meter.rails:
            return None
        energy = self._window.close()
        return energy.record() | {"tokens": self.tokens, "net_j": energy.net(idle).total_j}
