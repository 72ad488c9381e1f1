"""What runs now, and a warning of items that take far longer than others."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from typing import Any

from ostap_parallel.engine.backend import Backend
from ostap_parallel.errors import see
from ostap_parallel.logs import logger_of
from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.report import Running, describe
from ostap_parallel.runs.timing import Times
from ostap_parallel.views.words import duration

logger = logger_of(__name__)

# An item is a straggler, and warned of, when it takes so many times the median of at least so many
# others, and so many seconds at least.
FACTOR = 5
FEWEST = 10
LEAST = 5.0

# Seconds that hosts get to tell what they do.
ANSWER = 0.5


Seen = tuple[Running, Chunk]


class Watch:
    """Looks at what runs in one run.

    Parameters
    ----------
    running
        The chunks that are under way; others may change it meanwhile.
    stragglers
        Gets what is warned of.
    """

    def __init__(
        self, backend: Backend, running: Mapping[Future[Any], Chunk], stragglers: list[Running]
    ) -> None:
        self.times = Times()
        self._stragglers = stragglers
        self._backend, self._running = backend, running
        self._due = 0.0
        self._told: set[int] = set()

    def look(self, wait: float = ANSWER) -> list[Running]:
        """Return what runs, the longest first; wait so long for what hosts tell."""
        found = [one for one, _ in self._see(dict(self._running), wait)]
        return sorted(found, key=lambda one: -one.seconds)

    def _see(self, chunks: Mapping[Future[Any], Chunk], wait: float) -> Iterator[Seen]:
        for future, place in self._backend.places(chunks, wait).items():
            chunk = chunks[future]
            position, count = 0, len(chunk.indices)
            if place.index is not None and place.index in chunk.indices:
                position, count = chunk.indices.index(place.index), 1
            item = describe(chunk.items[position])
            about = chunk.indices[position], item, count, place.host, place.pid, place.seconds
            yield Running(*about, place.memory, place.load), chunk

    def patience(self) -> float | None:
        """Return the seconds until it is time to look for items that take too long, if ever."""
        if self.times.count < FEWEST:
            return None
        now = time.monotonic()
        if self._due <= now:
            self._due = now + self._limit()
        return self._due - now

    def is_due(self) -> bool:
        """Return whether it is time to look for items that take too long."""
        return self.times.count >= FEWEST and 0 < self._due <= time.monotonic()

    def warn(self) -> None:
        """Warn, once each, of items that take too long."""
        limit, median = self._limit(), self.times.median
        self._due = time.monotonic() + limit
        chunks, late = dict(self._running), {}
        for future, place in self._backend.places(chunks).items():
            indices = chunks[future].indices
            in_time = place.seconds - median * (len(indices) - 1) < limit
            if not in_time and self._told.isdisjoint(indices):
                late[future] = chunks[future]
        for one, chunk in self._see(late, ANSWER) if late else ():
            self._told.update(chunk.indices)
            self._stragglers.append(one)
            text = "still running: %s; most items take %s%s"
            logger.warning(text, one, duration(median), see("long"))

    def _limit(self) -> float:
        return max(LEAST, FACTOR * self.times.median)
