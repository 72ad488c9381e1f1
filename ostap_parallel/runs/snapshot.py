"""What a run is doing just now, as plain data."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ostap_parallel.engine.core import LOCAL
from ostap_parallel.runs.progress import ProgressReporter
from ostap_parallel.runs.run import Run

# Items that are told of as running, the longest first.
MOST = 200


class Snapshots:
    """Looks at a run, for who asks from outside."""

    def __init__(self, run: Run, reporter: ProgressReporter, title: str) -> None:
        self._run, self._reporter, self._title = run, reporter, title
        self._started = time.time()
        self._since: dict[str, tuple[str, float]] = {}  # states of hosts, and when first seen

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
            "running": [{**one, "memory": memory_of(one)} for one in running],
        }

    def _hosts(self, running: list[dict[str, Any]]) -> list[dict[str, Any]]:
        workers = dict(self._run.backend.workers)
        rows = []
        for host in self._run.backend.hosts:
            before = self._since.get(host.name)
            if before is None or before[0] != host.state:
                before = self._since[host.name] = (host.state, time.time())
            reason = host.reason or (str(host.error) if host.error else "")
            row: dict[str, Any] = {"host": host.name, "state": host.state, "lost": host.lost}
            row["for"] = time.time() - before[1]
            row["workers"] = workers.pop(host.name, 0)
            row["reason"] = "" if host.state == "up" else reason
            rows.append(row)
        here = [
            {"host": name, "state": "up", "lost": 0, "for": 0.0, "workers": count, "reason": ""}
            for name, count in workers.items()
        ]
        for row in (found := [*here, *rows]):
            row["busy"] = sum(one["host"] == row["host"] for one in running)
        return found


def memory_of(running: dict[str, Any]) -> int | None:
    """Return the bytes that a worker on this machine has in memory; of others it is not known."""
    if running["host"] != LOCAL or not running["pid"]:
        return None
    with contextlib.suppress(OSError, ValueError, IndexError):
        pages = int(Path(f"/proc/{running['pid']}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return None
