"""What users see of a run: who did what, how long it took, what failed."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
import reprlib
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ostap_parallel.errors import last_words
from ostap_parallel.logs import hand_on
from ostap_parallel.objects.serialize import name_and_text
from ostap_parallel.runs.display import Shown
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.profiles import received
from ostap_parallel.runs.tails import Tail
from ostap_parallel.runs.timing import Slow, Slowest, Times
from ostap_parallel.views import inline
from ostap_parallel.views.groups import Group, groups_of
from ostap_parallel.views.page import BARS, Facts, page_of
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.views.trace import trace_of
from ostap_parallel.views.words import cut, duration, named, printable
from ostap_parallel.worker.profiling import PROFILED

if TYPE_CHECKING:
    from ostap_parallel.supply.source import HostStatus

_COUNTS = ("submitted", "merged", "failed", "retried", "resumed", "wall", "complete")
_COLUMNS = (
    *("host", "state", "note", "jobs", "failed", "seconds"),
    *("shortest", "median", "longest", "lost", "error", "start"),
)
_MAX_REPR = 200
_NO_TIMELINE = "there is no timeline: no run yet, or one with timeline=False"
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
    nfailed
        Number of items that have failed there for good; those whose worker died are no jobs.
    """

    host: str = ""
    time: float = 0.0
    njobs: int = 0
    nfailed: int = 0

    def __post_init__(self) -> None:
        self.host = self.host or socket.getfqdn()
        self._started: float | None = time.perf_counter()

    def __enter__(self) -> Statistics:
        self._started = time.perf_counter()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def __iadd__(self, other: Statistics) -> Statistics:
        self.add(other.time, other.njobs, other.nfailed)
        return self

    def stop(self) -> None:
        """Count one job since the construction or the start of the block; once."""
        if self._started is not None:
            self.add(time.perf_counter() - self._started)
            self._started = None

    def add(self, seconds: float, njobs: int = 1, nfailed: int = 0) -> None:
        """Add jobs that took `seconds` together, and failures."""
        self.time += seconds
        self.njobs += njobs
        self.nfailed += nfailed


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
            self.add(stat.host, stat.time, stat.njobs, stat.nfailed)
        return self

    def __len__(self) -> int:
        return len(self.merged)

    def __iter__(self) -> Iterator[tuple[str, Statistics]]:
        return iter(self.merged.items())

    def __str__(self) -> str:
        return self.table()

    def add(self, host: str, seconds: float, njobs: int = 1, nfailed: int = 0) -> None:
        """Add jobs that `host` did in `seconds` together, and failures there."""
        if host not in self.merged:
            self.merged[host] = Statistics(host)
        self.merged[host].add(seconds, njobs, nfailed)

    @property
    def njobs(self) -> int:
        """Number of jobs on all hosts."""
        return sum(stat.njobs for stat in self.merged.values())

    @property
    def time(self) -> float:
        """Seconds of all jobs on all hosts."""
        return sum(stat.time for stat in self.merged.values())

    def table(self, title: str = "", prefix: str = "", notes: Mapping[str, str] = {}) -> str:
        """Return a table with one row per host; `prefix` begins each line.

        `notes` are about hosts, also about those that did nothing. Failures have a column if
        there are any.
        """
        stats = {**{host: Statistics(host) for host in notes}, **self.merged}
        rows = [stat for _, stat in sorted(stats.items())]
        failures = sum(stat.nfailed for stat in rows)
        if len(rows) > 1:
            rows.append(Statistics("total", self.time, self.njobs, failures))
        table = [("#jobs", "#failed", "%", "total time", "time/job", "server")]
        for stat in rows:
            share = f"{100 * stat.njobs / max(self.njobs, 1):.1f}"
            mean = duration(stat.time / stat.njobs) if stat.njobs else "-"
            note = f"{stat.host} ({notes[stat.host]})" if stat.host in notes else stat.host
            counts = str(stat.njobs), str(stat.nfailed)
            table.append((*counts, share, duration(stat.time), mean, note))
        form = "{:>8}  {:>7}  {:>5}  {:>11}  {:>9}  {}"
        if not failures:
            form = form.replace("  {:>7}", "{:.0}")
        lines = [title] if title else []
        lines += [form.format(*cells) for cells in table]
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
    tail
        Where its `output` comes from, which is known when the run has ended.
    """

    index: int
    item: str
    error: BaseException
    traceback: str
    host: str
    pid: int
    attempts: int
    tail: Tail | None = field(default=None, repr=False, compare=False)

    @property
    def output(self) -> str:
        """What its worker has printed last, for this item and, about then, for others."""
        return self.tail.text if self.tail is not None else ""

    @classmethod
    def of(cls, outcome: Outcome, tail: Tail | None = None) -> Failure:
        """Return the failure that an outcome is."""
        assert outcome.error is not None
        worker = outcome.host or "local", outcome.pid, outcome.attempts
        item = describe(outcome.item)
        return cls(outcome.index, item, outcome.error, outcome.traceback, *worker, tail)

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        names = "index", "item", "traceback", "host", "pid", "attempts", "output"
        error = name_and_text(self.error)
        return {**{name: getattr(self, name) for name in names}, "error": error}

    def __str__(self) -> str:
        times = f", {self.attempts} attempts" if self.attempts > 1 else ""
        where = f"{self.host} (pid {self.pid}{times})"
        return f"{named(self.index, self.item)} on {where}: {self.reason}"

    @property
    def reason(self) -> str:
        """What was raised, in one line; of a command that failed, also the last that it wrote."""
        words = [_one_line(line, str) for line in last_words(self.error, 1)]
        parts = type(self.error).__name__, _one_line(self.error, str), *words
        return ": ".join(filter(None, parts))


@dataclass(frozen=True)
class Running:
    """An item that runs, or the items one of which does.

    Attributes
    ----------
    index
        Its position in the input; of several, that of the first.
    item
        The item, shortened.
    count
        How many there are.
    host, pid
        Where it runs; 0 if the process is not known.
    seconds
        Since it began; if it was sent with others, since they began.
    memory
        Bytes that the process has in memory; 0 if that is not known.
    load
        Of the host, as ``uptime`` tells; ``None`` if that is not known.
    """

    index: int
    item: str
    count: int
    host: str
    pid: int
    seconds: float
    memory: int = 0
    load: float | None = None

    def __str__(self) -> str:
        what = named(self.index, self.item)
        if self.count > 1:
            what = f"one of {self.count} items from {self.index} on"
        where = f"{self.host} (pid {self.pid})" if self.pid else self.host
        return f"{what} on {where} for {duration(self.seconds)}"


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
    copies
        With ``speculate=True``: how many chunks were begun a second time elsewhere.
    stragglers
        What took five times as long as most items, and five seconds at least, when that was
        noticed.
    resumed
        Number of items whose result came from a checkpoint.
    stats
        Jobs and times by host.
    hosts
        The hosts and their states; `HostStatus.lost` counts the losses in this run.
    left_out
        The hosts that were not used any more, as items failed there that others did, and why.
    wall
        Seconds of wall time.
    result
        What was merged, when the run has ended, however it did.
    complete
        Whether the input was read to its end and every item was merged or has failed.
    times
        The times of items by host: `Times.least`, `Times.median` and `Times.most`.
    slowest
        The items that took longest, the longest first.
    timeline
        When each item ran, and where; ``None`` where that was not kept.
    """

    submitted: int = 0
    merged: int = 0
    failures: list[Failure] = field(default_factory=list)
    retried: int = 0
    resumed: int = 0
    copies: int = 0
    stragglers: list[Running] = field(default_factory=list)
    stats: StatMerger = field(default_factory=StatMerger)
    hosts: list[HostStatus] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    wall: float = 0.0
    result: Any = field(default=None, repr=False)
    complete: bool = False
    times: dict[str, Times] = field(default_factory=dict)
    slowest: Slowest = field(default_factory=Slowest)
    ran: list[Running] = field(default_factory=list, repr=False)
    look: Callable[[], list[Running]] | None = field(default=None, repr=False)
    timeline: Timeline | None = field(default=None, repr=False)

    @property
    def running(self) -> list[Running]:
        """What runs now, the longest first; if the run was stopped, what ran then.

        Hosts are asked, which takes half a second at most.
        """
        return self.ran if self.look is None else self.look()

    def count(self, done: Batch | Outcome) -> None:
        """Count what a worker has done, and how long each item took."""
        if isinstance(done, Outcome):
            seconds: Sequence[float] = [done.seconds]
        else:
            seconds = done.seconds
        self.stats.add(done.host, sum(seconds), len(seconds))
        if done.host not in self.times:
            self.times[done.host] = Times()
        if not self.slowest.wants(self.times[done.host].add(seconds)):
            return
        indices: Sequence[int] = [done.index]
        items = [done.item] if isinstance(done, Outcome) else done.items
        if isinstance(done, Batch):
            indices = done.indices
        for index, item, each in zip(indices, items, seconds, strict=True):
            if self.slowest.wants(each):
                self.slowest.add(Slow(each, index, describe(item), done.host, done.pid))

    _repr_pretty_ = Shown._repr_pretty_  # else IPython takes the repr

    @property
    def failed(self) -> int:
        """Number of items that have no result."""
        return len(self.failures)

    @property
    def gain(self) -> float:
        """Seconds of all jobs per second of wall time."""
        return self.stats.time / self.wall if self.wall > 0 else 0.0

    def table(self) -> str:
        """Return a table of what each host did, and why not more."""
        return self.stats.table(notes=self._notes())

    def _times(self) -> list[str]:
        """Return lines about the times of items."""
        row = "{:>9}  {:>9}  {:>9}  {}".format
        times = sorted(self.times.items())
        lines = [row("shortest", "median", "longest", "server")] if times else []
        for host, one in times:
            lines.append(row(*map(duration, (one.least, one.median, one.most)), host))
        return lines + [f"slow: {slow}" for slow in self.slowest]

    def _notes(self) -> dict[str, str]:
        """Return the reasons of hosts that did nothing, or were left out."""
        idle = [host for host in self.hosts if host.name not in self.stats.merged]
        notes = {host.name: _state(host) for host in idle}
        return notes | {host: f"left out: {reason}" for host, reason in self.left_out.items()}

    @property
    def groups(self) -> list[Group]:
        """The failures by what was raised and where, the most frequent first."""
        return groups_of(failure.as_dict() for failure in self.failures)

    def failed_in_groups(self) -> str:
        """Return how many items failed, the first, and how many in which way; empty if none."""
        lines = [self.failed_in_short()] if self.failures else []
        if self.failed > 1:
            groups = self.groups
            lines += [f"  {group}" for group in groups[:_MAX_FAILURES]]
            if more := len(groups) - _MAX_FAILURES:
                lines += [f"  ... and {more} more kinds"] if more > 0 else []
        return "\n".join(lines)

    def failed_in_short(self) -> str:
        """Return how many items failed and how the first did, in one line; empty if none."""
        if not self.failures:
            return ""
        first = min(self.failures, key=lambda failure: failure.index)
        counts = f"{self.failed} of {self.submitted} items FAILED"
        text = f"{counts}; first: item {first.index} on {first.host}: {first.reason}"
        return printable(text)  # the name of an exception may be anything

    def __str__(self) -> str:
        lines = [self.summary, *(str(group) for group in self.groups[:_MAX_FAILURES])]
        if self.stats:
            lines += [self.table(), *self._times()]
        lines += [f"took far longer: {one}" for one in self.stragglers[:_MAX_FAILURES]]
        lines += [f"running: {one}" for one in self.running[:_MAX_FAILURES]]
        for host in self.hosts:
            if host.error is not None:
                reason = f"{host.error.step}: {host.error.reason}".strip().replace("\n", "\n    ")
                state = f"lost {host.lost} x, {host.state}" if host.lost else host.state
                lines.append(f"host {host.name} {state}: {reason}")
        if not self.stats:
            lines += [f"host {host}: {note}" for host, note in self._notes().items()]
        lines += map(str, self.failures[:_MAX_FAILURES])
        if self.failed > _MAX_FAILURES:
            lines.append(f"... and {self.failed - _MAX_FAILURES} more failures")
        return printable("\n".join(lines))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it to a file: HTML, JSON or CSV by its ending, text otherwise.

        HTML is a page for a browser, with the plots that the extra ``plots`` makes possible. JSON
        has all of it but the result; CSV has a line for each host. Raises OSError.
        """
        path = Path(file).expanduser()
        match path.suffix.lower():
            case ".html" | ".htm":
                text = page_of(self.facts())
            case ".json":
                text = json.dumps(self.as_dict(), indent=1) + "\n"
            case ".csv":
                table = io.StringIO()
                writer = csv.DictWriter(table, _COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self._host_rows())
                text = table.getvalue()
            case _:
                text = f"{self}\n"
        path.write_text(text, encoding="utf-8", errors="backslashreplace")

    def facts(self) -> Facts:
        """Return what its page tells."""
        timeline = self.timeline
        title = (timeline.name if timeline is not None else "") or "A run"
        numbers = {name: str(getattr(self, name)) for name in _COUNTS[:2]}
        numbers["failed"] = str(self.failed)
        if unfinished := self.submitted - self.merged - self.failed:
            numbers["unfinished"] = str(unfinished)
        numbers |= {"retried": str(self.retried), "from the checkpoint": str(self.resumed)}
        numbers |= {"time": duration(self.wall), "gain": f"{self.gain:.2f}"}
        if self.wall:
            numbers["items per second"] = f"{self.stats.njobs / self.wall:.4g}"
        return Facts(
            title=title if self.complete else f"{title} (not complete)",
            numbers=numbers,
            hosts=self._host_rows(),
            failures=[failure.as_dict() for failure in self.failures],
            slowest=list(map(str, self.slowest)),
            running=list(map(str, self.running)),
            stragglers=list(map(str, self.stragglers)),
            picture=None if timeline is None else timeline.picture(BARS, self.wall),
        )

    def plot(self, axes: Any = None) -> Any:
        """Draw the timeline by matplotlib; return the axes, those of a new figure unless given.

        ``report.plot().figure.savefig("run.svg")`` writes it. Raises ValueError where there is
        no timeline, and ImportError without matplotlib, which the extra ``plots`` brings.
        """
        if self.timeline is None:
            raise ValueError(_NO_TIMELINE)
        return inline.draw(self.timeline.picture(inline.BARS, self.wall), axes)

    def _repr_html_(self) -> str:
        text = super()._repr_html_()
        if self.timeline is None or not len(self.timeline):
            return text
        return text + inline.image_of(self.timeline.picture(inline.BARS, self.wall))

    def trace(self, file: str | os.PathLike[str]) -> None:
        """Write when each item ran, and where, as Chrome trace events in JSON.

        Perfetto (ui.perfetto.dev) and chrome://tracing show such files.

        Raises
        ------
        ValueError
            The run was one of a manager with ``timeline=False``, or there was none yet.
        OSError
            The file cannot be written.
        """
        if self.timeline is None:
            raise ValueError(_NO_TIMELINE)
        text = json.dumps(trace_of(self.timeline.picture()))
        Path(file).expanduser().write_text(text, encoding="ascii")

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data: all but the result."""
        return {
            **{name: getattr(self, name) for name in _COUNTS},
            "gain": self.gain,
            "hosts": self._host_rows(),
            "groups": [asdict(group) for group in self.groups],
            "failures": [failure.as_dict() for failure in self.failures],
            "slowest": [asdict(slow) for slow in self.slowest],
            "stragglers": [asdict(one) for one in self.stragglers],
            "running": [asdict(one) for one in self.running],
        }

    def _host_rows(self) -> list[dict[str, Any]]:
        notes, states = self._notes(), {host.name: host for host in self.hosts}
        rows = []
        for host in sorted({*self.stats.merged, *notes, *states}):
            stat, times = self.stats.merged.get(host), self.times.get(host)
            state = states.get(host)
            values: list[Any] = [host, state.state if state else "", notes.get(host, "")]
            values += [stat.njobs, stat.nfailed, stat.time] if stat else [0, 0, 0.0]
            values += [times.least, times.median, times.most] if times else [None] * 3
            values += [state.lost if state else 0]
            values += [str(state.error) if state and state.error else ""]
            values += [state.seconds if state else None]
            rows.append(dict(zip(_COLUMNS, values, strict=True)))
        return rows

    @property
    def summary(self) -> str:
        """The counts and times in one line."""
        text = f"{self.submitted} submitted = {self.merged} merged + {self.failed} failed"
        if unfinished := self.submitted - self.merged - self.failed:
            text += f" + {unfinished} unfinished"
        text += f", {self.wall:.1f} s, gain {self.gain:.2f}"
        if self.retried:
            text += f", {self.retried} retried"
        if self.copies:
            text += f", {self.copies} begun a second time"
        if self.resumed:
            text += f", {self.resumed} from the checkpoint"
        return text if self.complete else f"{text}, not complete"


