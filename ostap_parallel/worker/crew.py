"""The workers of this machine: started by their template, fed, watched, and replaced."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from ostap_parallel.worker import template
from ostap_parallel.worker.chunk import Lost, locate, pack_result
from ostap_parallel.worker.cpus import thread_limits
from ostap_parallel.worker.jobs import Job, Machine, Queue
from ostap_parallel.worker.loop import Loop, Timer
from ostap_parallel.worker.nested import LAST, REQUEST
from ostap_parallel.worker.output import OutputReader
from ostap_parallel.worker.process import POSITION, open_position
from ostap_parallel.worker.processes import (
    close_kept,
    interpreter_options,
    keep_from_forks,
    start_apart,
)
from ostap_parallel.worker.transport import BUFFER_SIZE, Channel

logger = logging.getLogger(__name__)

# How often a worker that dies as it starts is started: it may be killed just then, too.
STARTS = 3

# Workers that are being started at once: what is handed to the template is held by the system.
STARTING = 16

# Seconds until a worker is interrupted again that had not begun an item when it was interrupted.
AGAIN = 0.2

# Seconds between two looks for workers that have not ended themselves, though the time of their
# item is over: a process that is stopped cannot. Two must find one, so long after its end is due.
OVERDUE = 1.0

# Seconds that a worker may be stopped, by a signal, while it has a job.
STOPPED = 5.0

# Seconds that the system may take to tell how a process ended that has closed its connection.
PATIENCE = 1.0


class Spawner:
    """Starts workers through a template process, which is started when it is first needed.

    Parameters
    ----------
    preload
        Modules that the template imports.
    fresh
        Have each worker be a new interpreter.
    """

    def __init__(
        self, loop: Loop, output: OutputReader, preload: Collection[str] = (), fresh: bool = False
    ) -> None:
        self._loop, self._output = loop, output
        self._preload, self._fresh = list(preload), fresh
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._workers: dict[int, Worker] = {}  # by pid: those that have not ended
        self._starting: dict[int, Worker] = {}  # by number: those that the template was asked for
        self._queue: list[Worker] = []
        self._printed: list[int] = []

    def start(self, worker: Worker) -> None:
        """Have a worker started; it learns of that. Raises OSError if no template can be."""
        if self._control is None:
            self._start_template()
        self._queue.append(worker)
        self._ask()

    def _start_template(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            mine, yours = socket.socketpair()
            ours.callback(mine.close)
            theirs.callback(yours.close)
            (out_r, out_w), (err_r, err_w) = _pipe(ours, theirs), _pipe(ours, theirs)
            arguments = (yours.fileno(), self._preload, self._fresh)
            path = [entry or os.getcwd() for entry in sys.path]  # noqa: PTH109
            words = template.command(path, "template", arguments)
            self._process = start_apart(
                [sys.executable, *interpreter_options(), *words],
                stdin=subprocess.DEVNULL,
                stdout=out_w,
                stderr=err_w,
                env={**os.environ, **thread_limits(os.environ)},
                pass_fds=[yours.fileno()],
            )
            ours.pop_all()
        self._control = mine
        keep_from_forks(mine.fileno())
        self._printed = [out_r, err_r]
        for descriptor, kind in (out_r, "stdout"), (err_r, "stderr"):
            self._output.add(descriptor, kind, self._process.pid)
        self._loop.watch(mine.fileno(), self._hear)

    def _ask(self) -> None:
        """Ask the template for workers, a few at a time."""
        while self._queue and len(self._starting) < STARTING and self._control is not None:
            worker = self._queue.pop(0)
            wanted = {
                "number": worker.number,
                "tasks": worker.tasks,
                "path": [entry or os.getcwd() for entry in sys.path],  # noqa: PTH109
                "directory": _directory(),
                "environment": {**os.environ, **thread_limits(os.environ)},
                "options": interpreter_options(),
            }
            self._starting[worker.number] = worker
            try:
                template.send(self._control, wanted, worker.theirs)
            except OSError:  # it has just ended, which is about to be heard
                return
            finally:
                worker.close_theirs()

    def _hear(self, mask: int) -> None:
        assert self._control is not None
        try:
            message = template.receive(self._control, [])
        except OSError:
            message = None
        match message:
            case ("started", number, pid):
                worker = self._starting.pop(number)
                self._workers[pid] = worker
                worker.has_started(pid)
            case ("failed", number, reason):
                self._starting.pop(number).cannot_start(reason)
            case ("ended", pid, status):
                if pid in self._workers:
                    self._workers.pop(pid).has_ended(status)
            case ("ready", threaded, failed):
                _warn(threaded, failed)
            case _:
                self._lose_template()
        self._ask()

    def _lose_template(self) -> None:
        """Go on without the template, which has ended; the next worker starts another one."""
        starting, self._starting = self._starting, {}
        queue, self._queue = self._queue, []
        self._workers.clear()  # how they end is not told any more
        self._end_template()
        for worker in (*starting.values(), *queue):
            worker.cannot_start("the process that starts workers has ended")

    def _end_template(self) -> None:
        if self._control is not None:
            self._loop.forget(self._control.fileno())
            descriptor = self._control.detach()
            self._control = None
            close_kept(descriptor)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5.0)
            self._process.kill()
            self._process.wait()
            self._process = None
        for descriptor in self._printed:
            self._output.read(descriptor)
            self._output.end_chunk(descriptor)
            self._output.remove(descriptor)
        self._printed = []

    def is_orphan(self, worker: Worker) -> bool:
        """Return whether nobody tells how a worker ends."""
        return worker.pid not in self._workers

    def close(self) -> None:
        """End the template, and all workers with it."""
        self._queue.clear()
        self._starting.clear()
        self._end_template()


def _warn(threaded: list[str], failed: list[tuple[str, str]]) -> None:
    for name, reason in failed:
        logger.warning("preload: %s cannot be imported: %s", name, reason)
    if threaded:
        names = ", ".join(threaded)
        text = "preload: importing %s has started a thread: each worker is a new interpreter"
        logger.warning(text, names)


def _directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        return "/"


def _pipe(
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
    """

    def __init__(self, crew: Crew, number: int, tasks: int | None) -> None:
        self.crew, self.number, self.tasks = crew, number, tasks
        self.pid = 0
        self.job: Job | None = None
        self.is_ready = self.is_leaving = self.has_gone = False
        self.status: int | None = None  # its exit status, as `subprocess` has it
        self.is_late = False
        self.failures = 0  # starts in its place before, in a row, that have failed
        self.stopped_since: float | None = None
        self._open()

    def _open(self) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            mine, yours = socket.socketpair()
            ours.callback(mine.close)
            for end in mine, yours:
                for option in socket.SO_SNDBUF, socket.SO_RCVBUF:
                    end.setsockopt(socket.SOL_SOCKET, option, BUFFER_SIZE)
            theirs.callback(yours.close)
            life_r, life_w = _pipe(ours, theirs, we_write=True)
            (out_r, out_w), (err_r, err_w) = _pipe(ours, theirs), _pipe(ours, theirs)
            log_r, log_w = _pipe(ours, theirs)
            position = open_position()
            ours.callback(os.close, position)
            self._position = mmap.mmap(position, POSITION.size, access=mmap.ACCESS_READ)
            self.theirs = [yours.fileno(), log_w, life_r, position, out_w, err_w]
            self._ends = theirs.pop_all()
            ours.pop_all()
        self._ends.callback(os.close, position)
        self._lifeline = life_w
        self._socket = mine
        self._pipes = {out_r: "stdout", err_r: "stderr", log_r: "log"}
        self._printed = select.poll()
        keep_from_forks(life_w)

    def connect(self, loop: Loop, on_message: Callable[[bytes], object], on_end: Any) -> None:
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
            self.crew.output.add(descriptor, kind, pid)
        self.crew.tell()

    def cannot_start(self, reason: str) -> None:
        """Take notice that there is no process."""
        self.close_theirs()
        self.crew.lose(self, reason)

    def has_ended(self, status: int) -> None:
        """Take notice of how the process has ended."""
        self.status = status
        self.crew.bury(self)

    def signal(self, number: int) -> None:
        """Send a signal to the process and all it started."""
        if self.pid and self.status is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def drain(self) -> None:
        """Pass on all that the process has printed by now."""
        ready = {descriptor for descriptor, _ in self._printed.poll(0)}
        for descriptor in self._pipes:
            if descriptor in ready:  # to ask each costs more than most jobs' other overhead
                self.crew.output.read(descriptor)
            self.crew.output.end_chunk(descriptor)

    def close(self) -> None:
        """Give back what was needed to talk to the process, and end what it has left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        if self.pid:
            self.drain()
            for descriptor in self._pipes:
                self.crew.output.remove(descriptor)
        else:
            for descriptor in self._pipes:
                os.close(descriptor)
        self.close_theirs()
        if hasattr(self, "channel"):
            self.channel.close()
        self._socket.close()
        close_kept(self._lifeline)
        self._position.close()

    @property
    def position(self) -> tuple[int, int]:
        """The index of the item that it runs, or -1, and when it is to end itself, or 0."""
        index, deadline = POSITION.unpack(self._position[:])
        return index, deadline

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
    if status >= 0:
        return f"worker {worker.pid} ended with exit status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"worker {worker.pid} was killed by {names.get(-status, f'signal {-status}')}"


class Crew(Machine):
    """The workers of this machine.

    Parameters
    ----------
    on_empty
        Called when the last worker is lost for good.
    tasks_per_worker
        Jobs after which a worker process is replaced; ``None`` for no limit.
    """

    def __init__(
        self,
        label: str,
        queue: Queue,
        loop: Loop,
        output: OutputReader,
        *,
        on_empty: Callable[[], object],
        tasks_per_worker: int | None = None,
        preload: Collection[str] = (),
        fresh: bool = False,
    ) -> None:
        super().__init__(label)
        self.output = output
        self._queue, self._loop = queue, loop
        self._spawner = Spawner(loop, output, preload, fresh)
        self._on_empty, self._tasks = on_empty, tasks_per_worker
        self._changed = threading.Condition(loop.lock)
        self._workers: list[Worker] = []
        self._leaving: set[Worker] = set()  # no longer counted, and not ended yet
        self._free: dict[Worker, None] = {}
        self._starts = 0
        self._last_failure = ""
        self._watching: Timer | None = None
        self._suspects: dict[Worker, Job] = {}
        self._is_closed = False

    def count(self) -> int:
        """Return the number of workers."""
        return len(self._workers)

    def pids(self) -> list[int]:
        """Return the process ids of the workers, also of those that are just being started."""
        with self._loop.lock:
            self._changed.wait_for(lambda: all(w.pid for w in self._workers), PATIENCE)
            return [worker.pid for worker in self._workers if worker.pid]

    def has_room(self) -> bool:
        """Return whether a worker is free."""
        limited = self.limit is not None and len(self.running) >= self.limit
        return bool(self._free) and not limited

    def tell(self) -> None:
        """Wake who waits for workers."""
        self._changed.notify_all()

    def resize(self, wanted: int) -> None:
        """Have so many workers; return when they are ready.

        Raises
        ------
        OSError, RuntimeError
            They cannot be started; there are as many as before then.
        """
        with self._loop.lock:
            new: list[Worker] = []
            try:
                for _ in range(wanted - len(self._workers)):
                    new.append(self._open_worker())
                self._last_failure = ""
                self._workers += new
                for worker in new:
                    self._spawner.start(worker)
            except BaseException:
                self._discard(new)
                raise
            while len(self._workers) > wanted:
                self._dismiss(self._workers.pop())
            try:
                self._changed.wait_for(lambda: all(w.is_ready or w.has_gone for w in new))
            except BaseException:
                self._discard(new)
                raise
            if new and not self._workers and self._last_failure:
                raise RuntimeError(f"no worker can be started: {self._last_failure}")

    def _discard(self, workers: list[Worker]) -> None:
        for worker in workers:
            if worker in self._workers:
                self._workers.remove(worker)
            worker.has_gone = True
            self._free.pop(worker, None)
            worker.signal(signal.SIGKILL)
            worker.close()

    def _open_worker(self) -> Worker:
        self._starts += 1
        worker = Worker(self, self._starts, self._tasks)
        worker.connect(
            self._loop,
            lambda message: self._hear(worker, message),
            lambda reason: self._end_soon(worker),
        )
        return worker

    def _dismiss(self, worker: Worker) -> None:
        """Have a worker end when it has done its job."""
        worker.is_leaving = True
        self._leaving.add(worker)
        self._free.pop(worker, None)
        if worker.job is None:
            worker.channel.close()  # it ends then

    # -- jobs

    def begin(self, job: Job) -> None:
        """Have a free worker do a job."""
        worker = next(iter(self._free))
        del self._free[worker]
        worker.job = job
        chunk = job.chunk
        if job.blob or job.modules:
            location = job.blob.location if job.blob else ""
            chunk = locate(chunk, location, job.modules.local if job.modules else b"")
        worker.channel.csend(job.call)
        worker.channel.send(chunk)
        if self._watching is None:
            self._watching = self._loop.call_later(OVERDUE, self._watch)

    def _hear(self, worker: Worker, message: bytes) -> None:
        if not worker.is_ready:
            worker.is_ready = True
            self._set_free(worker)
            self._changed.notify_all()
            return
        job = worker.job
        if job is None:
            return
        if message.startswith(REQUEST):
            if job.ask is not None:
                job.ask(job, message)
            return
        worker.job = None
        worker.drain()
        if message.startswith(LAST):  # it has done as many as it may
            message = message.removeprefix(LAST)
            self._replace(worker)
        elif worker.is_leaving:
            worker.channel.close()
        else:
            self._free[worker] = None
        self._queue.end(self, job, message)

    def _set_free(self, worker: Worker) -> None:
        if worker.is_leaving:
            worker.channel.close()
        else:
            self._free[worker] = None
            self._queue.dispatch()

    def answer(self, job: Job, message: bytes) -> None:
        """Answer what a job has asked."""
        for worker in self._with(job):
            worker.channel.send(message)

    def signal(self, job: Job, number: int) -> None:
        """Send a signal to the worker that runs a job."""
        for worker in self._with(job):
            worker.signal(number)

    def interrupt(self, jobs: Collection[Job], grace: float) -> None:
        """Interrupt jobs; a worker that has not come back in time is killed and replaced."""
        for job in jobs:
            for worker in self._with(job):
                early = worker.position[0] < 0  # between items it ignores the signal
                worker.signal(signal.SIGINT)
                if early:
                    self._signal_later(AGAIN, job, signal.SIGINT)
                self._signal_later(grace, job, signal.SIGKILL)

    def _signal_later(self, seconds: float, job: Job, number: int) -> None:
        self._loop.call_later(seconds, lambda: self.signal(job, number))

    def _with(self, job: Job) -> list[Worker]:
        workers = (*self._workers, *self._leaving)
        return [worker for worker in workers if worker.job is job]

    # -- ends

    def _end_soon(self, worker: Worker) -> None:
        """Take notice that a worker has closed its connection: it is about to end."""
        self._free.pop(worker, None)
        if worker.status is not None or (worker.pid and self._spawner.is_orphan(worker)):
            self.bury(worker)
            return

        def insist() -> None:
            if worker.status is None and not worker.has_gone:
                worker.signal(signal.SIGKILL)
                self._loop.call_later(PATIENCE, lambda: self.bury(worker))

        self._loop.call_later(PATIENCE, insist)

    def bury(self, worker: Worker) -> None:
        """Put another worker in the place of one that has ended."""
        if worker.has_gone:
            return
        worker.channel.drain()  # its last result may be there
        if worker.has_gone:
            return
        self.lose(worker, "")

    def lose(self, worker: Worker, reason: str) -> None:
        """Take leave of a worker; have another one in its place unless it was to leave."""
        if worker.has_gone:
            return
        worker.has_gone = True
        self._free.pop(worker, None)
        job, worker.job = worker.job, None
        lost = worker.describe()
        if not worker.is_ready:
            self._last_failure = reason or lost.reason
        was_leaving = worker in self._leaving
        worker.close()
        self._leaving.discard(worker)
        if not was_leaving and not self._is_closed:
            self._restart(worker)
        self._changed.notify_all()
        if job is not None:
            if self._is_closed:
                lost = Lost(lost.host, lost.pid, "the server was closed")
            self._queue.end(self, job, pack_result(lost))

    def _restart(self, worker: Worker) -> None:
        """Start another worker in place of one; with fewer, if that fails again and again."""
        place = self._workers.index(worker)
        failures = 0 if worker.is_ready else worker.failures + 1
        if failures < STARTS:
            try:
                new = self._open_worker()
                new.failures = failures
                self._workers[place] = new
                self._spawner.start(new)
                return
            except OSError as exc:
                self._last_failure = str(exc)
                if (new := self._workers[place]) is not worker:
                    new.has_gone = True
                    new.close()
        logger.error("no worker can be started, going on with fewer: %s", self._last_failure)
        del self._workers[place]
        if not self._workers:
            self._loop.deliver(self._on_empty)

    def _replace(self, worker: Worker) -> None:
        """Have another worker in the place of one that ends by itself."""
        self._leaving.add(worker)
        worker.is_leaving = True
        self._restart(worker)

    def _watch(self) -> None:
        """End workers that are overdue, stopped or dead.

        A child that C code has forked may hold the connection of a dead one open.
        """
        self._watching = None
        suspects: dict[Worker, Job] = {}
        for worker in (*self._workers, *self._leaving):
            if worker.job is None or not worker.is_ready:
                continue
            if self._is_stuck(worker):
                if self._suspects.get(worker) is worker.job:
                    worker.is_late = worker.is_late or worker.is_overdue()
                    worker.signal(signal.SIGKILL)
                    if worker.state() in ("", "Z") and self._spawner.is_orphan(worker):
                        self.bury(worker)
                suspects[worker] = worker.job
        self._suspects = suspects
        if self.running and not self._is_closed:
            self._watching = self._loop.call_later(OVERDUE, self._watch)

    def _is_stuck(self, worker: Worker) -> bool:
        state = worker.state()
        if state != "T":
            worker.stopped_since = None
        elif worker.stopped_since is None:
            worker.stopped_since = time.monotonic()
        stopped = worker.stopped_since
        too_long = stopped is not None and time.monotonic() - stopped > STOPPED
        return too_long or state in ("", "Z") or worker.is_overdue()

    def close(self) -> None:
        """End all workers and give up their jobs."""
        with self._loop.lock:
            self._is_closed = True
            workers = [*self._workers, *self._leaving]
            self._workers, self._free = [], {}
            for worker in workers:
                worker.signal(signal.SIGKILL)
            self._spawner.close()
            for worker in workers:
                self._leaving.add(worker)
                self.lose(worker, "")
            self._changed.notify_all()
