"""A timeline as Chrome trace events, which Perfetto and chrome://tracing open.

Each host is a process there and each worker a thread, by numbers of our own, as processes of
different hosts may have the same id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ostap_parallel.views.picture import Bar, Event, Fate, Picture

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
    hosts = sorted({lane.host for lane in picture.lanes} | {one.host for one in picture.events})
    numbers = {host: number for number, host in enumerate(hosts, _RUN + 1)}
    lanes, threads = _threads(picture)
    names = list(_names(picture, numbers, lanes))
    bars = [
        _event(picture, bar, numbers[picture.lanes[bar.lane].host], thread)
        for bar, thread in zip(picture.bars, threads, strict=True)
    ]
    states = [_state(event, numbers[event.host]) for event in picture.events]
    return {
        "traceEvents": [*names, *sorted([*bars, *states], key=lambda one: float(one["ts"]))],
        "displayTimeUnit": "ms",
        "otherData": {"name": picture.name, "start": picture.start},
    }


def _threads(picture: Picture) -> tuple[list[int], list[int]]:
    """Return the lane of each thread, from 1 on, and the thread of each bar.

    A lane has one, and more where bars overlap, as those of a worker that is not known may: of a
    thread the format wants one after the other.
    """
    lanes = picture.order()
    own = {lane: [thread] for thread, lane in enumerate(lanes, 1)}
    ends = [0.0] * (len(lanes) + 1)  # of what each thread has done so far
    threads = [0] * len(picture.bars)
    for position in sorted(range(len(threads)), key=lambda one: picture.bars[one].begin):
        bar = picture.bars[position]
        free = (thread for thread in own[bar.lane] if _time(ends[thread]) <= _time(bar.begin))
        if (thread := next(free, 0)) == 0:
            lanes.append(bar.lane)
            ends.append(0.0)
            own[bar.lane].append(thread := len(lanes))
        threads[position], ends[thread] = thread, bar.end
    return lanes, threads


def _names(
    picture: Picture, numbers: Mapping[str, int], lanes: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Yield how processes and threads are called."""
    yield _meta("process_name", _RUN, 0, picture.name)
    for host, number in numbers.items():
        yield _meta("process_name", number, 0, host)
        yield _meta("thread_name", number, 0, "host")
    for thread, position in enumerate(lanes, 1):
        lane = picture.lanes[position]
        yield _meta("thread_name", numbers[lane.host], thread, f"worker {lane.pid}")


def _state(event: Event, number: int) -> dict[str, Any]:
    return {
        "name": f"{event.host}: {event.state}",
        "cat": "host",
        "ph": "i",
        "s": "p",
        "ts": _time(event.seconds),
        "pid": number,
        "tid": 0,
        "args": {"reason": event.reason},
    }


def _time(seconds: float) -> float:
    """Return a time in microseconds, to a nanosecond: so exact are those who read it."""
    return max(0.0, round(seconds * 1e6, 3))


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
        "ts": _time(bar.begin),
        "dur": max(0.0, round(_time(bar.end) - _time(bar.begin), 3)),
        "pid": process,
        "tid": thread,
        "cname": _COLOURS[bar.fate],
        "args": about,
    }


def _meta(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}
