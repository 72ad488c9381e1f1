"""The workers of this machine: started by their template, fed, watched, and replaced."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from ostap_parallel.logs import logger_of
from ostap_parallel.machine.handle import Handle
from ostap_parallel.machine.jobs import Job, Machine, Queue
from ostap_parallel.machine.local import OVERDUE, Worker
from ostap_parallel.machine.loop import Loop, Timer
from ostap_parallel.machine.memory import MemoryWatch
from ostap_parallel.machine.output import OutputReader
from ostap_parallel.machine.spawner import Spawner
from ostap_parallel.machine.usage import Doing, doing
from ostap_parallel.worker.chunk import Lost, locate, pack_result
from ostap_parallel.worker.nested import LAST, REQUEST

logger = logger_of(__name__)

# How often a worker that dies as it starts is started: it may be killed just then, too.
STARTS = 3

# Seconds until a worker is interrupted again that had not begun an item when it was interrupted.
AGAIN = 0.2

# Seconds that a worker may be stopped, by a signal, while it has a job.
STOPPED = 5.0

# Seconds that the system may take to tell how a process ended that has closed its connection.
PATIENCE = 1.0


class Crew(Machine):
    """The workers of this machine.

    Parameters
    ----------
    on_empty, on_change
        Called when the last worker is lost for good; and when their number may have changed.
    tasks_per_worker
        Jobs after which a worker process is replaced; ``None`` for no limit.
    greeting
        Makes the job that each worker which is wanted does before all others. It does not count,
        and those that come in the place of others have none: a job that ends its worker does not
        end one after the other.
    """

    def __init__(
        self,
        label: str,
        queue: Queue,
        loop: Loop,
        output: OutputReader,
        *,
        on_empty: Callable[[], object],
        on_change: Callable[[], object] = lambda: None,
        tasks_per_worker: int | None = None,
        preload: Collection[str] = (),
        fresh: bool = False,
        host: str = "",
        sessions: Mapping[str, Any] = MappingProxyType({}),
        greeting: Callable[[], Job] | None = None,
    ) -> None:
        super().__init__(label)
        self._greeting = greeting
        self.output = output
        self._queue, self._loop = queue, loop
        self._spawner = Spawner(loop, output, preload, fresh, host, sessions)
        self._on_empty, self._on_change, self._tasks = on_empty, on_change, tasks_per_worker
        self._changed = threading.Condition(loop.lock)
        self._workers: list[Worker] = []
        self._leaving: set[Worker] = set()  # no longer counted, and not ended yet
        self._free: dict[Worker, None] = {}
        self._starts = 0
        self._last_failure = ""
        self._watching: Timer | None = None
        self._suspects: dict[Worker, Job] = {}
        self._is_closed = False
        self._memory = MemoryWatch()

    def count(self) -> int:
        """Return the number of workers."""
        return len(self._workers)

    def processes(self) -> list[Handle]:
        """Return the processes of the workers, also of those that are just being started."""
        with self._loop.lock:
            self._changed.wait_for(lambda: all(w.pid for w in self._workers), PATIENCE)
            return [Handle(worker, self._changed) for worker in self._workers if worker.pid]

    def own_processes(self) -> list[int]:
        """Return the children of this process whose end is waited for already."""
        return self._spawner.own_processes()

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
                    new.append(self._open_worker(self._greeting))
                self._last_failure = ""
                self._workers += new
                for worker in new:
                    self._spawner.start(worker)
            except BaseException:
                self._discard(new)
                raise
            while len(self._workers) > wanted:
                self._dismiss(self._workers.pop())
            try:  # for those that may have come in their place, too
                self._changed.wait_for(lambda: all(worker.is_ready for worker in self._workers))
            except BaseException:
                self._discard([worker for worker in self._workers if not worker.is_ready])
                raise
            if new and not self._workers and self._last_failure:
                raise RuntimeError(f"no worker can be started: {self._last_failure}")

    def _discard(self, workers: list[Worker]) -> None:
        for worker in workers:
            if worker in self._workers:
                self._workers.remove(worker)
            worker.has_gone = True
            self._free.pop(worker, None)
            self._spawner.forget(worker)
            worker.signal(signal.SIGKILL)
            worker.close()

    def _open_worker(self, greeting: Callable[[], Job] | None = None) -> Worker:
        self._starts += 1
        tasks = self._tasks and self._tasks + (greeting is not None)
        worker = Worker(self, self._starts, tasks, greeting)
        worker.connect(
            self._loop,
            lambda message: self._hear(worker, message),
            lambda reason: self._end_soon(worker),
        )
        return worker

    def look(self) -> None:
        """Have workers that are free replaced if this process has imported libraries since.

        The new ones share them with what starts workers, in place of importing them each. Those
        that were greeted stay: the greeting may be for so many workers, and no more.
        """
        with self._loop.lock:
            if self._spawner.look() and self._greeting is None:
                for worker in list(self._free):
                    self._dismiss(worker)
                    self._restart(worker)

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
        worker = job.worker or next(iter(self._free))
        self._free.pop(worker, None)
        worker.job, job.worker = job, worker
        chunk = job.chunk
        if job.blobs or job.modules:
            locations = [blob.location for blob in job.blobs]
            chunk = locate(chunk, locations, job.modules.local if job.modules else b"")
        worker.channel.csend(job.call)
        worker.channel.send(chunk)
        if self._watching is None:
            self._watching = self._loop.call_later(OVERDUE, self._watch)

    def _hear(self, worker: Worker, message: bytes) -> None:
        if not worker.is_ready:
            worker.is_ready = True
            if worker.greeting is None or worker.is_leaving:
                self._set_free(worker)
            else:
                greeting = worker.greeting()
                greeting.worker = worker
                self._queue.begin(self, greeting)
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
        is_last = message.startswith(LAST)  # it has done as many as it may
        if worker.is_leaving:
            worker.channel.close()
        elif is_last:
            self._replace(worker)
        elif worker.status is None:  # else it has ended, and this was what it had left
            self._free[worker] = None
        if is_last:
            message = message.removeprefix(LAST)
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

    def place(self, job: Job, tell: Callable[[Doing], object]) -> None:
        """Tell what the worker of a job does."""
        for worker in self._with(job):
            tell(doing(worker.position[0], worker.pid))

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
        worker: Worker | None = job.worker
        return [worker] if worker is not None and worker.job is job else []

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

    def lose(self, worker: Worker, reason: str, counts: bool = True) -> None:
        """Take leave of a worker; have another one in its place unless it was to leave.

        Unless it `counts`, that is no sign that others cannot be started.
        """
        if worker.has_gone:
            return
        worker.has_gone = True
        self._free.pop(worker, None)
        job, worker.job = worker.job, None
        lost = worker.describe()
        if worker.status == -signal.SIGKILL and (why := self._memory.look()):
            lost = replace(lost, reason=f"{lost.reason}: {why}")
        if not worker.is_ready:
            self._last_failure = reason or lost.reason
        was_leaving = worker in self._leaving
        worker.close()
        self._leaving.discard(worker)
        if not was_leaving and not self._is_closed:
            self._restart(worker, counts)
        self._changed.notify_all()
        self._on_change()
        if job is not None:
            if self._is_closed:
                lost = Lost(lost.host, lost.pid, "the server was closed")
            self._queue.end(self, job, pack_result(lost))

    def _restart(self, worker: Worker, counts: bool = True) -> None:
        """Start another worker in place of one; with fewer, if that fails again and again."""
        place = self._workers.index(worker)
        failures = 0 if worker.is_ready else worker.failures + counts
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
        text = "no worker can be started, going on with fewer: %s"
        self._loop.deliver(partial(logger.error, text, self._last_failure))
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
