"""A worker process as its crew sees it: its connection, where it is, and how it has ended."""

from __future__ import annotations

import contextlib
import mmap
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ostap_parallel.machine.channel import Channel
from ostap_parallel.machine.jobs import Job
from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.output import OutputReader
from ostap_parallel.worker.chunk import Lost
from ostap_parallel.worker.control import POSITION, open_position
from ostap_parallel.worker.processes import close_kept, describe_status, forking, keep_from_forks
from ostap_parallel.worker.transport import BUFFER_SIZE

# Seconds by which a worker may be late in ending itself for an item that took too long.
OVERDUE = 1.0


class Keeper(Protocol):
    """What a worker tells of what becomes of it."""

    output: OutputReader

    def tell(self) -> None:
        """Take notice that a process is there."""

    def bury(self, worker: Worker) -> None:
        """Take notice that a process has ended."""

    def lose(self, worker: Worker, reason: str, counts: bool = True) -> None:
        """Take notice that there is no process."""


def open_pipe(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack, we_write: bool = False
) -> tuple[int, int]:
    """Return both ends of a pipe, closed with the stacks: none remains if another fails."""
    reader, writer = os.pipe()
    own, other = (writer, reader) if we_write else (reader, writer)
    ours.callback(os.close, own)
    theirs.callback(os.close, other)
    return reader, writer


class Worker:
    """A worker process as its crew sees it: its connection, where it is, and how it has ended.

    Raises OSError if no descriptors are to be had for it.

    Attributes
    ----------
    number
        Of this attempt to start one.
    theirs
        The descriptors that the process gets.
    job
        What it does.
    greeting
        Makes the job that it does first.
    """

    def __init__(
        self,
        keeper: Keeper,
        number: int,
        tasks: int | None,
        greeting: Callable[[], Job] | None = None,
    ) -> None:
        self._keeper, self.number, self.tasks = keeper, number, tasks
        self.greeting = greeting
        self.pid = 0
        self.job: Job | None = None
        self.is_ready = self.is_leaving = self.has_gone = False
        self.status: int | None = None  # its exit status, as `subprocess` has it
        self.is_late = False
        self.failures = 0  # starts in its place before, in a row, that have failed
        self.stopped_since: float | None = None
        self._open()

    def _open(self) -> None:
        with forking, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            mine, yours = socket.socketpair()
            ours.callback(mine.close)
            for end in mine, yours:
                for option in socket.SO_SNDBUF, socket.SO_RCVBUF:
                    end.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)
            theirs.callback(yours.close)
            life_r, life_w = open_pipe(ours, theirs, we_write=True)
            (out_r, out_w), (err_r, err_w) = open_pipe(ours, theirs), open_pipe(ours, theirs)
            log_r, log_w = open_pipe(ours, theirs)
            position = open_position()
            ours.callback(os.close, position)
            self._position = mmap.mmap(position, POSITION.size, access=mmap.ACCESS_READ)
            self.theirs = [yours.fileno(), log_w, life_r, position, out_w, err_w]
            self._ends = theirs.pop_all()
            ours.pop_all()
            keep_from_forks(life_w)
            keep_from_forks(mine.fileno())
        self._ends.callback(os.close, position)
        self._lifeline = life_w
        self._socket = mine
        self._pipes = {out_r: "stdout", err_r: "stderr", log_r: "log"}
        self._printed = select.poll()

    def connect(
        self, loop: Loop, on_message: Callable[[bytes], object], on_end: Callable[[str], object]
    ) -> None:
        """Begin to listen to the process."""
        self.channel = Channel(loop, self._socket, on_message, on_end)

    def close_theirs(self) -> None:
        """Close the descriptors of the process, which has them now."""
        self._ends.close()

    def has_started(self, pid: int) -> None:
        """Take notice that the process is there."""
        self.pid = pid
        if self.has_gone:  # it was not wanted any more
            self.signal(signal.SIGKILL)
            return
        for descriptor, kind in self._pipes.items():
            self._printed.register(descriptor, select.POLLIN)
            self._keeper.output.add(descriptor, kind, pid, lambda: self.only)
        self._keeper.tell()

    def cannot_start(self, reason: str, counts: bool = True) -> None:
        """Take notice that there is no process."""
        self.close_theirs()
        self._keeper.lose(self, reason, counts)

    def has_ended(self, status: int) -> None:
        """Take notice of how the process has ended."""
        self.status = status
        self._keeper.bury(self)

    def signal(self, number: int) -> None:
        """Send a signal to the process and all it started."""
        if self.pid and self.status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def drain(self) -> None:
        """Pass on all that the process has printed by now."""
        for descriptor, _ in self._printed.poll(0):
            self._keeper.output.read(descriptor)
        self._keeper.output.end_chunk(self._pipes)

    def close(self) -> None:
        """Give back what was needed to talk to the process, and end what it has left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        if self.pid:
            self.drain()
            for descriptor in self._pipes:
                self._keeper.output.remove(descriptor)
        else:
            for descriptor in self._pipes:
                os.close(descriptor)
        self.close_theirs()
        if hasattr(self, "channel"):
            self.channel.close()
        close_kept(self._socket.detach())  # unless the channel has closed it
        close_kept(self._lifeline)
        self._position.close()

    @property
    def position(self) -> tuple[int, int]:
        """The index of the item that it runs, or -1, and when it is to end itself, or 0."""
        index, deadline, _ = POSITION.unpack(self._position[:])
        return index, deadline

    @property
    def only(self) -> int:
        """The index of the item that its last chunk consists of, or -1 if there are more."""
        only: int = POSITION.unpack(self._position[:])[2]
        return only

    def is_overdue(self) -> bool:
        """Return whether it should have ended itself by now for an item that took too long."""
        index, deadline = self.position
        return index >= 0 and 0 < deadline < time.monotonic_ns() - OVERDUE * 1e9

    def state(self) -> str:
        """Return the letter for the state of the process, as in ps; empty: it is gone."""
        try:
            text = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return ""
        return text.rpartition(")")[2].split()[0]

    def describe(self) -> Lost:
        """Return how the process has ended, and at which item."""
        index, deadline = self.position
        lost = Lost(socket.gethostname(), self.pid, _ending(self))
        if index < 0:  # between items: none of them is to blame
            return lost
        # `execute._arm` has it ended with this status
        timed_out = (self.status == 1 or self.is_late) and 0 < deadline <= time.monotonic_ns()
        return replace(lost, by_worker=True, index=index, timed_out=timed_out)


def _ending(worker: Worker) -> str:
    status = worker.status
    if worker.stopped_since is not None and status == -signal.SIGKILL:
        return f"worker {worker.pid} was stopped by a signal and did not go on"
    if status is None:
        return f"worker {worker.pid} has ended; how, nobody can tell"
    return f"worker {worker.pid} {describe_status(status)}"
