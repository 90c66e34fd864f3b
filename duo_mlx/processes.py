"""Work shared by several processes, on one machine or on several: what ``mlx.launch`` starts, or a single one."""

from collections.abc import Sequence
from functools import cached_property

import mlx.core as mx
import numpy as np

from duo_mlx.errors import DuoError


class Processes:
    """The processes of one run; the first of them, rank 0, is the one that reads and writes results."""

    @cached_property
    def _group(self) -> mx.distributed.Group:
        return mx.distributed.init()

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
        sizes = self._all([len(own)])[:, 0]
        padded = np.zeros(int(sizes.max()) or 1, np.uint8)
        padded[: len(own)] = np.frombuffer(own, np.uint8)
        return [bytes(row[:size]) for row, size in zip(self._all(padded), sizes, strict=True)]

    def agree(self, numbers: Sequence[int], failed: bool = False) -> set[int]:
        """The numbers that rank 0 gives, in all processes.

        Raises:
            DuoError: in the other processes, if rank 0 says that it failed.
        """
        message = self.gather(np.array([failed, *numbers], np.int64).tobytes() if self.rank == 0 else b"")
        failure, *agreed = np.frombuffer(message[0], np.int64).tolist()
        if failure and self.rank:
            raise DuoError("the first process gave up, and says why")
        return set(agreed)

    def _all(self, row: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.array(mx.distributed.all_gather(mx.array(row)[None], group=self._group, stream=mx.cpu))
