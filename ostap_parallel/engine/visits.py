"""Who waits for one call reads its result itself, in place of the loop.

Otherwise the result wakes the loop's thread, and that the one that waits: this takes longer than
all that is done for a brief call. Nothing else is done here: what has come for others, and what
runs code of theirs, is left to the loop.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import weakref
from _signal import getsignal  # type: ignore[import-not-found]
from collections.abc import Callable
from threading import get_ident, main_thread
from typing import Any

from ostap_parallel.engine.future import Future
from ostap_parallel.machine.jobs import Job, deferring_interrupts
from ostap_parallel.machine.loop import Loop, attempt

# What code of the program may be called for at any line, but for SIGINT, which can be deferred.
_SIGNALS = sorted(map(int, signal.valid_signals() - {signal.SIGINT}))

_LONGEST = 1e6  # seconds


class Visitor:
    """A place from which to wait at a connection, until something comes or somebody calls."""

    def __init__(self) -> None:
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._bell, select.POLLIN)
        self._finalizer = weakref.finalize(self, os.close, self._bell)

    def ring(self) -> None:
        """Have `wait` return, now or when it is called next."""
        os.eventfd_write(self._bell, 1)

    def wait(self, descriptor: int, seconds: float | None) -> bool:
        """Wait, so long at most; return whether there is something to read, and nobody calls."""
        self._poll.register(descriptor, select.POLLIN)
        try:
            left = None if seconds is None else min(max(0.0, seconds), _LONGEST) * 1000
            found = self._poll.poll(left)
        finally:
            self._poll.unregister(descriptor)
        return len(found) == 1 and found[0][0] == descriptor

    def calm(self) -> None:
        """Forget who has called."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)


class Visits:
    """The threads that wait so.

    Parameters
    ----------
    may_take
        Whether what has come can be taken now, as nothing has to be shown before.
    """

    def __init__(self, loop: Loop, may_take: Callable[[], bool]) -> None:
        self._loop, self._may_take = loop, may_take
        self._idle: list[Visitor] = []

    def wait(self, future: Future[Any], seconds: float | None) -> None:
        """Wait for a future, so long at most, if it is one that a worker of this machine is at.

        Returns early where there is anything else than to wait for it.
        """
        if get_ident() == main_thread().ident and any(map(callable, map(getsignal, _SIGNALS))):
            return  # a handler may raise anywhere
        visitor = self._idle.pop() if self._idle else Visitor()
        with deferring_interrupts(visitor.ring):
            if (action := self._stand_in(visitor, future, seconds)) is not None:
                attempt(action)
                future.release(self._loop.deliver)
            visitor.calm()
        self._idle.append(visitor)

    def _stand_in(
        self, visitor: Visitor, future: Future[Any], seconds: float | None
    ) -> Callable[[], object] | None:
        """Read at the connection of the worker; return what then is to be done for the future."""
        end = None if seconds is None else time.monotonic() + seconds
        with self._loop.lock:
            job: Job | None = future.job
            line = job.machine.line(job) if job is not None and job.machine is not None else None
            if job is None or line is None or not line.lend(visitor):
                return None
            future.ring = visitor.ring
        try:
            while not future.done() and visitor.wait(line.descriptor, seconds):
                with self._loop.lock:
                    action = self._loop.stand_in(line.read)
                    if action is not None and not self._takes(future, job):
                        self._loop.deliver_first(action)
                        action = None
                    if action is not None or job.state != "running" or not line.is_open:
                        return action
                if end is not None:
                    seconds = end - time.monotonic()
            return None
        finally:
            with self._loop.lock:
                future.ring = None
                line.take_back()

    def _takes(self, future: Future[Any], job: Job) -> bool:
        return job.state == "done" and self._may_take() and future.claim()

    def close(self) -> None:
        """Close what nobody uses."""
        self._idle.clear()
