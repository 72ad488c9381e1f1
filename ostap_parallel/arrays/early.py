"""What jobs have told so far of chunks that they are still at."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from ostap_parallel.arrays.layout import Layout
from ostap_parallel.arrays.records import Record, read_on

FEW = 3  # chunks whose files are looked for one by one


class Early:
    """Reads on in the files of results that are being written."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._places: dict[int, dict[Path, int]] = {}  # by chunk: what has been read

    def news(self, numbers: Collection[int]) -> dict[int, list[Record]]:
        """Return, by chunk, what was told of items since this was called last."""
        if len(numbers) > FEW:
            every = self._layout.all_parts()
            parts = {number: every[number] for number in numbers if number in every}
        else:
            parts = {number: self._layout.parts(number) for number in numbers}
        found: dict[int, list[Record]] = {}
        for number, paths in parts.items():
            places = self._places.setdefault(number, {})
            for path in paths:
                records, places[path] = read_on(path, places.get(path, 0))
                if records:
                    found.setdefault(number, []).extend(records)
        return found

    def forget(self, number: int) -> None:
        """Take notice that a chunk has ended."""
        self._places.pop(number, None)
