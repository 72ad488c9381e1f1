"""What a job tells of its items, as it goes on: what of that is there survives its end."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import threading
import zlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ostap_parallel.worker.chunk import ChunkOutcome, Lost
from ostap_parallel.worker.files import write_all

# Seconds after which what was written is brought to the disk, and a file is touched to show that
# the job lives.
SYNC = 10.0

# Characters of an item's output that are kept, of the end.
MAX_OUTPUT = 1 << 20


@dataclass(slots=True)
class Record:
    """What became of an item in one job.

    Attributes
    ----------
    answer
        Its packed value, or what `worker.chunk.unpack_error` reads.
    lost
        How its worker has ended, if it did: there is no answer then.
    start
        In seconds since the epoch.
    memory
        Bytes that its worker had in use at most, 0 if that is not known.
    attempt
        How often it was begun, from 1.
    """

    index: int
    ok: bool = False
    answer: Any = None
    lost: str = ""
    out_of_memory: bool = False
    host: str = ""
    pid: int = 0
    start: float = 0.0
    seconds: float = 0.0
    memory: int = 0
    attempt: int = 1
    stdout: str = ""
    stderr: str = ""

    def outcome(self) -> ChunkOutcome:
        """Return it as a worker would have sent it, alone."""
        failed = set() if self.ok else {0}
        return ChunkOutcome(self.host, self.pid, [self.answer], array("d", [self.seconds]), failed)


@dataclass
class Told:
    """All that a job has told of its chunk.

    Attributes
    ----------
    records
        Of items that have ended.
    running
        Items that had begun and not ended, and when, in seconds since the epoch.
    whole
        What became of the chunk as one.
    end
        Why the job has ended before all was done, see `scheduler.End`, or ``"done"``; empty: it
        did not say so.
    words
        Of the scheduler, or of who found that it had ended.
    job
        Its id and host.
    """

    records: dict[int, Record] = field(default_factory=dict)
    running: dict[int, float] = field(default_factory=dict)
    whole: ChunkOutcome | Lost | None = None
    end: str = ""
    words: str = ""
    job: str = ""
    host: str = ""
    has_begun: bool = False

    def add(self, kind: str, value: Any) -> None:
        """Take in one entry of a file."""
        if kind == "job":
            self.job, self.host = value
            self.has_begun = True
        elif kind == "began":
            self.running.update(value)
        elif kind == "records":
            self.records.update((record.index, record) for record in value)
            for record in value:
                self.running.pop(record.index, None)
        elif kind == "whole":
            self.whole = value
        elif kind == "end":
            self.end, self.words = value


def read(*paths: Path) -> Told:
    """Return what is in files of results; one that ends in the middle is read so far."""
    told = Told()
    broken = FileNotFoundError, EOFError, pickle.UnpicklingError
    for path in paths:
        with contextlib.suppress(*broken), path.open("rb") as file:
            while True:
                told.add(*pickle.load(file))
    return told


def read_on(path: Path, place: int) -> tuple[list[Record], int]:
    """Return the records behind a place of a file that is being written, and where to go on.

    Of what another host writes some pages may be seen before others: an entry counts once it has
    its sum.
    """
    found: list[Record] = []
    with contextlib.suppress(Exception):  # of what is not whole anything may come
        with path.open("rb") as file:
            file.seek(place)
            data = file.read()
        stream, records, entry, begin = io.BytesIO(data), list[Record](), b"", place
        while True:
            start = stream.tell()
            kind, value = pickle.load(stream)
            if kind == "records":
                records, entry = value, data[start : stream.tell()]
            elif kind == "sum" and zlib.crc32(entry) != value:
                break
            elif kind == "sum":
                found += records
                place = begin + stream.tell()
    return found, place


class Writer:
    """Writes what becomes of a chunk; it has its last name when it is closed.

    What is written survives the end of this process. It is brought to the disk now and then.
    """

    def __init__(self, part: Path, final: Path, job: str, host: str) -> None:
        self._part, self._final = part, final
        self._file = part.open("ab", buffering=0)
        self._is_over = threading.Event()
        self.add("job", (job, host))
        self._keeping = threading.Thread(target=self._keep, name="records", daemon=True)
        self._keeping.start()

    def add(self, kind: str, value: Any) -> None:
        """Write an entry, or nothing of it; raises OSError."""
        data = pickle.dumps((kind, value))
        if kind == "records":
            data += pickle.dumps(("sum", zlib.crc32(data)))
        begin = self._file.seek(0, os.SEEK_END)
        try:
            write_all(self._file, data)
        except OSError as exc:  # the disk is full; the log of the job needs room to tell so
            exc.filename = str(self._part)
            with contextlib.suppress(OSError):
                self._file.truncate(begin)
            raise

    def _keep(self) -> None:
        while not self._is_over.wait(SYNC):
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
                os.utime(self._part)

    def close(self, end: str, words: str = "") -> None:
        """Have all on disk, and give the file its last name."""
        self.add("end", (end, words))
        self._is_over.set()
        self._keeping.join()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self._final)


def write_verdict(told: Told, write: Callable[[bytes], object]) -> None:
    """Write what a job that has ended without a last word has told, with what ended it."""
    entries: list[tuple[str, Any]] = []
    if told.has_begun:
        entries.append(("job", (told.job, told.host)))
    entries.append(("records", list(told.records.values())))
    entries.append(("began", told.running))
    if told.whole is not None:
        entries.append(("whole", told.whole))
    entries.append(("end", (told.end, told.words)))
    write(b"".join(map(pickle.dumps, entries)))


def is_alive(part: Path, within: float, now: float) -> bool:
    """Return whether a file of results was touched lately."""
    with contextlib.suppress(OSError):
        return now - part.stat().st_mtime < within
    return False
