"""Inputs of a pool that are read by a thread of their own."""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.run import PAUSE
from ostap_parallel.runs.stream import AHEAD


class Source:
    """An input that a thread reads: results come though the next item does not.

    Its error comes after the results of the chunks that it gave before.
    """

    def __init__(self, iterable: Iterable[Any], chunksize: int) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._chunksize = chunksize
        self._iterator = iter(iterable)
        self._held: deque[Any] = deque()
        self._changed = threading.Condition()
        self._room: float = AHEAD
        self._is_awaited = self._is_read = False
        self._error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        in_thread(self._read)
        while True:
            with self._changed:
                if self._held:
                    item = self._held.popleft()
                    self._changed.notify()
                elif self._is_read:
                    return
                else:
                    item, self._is_awaited = PAUSE, True
            yield item

    def _read(self) -> None:
        try:
            while chunk := list(itertools.islice(self._iterator, self._chunksize)):
                with self._changed:
                    self._changed.wait_for(lambda: len(self._held) < self._room)
                    self._held.extend(chunk)
                self._tell()
                if self._room == math.inf:
                    return
        except BaseException as exc:
            self._error = exc
        with self._changed:
            self._is_read = True
        self._tell()

    def _tell(self) -> None:
        if self._is_awaited:
            self._is_awaited = False
            self.wake()

    def follow(
        self, arrivals: Generator[Batch | Outcome, None, None]
    ) -> Generator[Batch | Outcome, None, None]:
        try:
            yield from arrivals
        finally:
            with self._changed:
                self._room = math.inf
                self._changed.notify()
        if self._error is not None:
            raise self._error


def in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call a function in a thread that does not keep the interpreter from exiting."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=work, name="pool", daemon=True).start()
    return future
