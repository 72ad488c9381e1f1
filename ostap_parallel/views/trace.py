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
        "traceEvents": list(_events(picture)),
        "displayTimeUnit": "ms",
        "otherData": {"name": picture.name, "start": picture.start},
    }


def _events(picture: Picture) -> Iterator[dict[str, Any]]:
    hosts = sorted({lane.host for lane in picture.lanes} | {one.host for one in picture.events})
    numbers = {host: number for number, host in enumerate(hosts, _RUN + 1)}
    yield _meta("process_name", _RUN, 0, picture.name)
    for host, number in numbers.items():
        yield _meta("process_name", number, 0, host)
    threads = {}
    for thread, position in enumerate(picture.order(), 1):
        lane = picture.lanes[position]
        threads[position] = (numbers[lane.host], thread)
        yield _meta("thread_name", *threads[position], f"worker {lane.pid}")
    for bar in picture.bars:
        yield _event(picture, bar, *threads[bar.lane])
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
