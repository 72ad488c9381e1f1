"""Futures of calls that can be cancelled while they run, too."""

from __future__ import annotations

import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, Generic, TypeVar

from ostap_parallel.machine.jobs import Job

T = TypeVar("T")

_lock = threading.Lock()  # of all futures: it is held for moments only


class Future(concurrent.futures.Future[T], Generic[T]):
    """What `concurrent.futures.Future` is.

    That it runs is known here only: the state of the base, in which it could not be cancelled,
    is pending until it has ended.

    Parameters
    ----------
    interrupt
        Gives up the calls of futures.
    wait
        Waits for this, so many seconds at most, or returns early: see `visits`.

    Attributes
    ----------
    job
        What is done for it now.
    ring
        Called when it has ended, or is cancelled: somebody waits elsewhere.
    """

    def __init__(
        self,
        interrupt: Callable[[list[Future[T]]], object],
        wait: Callable[[Future[T], float | None], object] = lambda future, seconds: None,
    ) -> None:
        super().__init__()
        self._interrupt, self._wait = interrupt, wait
        self._has_begun = self._is_given_up = False
        self.job: Job | None = None
        self.ring: Callable[[], object] | None = None
        self._is_watched = self._is_claimed = False
        self._late: list[Callable[[concurrent.futures.Future[T]], object]] = []
        super().add_done_callback(_tell_cancelled)

    def __repr__(self) -> str:
        text = super().__repr__()
        return text.replace("state=pending", "state=running") if self._has_begun else text

    def begin(self) -> bool:
        """Count as running from now on; return false if it was cancelled."""
        with _lock:
            if not self._is_given_up:
                self._has_begun = True
            return not self._is_given_up

    def running(self) -> bool:
        """Return whether the call has begun and has not ended."""
        return self._has_begun and not self.done()

    def result(self, timeout: float | None = None) -> T:
        """Wait, and return what the call returned or raise what it raised."""
        return super().result(self._await(timeout))

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return what the call raised, or ``None``."""
        return super().exception(self._await(timeout))

    def _await(self, timeout: float | None) -> float | None:
        """Wait where that is quicker; return how long to wait then."""
        if self.done() or (timeout is not None and timeout <= 0):
            return timeout
        begin = time.monotonic()
        self._wait(self, timeout)
        return None if timeout is None else max(0.0, timeout - time.monotonic() + begin)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        """Have something called with this when it has ended, never by who waits for it."""
        with _lock:
            self._is_watched = True
            if self._is_claimed:
                self._late.append(fn)
                return
        super().add_done_callback(fn)

    def claim(self) -> bool:
        """Have callbacks that come from now on be called by others than who sets the result.

        Returns false if there are some already. Ends with `release`.
        """
        with _lock:
            self._is_claimed = not self._is_watched
            return self._is_claimed

    def release(self, deliver: Callable[[Callable[[], object]], object]) -> None:
        """Hand on the callbacks that have come meanwhile."""
        with _lock:
            self._is_claimed, late, self._late = False, self._late, []
        for fn in late:
            deliver(partial(self.add_done_callback, fn))

    def set_result(self, result: T) -> None:
        """Take what the call returned."""
        super().set_result(result)
        self._tell()

    def set_exception(self, exception: BaseException | None) -> None:
        """Take what the call raised."""
        super().set_exception(exception)
        self._tell()

    def _tell(self) -> None:
        self.job = None
        if (ring := self.ring) is not None:
            ring()

    def cancel(self, interrupt: bool = False) -> bool:
        """Cancel the call unless it has begun or, with `interrupt`, also then.

        A task that runs gets KeyboardInterrupt, and may need a moment to end. Returns whether the
        future is cancelled.
        """
        with _lock:
            has_begun = self._has_begun
            if has_begun and not interrupt:
                return self.cancelled()
            self._is_given_up = True
        was_cancelled = self.cancelled()
        if is_cancelled := super().cancel():
            self._tell()
        if is_cancelled and has_begun and not was_cancelled:
            self._interrupt([self])
        return is_cancelled


def weak(method: Callable[..., object]) -> Callable[..., None]:
    """Return what calls a method, without keeping a forgotten object alive."""
    this = weakref.WeakMethod(method)

    def call(*args: Any) -> None:
        if (found := this()) is not None:
            found(*args)

    return call


def _tell_cancelled(future: concurrent.futures.Future[Any]) -> None:
    """Wake who waits for a future that was cancelled: `Future.cancel` itself does not."""
    if future.cancelled():
        future.set_running_or_notify_cancel()
