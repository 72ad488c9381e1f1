"""Calls that are submitted one by one, as who looks from outside is told of them."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from typing import Any

from ostap_parallel.engine.backend import AnyFuture, Backend
from ostap_parallel.runs.report import Running
from ostap_parallel.runs.snapshot import Coming, Snapshots
from ostap_parallel.views.live import telling
from ostap_parallel.views.words import printable

ANSWER = 0.5  # seconds that hosts get to tell what they do


class Calls:
    """Calls of one backend, from the first `add` to `close`, or until nobody has this any more.

    Attributes
    ----------
    failed, retried
        Nothing: futures tell that to who has them.
    """

    failed = retried = 0

    def __init__(self, backend: Backend, title: str) -> None:
        self.backend, self.title = backend, title
        self._count = 0
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._names: weakref.WeakKeyDictionary[AnyFuture, tuple[int, str]]
        self._names = weakref.WeakKeyDictionary()
        self._telling = contextlib.ExitStack()
        self._snapshots = Snapshots(self, self, title, Coming(backend))
        self._finalizer = weakref.finalize(self, self._telling.close)
        self._finalizer.atexit = False

    def add(self, future: AnyFuture, function: Any) -> None:
        """Tell of one more call."""
        with self._lock:
            if not self._count and self._finalizer.alive:
                self._started = time.monotonic()
                this = weakref.ref(self)
                self._telling.enter_context(telling(lambda: _look(this)))
            self._names[future] = self._count, getattr(function, "__name__", "")
            self._count += 1

    def close(self) -> None:
        """Tell nothing any more."""
        self._finalizer()

    @property
    def total(self) -> int:
        """Number of calls so far."""
        return self._count

    @property
    def done(self) -> int:
        """Number of those that have ended."""
        return self._count - len(self.pending())

    @property
    def elapsed(self) -> float:
        """Seconds since the first one."""
        return time.monotonic() - self._started

    def rate(self) -> float:
        """Return how many ended per second."""
        return self.done / self.elapsed if self.elapsed else 0.0

    def running(self) -> list[Running]:
        """Return what runs, the longest first."""
        pending = self.pending()
        found = []
        for future, place in self.backend.places(pending, ANSWER).items():
            number, name = pending[future]
            about = place.host, place.pid, place.seconds, place.memory, place.load
            found.append(Running(number, printable(name), 1, *about))
        return sorted(found, key=lambda one: -one.seconds)

    def look(self) -> dict[str, Any]:
        """Return what there is to tell; raises LookupError if that is nothing."""
        if not self.pending():
            raise LookupError("no call is under way")
        return self._snapshots.look()

    def pending(self) -> dict[AnyFuture, tuple[int, str]]:
        """Return those that have not ended, with their numbers and names."""
        with self._lock:
            names = dict(self._names)
        return {future: name for future, name in names.items() if not future.done()}


def _look(this: weakref.ref[Calls]) -> dict[str, Any]:
    """Look at calls, if they are still there: who tells of them is not to keep them."""
    if (calls := this()) is None:
        raise LookupError("nobody has them")
    return calls.look()
