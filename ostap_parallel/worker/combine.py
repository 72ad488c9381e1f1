"""Merging on the worker: what the items of a chunk give travels as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ostap_parallel.objects import serialize


class Combiner:
    """Merges the values of items for as long as these follow one another.

    Parameters
    ----------
    merger
        ``merger(merged, value)``, associative.
    indices
        Of the chunk's items.
    answers
        Their packed values. Of those that are merged together the first gets to stand for all.

    Attributes
    ----------
    ranges
        What was merged: positions of the first item, and behind the last.
    start
        Position of the first item of what is being merged.
    """

    def __init__(
        self, merger: Callable[[Any, Any], Any], indices: Sequence[int], answers: list[Any]
    ) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.start = self._stop = 0
        self._merger, self._indices, self._answers = merger, indices, answers
        self._value: Any = None

    def add(self, value: Any) -> None:
        """Merge the value of the last item that there is an answer for."""
        position = len(self._answers) - 1
        follows = position and self._indices[position] == self._indices[position - 1] + 1
        if self.start < self._stop == position and follows:
            self._value = self._merger(self._value, value)
            self._answers[position] = None
        else:
            self.end()
            self.start, self._value = position, value
        self._stop = position + 1

    def end(self) -> None:
        """Pack what was merged so far; raises `SerializeError`."""
        if self._stop - self.start > 1:
            first, last = self._indices[self.start], self._indices[self._stop - 1]
            what = f"what the results of items {first} to {last} were merged to"
            self._answers[self.start] = serialize.pack(self._value, what, back=True)
            self.ranges.append((self.start, self._stop))
        self.start = self._stop
