"""What is to be seen of the runs that a checkpoint belongs to, also while one is going on."""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ostap_parallel.runs.checkpoint import Summary, read_summary
from ostap_parallel.runs.database import connect, refusing, seal_of, transaction
from ostap_parallel.views.page import BARS, FAILURES, Facts
from ostap_parallel.views.picture import Picture, in_a_row
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.views.words import duration

# A failure in one line, as a checkpoint keeps it.
_LINE = re.compile(
    r"item (?P<index>\d+) \((?P<item>.*)\) on (?P<host>.*?) "
    r"\(pid (?P<pid>\d+)(?:, (?P<attempts>\d+) attempts)?\): (?P<error>.*)",
    re.DOTALL,
)


def facts_of(path: str | os.PathLike[str]) -> Facts:
    """Return what a page tells of a checkpoint; raises `CheckpointError`."""
    summary = read_summary(path, FAILURES)
    done = summary.done + summary.failed
    seconds = sum(seconds for _, seconds in summary.sessions)
    numbers = {"submitted": summary.submitted, "merged": summary.done, "failed": summary.failed}
    if summary.total is not None and (remaining := summary.total - done):
        numbers["unfinished"] = remaining
    numbers["runs"] = len(summary.sessions)
    shown = {name: str(number) for name, number in numbers.items()}
    shown["time"] = duration(seconds)
    if seconds:
        shown["gain"] = f"{summary.stats.time / seconds:.2f}"
        shown["items per second"] = f"{done / seconds:.4g}"
    return Facts(
        title=f"{summary.name or 'A run'}{'' if summary.complete else ' (not complete)'}",
        numbers=shown,
        hosts=_hosts(Path(path), summary),
        failures=[_failure(line, text) for line, text in summary.failures],
        number_of_failures=summary.failed,
        notes=_notes(summary),
        picture=picture_of(path),
    )


def look(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return how far the runs of a checkpoint are, as a `Snapshots.look` of one would."""
    summary = read_summary(path, 0)
    done = summary.done + summary.failed
    started, seconds = summary.sessions[-1] if summary.sessions else (0.0, 0.0)
    rate = done / sum(each for _, each in summary.sessions) if seconds else 0.0
    left = None
    if summary.total is not None and rate:
        left = (summary.total - done) / rate
    about = {"title": summary.name, "started": started, "seconds": seconds, "total": summary.total}
    counts = {"done": done, "failed": summary.failed}
    return {**about, **counts, "rate": rate, "left": left, "hosts": [], "running": []}


def picture_of(path: str | os.PathLike[str], most: int = BARS) -> Picture | None:
    """Return the timeline of a checkpoint, its runs in a row; ``None`` if there is none."""
    timelines: dict[int, Timeline] = {}
    with (
        refusing(Path(path)),
        contextlib.closing(connect(Path(path))) as database,
        transaction(database, "DEFERRED") as execute,
    ):
        query = "SELECT count(*) FROM sqlite_master WHERE name = 'timeline'"
        if execute(query).fetchone() == (0,):
            return None
        for *row, seal in execute("SELECT session, data, seal FROM timeline ORDER BY rowid"):
            if seal != seal_of(row):  # half of it is of no use
                timelines.pop(row[0], None)
                continue
            session, data = row
            timelines.setdefault(session, Timeline()).take(data)
    each = most // max(1, len(timelines))
    pictures = [one.picture(each) for one in timelines.values()]
    return in_a_row(pictures) if pictures else None


def _notes(summary: Summary) -> list[str]:
    runs = len(summary.sessions)
    return [f"{runs} runs, drawn one behind the other."] if runs > 1 else []


def _hosts(path: Path, summary: Summary) -> list[dict[str, Any]]:
    times: dict[str, list[float]] = {}
    with refusing(path), contextlib.closing(connect(path)) as database:
        for host, seconds in database.execute("SELECT host, seconds FROM outcome"):
            if seconds:
                times.setdefault(str(host), []).append(float(seconds))
    rows = []
    for name, stat in summary.stats:
        known = times.get(name, [0.0])
        row = {"host": name, "jobs": stat.njobs, "seconds": stat.time}
        row |= {"shortest": min(known), "median": statistics.median(known), "longest": max(known)}
        rows.append(row)
    return sorted(rows, key=lambda row: str(row["host"]))


def _failure(line: str, traceback: str) -> Mapping[str, Any]:
    """Return a failure as `Failure.as_dict` does."""
    found = _LINE.fullmatch(line)
    about: dict[str, Any] = {
        "index": 0,
        "item": "",
        "host": "",
        "pid": 0,
        "error": line,
        "attempts": 1,
    }
    if found is not None:
        about |= found.groupdict(default="1")
        for name in ("index", "pid", "attempts"):
            about[name] = int(about[name])
    return about | {"traceback": traceback, "output": ""}
