"""Results in the order of the items: what comes early is held back, within a bound of bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ostap_parallel.runs.outcome import Batch, Outcome

# Bytes of results, as they have come, that are held back; no more input is read then.
HELD_BYTES = 1 << 28

# Part of the mean that the items of the last chunk make.
_LAST = 0.3


class Ordering:
    """What has come early in one run.

    Parameters
    ----------
    limit
        Bytes that may be held back, about.

    Attributes
    ----------
    first
        The oldest item that has not been yielded.
    """

    def __init__(self, limit: float = HELD_BYTES) -> None:
        self.first = 0
        self._limit = limit
        self._held: dict[int, tuple[Batch | Outcome, float]] = {}  # by the first item, with bytes
        self._bytes = 0.0
        self._weights: dict[int, float] = {}  # of what is about to arrive
        self._mean = 0.0  # bytes of an item

    def weigh(self, index: int, answers: Sequence[Any], count: int = 1) -> None:
        """Note what the results of `count` items weigh that arrive with the first one's index."""
        weight = 0.0
        if not {bytes, str}.isdisjoint(map(type, answers)):
            weight += sum(len(one) for one in answers if type(one) in (bytes, str))
        self._weights[index] = weight
        self._mean += (weight / count - self._mean) * (_LAST if self._mean else 1)

    def room(self, under_way: int) -> float:
        """Return how many more items may be sent while so many are under way."""
        if not self._mean:
            return math.inf
        left = max(0.0, self._limit - self._bytes) / self._mean - under_way
        return max(left, 0 if under_way else 1)

    def in_order(self, arriving: Iterator[Batch | Outcome]) -> Iterator[Batch | Outcome]:
        """Yield what arrives in the order of the items."""
        for arrival in arriving:
            self._hold(arrival)
            del arrival  # not to be kept while the next one is awaited
            while self.first in self._held:
                ready, weight = self._held.pop(self.first)
                self._bytes -= weight
                self.first += len(ready) if isinstance(ready, Batch) else 1
                yield ready
                del ready

    def _hold(self, arrival: Batch | Outcome) -> None:
        weight = self._weights.pop(arrival.index, 0.0)
        self._bytes += weight
        if isinstance(arrival, Batch) and arrival.has_gaps:
            each = weight / len(arrival)
            self._held.update((outcome.index, (outcome, each)) for outcome in arrival)
        else:
            self._held[arrival.index] = arrival, weight
