"""What is to be seen of a run: a lane for each worker, and bars on it."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class Fate(enum.Enum):
    """What became of an item, or what a worker did instead."""

    OK = "ok"
    FAILED = "failed"
    RETRIED = "failed, run again"
    LOST = "lost with its worker"
    STOPPED = "interrupted"
    WAITING = "waiting for work"


class Lane(NamedTuple):
    """A worker. Commands have no process id of one: their lanes are numbered."""

    host: str
    pid: int

    def __str__(self) -> str:
        return f"{self.host} {self.pid}"


class Bar(NamedTuple):
    """An item, or several that stand together.

    Attributes
    ----------
    lane
        Position of its worker in the list of these.
    begin, end
        Seconds since the run began.
    first, items
        Which item it is; of several, the first one. What is waited for has 0 items.
    function
        Position of what was run in the list of names.
    """

    lane: int
    begin: float
    end: float
    first: int
    items: int
    fate: Fate
    function: int = 0


class Event(NamedTuple):
    """What became of a host, so many seconds after the run began."""

    seconds: float
    host: str
    state: str
    reason: str


@dataclass
class Picture:
    """A timeline as it is drawn.

    Attributes
    ----------
    start
        When it begins, in seconds since the epoch.
    items
        Number of times that an item was run.
    beyond
        Number of items of which nothing was kept.
    end
        Seconds from the start until the last of it.
    """

    name: str
    start: float
    lanes: list[Lane]
    functions: list[str]
    events: list[Event] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    items: int = 0
    beyond: int = 0
    end: float = 0.0

    def fill(self, bars: Iterable[Bar], least: float) -> None:
        """Take bars; what would be shorter than `least` seconds stands together."""
        for bar in together(self._counted(bars), least):
            self.bars.append(bar)
            self.end = max(self.end, bar.end)

    def _counted(self, bars: Iterable[Bar]) -> Iterator[Bar]:
        for bar in bars:
            self.items += bar.items
            yield bar

    @property
    def is_binned(self) -> bool:
        """Whether some bars stand for several items."""
        return any(bar.items > 1 for bar in self.bars)

    def order(self) -> list[int]:
        """Return the positions of the lanes by host and process."""
        return sorted(range(len(self.lanes)), key=lambda lane: self.lanes[lane])


def together(bars: Iterable[Bar], least: float) -> Iterator[Bar]:
    """Yield bars, where neighbours on a lane with the same fate stand together up to a length."""
    if not least:
        yield from bars
        return
    open_bars: dict[int, Bar] = {}
    for bar in bars:
        before = open_bars.get(bar.lane)
        if bar.fate is Fate.WAITING and bar.end - bar.begin < least:
            continue
        if before is not None:
            fits = bar.end - before.begin <= least and before.fate is bar.fate
            if fits and before.function == bar.function:
                items = before.items + bar.items
                open_bars[bar.lane] = before._replace(end=bar.end, items=items)
                continue
            yield before
        open_bars[bar.lane] = bar
    yield from open_bars.values()
