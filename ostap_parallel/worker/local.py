"""A worker process as its server sees it: its pipes, where it is, and how it has ended."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from dataclasses import replace

import ppft

from ostap_parallel.worker.chunk import Lost
from ostap_parallel.worker.cpus import thread_limits
from ostap_parallel.worker.output import OutputReader
from ostap_parallel.worker.process import POSITION, command, disconnect, open_position
from ostap_parallel.worker.transport import Pipe

# Seconds between two looks for workers that have not ended themselves, though the time of their
# item is over: a process that is stopped cannot. Two must find one, so long after its end is due.
OVERDUE = 1.0


# A process that the caller forks must not keep workers alive when the caller dies.
_lifelines: set[int] = set()
os.register_at_fork(after_in_child=lambda: disconnect(*_lifelines))


class Worker(ppft._pp._Worker):  # type: ignore[misc]
    """A worker process as its server sees it."""

    def __init__(self, output: OutputReader) -> None:
        # not ppft's own, which starts the process and waits for it
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # to its thread: go on, or end
        self.replacing = threading.Lock()  # held while it is ended, and another is started
        self.is_free = False
        self._output = output
        self.launch()

    def launch(self) -> None:
        """Start the process without waiting until it is ready; `start` waits."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            (jobs, results, life, out, err, log), yours = _open_pipes(ours, theirs)
            jobs_r, results_w, life_r, out_w, err_w, log_w = yours
            position = open_position()
            ours.callback(os.close, position)
            passed = (jobs_r, results_w, log_w, life_r, position)
            self.process = subprocess.Popen(
                command(passed),
                stdin=subprocess.DEVNULL,
                stdout=out_w,
                stderr=err_w,
                env={**os.environ, **thread_limits(os.environ)},
                pass_fds=passed,
                start_new_session=True,  # Ctrl-C in the terminal is for the caller to handle
            )
            ours.pop_all()
        self.pid = self.process.pid
        self.jobs = 0  # that it has done
        self._stopped = self._is_too_late = self.is_ready = False
        self.t = Pipe(os.fdopen(results, "rb"), os.fdopen(jobs, "wb"))
        self._position = position
        self._lifeline = life
        _lifelines.add(life)
        self._pipes = {out: "stdout", err: "stderr", log: "log"}
        self._printed = select.poll()
        for descriptor, kind in self._pipes.items():
            self._printed.register(descriptor, select.POLLIN)
            self._output.add(descriptor, kind, self.pid)

    def start(self) -> None:
        """Wait until the process is ready; raises RuntimeError if it ended instead."""
        self.t.receive()
        self.is_ready = True  # for signals, too

    def stop(self, patience: float = 0.0) -> Lost:
        """End the process and all it started; return how it ended, and at which item.

        One that is about to end by itself gets `patience` seconds, so as to tell how.
        """
        self.is_free = False
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.signal(signal.SIGKILL)
        status = self.process.wait()
        if not self._stopped:
            self._stopped = True
            self.drain()
            for descriptor in self._pipes:
                self._output.remove(descriptor)
            with contextlib.suppress(OSError):
                self.t.close()  # flushing a broken pipe
            _lifelines.discard(self._lifeline)
            os.close(self._lifeline)
            self._lost = self._describe(status)
            os.close(self._position)
        return self._lost

    def is_between_items(self) -> bool:
        """Return whether it runs no item; as it may end meanwhile, this is no more than likely."""
        try:
            return self._read_position()[0] < 0
        except (OSError, struct.error):
            return False

    def is_overdue(self) -> bool:
        """Return whether it should have ended itself by now for an item that took too long."""
        try:
            index, deadline = self._read_position()
        except (OSError, struct.error):
            return False
        return index >= 0 and 0 < deadline < time.monotonic_ns() - OVERDUE * 1e9

    def is_dead(self) -> bool:
        """Return whether the process has ended, whoever holds its pipes open."""
        return self.is_ready and self.process.poll() is not None

    def end(self) -> None:
        """Kill what is overdue, or what a dead one has left."""
        self._is_too_late = not self.is_dead()
        self.signal(signal.SIGKILL)

    def _read_position(self) -> tuple[int, int]:
        index, deadline = POSITION.unpack(os.pread(self._position, POSITION.size, 0))
        return index, deadline

    def _describe(self, status: int) -> Lost:
        index, deadline = self._read_position()
        lost = Lost(socket.gethostname(), self.pid, _ending(self.pid, status))
        if index < 0:  # between items: none of them is to blame
            return lost
        # `execute._arm` has it ended with this status
        timed_out = (status == 1 or self._is_too_late) and 0 < deadline <= time.monotonic_ns()
        return replace(lost, by_worker=True, index=index, timed_out=timed_out)

    def signal(self, number: int) -> None:
        """Send a signal to the process and all it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def drain(self) -> None:
        """Pass on all that the process has printed by now."""
        ready = {descriptor for descriptor, _ in self._printed.poll(0)}
        for descriptor in self._pipes:
            if descriptor in ready:  # to ask each costs more than most jobs' other overhead
                self._output.read(descriptor)
            self._output.end_chunk(descriptor)


def _open_pipes(
    ours: contextlib.ExitStack, theirs: contextlib.ExitStack
) -> tuple[list[int], list[int]]:
    """Return our and a worker's ends of: jobs, results, lifeline, output, errors, log.

    They are closed with the stacks; so no end remains if another cannot be opened.
    """
    mine, yours = [], []
    for we_write in (True, False, True, False, False, False):
        reader, writer = os.pipe()
        own, other = (writer, reader) if we_write else (reader, writer)
        ours.callback(os.close, own)
        theirs.callback(os.close, other)
        mine.append(own)
        yours.append(other)
    return mine, yours


def _ending(pid: int, status: int) -> str:
    if status >= 0:
        return f"worker {pid} ended with exit status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"worker {pid} was killed by {names.get(-status, f'signal {-status}')}"
