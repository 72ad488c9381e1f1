"""How long items take: the extremes and the median by host, and the slowest of all."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from ostap_parallel.views.words import duration, named

# Of more times than these the median is that of some of them, evenly spread.
_KEPT = 1 << 12

SLOWEST = 5


class Times:
    """Times of items, in seconds.

    Attributes
    ----------
    count, least, most
        Number of the times, and the extremes.
    """

    def __init__(self) -> None:
        self.count, self.least, self.most = 0, float("inf"), 0.0
        self._kept: list[float] = []
        self._step = 1

    def add(self, seconds: Sequence[float]) -> float:
        """Add times of some items; return the longest."""
        most = max(seconds, default=0.0)
        self.least = min(self.least, min(seconds, default=self.least))
        self.most = max(self.most, most)
        self.sample(seconds)
        return most

    def sample(self, seconds: Sequence[float]) -> None:
        """Add times for the median only, which takes next to no time."""
        self._kept.extend(seconds[-self.count % self._step :: self._step])
        self.count += len(seconds)
        if len(self._kept) > _KEPT:
            self._kept = self._kept[::2]
            self._step *= 2

    @property
    def median(self) -> float:
        """The median, about."""
        ordered = sorted(self._kept)
        middle = len(ordered) // 2
        return (ordered[middle] + ordered[~middle]) / 2 if ordered else 0.0


@dataclass(frozen=True, order=True)
class Slow:
    """An item that took long.

    Attributes
    ----------
    item
        The item, as a short text.
    """

    seconds: float
    index: int
    item: str = field(compare=False)
    host: str = field(compare=False)
    pid: int = field(compare=False)

    def __str__(self) -> str:
        where = f"{self.host} (pid {self.pid})"
        return f"{named(self.index, self.item)} on {where}: {duration(self.seconds)}"


class Slowest(Sequence[Slow]):
    """The items that took longest, the slowest first."""

    def __init__(self) -> None:
        self._heap: list[Slow] = []

    def wants(self, seconds: float) -> bool:
        """Return whether an item that took so long is one of them."""
        return len(self._heap) < SLOWEST or seconds > self._heap[0].seconds

    def add(self, slow: Slow) -> None:
        """Add an item."""
        heapq.heappush(self._heap, slow)
        if len(self._heap) > SLOWEST:
            heapq.heappop(self._heap)

    @overload
    def __getitem__(self, index: int) -> Slow: ...

    @overload
    def __getitem__(self, index: slice) -> list[Slow]: ...

    def __getitem__(self, index: int | slice) -> Slow | list[Slow]:
        return sorted(self._heap, reverse=True)[index]

    def __len__(self) -> int:
        return len(self._heap)
