"""How much each host has done for a pool."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from typing import Any

from ostap_parallel.runs.report import StatMerger
from ostap_parallel.worker.chunk import ChunkOutcome


class Tally:
    """Counts jobs and their times by host.

    Attributes
    ----------
    stats
        The counts.
    begun
        When it began, by the clock that only goes forward.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.stats = StatMerger()
        self.begun = time.monotonic()

    def hear(self, done: Future[Any], chunk: object = None) -> None:
        """Count what a chunk, or a call, was."""
        if done.cancelled():
            return
        failed = 0
        if "host" in vars(done):
            found: Any = done
            host, seconds, count = found.host, found.seconds, 1
            failed = int(done.exception() is not None)
        elif done.exception() is None and isinstance(result := done.result(), ChunkOutcome):
            host, seconds, count = result.host, sum(result.seconds), len(result.seconds)
            failed = len(list(result.failed))
        else:
            return
        with self._lock:
            self.stats.add(host, seconds, count, failed)
