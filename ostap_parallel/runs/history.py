"""What a run keeps for who wants to see it later: when what ran where, hosts, and last words."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ostap_parallel.engine.backend import result_of
from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.run import Run
from ostap_parallel.runs.tails import Tail, Tails
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker.chunk import Lost

# Failed items of which lines are kept at most.
MOST = 1000


class History:
    """Keeps what a run tells.

    Parameters
    ----------
    timeline
        Where to; ``None``: nothing is kept of times.
    """

    def __init__(self, run: Run, timeline: Timeline | None, tails: Tails | None) -> None:
        self._timeline, self._tails = timeline, tails
        self._run, self._backend = run, run.backend
        self._outputs: dict[int, Tail] = {}
        self._states: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note during the block what becomes of chunks and hosts."""
        unheard, self._run.heard = self._run.heard, self._hear
        try:
            if self._timeline is None:
                yield
                return
            self._look()
            undo = self._backend.listen(self._look)
            try:
                yield
            finally:
                undo()
                self._look()
        finally:
            self._run.heard = unheard  # not to keep one another until the garbage is collected

    def output(self, index: int) -> Tail | None:
        """Return the last lines of an item that has failed, once."""
        return self._outputs.pop(index, None)

    def _hear(self, done: Future[Any], chunk: Chunk) -> None:
        if done.cancelled():  # before its turn came
            return
        result = result_of(done, self._backend.name)
        if self._timeline is not None:
            self._timeline.add(result, chunk.indices, chunk.made)
            if self._run.journal is not None:
                self._run.journal.timeline = self._timeline
        if self._tails is None:
            return
        if isinstance(result, Lost):
            failed = chunk.indices if result.index is None else [result.index]
            seconds = time.time() - chunk.made
        else:
            failed = [chunk.indices[position] for position in result.failed]
            seconds = sum(result.seconds)
        if failed and len(self._outputs) < MOST:
            tail = self._tails.about(result.host, result.pid, seconds)
            self._outputs.update(dict.fromkeys(failed[:MOST], tail))

    def _look(self) -> None:
        """Note the hosts whose state has changed."""
        assert self._timeline is not None
        with self._lock:
            for host in list(self._backend.hosts):
                if self._states.get(host.name) != (state := (host.state, host.lost)):
                    self._states[host.name] = state
                    reason = ""
                    if host.error and host.state != "up":
                        reason = f"{host.error.step}: {host.error.reason}"
                    self._timeline.note(host.name, host.state, host.reason or reason)
