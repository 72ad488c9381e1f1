"""Items that are sent together: enough to be worth it, few enough that workers end together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from ostap_parallel.worker import execute

# A chunk should take about this long: many times a round trip, yet short beside a user's patience.
CHUNK_SECONDS = 0.3
MAX_CHUNK = 1 << 12

# A shorter one costs more than it computes. Where the way to a host is long, a chunk takes at
# least so many round trips, and towards the end of the input so many: the next one is on its way
# meanwhile. What was measured as a round trip may have been a moment of high load.
SHORTEST_CHUNK = 0.005
ROUND_TRIPS = 3
ROUND_TRIPS_AT_THE_END = 1
LONGEST_ROUND_TRIP = 0.1

GROWTH = 8  # from one chunk to the next
MANY = 4  # items whose time is known, for each of a chunk that is as short as is worth it

# When items take far longer than those before: after so many seconds a chunk gives back those
# that it has not begun.
LONGEST_CHUNK = 1.0


@dataclass
class Chunk:
    """Items that are sent together for the first time."""

    indices: Sequence[int]
    items: list[Any]
    packed: Sequence[Any]

    def split(self) -> list[Item]:
        """Return the items one by one, as each may get a history of its own."""
        return list(map(Item, self.indices, self.items, self.packed))


@dataclass
class Item:
    """An item that is run again.

    Attributes
    ----------
    failed
        How often it raised, or took too long.
    lost
        How often its worker died by it.
    blameless
        How often it was lost by the fault of others.
    """

    index: int
    item: Any
    packed: Any
    failed: int = 0
    lost: int = 0
    blameless: int = 0

    @property
    def attempts(self) -> int:
        """How often it will have run when this time is over."""
        return 1 + self.failed + self.lost + self.blameless


def pack_chunk(chunk: Chunk | list[Item], run: bytes, limit: float) -> bytes:
    """Return the message for a chunk, see `execute.pack_chunk`."""
    if isinstance(chunk, Chunk):
        return execute.pack_chunk(chunk.indices, chunk.packed, run, limit)
    columns = [item.index for item in chunk], [item.packed for item in chunk]
    return execute.pack_chunk(*columns, run, limit)


class ChunkSize:
    """The size of the next chunk, by the times of the items so far, also of earlier runs.

    Round trips are the seconds that a message to the farthest host and its answer take.
    """

    def __init__(self) -> None:
        self._seconds: float | None = None  # mean time per item
        self._count = 0  # of items that this comes from
        self._size = 1

    @classmethod
    def of(cls, function: Callable[..., Any]) -> ChunkSize:
        """Return that of the last run of a function."""
        try:
            return _known.setdefault(function, cls())
        except Exception:  # it has no hash, or cannot be referred to weakly
            return cls()

    def adapt(self, seconds: float, count: int, round_trip: float) -> None:
        """Take in that a chunk of `count` items took `seconds` on its worker."""
        mean = seconds / count
        self._count += count
        self._seconds = mean if self._seconds is None else 0.7 * self._seconds + 0.3 * mean
        wanted = max(CHUNK_SECONDS, ROUND_TRIPS * min(round_trip, LONGEST_ROUND_TRIP))
        fitting = wanted / max(self._seconds, 1e-7)
        # grows step by step, as the first items may not be like the others: beyond a chunk that
        # came back, not with each of those that are under way
        self._size = max(1, min(int(fitting), max(self._size, GROWTH * count), MAX_CHUNK))

    def choose(self, workers: int, total: int | None, left: int, round_trip: float) -> int:
        """Return the size of the next chunk when `left` of `total` items, if known, are left."""
        if total is None:
            return self._size
        # guided: towards the end ever fewer, so that no worker idles while another works
        shortest = ROUND_TRIPS_AT_THE_END * min(round_trip, LONGEST_ROUND_TRIP)
        least = int(max(SHORTEST_CHUNK, shortest) / self._seconds) if self._seconds else 1
        guided = math.ceil(max(1, left) / (3 * workers))
        # these may take far longer than those of earlier runs
        share = math.ceil(max(1, total) / workers)
        return min(self._size, share, max(min(least, self._count // MANY), guided))

    def is_short(self, count: int) -> bool:
        """Return whether a chunk of so many items is likely to be over soon."""
        if self._seconds is None or self._count < count:
            return False
        return self._seconds * count < 2 * max(CHUNK_SECONDS, ROUND_TRIPS * LONGEST_ROUND_TRIP)


_known: WeakKeyDictionary[Callable[..., Any], ChunkSize] = WeakKeyDictionary()
