"""What a run is doing just now, as plain data."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any, Protocol

from ostap_parallel.engine.backend import Backend
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.progress import ProgressReporter
from ostap_parallel.runs.report import Running
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.views.live import telling
from ostap_parallel.views.words import cut, duration

# Items that are told of as running, the longest first.
MOST = 200

# Hosts that are waited for, and named one by one.
FEW = 2
SHORT = 72  # characters of what they wait for


class Coming:
    """The hosts that are not up, and for how long."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._since: dict[str, tuple[str, float]] = {}  # states, and when they were first seen

    def seconds(self, host: HostStatus) -> float:
        """Return for how long a host has been in its state, since somebody has looked."""
        before = self._since.get(host.name)
        if before is None or before[0] != host.state:
            before = self._since[host.name] = (host.state, time.time())
        return time.time() - before[1]

    def __str__(self) -> str:
        """Return in a few words what is waited for; empty if nothing is."""
        waits = [
            (host, self.seconds(host))
            for host in list(self._backend.hosts)
            if host.state in ("starting", "queued", "lost")
        ]
        if len(waits) > FEW:
            longest = max(seconds for _, seconds in waits)
            return f"{len(waits)} hosts are not up, for {duration(max(1, round(longest)))}"
        return ", ".join(
            f"{host.name} {host.state}{_at(host)} for {duration(max(1, round(seconds)))}"
            for host, seconds in waits
        )


class Looked(Protocol):
    """What there is to look at of a run.

    Attributes
    ----------
    backend
        What computes it.
    retried
        How many times something was run again.
    """

    @property
    def backend(self) -> Backend: ...
    @property
    def retried(self) -> int: ...
    def running(self) -> list[Running]:
        """Return what runs, the longest first."""


class Counted(Protocol):
    """How far something is, as `ProgressReporter` counts it."""

    @property
    def total(self) -> int | None: ...
    @property
    def done(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def elapsed(self) -> float: ...
    def rate(self) -> float:
        """Return how many ended per second."""


def _at(host: HostStatus) -> str:
    """Return what a host that is not up is at, or waits for, if that is known."""
    text = host.step or host.reason
    return f" ({cut(text, SHORT)})" if text else ""


class Snapshots:
    """Looks at a run, for who asks from outside."""

    def __init__(self, run: Looked, reporter: Counted, title: str, coming: Coming) -> None:
        self._run, self._reporter, self._title = run, reporter, title
        self._started = time.time()
        self._coming = coming

    def look(self) -> dict[str, Any]:
        """Return what there is to tell; hosts are asked, which takes half a second at most."""
        reporter = self._reporter
        rate = reporter.rate()
        left = None
        if reporter.total is not None and rate:
            left = max(0.0, (reporter.total - reporter.done) / rate)
        running = [asdict(one) for one in self._run.running()[:MOST]]
        return {
            "title": self._title,
            "started": self._started,
            "seconds": reporter.elapsed,
            "total": reporter.total,
            "done": reporter.done,
            "failed": reporter.failed,
            "retried": self._run.retried,
            "rate": rate,
            "left": left,
            "load": os.getloadavg()[0],
            "hosts": self._hosts(running),
            "running": running,
        }

    def _hosts(self, running: list[dict[str, Any]]) -> list[dict[str, Any]]:
        workers = dict(self._run.backend.workers)
        rows = []
        for host in self._run.backend.hosts:
            why = host.error
            reason = host.reason or (f"{why.step}: {why.reason}" if why else "")
            row: dict[str, Any] = {"host": host.name, "state": host.state, "lost": host.lost}
            row["for"], row["step"] = self._coming.seconds(host), host.step
            row["workers"] = workers.pop(host.name, 0)
            row["reason"] = "" if host.state == "up" else reason
            rows.append(row)
        here = [
            {"host": name, "state": "up", "lost": 0, "for": 0.0, "workers": count, "reason": ""}
            for name, count in workers.items()
        ]
        for row in (found := [*here, *rows]):
            its = [one for one in running if one["host"] == row["host"]]
            row["busy"], row["memory"] = len(its), sum(one["memory"] for one in its)
            loads = [one["load"] for one in its if one["load"] is not None]
            row["load"] = max(loads, default=None)
        return found


@contextlib.contextmanager
def telling_of(run: Looked, title: str, total: int | None) -> Iterator[ProgressReporter]:
    """Tell of a run during a block, to who looks from outside; what is yielded is to count."""
    backend = run.backend
    reporter = ProgressReporter(total, title, lambda: backend.workers, time.monotonic)
    with telling(Snapshots(run, reporter, title, Coming(backend)).look):
        yield reporter


class Arriving(Looked, Protocol):
    """What also yields what becomes of items; `total` is their number, if that is known."""

    @property
    def total(self) -> int | None: ...
    def arrivals(self) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items."""


def told(run: Arriving, title: str) -> Generator[Batch | Outcome, None, None]:
    """Yield what becomes of the items of a run, which is told of meanwhile."""
    with telling_of(run, title, run.total) as reporter, closing(run.arrivals()) as arrivals:
        for arrival in arrivals:
            if isinstance(arrival, Batch):
                reporter.advance(len(arrival))
            else:
                reporter.advance(1, int(arrival.error is not None))
            yield arrival
            del arrival  # not to be kept while the next one is awaited
