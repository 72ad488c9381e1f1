"""What a command prints, as it is read: bounded in memory, told of by line."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from typing import IO

# A line longer than this is told of in pieces.
MAX_LINE = 64 * 1024


@dataclass(frozen=True)
class Taken:
    """What a command has printed.

    Attributes
    ----------
    data
        All of it, or its beginning and its end.
    size
        How many bytes there were.
    place
        The file on the worker's machine that holds all of it, if `data` does not.
    """

    data: bytes = b""
    size: int = 0
    place: str = ""


class Stream:
    """One output of a command.

    Parameters
    ----------
    name, level
        Of the log record for each line; no level, no records.
    keep
        Bytes that are kept in memory.
    spool
        Keep all that is longer in a file.
    """

    def __init__(self, name: str, level: int | None, keep: int, spool: bool = False) -> None:
        self._name, self._level, self._keep, self._spool = name, level, keep, spool
        self._size = 0
        self._head, self._tail = bytearray(), bytearray()
        self._line = bytearray()
        self._file: IO[bytes] | None = None

    def take(self, data: bytes) -> None:
        """Take what was printed; raises OSError if there is no room for it."""
        self._size += len(data)
        if self._level is not None:
            self._tell(data)
        if self._file is not None:
            self._file.write(data)
        elif self._size <= self._keep:
            self._head += data
        elif self._spool:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - `is_wanted` closes
            self._file.write(self._head + data)
            self._head.clear()
        else:
            self._keep_ends(data)

    def _keep_ends(self, data: bytes) -> None:
        half = self._keep // 2
        if not self._tail:
            self._head += data
            self._tail = self._head[half:]
            del self._head[half:]
        else:
            self._tail += data
        if len(self._tail) > 2 * half + MAX_LINE:
            del self._tail[: len(self._tail) - half]

    def drop(self) -> None:
        """Keep nothing of it."""
        self._size = 0
        self._head.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    def end(self) -> Taken:
        """Take notice that there is no more; return what was printed."""
        if self._line and self._level is not None:
            self._tell(b"\n")
        if self._file is not None:
            return Taken(b"", self._size, f"/proc/{os.getpid()}/fd/{self._file.fileno()}")
        if self._size > self._keep:
            half = self._keep // 2
            tail = self._tail[len(self._tail) - half :] if half else b""
            return Taken(bytes(self._head + tail), self._size)
        return Taken(bytes(self._head), self._size)

    def is_wanted(self) -> bool:
        """Return whether its file has still to be kept; close it if not."""
        if self._file is None:
            return False
        if os.fstat(self._file.fileno()).st_size:
            return True
        self._file.close()
        return False

    def _tell(self, data: bytes) -> None:
        *lines, rest = (self._line + data).split(b"\n")
        while len(rest) > MAX_LINE:
            lines.append(rest[:MAX_LINE])
            rest = rest[MAX_LINE:]
        self._line = bytearray(rest)
        root = logging.getLogger()
        for line in lines:
            text = line.decode("utf-8", "backslashreplace")
            # A logger for each name would stay for ever.
            record = root.makeRecord(self._name, self._level or 0, "", 0, "%s", (text,), None)
            root.handle(record)
