"""A timeline as Chrome trace events, which Perfetto and chrome://tracing open.

Each host is a process there and each worker a thread, by numbers of our own, as processes of
different hosts may have the same id.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ostap_parallel.views.picture import Bar, Fate, Picture

# Names of colours that the format knows.
_COLOURS = {
    Fate.OK: "good",
    Fate.FAILED: "terrible",
    Fate.RETRIED: "bad",
    Fate.LOST: "black",
    Fate.STOPPED: "yellow",
    Fate.WAITING: "grey",
}

# The group of events about all of the run.
_RUN = 1


def trace_of(picture: Picture) -> dict[str, Any]:
    """Return the trace as an object for JSON; times in it are microseconds since the start."""
    return {
        "traceEvents": [*_names(picture), *sorted(_events(picture), key=lambda one: one["ts"])],
        "displayTimeUnit": "ms",
        "otherData": {"name": picture.name, "start": picture.start},
    }


def _numbers(picture: Picture) -> dict[str, int]:
    """Return the number of the process that each host is."""
    hosts = sorted({lane.host for lane in picture.lanes} | {one.host for one in picture.events})
    return {host: number for number, host in enumerate(hosts, _RUN + 1)}


def _names(picture: Picture) -> Iterator[dict[str, Any]]:
    """Yield how processes and threads are called."""
    numbers = _numbers(picture)
    yield _meta("process_name", _RUN, 0, picture.name)
    for host, number in numbers.items():
        yield _meta("process_name", number, 0, host)
        yield _meta("thread_name", number, 0, "host")
    for thread, position in enumerate(picture.order(), 1):
        lane = picture.lanes[position]
        yield _meta("thread_name", numbers[lane.host], thread, f"worker {lane.pid}")


def _events(picture: Picture) -> Iterator[dict[str, Any]]:
    numbers = _numbers(picture)
    threads = {position: thread for thread, position in enumerate(picture.order(), 1)}
    for bar in picture.bars:
        yield _event(picture, bar, numbers[picture.lanes[bar.lane].host], threads[bar.lane])
    for one in picture.events:
        yield {
            "name": f"{one.host}: {one.state}",
            "cat": "host",
            "ph": "i",
            "s": "p",
            "ts": max(0.0, one.seconds * 1e6),
            "pid": numbers[one.host],
            "tid": 0,
            "args": {"reason": one.reason},
        }


def _event(picture: Picture, bar: Bar, process: int, thread: int) -> dict[str, Any]:
    lane = picture.lanes[bar.lane]
    about: dict[str, Any] = {"host": lane.host, "pid": lane.pid, "outcome": bar.fate.value}
    if bar.items:
        about["item"] = bar.first
    if bar.items > 1:
        about["items"] = bar.items
    name = picture.functions[bar.function] if bar.items else bar.fate.value
    return {
        "name": name or "item",
        "cat": bar.fate.name.lower(),
        "ph": "X",
        "ts": max(0.0, bar.begin * 1e6),
        "dur": max(0.0, (bar.end - bar.begin) * 1e6),
        "pid": process,
        "tid": thread,
        "cname": _COLOURS[bar.fate],
        "args": about,
    }


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
