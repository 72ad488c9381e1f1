"""When the next command may begin, and which ones take too long beside the others."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterable

from ostap_parallel.commands.command import Done
from ostap_parallel.commands.slots import Job
from ostap_parallel.errors import ConfigError
from ostap_parallel.worker.command import TOGETHER

# Seconds below which nothing is too long, whatever the others took.
LEAST = 1.0

# So many of the last times are looked at.
MANY = 999

# So many commands go to a host with one message, at most, as are done in some seconds there.
MOST_TOGETHER = 32


class Pace:
    """Keeps commands apart, and tells those that take too long.

    Parameters
    ----------
    delay
        Seconds between two that begin.
    percent
        How long one may take, of the median of those that have ended well.
    one_by_one
        None may begin before it is known what became of the one before it in its slot; so it is
        if there are other settings.
    """

    def __init__(
        self, delay: float = 0.0, percent: float | None = None, one_by_one: bool = False
    ) -> None:
        if not 0 <= delay <= threading.TIMEOUT_MAX:
            raise ConfigError(f"delay must be a number of seconds from 0 on, not {delay!r}")
        if percent is not None and not percent > 0:
            raise ConfigError(f"percent must be a positive number, not {percent!r}")
        self._delay, self._percent = delay, percent
        self._next = self._last = 0.0
        self._times: list[float] = []
        self.one_by_one = bool(one_by_one or delay or percent)
        self._mean = TOGETHER

    @property
    def together(self) -> int:
        """How many commands may go to a host with one message: as many as take a moment."""
        if self.one_by_one:
            return 1
        return min(MOST_TOGETHER, max(1, int(TOGETHER / max(self._mean, 1e-6))))

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
        self._mean += (min(done.seconds, LEAST) - self._mean) / 4
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
