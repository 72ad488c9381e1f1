"""What a run keeps for who wants to see it later: when what ran where, hosts, and last words."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from ostap_parallel.engine.backend import result_of
from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.run import Run
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker.chunk import Lost

# Of what a worker prints while it runs a chunk: so many lines, of so many characters, are kept.
LINES = 20
LENGTH = 500

# Workers, and failed items, of which lines are kept at most.
MOST = 1000


class Tails:
    """The last lines that each worker has printed since its last chunk.

    Parameters
    ----------
    hand_on
        Gets all that is heard.
    """

    def __init__(self, hand_on: Callable[[str, Mapping[str, Any]], object]) -> None:
        self._hand_on = hand_on
        self._lines: dict[tuple[str, int], deque[str]] = {}

    def hear(self, host: str, event: Mapping[str, Any]) -> None:
        """Take a line that a worker has printed or logged, see `worker.output.Sink`."""
        self._hand_on(host, event)
        if len(self._lines) > MOST:  # workers that have gone
            self._lines.clear()
        if event["kind"] == "log":
            record = logging.makeLogRecord(dict(event["record"]))
            text = f"{record.levelname} {record.name}: {record.getMessage()}"
        else:
            text = event["text"]
        lines = self._lines.setdefault((host, event["pid"]), deque(maxlen=LINES))
        lines.append(text[:LENGTH])

    def take(self, host: str, pid: int) -> str:
        """Return the last lines of a worker, and forget them."""
        return "\n".join(self._lines.pop((host, pid), ()))


class History:
    """Keeps what a run tells.

    Parameters
    ----------
    timeline
        Where to; ``None``: nothing is kept of times.
    """

    def __init__(self, run: Run, timeline: Timeline | None, tails: Tails | None) -> None:
        self._timeline, self._tails = timeline, tails
        self._backend = run.backend
        self._outputs: dict[int, str] = {}
        self._states: dict[str, tuple[str, int]] = {}
        self._lock = threading.Lock()
        run.heard = self._hear

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note during the block what becomes of hosts."""
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

    def output(self, index: int) -> str:
        """Return the last lines of an item that has failed, once."""
        return self._outputs.pop(index, "")

    def _hear(self, done: Future[Any], chunk: Chunk) -> None:
        if done.cancelled():  # before its turn came
            return
        result = result_of(done, self._backend.name)
        if self._timeline is not None:
            self._timeline.add(result, chunk.indices, chunk.made)
        if self._tails is None or not (lines := self._tails.take(result.host, result.pid)):
            return
        if isinstance(result, Lost):
            failed = chunk.indices if result.index is None else [result.index]
        else:
            failed = [chunk.indices[position] for position in result.failed]
        for index in failed:
            if len(self._outputs) < MOST:
                self._outputs[index] = lines

    def _look(self) -> None:
        """Note the hosts whose state has changed."""
        assert self._timeline is not None
        with self._lock:
            for host in list(self._backend.hosts):
                if self._states.get(host.name) != (state := (host.state, host.lost)):
                    self._states[host.name] = state
                    reason = f"{host.error.step}: {host.error.reason}" if host.error else ""
                    self._timeline.note(host.name, host.state, host.reason or reason)
