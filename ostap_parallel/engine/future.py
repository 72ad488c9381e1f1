"""Futures of calls that can be cancelled while they run, too."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from concurrent.futures._base import PENDING
from typing import Generic, TypeVar

T = TypeVar("T")


class Future(concurrent.futures.Future[T], Generic[T]):
    """What `concurrent.futures.Future` is.

    Parameters
    ----------
    interrupt
        Gives up the calls of futures.
    """

    def __init__(self, interrupt: Callable[[list[Future[T]]], object]) -> None:
        super().__init__()
        self._interrupt = interrupt

    def begin(self) -> bool:
        """Count as running from now on; return false if it was cancelled."""
        with self._condition:
            if self.cancelled():
                return False
            return self.running() or self.set_running_or_notify_cancel()

    def cancel(self, interrupt: bool = False) -> bool:
        """Cancel the call unless it has begun or, with `interrupt`, also then.

        A task that runs gets KeyboardInterrupt, and may need a moment to end. Returns whether the
        future is cancelled.
        """
        if interrupt:
            with self._condition:
                if is_running := self.running():
                    self._state = PENDING
            if super().cancel() and is_running:
                self._interrupt([self])
        return super().cancel()
