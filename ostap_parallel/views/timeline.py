"""When which worker did what: kept in columns while a run goes on, read when it is looked at.

A chunk takes 41 bytes here, an item of it 8, and a failure 8 more; nothing of a chunk is looked at
item by item before somebody wants to see it.
"""

from __future__ import annotations

import copy
import json
import struct
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ostap_parallel.views.picture import Bar, Event, Fate, Lane, Picture
from ostap_parallel.worker.chunk import INTERRUPTED, ChunkOutcome, Lost

# Items of which it is kept when they ran: an endless run must not fill the memory.
LIMIT = 1 << 22

# when it was made, began by the clock of its worker, was heard of; first item, count, worker, fate
_CHUNK = struct.Struct("=dddqIIB")
_FAILED = struct.Struct("=II")  # chunk, position

_DONE, _LOST, _STOPPED = range(3)


class _Chunk(NamedTuple):
    made: float
    begun: float
    heard: float
    first: int
    size: int
    worker: int
    fate: int


class _Told(NamedTuple):
    """How much of each column has been given by `news`."""

    chunks: int = 0
    failed: int = 0
    seconds: int = 0
    workers: int = 0
    events: int = 0


class Timeline:
    """When the items of a run began and ended, and where.

    Attributes
    ----------
    name
        What is run.
    start
        When the run began, in seconds since the epoch.
    events
        What became of hosts meanwhile.
    beyond
        Number of items, after so many that nothing is kept of them.
    """

    def __init__(self, name: str = "", limit: int = LIMIT) -> None:
        self.name, self.start = name, time.time()
        self.events: list[Event] = []
        self.beyond = 0
        self._limit = limit
        self._lock = threading.Lock()
        self._chunks = bytearray()
        self._failed = bytearray()
        self._seconds = array("d")
        self._scattered: dict[int, array[int]] = {}  # indices of chunks, unless they are a range
        self._workers: dict[tuple[str, int], int] = {}
        self._ahead: dict[str, float] = {}  # how far a host's clock is ahead of ours, at most
        self._told = _Told()

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                name: copy.copy(value) for name, value in vars(self).items() if name != "_lock"
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return len(self._seconds)

    @property
    def nbytes(self) -> int:
        """Bytes that it takes, about."""
        columns = len(self._chunks) + len(self._failed) + 8 * len(self._seconds)
        return columns + sum(8 * len(indices) for indices in self._scattered.values())

    def add(self, result: ChunkOutcome | Lost, indices: Sequence[int], made: float) -> None:
        """Note what has become of a chunk that was made at a time; called as it is heard of.

        From any thread.
        """
        with self._lock:
            if isinstance(result, Lost):
                self._add_lost(result, indices, made)
            else:
                self._add(result, indices, made)

    def _add(self, result: ChunkOutcome, indices: Sequence[int], made: float) -> None:
        count, now = len(result.seconds), time.time()
        if len(self._seconds) + count > self._limit:
            self.beyond += count
            return
        if not count:
            return
        self._seconds.extend(result.seconds)
        if result.failed:
            number = len(self._chunks) // _CHUNK.size
            for position in sorted(result.failed):
                self._failed += _FAILED.pack(number, position)
        if result.begun:
            ahead = result.begun + sum(result.seconds) - now
            self._ahead[result.host] = max(ahead, self._ahead.get(result.host, ahead))
        self._put(result, indices[:count], made, result.begun, now, _DONE)

    def _add_lost(self, lost: Lost, indices: Sequence[int], made: float) -> None:
        if len(self._chunks) >= self._limit * _CHUNK.size:
            return
        if lost.index is not None and lost.index in indices:
            indices = [lost.index]
        fate = _STOPPED if lost.reason == INTERRUPTED else _LOST
        self._put(lost, indices, made, 0.0, time.time(), fate)

    def _put(
        self,
        result: ChunkOutcome | Lost,
        indices: Sequence[int],
        made: float,
        begun: float,
        heard: float,
        fate: int,
    ) -> None:
        count, first = len(indices), indices[0]
        if not isinstance(indices, range) and count > 1:
            self._scattered[len(self._chunks) // _CHUNK.size] = array("q", indices)
        key = (result.host, result.pid)
        worker = self._workers.setdefault(key, len(self._workers))
        self._chunks += _CHUNK.pack(made, begun, heard, first, count, worker, fate)

    def note(self, host: str, state: str, reason: str = "") -> None:
        """Note what becomes of a host now, from any thread."""
        with self._lock:  # or `news` might give it twice
            self.events.append(Event(time.time() - self.start, host, state, reason))

    def news(self) -> bytes:
        """Return what has come since the last call, for `take` of another one; empty: nothing."""
        with self._lock:
            columns = self._chunks, self._failed, self._seconds, self._workers, self.events
            old, new = self._told, _Told(*(len(column) for column in columns))
            if old == new:
                return b""
            self._told = new
            chunks = bytes(self._chunks[old.chunks :])
            first = old.chunks // _CHUNK.size
            scattered = {n: list(self._scattered[n]) for n in self._scattered if n >= first}
            head = {
                "name": self.name,
                "start": self.start,
                "beyond": self.beyond,
                "ahead": self._ahead,
                "workers": list(self._workers)[old.workers :],
                "events": self.events[old.events :],
                "scattered": list(scattered.items()),
                "sizes": [len(chunks), new.failed - old.failed],
            }
            text = json.dumps(head).encode()
            failed = bytes(self._failed[old.failed :])
            seconds = self._seconds[old.seconds :].tobytes()
        return b"".join((len(text).to_bytes(4, "little"), text, chunks, failed, seconds))

    def take(self, news: bytes) -> None:
        """Add what `news` has given; raises ValueError if it is something else."""
        try:
            end = 4 + int.from_bytes(news[:4], "little")
            head = json.loads(news[4:end])
            chunks, failed = (int(size) for size in head["sizes"])
            self.name, self.start = str(head["name"]), float(head["start"])
            self.beyond, self._ahead = int(head["beyond"]), dict(head["ahead"])
            self.events += (Event(*event) for event in head["events"])
            for host, pid in head["workers"]:
                self._workers[str(host), int(pid)] = len(self._workers)
            self._scattered.update((n, array("q", indices)) for n, indices in head["scattered"])
            self._chunks += news[end : end + chunks]
            self._failed += news[end + chunks : end + chunks + failed]
            self._seconds.frombytes(news[end + chunks + failed :])
        except (KeyError, TypeError) as exc:
            raise ValueError(f"no part of a timeline: {exc}") from exc

    def picture(self, most: int = 0, end: float | None = None) -> Picture:
        """Return what is to be seen of it.

        Parameters
        ----------
        most
            Number of bars, about: neighbours that are short and had the same fate stand together
            in one. 0: one for each item.
        end
            Seconds since the start until the run ended.
        """
        with self._lock:  # a run may be going on: its next chunk may be of a new worker
            lanes = [Lane(host, pid) for host, pid in self._workers]
            data = bytes(self._chunks)
        picture = Picture(self.name, self.start, lanes, [self.name], list(self.events))
        least = sum(self._seconds) / most if most and len(self._seconds) > most else 0.0
        picture.fill(self._bars(lanes, data), least)
        picture.beyond = self.beyond
        picture.end = max(picture.end, end or 0.0)
        return picture

    def _bars(self, lanes: Sequence[Lane], data: bytes) -> Iterator[Bar]:
        """Yield a bar for each item, or for each chunk that was lost, and for waiting."""
        chunks = list(map(_Chunk._make, _CHUNK.iter_unpack(data)))
        failed = self._fates(chunks)
        ends = [0.0] * len(lanes)  # of what each worker has done so far
        position = 0
        for number, chunk in enumerate(chunks):
            worker, heard = chunk.worker, chunk.heard - self.start
            free = max(ends[worker], chunk.made - self.start)
            if chunk.fate != _DONE:
                fate = Fate.LOST if chunk.fate == _LOST else Fate.STOPPED
                if not lanes[worker].pid:  # several may be lost with one host
                    free = chunk.made - self.start
                yield Bar(worker, min(free, heard), heard, chunk.first, chunk.size, fate)
                ends[worker] = max(heard, free)
                continue
            seconds = self._seconds[position : position + chunk.size]
            position += chunk.size
            now = heard - sum(seconds)
            if chunk.begun:
                now = chunk.begun - self._ahead.get(lanes[worker].host, 0.0) - self.start
            now = max(now, free)
            if now > free:
                yield Bar(worker, free, now, chunk.first, 0, Fate.WAITING)
            indices: Sequence[int] = self._scattered.get(number, range(0))
            indices = indices or range(chunk.first, chunk.first + chunk.size)
            for index, each in zip(indices, seconds, strict=True):
                fate = failed.get((number, index), Fate.OK) if failed else Fate.OK
                yield Bar(worker, now, now + each, index, 1, fate)
                now += each
            ends[worker] = now

    def _fates(self, chunks: Sequence[_Chunk]) -> dict[tuple[int, int], Fate]:
        """Return what has failed, by chunk and item: what was run again later was not the end."""
        found: dict[tuple[int, int], Fate] = {}
        last: dict[int, int] = {}
        for number, position in _FAILED.iter_unpack(bytes(self._failed)):
            if number >= len(chunks):  # it came just now
                break
            index = self._indices(chunks, number)[position]
            found[number, index] = Fate.FAILED
            last[index] = number
        for number in range(len(chunks)) if last else ():
            for index in last.keys() & set(self._indices(chunks, number)):
                last[index] = max(last[index], number)
        for number, index in found:
            if number < last[index]:
                found[number, index] = Fate.RETRIED
        return found

    def _indices(self, chunks: Sequence[_Chunk], number: int) -> Sequence[int]:
        if number in self._scattered:
            return self._scattered[number]
        chunk = chunks[number]
        return range(chunk.first, chunk.first + chunk.size)
