"""When the next command may begin, and which ones take too long beside the others."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable

from ostap_parallel.commands.command import Done
from ostap_parallel.commands.slots import Job
from ostap_parallel.errors import ConfigError

# Seconds below which nothing is too long, whatever the others took.
LEAST = 1.0

# So many of the last times are looked at.
MANY = 999


class Pace:
    """Keeps commands apart, and tells those that take too long.

    Parameters
    ----------
    delay
        Seconds between two that begin.
    percent
        How long one may take, of the median of those that have ended well.
    """

    def __init__(self, delay: float = 0.0, percent: float | None = None) -> None:
        if not 0 <= delay <= threading.TIMEOUT_MAX:
            raise ConfigError(f"delay must be a number of seconds from 0 on, not {delay!r}")
        if percent is not None and not percent > 0:
            raise ConfigError(f"percent must be a positive number, not {percent!r}")
        self._delay, self._percent = delay, percent
        self._next = self._last = 0.0
        self._times: list[float] = []

    def may_begin(self) -> bool:
        """Return whether a command may begin now; if so, count it."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._last, self._next = self._next, now + self._delay
        return True

    def take_back(self) -> None:
        """Have the last one not counted: there was none."""
        self._next = self._last

    def note(self, done: Done) -> None:
        """Take notice of how long one took."""
        if self._percent and done.succeeded and not done.is_skipped:
            self._times = [*self._times[1 - MANY :], done.seconds]

    @property
    def limit(self) -> float:
        """How many seconds one may take."""
        if not self._percent or not self._times:
            return float("inf")
        return max(LEAST, statistics.median(self._times) * self._percent / 100)

    def overdue(self, running: Iterable[Job]) -> list[Job]:
        """Return those that take too long."""
        if not self._percent:
            return []
        now, limit = time.monotonic(), self.limit
        return [job for job in running if not job.is_overdue and now - job.begun >= limit]

    def wait(self, running: Iterable[Job], are_waiting: bool) -> float | None:
        """Return in how many seconds to look again; ``None`` if only news will tell."""
        now, limit = time.monotonic(), self.limit
        times = [job.begun + limit for job in running if not job.is_overdue]
        if are_waiting and self._next > now:
            times.append(self._next)
        first = min(times, default=float("inf"))
        return None if first == float("inf") else max(0.0, first - now)
