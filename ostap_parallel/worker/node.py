"""Node scripts: programs on a host that get their arguments, and log and answer, through pipes.

What started them hands down two descriptors, named in the environment: a file with the arguments,
and a pipe for records and the answer. Nothing listens anywhere.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
import struct
from typing import Any

from ostap_parallel.objects import serialize

# Holds the two descriptors.
VARIABLE = "OSTAP_PARALLEL_NODE"

# Begins each message: what it is, and how long.
HEAD = struct.Struct("!cI")
LOG, ANSWER = b"L", b"A"

# The third word on the command line of a node script: that of a port, which there is none of.
NO_PORT = "0"


class LOFARnode:
    """Base class of what a node script runs.

    The script calls it with its first two words, then `run_with_logging` with the others; or with
    three, then `run_with_stored_arguments`.

    Attributes
    ----------
    logger
        Its records come to the log of the recipe, as ``node.<host>.<class>``.
    outputs
        What is to be found in the results of the job.
    resourceMonitor
        What is used is known without it; it is there for scripts that name their processes to it.
    """

    def __init__(self, *words: object) -> None:
        self._file, self._pipe = _descriptors()
        self._words = words
        self.outputs: dict[str, Any] = {}
        self.environment = os.environ
        self.resourceMonitor = _NoMonitor()
        self.logger = logging.getLogger(f"node.{platform.node()}.{type(self).__name__}")
        self.logger.setLevel(logging.DEBUG)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of the job, as they were given to it."""
        if self._file is None:
            return ()
        size = os.fstat(self._file).st_size
        found: tuple[Any, ...] = serialize.loads(os.pread(self._file, size, 0))
        return found

    def run(self, *args: Any) -> int | None:
        """Do the work and return the exit status; to be overridden."""
        raise NotImplementedError

    def run_with_logging(self, *args: Any) -> int | None:
        """Call `run`, with its records and outputs on their way to the recipe."""
        if args[:1] == (NO_PORT,) and len(self._words) < 3 and self._pipe is not None:
            args = args[1:]
        handler: logging.Handler = logging.NullHandler()
        if self._pipe is not None:
            handler = _ToRecipe(self._pipe)
        self.logger.addHandler(handler)
        try:
            return self.run(*args)
        finally:
            self.logger.removeHandler(handler)
            if self._pipe is not None:
                _send(self._pipe, ANSWER, serialize.dumps(self.outputs))

    def run_with_stored_arguments(self) -> int | None:
        """Call `run` with the arguments of the job, which may be any objects."""
        return self.run_with_logging(*self.arguments)


class _NoMonitor:
    def addPID(self, pid: int) -> None:
        """Do nothing."""


class LOFARnodeTCP(LOFARnode):
    """The same by its other name."""


class _ToRecipe(logging.Handler):
    def __init__(self, pipe: int) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a record must never harm who made it
            fields: dict[str, Any] = {"name": record.name, "levelno": record.levelno}
            fields |= {"levelname": record.levelname, "created": record.created}
            fields["msg"] = record.getMessage()
            if record.exc_info:
                fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
            _send(self._pipe, LOG, json.dumps(fields).encode())


@functools.cache
def _descriptors() -> tuple[int | None, int | None]:
    """Return the descriptors that were handed down; they are for this process alone."""
    numbers = os.environ.pop(VARIABLE, "").split()
    if len(numbers) != 2:
        return None, None
    file, pipe = map(int, numbers)
    for descriptor in (file, pipe):
        os.set_inheritable(descriptor, False)
    return file, pipe


def _send(pipe: int, kind: bytes, data: bytes) -> None:
    message = memoryview(HEAD.pack(kind, len(data)) + data)
    with contextlib.suppress(BrokenPipeError):
        while message:
            message = message[os.write(pipe, message) :]


class Messages:
    """Takes what a node script sends, as it comes.

    Attributes
    ----------
    answer
        The packed outputs, once they are there.
    """

    def __init__(self) -> None:
        self.answer = b""
        self._data = bytearray()

    def take(self, data: bytes) -> None:
        """Take some bytes: log what is a record, keep what is the answer."""
        self._data += data
        while len(self._data) >= HEAD.size:
            kind, size = HEAD.unpack_from(self._data)
            end = HEAD.size + size
            if len(self._data) < end:
                return
            body = bytes(self._data[HEAD.size : end])
            del self._data[:end]
            if kind == ANSWER:
                self.answer = body
            elif kind == LOG:
                with contextlib.suppress(ValueError, TypeError):
                    logging.getLogger().handle(logging.makeLogRecord(json.loads(body)))
