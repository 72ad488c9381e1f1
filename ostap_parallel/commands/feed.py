"""Input that may come slowly, read ahead by a thread, so that nobody waits for it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ostap_parallel.runs.run import PAUSE

AHEAD = 1000  # at most


class Feed:
    """Yields what an iterable does, and `PAUSE` where nothing is there now.

    Attributes
    ----------
    wake
        Called, from a thread, when there is more after a pause.
    """

    def __init__(self, source: Iterable[Any]) -> None:
        self.wake: Callable[[], object] = lambda: None
        self._source = source
        self._queue: queue.Queue[Any] = queue.Queue(AHEAD)
        self._error: BaseException | None = None
        self._is_awaited = False

    def __iter__(self) -> Iterator[Any]:
        threading.Thread(target=self._read, name="feed", daemon=True).start()
        while True:
            self._is_awaited = True  # first: what comes from now on is told of
            try:
                item = self._queue.get_nowait()
                self._is_awaited = False
            except queue.Empty:
                item = PAUSE
            if item is self:  # the end
                if self._error is not None:
                    raise self._error
                return
            yield item

    def _read(self) -> None:
        try:
            for item in self._source:
                self._queue.put(item)
                if self._is_awaited:
                    self.wake()
        except BaseException as exc:
            self._error = exc
        self._queue.put(self)
        self.wake()
