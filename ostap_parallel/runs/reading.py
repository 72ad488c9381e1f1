"""Input that may come slowly: a thread reads it, so that results need not wait for it."""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ostap_parallel.runs.chunking import Chunk
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.run import PAUSE, Run

# Seconds that items which are wanted are waited for before it is looked for results.
SOON = 0.02

# Kinds of input for which nobody has to wait.
THERE = range, list, tuple, set, frozenset, dict, str, bytes


class Reader:
    """Reads from an iterable what is asked for, and nothing ahead of that, in a thread.

    Attributes
    ----------
    wake
        Called from the thread when there is something after a pause.
    """

    def __init__(self, source: Iterable[Any], wake: Callable[[], object]) -> None:
        self.wake = wake
        self._iterator = iter(source)
        self._held: deque[Any] = deque()
        self._changed = threading.Condition()
        self._wanted = 0
        self._is_paused = self._is_over = False
        self._error: BaseException | None = None
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=[self._read], daemon=True)

    def take(self, count: int) -> Iterator[Any]:
        """Yield so many items; `PAUSE` if those that are left are not there yet."""
        if not self._thread.ident:
            self._thread.start()
        with self._changed:
            self._wanted = count
            self._changed.notify_all()
            if not self._is_paused:
                self._changed.wait_for(self._is_enough, SOON)
        for _ in range(count):
            try:
                item = self._held.popleft()
            except IndexError:
                item = self._at_pause()
            if item is self:
                return
            yield item
            if item is PAUSE:
                return

    def _at_pause(self) -> Any:
        """Return `PAUSE`, or an item that has just come, or this object at the end."""
        with self._changed:
            self._is_paused = not self._is_over  # first: the thread looks at it behind an item
            if self._held:
                self._is_paused = False
                return self._held.popleft()
            if self._is_paused:
                return PAUSE
        if self._error is not None:
            raise self._error
        return self

    def close(self) -> None:
        """Have the thread read no more."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def _is_enough(self) -> bool:
        return len(self._held) >= self._wanted or self._is_over

    def _read(self) -> None:
        held = self._held
        try:
            while self._wait_until_wanted():
                while len(held) < self._wanted and not self._is_over:
                    item = next(self._iterator, self)
                    if item is self:
                        return
                    held.append(item)
                    if self._is_paused:
                        self._tell()
                self._tell()
        except BaseException as exc:
            self._error = exc
        finally:
            self._is_over = True
            self._tell()

    def _wait_until_wanted(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: len(self._held) < self._wanted or self._is_over)
            return not self._is_over

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
            was_paused, self._is_paused = self._is_paused, False
        if was_paused:
            self.wake()


@dataclass
class ReadingRun(Run):
    """A run whose input is read by a thread, unless it is all there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._reader: Reader | None = None
        if not isinstance(self.items, THERE) and not hasattr(self.items, "__array__"):
            self._reader = Reader(self.items, self.wake)
            self.items = iter(())

    def arrivals(self) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items, see `Run.arrivals`."""
        try:
            yield from super().arrivals()
        finally:
            if self._reader is not None:
                self._reader.close()

    def _pack(self, values: Iterable[Any], size: int) -> tuple[Chunk, bytes] | None:
        if self._reader is not None:
            values = self._reader.take(size)
        return super()._pack(values, size)
