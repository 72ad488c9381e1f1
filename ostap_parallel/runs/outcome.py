"""What became of items: one by one, or of many that came back together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker.execute import Call


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one item.

    Attributes
    ----------
    index
        Position in the input, from 0.
    error
        ``None``, or the task's own exception, `TaskTimeout`, `WorkerLost`, `SerializeError`.
    traceback
        The error's traceback on the worker, as text.
    seconds
        Time that the item took on the worker.
    attempts
        How often it was run; 0 if it could not be sent, or its value comes from a checkpoint.
    """

    index: int
    item: Any
    value: Any = None
    error: BaseException | None = None
    traceback: str = ""
    host: str = ""
    pid: int = 0
    seconds: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class Batch:
    """Items that succeeded and came back together; iterating yields an `Outcome` for each.

    All lists have one entry per item, in the order of the items.
    """

    indices: Sequence[int]
    items: list[Any]
    values: list[Any]
    seconds: Sequence[float]
    host: str
    pid: int

    @property
    def index(self) -> int:
        """Index of the first item."""
        return self.indices[0]

    @property
    def has_gaps(self) -> bool:
        """Whether items are missing between the first and the last."""
        return self.indices[-1] - self.indices[0] >= len(self)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Outcome]:
        columns = self.indices, self.items, self.values, self.seconds
        for index, item, value, seconds in zip(*columns, strict=True):
            yield Outcome(index, item, value, None, "", self.host, self.pid, seconds, 1)


class Combined(Batch):
    """Items that follow one another and whose results were merged on their worker.

    `values` has one entry, for all of them; there is no `Outcome` of each.
    """


class Journal(Protocol):
    """Keeps the outcomes of a run, so that a later run can go on with them.

    Attributes
    ----------
    timeline
        It is kept, too, if there is one.
    look
        Returns what runs now, of which a note is kept.
    """

    timeline: Timeline | None
    look: Callable[[], Sequence[object]]

    def find(self, index: int, item: Any) -> Outcome | None:
        """Return the outcome of an item if an earlier run has got it."""

    def keep(self, outcome: Outcome) -> None:
        """Keep an outcome, unless it is one that `find` has returned."""


class Checkpoint(Protocol):
    """Where a journal is to be had."""

    def open(self, call: Call, total: int | None) -> contextlib.AbstractContextManager[Journal]:
        """Open the journal of runs of `call` on `total` items."""


def keep(journal: Journal, arriving: Iterator[Batch | Outcome]) -> Iterator[Batch | Outcome]:
    """Have a journal keep what arrives, and pass it on."""
    for arrival in arriving:
        for outcome in arrival if isinstance(arrival, Batch) else [arrival]:
            journal.keep(outcome)
        yield arrival