def _state(host: HostStatus) -> str:
    """Return in a few words why a host did nothing."""
    match host.state:
        case "starting":
            return "still starting when the run ended"
        case "queued":
            return f"queued: {host.reason}" if host.reason else "queued"
        case "up":
            return "up, but nothing was left for it"
    return host.state


def describe(obj: object) -> str:
    """Return the repr of any object in one line of at most 200 characters; never fail."""
    short = reprlib.Repr()  # cheap also for huge containers, of which it looks at the ends only
    short.maxstring = short.maxother = _MAX_REPR
    return _one_line(obj, short.repr)


def _one_line(obj: Any, to_text: Any) -> str:
    try:
        text = re.sub(r"\s*[\n\t]\s*", " ", to_text(obj).strip())
    except KeyboardInterrupt:
        raise
    except BaseException as exc:  # user code
        text = f"<{type(obj).__name__} whose text raises {type(exc).__name__}>"
    return cut(printable(text), _MAX_REPR)


def relay(host: str, event: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Print what a worker printed, log what it logged; a host's name goes before it.

    On standard error the index of the item does, too, where one item ran.

    `event` is what `output.Sink` describes; `out` takes the place of standard output.
    """
    if event["kind"] == "log":
        if event["record"].get("name") == PROFILED:
            received.take_for_file(host, event)
            return
        hand_on(host, logging.makeLogRecord(dict(event["record"])))
        return
    stream = (out or sys.stdout) if event["kind"] == "stdout" else sys.stderr
    origin = [host] if host != "local" else []
    if "item" in event:
        origin.append(f"item {event['item']}")
    prefix = f"{', '.join(origin)}: " if origin else ""
    # One write for both: lines of several hosts must not get mixed.
    print(f"{prefix}{event['text']}\n", end="", file=stream, flush=True)
