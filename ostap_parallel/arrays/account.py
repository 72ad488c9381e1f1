"""What the jobs of a run have told: when which item ran, and where; now, and as a report."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ostap_parallel.arrays.layout import Layout
from ostap_parallel.arrays.records import SYNC, Record, Told, read
from ostap_parallel.arrays.run import Run
from ostap_parallel.arrays.summary import state_of, states
from ostap_parallel.errors import JobRefused, SchedulerUnavailable
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.runs.report import Failure, Report, Running, describe
from ostap_parallel.views.page import BARS, FAILURES, Facts
from ostap_parallel.views.picture import Bar, Fate, Lane, Picture
from ostap_parallel.views.words import duration
from ostap_parallel.worker.chunk import unpack_value

# Seconds between two questions to the scheduler by who looks again and again.
PAUSE = 20.0

# What jobs have told that have not been heard of for so many seconds is what they told last.
SILENT = 3 * SYNC

# Where an item has failed whose jobs have all ended before it began.
NOWHERE = "no host"

SLOWEST = 10  # items that are named as such, at least
MOST = 200  # items that are told of as running

_TAIL = 4000  # characters of what an item has printed that a page shows


@dataclass
class Account:
    """What the jobs of a run have told so far; looked at anew it reads what is new only.

    Attributes
    ----------
    ended
        What is known of the chunks whose jobs have ended, with the last sign of these in seconds
        since the epoch.
    going
        What the others tell, and the last sign of them.
    failures
        What became of the items that have failed.
    """

    run: Run
    ended: dict[int, tuple[Told, float]] = field(default_factory=dict)
    going: dict[int, tuple[Told, float]] = field(default_factory=dict)
    failures: list[Outcome] = field(default_factory=list)
    _jobs: tuple[float, list[str]] = (0.0, [])

    def __post_init__(self) -> None:
        self._layout = Layout(self.run.directory)
        self.refresh()

    def refresh(self) -> None:
        """Take in what there is now."""
        self.failures = self.run.failures()
        parts = self._layout.all_parts()
        for number in self._layout.results(set(self._layout.chunks()) - self.ended.keys()):
            path = self._layout.root / self._layout.name("results", number)
            told = read(path)
            if told.end:
                self.ended[number] = told, _last_sign(parts.get(number) or [path])
        self.going = {
            number: (read(*files), _last_sign(files))
            for number, files in parts.items()
            if number not in self.ended
        }

    def look_again(self) -> list[str]:
        """Take in what there is now; return how the run stands, in lines."""
        try:
            self.refresh()
            return [state_of(self.run), *self.jobs()]
        except FileNotFoundError:  # as pools do with runs that have ended well
            self.going = {}
            return ["its directory has been removed"]

    def records(self) -> Iterator[Record]:
        """Yield what is known of items that have ended; of one that was begun again, each time."""
        for told, _ in itertools.chain(self.ended.values(), self.going.values()):
            yield from told.records.values()

    def fresh(self) -> tuple[int, int]:
        """Return how many items have ended, well and badly, in jobs that go on."""
        told = [record.ok for told, _ in self.going.values() for record in told.records.values()]
        return sum(told), len(told) - sum(told)

    def running(self) -> list[Running]:
        """Return what runs now, or has not been heard of lately, the longest first."""
        now = time.time()
        found = [
            Running(index, "", 1, told.host, 0, max(0.0, now - start))
            for told, _ in self.going.values()
            for index, start in told.running.items()
        ]
        return sorted(found, key=lambda one: -one.seconds)

    def lost(self) -> Iterator[tuple[int, str, float, float]]:
        """Yield items whose job ended before they did: index, host, begin, last sign."""
        for told, last in self.ended.values():
            for index, start in told.running.items():
                yield index, told.host, start, max(start, last)

    def items(self, indices: Iterable[int]) -> dict[int, str]:
        """Return items as short texts; those that cannot be read here are missing."""
        wanted: dict[int, list[int]] = {}
        for index in indices:
            wanted.setdefault(index // self.run.settings.size, []).append(index)
        texts: dict[int, str] = {}
        for number, some in wanted.items():
            with contextlib.suppress(Exception):  # user code
                packed = dict(self._layout.read_chunk(number)[1])
                texts.update((index, describe(unpack_value(packed[index]))) for index in some)
        return texts

    def jobs(self) -> list[str]:
        """Return how many jobs there are in each state, as the scheduler said not long ago."""
        if self.run.is_done or self.run.is_cancelled:
            return []
        asked, lines = self._jobs
        if time.monotonic() > asked + PAUSE or not asked:
            try:
                counts = sorted(states(self.run).items())
                lines = [f"jobs {words}: {count}" for words, count in counts]
            except (SchedulerUnavailable, JobRefused) as exc:
                lines = [str(exc)]
            self._jobs = time.monotonic(), lines
        return lines

    @property
    def submitted(self) -> float:
        """When the run was made, in seconds since the epoch."""
        return _last_sign([self._layout.root / "settings"])

    @property
    def began(self) -> float:
        """When the first item began, in seconds since the epoch; 0: none has."""
        records = (record.start for record in self.records())
        begun = (start for told, _ in self.going.values() for start in told.running.values())
        return min(itertools.chain(records, begun), default=0.0)

    @property
    def last(self) -> float:
        """When the last item ended that has, in seconds since the epoch."""
        return max((record.start + record.seconds for record in self.records()), default=0.0)


def _last_sign(files: Iterable[Path]) -> float:
    last = 0.0
    for file in files:
        with contextlib.suppress(OSError):  # it has just got its last name
            last = max(last, file.stat().st_mtime)
    return last


class _Text(str):
    """An item as it was put in words."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def report_of(account: Account) -> Report:
    """Return what there is to say about a run, as of one of a manager."""
    report = Report(submitted=account.run.total, complete=account.run.is_done)
    report.ran, failures = account.running(), account.failures
    slowest = heapq.nlargest(SLOWEST, account.records(), key=lambda record: record.seconds)
    named = {one.index for one in slowest} | {one.index for one in report.ran}
    texts = account.items(named | {one.index for one in failures[:FAILURES]})
    attempts: dict[int, int] = {}
    for record in account.records():
        item = _Text(texts.get(record.index, ""))
        where = record.host, record.pid, record.seconds
        report.count(Outcome(record.index, item, None, None, "", *where))
        attempts[record.index] = max(record.attempt, attempts.get(record.index, 1))
    report.retried = sum(attempts.values()) - len(attempts)
    report.merged = account.run.ended - len(failures) + account.fresh()[0]
    report.wall = max(0.0, account.last - account.began)
    report.ran = [replace(one, item=texts.get(one.index, "")) for one in report.ran]
    for failure in failures:
        host, item = failure.host or NOWHERE, _Text(texts.get(failure.index, ""))
        report.stats.add(host, 0.0, 0, 1)
        report.failures.append(Failure.of(replace(failure, item=item, host=host)))
    return report


