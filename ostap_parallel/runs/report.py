"""What users see of a run: who did what, how long it took, what failed."""

from __future__ import annotations

import logging
import re
import reprlib
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from ostap_parallel.runs.display import Shown

if TYPE_CHECKING:
    from ostap_parallel.runs.outcome import Outcome
    from ostap_parallel.supply.source import HostStatus

_MAX_REPR = 200
_MAX_FAILURES = 10  # shown by a report; all of them are in its list


@dataclass
class Statistics:
    """How many jobs a host did, and in how much time.

    Used as a context manager it counts its body as one job.

    Attributes
    ----------
    host
        Name of the host; default: the full name of this one.
    time
        Seconds of wall time, summed over the jobs.
    njobs
        Number of jobs.
    """

    host: str = ""
    time: float = 0.0
    njobs: int = 0

    def __post_init__(self) -> None:
        self.host = self.host or socket.getfqdn()
        self._started: float | None = time.perf_counter()

    def __enter__(self) -> Statistics:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __iadd__(self, other: Statistics) -> Statistics:
        self.add(other.time, other.njobs)
        return self

    def stop(self) -> None:
        """Count one job since the construction or the start of the block; once."""
        if self._started is not None:
            self.add(time.perf_counter() - self._started)
            self._started = None

    def add(self, seconds: float, njobs: int = 1) -> None:
        """Add jobs that took `seconds` together."""
        self.time += seconds
        self.njobs += njobs


class StatMerger:
    """The statistics of several hosts.

    Attributes
    ----------
    merged
        The statistics by host, in the order of their first jobs.
    """

    def __init__(self) -> None:
        self.merged: dict[str, Statistics] = {}

    def __iadd__(self, other: Statistics | StatMerger) -> StatMerger:
        for stat in [other] if isinstance(other, Statistics) else other.merged.values():
            self.add(stat.host, stat.time, stat.njobs)
        return self

    def __len__(self) -> int:
        return len(self.merged)

    def __iter__(self) -> Iterator[tuple[str, Statistics]]:
        return iter(self.merged.items())

    def __str__(self) -> str:
        return self.table()

    def add(self, host: str, seconds: float, njobs: int = 1) -> None:
        """Add jobs that `host` did in `seconds` together."""
        if host not in self.merged:
            self.merged[host] = Statistics(host)
        self.merged[host].add(seconds, njobs)

    @property
    def njobs(self) -> int:
        """Number of jobs on all hosts."""
        return sum(stat.njobs for stat in self.merged.values())

    @property
    def time(self) -> float:
        """Seconds of all jobs on all hosts."""
        return sum(stat.time for stat in self.merged.values())

    def table(self, title: str = "", prefix: str = "") -> str:
        """Return a table with one row per host; `prefix` begins each line."""
        row = "{:>8}  {:>5}  {:>11}  {:>9}  {}".format
        lines = [title] if title else []
        lines.append(row("#jobs", "%", "total time", "time/job", "server"))
        stats = [stat for _, stat in sorted(self)]
        if len(stats) > 1:
            stats.append(Statistics("total", self.time, self.njobs))
        for stat in stats:
            share = f"{100 * stat.njobs / max(self.njobs, 1):.1f}"
            mean = duration(stat.time / max(stat.njobs, 1))
            lines.append(row(stat.njobs, share, duration(stat.time), mean, stat.host))
        return "\n".join(prefix + line for line in lines)

    def print_stats(self, prefix: str = "", cputime: float | None = None) -> None:
        """Print the table and, given the wall time in seconds, the gain."""
        print(self.table(prefix=prefix))
        if cputime:
            gain = f"{self.time / cputime:.2f} = {duration(self.time)} / {duration(cputime)}"
            print(f"{prefix}gain: {gain}")


@dataclass(frozen=True)
class Failure:
    """An item that has no result.

    Attributes
    ----------
    index
        Position of the item in the input, counted from 0.
    item
        The item, shortened; see `describe`.
    error
        What was raised, or `WorkerLost`.
    traceback
        Where it was raised, as text.
    host, pid
        The worker that had it last.
    attempts
        How often it was tried.
    """

    index: int
    item: str
    error: BaseException
    traceback: str
    host: str
    pid: int
    attempts: int

    @classmethod
    def of(cls, outcome: Outcome) -> Failure:
        """Return the failure that an outcome is."""
        assert outcome.error is not None
        worker = outcome.host or "local", outcome.pid, outcome.attempts
        item = describe(outcome.item)
        return cls(outcome.index, item, outcome.error, outcome.traceback, *worker)

    def __str__(self) -> str:
        name = type(self.error).__name__
        reason = _one_line(self.error, str)
        times = f", {self.attempts} attempts" if self.attempts > 1 else ""
        where = f"{self.host} (pid {self.pid}{times})"
        return f"item {self.index} ({self.item}) on {where}: {name}{': ' * bool(reason)}{reason}"


