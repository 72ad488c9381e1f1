"""Items that are sent together: enough to be worth it, few enough that workers end together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from ostap_parallel.engine.retries import Attempts
from ostap_parallel.worker import calls
from ostap_parallel.worker.chunk import NEXT, PLAIN, Writer, pack_chunk

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


# Of these there may be as many as are wanted.
SMALL = frozenset(PLAIN) - {str}

# Bytes of a chunk, unless one item has more, or the next ones add little.
MAX_CHUNK_BYTES = 1 << 22
LITTLE = MAX_CHUNK_BYTES >> 6


@dataclass
class Chunk:
    """Items that are sent together.

    Attributes
    ----------
    sent
        What stands for them in the message: their bytes, unless these were written with those of
        others.
    history
        Is there if they are not sent for the first time.
    made
        When, in seconds since the epoch.
    """

    indices: Sequence[int]
    items: list[Any]
    sent: Sequence[Any]
    history: list[Item] | None = None
    made: float = field(default_factory=time.time)

    def split(self) -> list[Item]:
        """Return the items one by one, as each may get a history of its own."""
        return self.history or list(map(Item, self.indices, self.items, self.sent))


@dataclass
class Item(Attempts):
    """An item that is run again: as it was sent, or as it is now if it was sent with others.

    Attributes
    ----------
    doubted
        How often it raised where that may be the host's fault, and others were to try it.
    tried
        The hosts where it has failed.
    """

    index: int
    item: Any
    sent: Any = NEXT
    doubted: int = 0
    tried: frozenset[str] = frozenset()

    @property
    def attempts(self) -> int:
        """How often it will have run when this time is over."""
        return super().attempts + self.doubted


class Packing:
    """The items of one chunk, as they are read.

    Parameters
    ----------
    cache, together
        Of one run, see `Writer`.
    """

    def __init__(self, cache: dict[type, bytes], together: bool) -> None:
        self.indices: list[int] = []
        self.items: list[Any] = []
        self.sent: list[Any] = []
        self._writer = Writer(cache, together)
        self._is_over = False

    @property
    def is_full(self) -> bool:
        """Whether it has all the bytes that a chunk may have."""
        return self._writer.size >= MAX_CHUNK_BYTES

    def has_room(self, value: Any) -> bool:
        """Return whether another item should be added: it is likely to add little if it shares."""
        return not self.is_full or (not self._is_over and _share(value, self.items[-1]))

    def add(self, index: int, value: Any, packed: Any = NEXT) -> None:
        """Add an item, which may be packed already; raises `SerializeError`."""
        before, was_full = self._writer.size, self.is_full
        sent = value
        if packed is not NEXT:
            sent = self._writer.add_packed(packed)
        elif type(value) not in SMALL:
            sent = self._writer.add(value, f"item {index} (a {type(value).__name__})")
        self._is_over = was_full and self._writer.size - before > LITTLE
        self.indices.append(index)
        self.items.append(value)
        self.sent.append(sent)

    def chunk(self) -> Chunk:
        """Return the chunk of those that were added."""
        without_gaps = range(self.indices[0], self.indices[-1] + 1)  # no memory, no time to send
        is_whole = len(without_gaps) == len(self.items)
        return Chunk(without_gaps if is_whole else self.indices, self.items, self.sent)

    def message(self, indices: Sequence[int], run: bytes, limit: float) -> bytes:
        """Return what is sent; see `worker.chunk.pack_chunk`."""
        return pack_chunk(indices, self.sent, self._writer.stream(), run, limit)


def _share(one: Any, other: Any) -> bool:
    """Return whether two items have something in common, at a glance."""
    both = (each if isinstance(each, tuple) else (each,) for each in (one, other))
    return any(a is b and type(a) not in PLAIN for a, b in zip(*both, strict=False))


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
        if isinstance(function, partial) and function.func is calls.spread:
            function = function.args[0]  # that is the user's
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

    def choose(
        self, workers: int, total: int | None, left: int, round_trip: float, is_heavy: bool = False
    ) -> int:
        """Return the size of the next chunk when `left` of `total` items, if known, are left.

        These include what other workers have, while there are some that have nothing. One that
        `is_heavy` costs much by itself, by what its items share, and there should be few.
        """
        if total is None:
            return self._size
        # guided: towards the end ever fewer, so that no worker idles while another works
        shortest = ROUND_TRIPS_AT_THE_END * min(round_trip, LONGEST_ROUND_TRIP)
        least = int(max(SHORTEST_CHUNK, shortest) / self._seconds) if self._seconds else 1
        guided = math.ceil(max(1, left) / (3 * workers))
        # these may take far longer than those of earlier runs
        share = math.ceil(max(1, total) / workers)
        size = min(self._size, share, max(min(least, self._count // MANY), guided))
        # not more for one worker than for the others, unless that is hardly anything
        size = min(size, max(1, math.ceil(left / workers), least // 4))
        if not is_heavy or not self._seconds:
            return size
        fitting = int(LONGEST_CHUNK / self._seconds)  # what it does not begin by then comes back
        return max(size, min(fitting, MAX_CHUNK, math.ceil(total / (4 * workers))))

    def is_short(self, count: int) -> bool:
        """Return whether a chunk of so many items is likely to be over soon."""
        if self._seconds is None or self._count < count:
            return False
        return self._seconds * count < 2 * max(CHUNK_SECONDS, ROUND_TRIPS * LONGEST_ROUND_TRIP)


_known: WeakKeyDictionary[Callable[..., Any], ChunkSize] = WeakKeyDictionary()
