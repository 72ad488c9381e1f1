"""How much is left: what programs read in pools of `multiprocessing` to show progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ostap_parallel.worker.chunk import ChunkOutcome

Heard = Callable[[Future[Any], Any], object]


class Left:
    """The items of a map that are not done, counted in chunks as the original has them."""

    def __init__(self, total: int, chunksize: int) -> None:
        self.chunksize = max(1, chunksize)
        self._total = total
        self._done: list[int] = []  # of each chunk that has come

    def chunks(self) -> int:
        """Return how many chunks are left, of which there is one until all has come."""
        return max(1, math.ceil((self._total - sum(self._done)) / self.chunksize))

    def hearing(self, heard: Heard) -> Heard:
        """Return what counts a chunk of a run that is done, and tells `heard`."""

        def hear(done: Future[Any], chunk: Any) -> None:
            if not done.cancelled() and done.exception() is None:
                outcome = done.result()
                if isinstance(outcome, ChunkOutcome):
                    self._done.append(len(outcome.seconds))
            heard(done, chunk)

        return hear


class Waiting:
    """So many calls and maps that no worker has begun, as a queue tells of them."""

    def __init__(self, count: int) -> None:
        self._count = max(0, count)

    def qsize(self) -> int:
        """Return how many there are."""
        return self._count

    def empty(self) -> bool:
        """Return whether there is none."""
        return not self._count