def text_of(account: Account) -> str:
    """Return lines about a run."""
    lines = [f"{account.run.directory}: {state_of(account.run)}", str(report_of(account))]
    return "\n".join([*lines, *account.jobs()])


def facts_of(account: Account) -> Facts:
    """Return what a page tells of a run."""
    report, run = report_of(account), account.run
    facts = report.facts()
    numbers = {name: n for name, n in facts.numbers.items() if name != "from the checkpoint"}
    if account.began > account.submitted:
        numbers["in the queue first"] = duration(account.began - account.submitted)
    printed = {}
    memory: dict[str, int] = {}
    for record in account.records():
        if not record.ok:
            printed[record.index] = (record.stdout + record.stderr)[-_TAIL:]
        memory[record.host] = max(record.memory, memory.get(record.host, 0))
    title = f"{run.settings.function or 'A run'} in {run.directory.name}"
    return replace(
        facts,
        title=title if run.is_done else f"{title} ({state_of(run)})",
        numbers=numbers,
        hosts=[{**row, "memory": memory.get(row["host"])} for row in facts.hosts],
        failures=[{**one, "output": printed.get(one["index"], "")} for one in facts.failures],
        notes=account.jobs(),
        picture=picture_of(account),
    )


def picture_of(account: Account, most: int = BARS) -> Picture | None:
    """Return the timeline of a run, from when the first item began; ``None`` if none has."""
    records = sorted(account.records(), key=lambda record: record.start)
    if not records:
        return None
    start, name = account.began, account.run.settings.function
    bars = [*_bars(records, start)]
    for index, host, begin, end in account.lost():
        lane = Lane(host, 0)  # which process it was nobody has told
        bars.append((lane, Bar(0, begin - start, end - start, index, 1, Fate.LOST)))
    bars.sort(key=lambda bar: bar[1].begin)
    lanes = {lane: n for n, lane in enumerate(dict.fromkeys(lane for lane, _ in bars))}
    picture = Picture(name, start, list(lanes), [name])
    total = sum(record.seconds for record in records)
    least = total / most if len(records) > most else 0.0
    picture.fill((bar._replace(lane=lanes[lane]) for lane, bar in bars), least)
    return picture


