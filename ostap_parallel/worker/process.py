"""A worker process: what a task prints cannot break it, and it never outlives its server.

Jobs and results have a connection of their own, unlike in ppft's worker, where standard output
is the protocol; standard output and error are pipes that the server reads; a third pipe brings log
records; the read end of a *lifeline*, whose closing by the server's end kills the worker
with all that it started, however busy it is; and a piece of memory tells the server which item
the worker is at, also after its death.
"""

from __future__ import annotations

import contextlib
import ctypes
import decimal  # noqa: F401 - once for all workers: each looks at it, see `objects.settings`
import fcntl
import functools
import io
import json
import locale  # noqa: F401
import logging
import mmap
import multiprocessing.process
import os
import signal
import socket
import sys
from typing import Any

from ostap_parallel import libraries
from ostap_parallel.lending import borrower
from ostap_parallel.logs import SHOWN, shown_by
from ostap_parallel.worker import generators, nested
from ostap_parallel.worker.control import POSITION, set_name
from ostap_parallel.worker.execute import bind, executing, restore, take_signals
from ostap_parallel.worker.processes import disconnect
from ostap_parallel.worker.restore import Baseline
from ostap_parallel.worker.transport import Buffered


def main(arguments: tuple[tuple[int, int, int, int], int | None, tuple[str, int]]) -> None:
    """Serve jobs until the server closes the connection or the lifeline.

    `arguments` are the descriptors of the connection, the log, the lifeline and the position;
    after how many jobs to leave; and the host and the number of this worker.
    """
    descriptors, tasks, (host, number) = arguments
    connection, log, lifeline, position = descriptors
    sys.argv = ["ostap_parallel-worker"]
    set_name("ppworker")
    _name_process(host, number)
    borrower.Here.is_near = not host
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    _die_with(lifeline)
    # A process that a task forks must not hold the connection open when this one dies.
    os.register_at_fork(after_in_child=lambda: disconnect(connection))
    take_signals()
    libraries.watch(generators.take_in)
    executing.position = memoryview(mmap.mmap(position, POSITION.size)).cast("q")
    os.close(position)
    logging.getLogger().addHandler(LogToServer(log))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    _buffer_c_output_by_line()
    executing.baseline = Baseline()
    protocol = _Protocol(socket.socket(fileno=connection))
    link = nested.connect(protocol)
    protocol.send(b"ready")
    while tasks is None or link.jobs < tasks:
        run_chunk = protocol.creceive(bind)
        link.serve(run_chunk, protocol.receive(), tasks)
        restore()  # while the server has its own things to do
    borrower.flush()
    os._exit(0)


def _name_process(host: str, number: int) -> None:
    """Be one of many by the names that programs for `multiprocessing` ask for."""
    this: Any = multiprocessing.current_process()
    this.name = f"{host}-PoolWorker-{number}" if host else f"PoolWorker-{number}"
    this._identity = (number,)
    vars(multiprocessing.process)["_parent_process"] = _Parent()


class _Parent:
    """What ``multiprocessing.parent_process`` returns: by it programs ask whether they are one."""

    name = "MainProcess"

    def __init__(self) -> None:
        self.pid = self.ident = os.getppid()

    def is_alive(self) -> bool:
        """Return true: a worker ends with it."""
        return True


class _Protocol(Buffered):
    def receive(self, preprocess: Any = None) -> Any:
        try:
            return super().receive(preprocess)
        except (RuntimeError, OSError):
            os._exit(0)  # the server closed the connection


# Characters of a record's text that are passed on.
MAX_RECORD = 4 << 20


class LogToServer(logging.Handler):
    """Writes each record as one JSON line, also in processes that tasks fork."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self._descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a record must never harm the task that made it
            plain = (str, int, float)
            fields = {key: value for key, value in vars(record).items() if type(value) in plain}
            fields["msg"] = record.getMessage()[:MAX_RECORD]
            if shown := shown_by(record, borrower.Here.is_near):
                fields[SHOWN] = shown
            if record.exc_info:
                fields["exc_text"] = logging.Formatter().formatException(record.exc_info)
            self._write(json.dumps(fields).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        # Between processes; threads have the handler's.
        fcntl.lockf(self._descriptor, fcntl.LOCK_EX)
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        finally:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def _die_with(lifeline: int) -> None:
    """Arrange that this process and all in its session end when the lifeline's other end does.

    The kernel itself kills the process group: also while C code holds the interpreter. This is
    what ties the package to Linux, see F_SETSIG in fcntl(2).
    """
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    # It may have been closed before this was set up.
    with contextlib.suppress(BlockingIOError):
        if os.read(lifeline, 1) == b"":
            os._exit(0)


def _buffer_c_output_by_line() -> None:
    # C and C++ hold back what they print to a pipe until some KiB have come together; and of a
    # line, what its end has not come for.
    with contextlib.suppress(AttributeError, OSError, ValueError):
        libc = ctypes.CDLL(None)
        stdout = ctypes.c_void_p.in_dll(libc, "stdout")
        libc.setvbuf(stdout, None, 1, 0)  # 1 is _IOLBF
        executing.flush = functools.partial(libc.fflush, stdout)
