"""Futures of calls that can be cancelled while they run, too."""

from __future__ import annotations

import concurrent.futures
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

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
    """

    def __init__(self, interrupt: Callable[[list[Future[T]]], object]) -> None:
        super().__init__()
        self._interrupt = interrupt
        self._has_begun = self._is_given_up = False
        self.add_done_callback(_tell_cancelled)

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
        is_cancelled = super().cancel()
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
