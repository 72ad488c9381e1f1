"""Runs that end though a host stalls: near the end, what takes long runs a second time elsewhere.

The first result counts; the other copy is interrupted, and nothing of it is merged.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ostap_parallel.engine.backend import result_of
from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.reading import ReadingRun
from ostap_parallel.worker.chunk import ChunkOutcome

# A chunk gets a copy when it has taken so many times what is usual for as many items, and so many
# seconds at least: a copy takes a worker that would have nothing to do, and no more.
FACTOR = 1.5
LEAST = 0.2


@dataclass
class SpeculatingRun(ReadingRun):
    """A run at whose end idle workers do again what takes long elsewhere."""

    _messages: dict[Future[Any], bytes] = field(default_factory=dict)
    _twins: dict[Future[Any], Future[Any]] = field(default_factory=dict)
    _last: set[Future[Any]] = field(default_factory=set)  # whose other copies were lost
    _look_again: float | None = None  # seconds

    def _send(self, chunk: Chunk, message: bytes, places: frozenset[str] | None) -> None:
        super()._send(chunk, message, places)
        self._messages[next(reversed(self._running))] = message

    def _feed(self) -> None:
        super()._feed()
        self._look_again = None
        # Nothing is left to be sent now: the input is at its end, or what comes in the order of
        # the items must wait for one.
        if self._running and not self._again:
            self._look_again = self._copy()

    def _patience(self) -> float:
        seconds = super()._patience()
        return seconds if self._look_again is None else min(seconds, self._look_again)

    def _copy(self) -> float | None:
        """Begin copies of what is late; return the seconds until more may be, if ever."""
        under_way = self.backend.places(list(self._running))
        busy = Counter(place.host for place in under_way.values())
        idle = {host: count - busy[host] for host, count in self.backend.workers.items()}
        idle = {host: n for host, n in idle.items() if n > 0 and host not in self.trust.left_out}
        waiting = len(self._running) - len(under_way)  # these will take idle workers
        late, soon = [], [LEAST] if waiting else []
        for future, place in under_way.items():
            elsewhere = idle.keys() - {place.host}
            if future in self._twins or future in self._last or not elsewhere:
                continue
            usual = self._watch.times.median * len(self._running[future].indices)
            left = max(LEAST, FACTOR * usual) - place.seconds
            if left > 0:
                soon.append(left)
            else:
                late.append((left, future, place.host))
        late.sort(key=lambda one: one[0])
        for _, future, host in late[: max(0, sum(idle.values()) - waiting)]:
            if places := frozenset(name for name in idle if name != host and idle[name] > 0):
                self._begin_copy(future, places)
                idle[max(places, key=idle.__getitem__)] -= 1
        return max(0.01, min(soon)) if soon else None

    def _begin_copy(self, future: Future[Any], places: frozenset[str]) -> None:
        chunk = replace(self._running[future], made=time.time())
        self._send(chunk, self._messages[future], places)
        twin = next(reversed(self._running))
        self._twins[future], self._twins[twin] = twin, future
        self.copies += 1

    def _arrivals_of(self, done: Future[Any], chunk: Chunk) -> Iterator[Batch | Outcome]:
        self._messages.pop(done, None)
        self._last.discard(done)
        if (twin := self._twins.pop(done, None)) is not None:
            del self._twins[twin]
            result = result_of(done, self.backend.name)
            if not isinstance(result, ChunkOutcome) or len(result.answers) < len(chunk.items):
                # The other one may do better. With more copies, an item that ends each of its
                # workers would always have one under way, and never be given up.
                self._last.add(twin)
                return
            del self._running[twin], self._messages[twin]
            self._pinned.pop(twin, None)
            self.backend.give_up([twin])
        yield from super()._arrivals_of(done, chunk)