@dataclass
class Report(Shown):
    """The outcome of a run, also of one that is going on or was stopped.

    Attributes
    ----------
    submitted, merged
        Numbers of items taken from the input, and of those whose result was merged.
    failures
        The items that have no result.
    retried
        How often an item was run again.
    resumed
        Number of items whose result came from a checkpoint.
    stats
        Jobs and times by host.
    hosts
        The hosts and their states; `HostStatus.lost` counts the losses in this run.
    wall
        Seconds of wall time.
    result
        What was merged, when the run has ended, however it did.
    complete
        Whether the input was read to its end and every item was merged or has failed.
    """

    submitted: int = 0
    merged: int = 0
    failures: list[Failure] = field(default_factory=list)
    retried: int = 0
    resumed: int = 0
    stats: StatMerger = field(default_factory=StatMerger)
    hosts: list[HostStatus] = field(default_factory=list)
    wall: float = 0.0
    result: Any = field(default=None, repr=False)
    complete: bool = False

    _repr_pretty_ = Shown._repr_pretty_  # else IPython takes the repr

    @property
    def failed(self) -> int:
        """Number of items that have no result."""
        return len(self.failures)

    @property
    def gain(self) -> float:
        """Seconds of all jobs per second of wall time."""
        return self.stats.time / self.wall if self.wall > 0 else 0.0

    def __str__(self) -> str:
        lines = [self.summary]
        if self.stats:
            lines.append(self.stats.table())
        for host in self.hosts:
            if host.error is not None:
                reason = f"{host.error.step}: {host.error.reason}".strip().replace("\n", "\n    ")
                state = f"lost {host.lost} x, {host.state}" if host.lost else host.state
                lines.append(f"host {host.name} {state}: {reason}")
        lines += map(str, self.failures[:_MAX_FAILURES])
        if self.failed > _MAX_FAILURES:
            lines.append(f"... and {self.failed - _MAX_FAILURES} more failures")
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """The counts and times in one line."""
        text = f"{self.submitted} submitted = {self.merged} merged + {self.failed} failed"
        if unfinished := self.submitted - self.merged - self.failed:
            text += f" + {unfinished} unfinished"
        text += f", {self.wall:.1f} s, gain {self.gain:.2f}"
        if self.retried:
            text += f", {self.retried} retried"
        if self.resumed:
            text += f", {self.resumed} from the checkpoint"
        return text if self.complete else f"{text}, not complete"


def describe(obj: object) -> str:
    """Return the repr of any object in one line of at most 200 characters; never fail."""
    short = reprlib.Repr()  # cheap also for huge containers, of which it looks at the ends only
    short.maxstring = short.maxother = _MAX_REPR
    return _one_line(obj, short.repr)


def duration(seconds: float) -> str:
    """Return a time in few characters, e.g. ``1.5 ms``, ``43.1 s``, ``2:05:00``."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    return str(timedelta(seconds=round(seconds)))


def _one_line(obj: Any, to_text: Any) -> str:
    try:
        text = re.sub(r"\s*\n\s*", " ", to_text(obj).strip())
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # user code
        text = f"<{type(obj).__name__} whose text raises {type(exc).__name__}>"
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _MAX_REPR else f"{text[: _MAX_REPR - 3]}..."


def relay(host: str, event: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Print what a worker printed, log what it logged; a host's name goes before it.

    `event` is what `output.Sink` describes; `out` takes the place of standard output.
    """
    if event["kind"] == "log":
        record = logging.makeLogRecord(dict(event["record"]))
        record.name = f"{host}.{record.name}"
        log = logging.getLogger(record.name)
        if log.isEnabledFor(record.levelno):
            log.handle(record)
        return
    stream = (out or sys.stdout) if event["kind"] == "stdout" else sys.stderr
    prefix = "" if host == "local" else f"{host}: "
    # One write for both: lines of several hosts must not get mixed.
    print(f"{prefix}{event['text']}\n", end="", file=stream, flush=True)