def _bars(records: list[Record], start: float) -> Iterator[tuple[Lane, Bar]]:
    """Yield a bar for each record, and for the time between two of a worker."""
    last = {record.index: position for position, record in enumerate(records)}
    ends: dict[Lane, float] = {}
    for position, record in enumerate(records):
        lane = Lane(record.host, record.pid)
        begin, end = record.start - start, record.start - start + record.seconds
        if ends.get(lane, begin) < begin:
            yield lane, Bar(0, ends[lane], begin, record.index, 0, Fate.WAITING)
        ends[lane] = end
        fate = Fate.OK if record.ok else Fate.LOST if record.lost else Fate.FAILED
        if fate is Fate.FAILED and last[record.index] > position:
            fate = Fate.RETRIED
        yield lane, Bar(0, begin, end, record.index, 1, fate)


def look(account: Account) -> dict[str, Any]:
    """Return how far a run is, as `runs.snapshot.Snapshots.look` does of one of a manager."""
    notes = account.look_again()
    run, running = account.run, account.running()
    seconds = (time.time() if running else account.last) - account.began
    well, badly = account.fresh()
    done = run.ended + well + badly
    rate = done / seconds if done and seconds > 0 else 0.0
    texts = account.items({one.index for one in running[:MOST]})
    return {
        "title": f"{run.settings.function or 'A run'} in {run.directory}",
        "started": account.began,
        "seconds": max(0.0, seconds),
        "total": run.total,
        "done": done,
        "failed": len(account.failures) + badly,
        "rate": rate,
        "left": (run.total - done) / rate if rate and running else None,
        "hosts": list(_hosts(account)),
        "running": [{**asdict(one), "item": texts.get(one.index, "")} for one in running[:MOST]],
        "notes": notes,
    }


def _hosts(account: Account) -> Iterator[dict[str, Any]]:
    """Yield a row for each host where jobs of the run are."""
    told: dict[str, list[tuple[Told, float]]] = {}
    for one in account.going.values():
        if one[0].has_begun:
            told.setdefault(one[0].host, []).append(one)
    for host, jobs in sorted(told.items()):
        silent = time.time() - max(last for _, last in jobs)
        is_up = silent < SILENT
        yield {
            "host": host,
            "state": "up" if is_up else "silent",
            "for": silent,
            "lost": 0,
            "workers": len(jobs) * account.run.settings.processes,
            "busy": sum(len(one.running) for one, _ in jobs),
            "reason": "" if is_up else "its jobs have told nothing, they may have ended",
        }
