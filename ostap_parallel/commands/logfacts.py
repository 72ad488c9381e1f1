"""What is to be seen of a job log: of commands that have ended, also by GNU parallel."""

from __future__ import annotations

import heapq
import shlex
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ostap_parallel.commands.joblog import Entry, read
from ostap_parallel.errors import ConfigError
from ostap_parallel.views.page import BARS, FAILURES, Facts
from ostap_parallel.views.picture import Bar, Fate, Lane, Picture
from ostap_parallel.views.words import duration


def is_joblog(path: Path) -> bool:
    """Return whether a file begins as a job log does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"Seq\t"
    except OSError:
        return False


def facts_of(path: Path) -> Facts:
    """Return what a page tells of a job log; raises ConfigError."""
    entries = sorted(read(path).values(), key=lambda entry: entry.start)
    if not entries:
        raise ConfigError(f"job log {path}: no command has ended yet")
    failed = [entry for entry in entries if not entry.succeeded]
    picture = picture_of(entries, path.name)
    numbers = {"ended": len(entries), "failed": len(failed)}
    shown = {name: str(number) for name, number in numbers.items()} | {
        "time": duration(picture.end)
    }
    if picture.end:
        together = sum(entry.seconds for entry in entries)
        shown["gain"] = f"{together / picture.end:.2f}"
        shown["commands per second"] = f"{len(entries) / picture.end:.4g}"
    slowest = heapq.nlargest(5, entries, key=lambda entry: entry.seconds)
    return Facts(
        title=path.name,
        numbers=shown,
        hosts=_hosts(entries),
        failures=[_failure(entry) for entry in failed[:FAILURES]],
        number_of_failures=len(failed),
        slowest=[
            f"{entry.number} on {_host(entry)}: {duration(entry.seconds)}: {entry.command}"
            for entry in slowest
        ],
        picture=picture,
    )


def look(path: Path) -> dict[str, Any]:
    """Return how far the commands of a job log are, as of a run that is going on."""
    entries = sorted(read(path).values(), key=lambda entry: entry.start)
    start = entries[0].start if entries else 0.0
    seconds = max((entry.start + entry.seconds - start for entry in entries), default=0.0)
    about = {"title": path.name, "started": start, "seconds": seconds, "total": None}
    about |= {"done": len(entries), "failed": sum(not entry.succeeded for entry in entries)}
    about["rate"] = len(entries) / seconds if seconds else 0.0
    return {**about, "left": None, "hosts": [], "running": []}


def text_of(path: Path) -> tuple[str, int]:
    """Return what there is to tell of a job log, and how many commands have failed."""
    facts = facts_of(path)
    lines = [", ".join(f"{value} {name}" for name, value in facts.numbers.items())]
    lines += map(str, facts.groups)
    for row in facts.hosts:
        times = (f"{name} {duration(row[name])}" for name in ("shortest", "median", "longest"))
        lines.append(f"{row['host']}: {row['jobs']} commands, {', '.join(times)}")
    return "\n".join(lines), facts.number_of_failures


def picture_of(entries: list[Entry], name: str) -> Picture:
    """Return the timeline; each host has as many lanes as commands ran there at a time."""
    start = entries[0].start
    lanes: dict[Lane, int] = {}
    functions: dict[str, int] = {}
    picture = Picture(name, start, [], [])

    def bars() -> Iterator[Bar]:
        free: dict[str, list[tuple[float, int]]] = {}
        for entry in entries:
            host, begin = _host(entry), entry.start - start
            ends = free.setdefault(host, [])
            # times in the file are in milliseconds
            if ends and ends[0][0] <= begin + 2e-3:
                _, slot = heapq.heappop(ends)
            else:
                slot = len(ends) + 1
            heapq.heappush(ends, (begin + entry.seconds, slot))
            lane = lanes[Lane(host, -slot)]
            fate = Fate.OK if entry.succeeded else Fate.FAILED
            program = functions.setdefault(_program(entry.command), len(functions))
            yield Bar(lane, begin, begin + entry.seconds, entry.number, 1, fate, program)

    for host, slots in _slots(entries):
        for slot in range(1, slots + 1):
            lanes[Lane(host, -slot)] = len(lanes)
    picture.lanes = list(lanes)
    busy = sum(entry.seconds for entry in entries)
    picture.fill(bars(), busy / BARS if len(entries) > BARS else 0.0)
    picture.functions = list(functions)
    return picture


def _slots(entries: Iterable[Entry]) -> Iterator[tuple[str, int]]:
    """Yield for each host how many commands ran at a time there, at most."""
    ends: dict[str, list[float]] = {}
    most: dict[str, int] = {}
    for entry in entries:
        running = ends.setdefault(_host(entry), [])
        if running and running[0] <= entry.start + 2e-3:
            heapq.heappop(running)
        heapq.heappush(running, entry.start + entry.seconds)
        most[_host(entry)] = max(most.get(_host(entry), 0), len(running))
    yield from sorted(most.items())


def _host(entry: Entry) -> str:
    return "local" if entry.host == ":" else entry.host


def _program(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return Path(words[0]).name if words else "command"


def _hosts(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    by_host: dict[str, list[Entry]] = {}
    for entry in entries:
        by_host.setdefault(_host(entry), []).append(entry)
    rows = []
    for host, found in sorted(by_host.items()):
        times = [entry.seconds for entry in found]
        row: dict[str, Any] = {"host": host, "jobs": len(found), "seconds": sum(times)}
        row["failed"] = sum(not entry.succeeded for entry in found)
        row |= {"shortest": min(times), "median": statistics.median(times), "longest": max(times)}
        rows.append(row)
    return rows


def _failure(entry: Entry) -> dict[str, Any]:
    how = f"signal {entry.signal}" if entry.signal else f"exit status {entry.status}"
    about = {"index": entry.number, "item": entry.command, "error": how, "host": _host(entry)}
    return about | {"traceback": "", "pid": 0, "attempts": 1, "output": ""}
