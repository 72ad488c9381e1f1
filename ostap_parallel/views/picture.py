"""What is to be seen of a run: a lane for each worker, and bars on it."""

from __future__ import annotations

import enum
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

CLASSES = 20
SHORTEST = 1e-6  # seconds; what takes less counts as this


class Fate(enum.Enum):
    """What became of an item, or what a worker did instead."""

    OK = "ok"
    FAILED = "failed"
    RETRIED = "failed, run again"
    LOST = "lost with its worker"
    STOPPED = "interrupted"
    WAITING = "waiting for work"


class Lane(NamedTuple):
    """A worker. Where its process is not known, `pid` is negative: lanes are numbered."""

    host: str
    pid: int

    @property
    def pid_text(self) -> str:
        """The worker on its host, in words."""
        if not self.pid:
            return "a worker that is not known"
        return f"pid {self.pid}" if self.pid > 0 else f"slot {-self.pid}"


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
    least
        Seconds; neighbours that are shorter stand together. 0: none do.
    times
        By host, how many items took how long: the number of each class of `class_of`.
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
    least: float = 0.0
    times: dict[str, Counter[int]] = field(default_factory=dict)

    def fill(self, bars: Iterable[Bar], least: float) -> None:
        """Take bars; neighbours that are shorter than `least` seconds stand together."""
        self.least = least
        for bar in together(self._counted(bars), least):
            self.bars.append(bar)
            self.end = max(self.end, bar.end)

    def _counted(self, bars: Iterable[Bar]) -> Iterator[Bar]:
        times = [self.times.setdefault(lane.host, Counter()) for lane in self.lanes]
        for bar in bars:
            self.items += bar.items
            if bar.items == 1 and bar.fate is not Fate.LOST:
                times[bar.lane][class_of(bar.end - bar.begin)] += 1
            yield bar

    @property
    def is_binned(self) -> bool:
        """Whether some bars stand for several items."""
        return any(bar.items > 1 for bar in self.bars)

    def rates(self, number: int) -> list[float]:
        """Return how many items ended per second in each of so many equal parts of the time."""
        width = self.end / number
        if not width:
            return [0.0] * number
        counts = [0.0] * number
        for bar in self.bars:
            if bar.items == 1 or bar.end <= bar.begin:
                counts[min(int(bar.end / width), number - 1)] += bar.items
                continue
            # several that stand together have ended one after another
            begin, end = bar.begin / width, min(bar.end / width, number)
            for part in range(int(begin), math.ceil(end)):
                share = (min(end, part + 1) - max(begin, part)) / (end - begin)
                counts[min(part, number - 1)] += bar.items * share
        return [count / width for count in counts]

    def order(self) -> list[int]:
        """Return the positions of the lanes by host and process."""
        return sorted(range(len(self.lanes)), key=lambda lane: self.lanes[lane])


def in_a_row(pictures: Sequence[Picture]) -> Picture:
    """Return one picture of several runs, one behind the other, without the time between them."""
    first = pictures[0]
    if len(pictures) == 1:
        return first
    lanes: dict[Lane, int] = {}
    functions: dict[str, int] = {}
    found = Picture(first.name, first.start, [], [])
    found.least = max(picture.least for picture in pictures)
    for picture in pictures:
        shift = found.end
        for bar in picture.bars:
            lane = lanes.setdefault(picture.lanes[bar.lane], len(lanes))
            function = functions.setdefault(picture.functions[bar.function], len(functions))
            begin, end = bar.begin + shift, bar.end + shift
            found.bars.append(bar._replace(lane=lane, function=function, begin=begin, end=end))
        found.events += (one._replace(seconds=one.seconds + shift) for one in picture.events)
        for host, times in picture.times.items():
            found.times.setdefault(host, Counter()).update(times)
        found.items += picture.items
        found.beyond += picture.beyond
        found.end = shift + picture.end
    found.lanes, found.functions = list(lanes), list(functions)
    return found


def class_of(seconds: float) -> int:
    """Return the class of a time: there are `CLASSES` to a power of ten."""
    return math.floor(CLASSES * math.log10(max(seconds, SHORTEST)))


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
