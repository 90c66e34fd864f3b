"""Work shared by several processes, on one machine or on several: what ``mlx.launch`` starts, or a single one.

A process that ends before its time closes its connections, whatever ended it. The others see it when they next wait for
it, and end, too.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from duo_mlx.errors import DuoError

BACKEND = "[ring]"  # begins what MLX says of its connections


@contextmanager
def in_touch() -> Iterator[None]:
    """Say in one line that another process is lost, where the block waits for what `mx.distributed` gives.

    The block must call `mx.eval`: where it fails, `np.array` raises nothing and gives what the memory holds.

    Raises:
        DuoError: in place of MLX's `RuntimeError` that a connection is lost.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(BACKEND):
            raise
        raise DuoError(
            "another process of this run ended before its time, and says why unless it was killed"
        ) from error


class Processes:
    """The processes of one run; the first of them, rank 0, is the one that reads and writes results.

    Raises:
        DuoError: another process is not there, or ended before its time; from whatever waits for it.
    """

    @cached_property
    def _group(self) -> mx.distributed.Group:
        try:
            return mx.distributed.init()
        except RuntimeError as error:
            raise DuoError(
                f"MLX finds no other processes of this run ({' '.join(str(error).split())}); a single process needs no "
                "mlx.launch"
            ) from error

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return self._group.rank()

    @property
    def count(self) -> int:
        """How many there are; 1 without ``mlx.launch``."""
        return self._group.size()

    def gather(self, own: bytes) -> list[bytes]:
        """What each process gives, by rank; all of them must call it."""
        if self.count == 1:
            return [own]
        sizes = self._all(np.array([len(own)]))[:, 0]
        padded = np.zeros(int(sizes.max()) or 1, np.uint8)
        padded[: len(own)] = np.frombuffer(own, np.uint8)
        return [bytes(row[:size]) for row, size in zip(self._all(padded), sizes, strict=True)]

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` gives rank 0, JSON's types alone, in all processes; the others do not call it.

        Raises:
            DuoError: in the other processes, if rank 0 fails to make it.
        """
        message = b""
        if self.rank == 0:
            try:
                message = json.dumps(make()).encode()
            except BaseException:
                self.gather(message)
                raise
        found = self.gather(message)[0]
        if not found:
            raise DuoError("the first process gave up, and says why")
        return json.loads(found)

    def _all(self, row: NDArray[Any]) -> NDArray[Any]:
        gathered = mx.distributed.all_gather(mx.array(row)[None], group=self._group, stream=mx.cpu)
        with in_touch():
            mx.eval(gathered)
        return np.array(gathered)
