"""ppft's server, made trustworthy: it loses no job, reads what workers print, and can be stopped.

The same class runs the local workers of a caller and the workers of a host.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Collection
from typing import Any

import ppft

from ostap_parallel.worker.chunk import Lost, pack_result
from ostap_parallel.worker.cpus import usable_cpus
from ostap_parallel.worker.local import OVERDUE, Worker
from ostap_parallel.worker.nested import REQUEST
from ostap_parallel.worker.output import OutputReader, Sink
from ostap_parallel.worker.shared import Blob

logger = logging.getLogger(__name__)

# How often a worker that dies as it starts is started: it may be killed just then, too.
STARTS = 3

# Seconds until a worker is interrupted again that had not begun an item when it was interrupted.
AGAIN = 0.2


class Task(ppft._pp._Task):  # type: ignore[misc]
    """A job whose raw result goes to a function as soon as it is there.

    `deliver` must not raise. A job that is no longer wanted when its turn comes is given up.
    `host` is set by the server to where the job ran. `blob` and `modules` are what it needs there.
    `is_short` tells that it may be sent on to where it waits behind another one.
    `is_interrupted` is set by who gives the job up.
    """

    def __init__(
        self,
        server: Server,
        deliver: Callable[[bytes], None] | None = None,
        blob: Blob | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
        modules: Any = None,
        is_short: bool = False,
    ) -> None:
        super().__init__(server, server._Server__gentid())
        self.deliver = deliver
        self.blob, self.modules = blob, modules
        self.is_wanted = is_wanted
        self.host = ""
        self.is_short = is_short
        self.is_nested = False
        self.is_interrupted = False

    def finalize(self, sresult: bytes) -> None:
        deliver, self.deliver = self.deliver, None
        # not to wait for the garbage collector: those refer to this
        self.blob, self.modules, self.is_wanted = None, None, bool
        super().finalize(sresult if deliver is None else b"")
        if deliver is not None:
            deliver(sresult)


class Busy(Exception):
    """No worker is free."""


class Server(ppft.Server):  # type: ignore[misc]
    """ppft's server with workers that may print, crash and be interrupted without loss.

    A job whose worker dies ends with `Lost` as its result, and the worker is replaced. Takes
    ppft's arguments in ppft's order; `sink` is set on a subclass or before the constructor, and so
    is `on_empty`, which is called from a thread when the last worker is lost for good. After
    `tasks_per_worker` jobs a worker process is replaced.
    """

    tasks_per_worker: int | None = None
    sink: Sink = staticmethod(lambda event: None)
    on_empty: Callable[[], None] = staticmethod(lambda: None)

    # ppft's own, by the names that Python gives to its private attributes
    _Server__workers: list[Worker]
    _Server__queue: list[tuple[Task, bytes, bytes]]
    _Server__ncpus: int

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        ppservers: tuple[str, ...] = (),
        secret: str | None = None,
        restart: bool = False,
        proto: int = 5,
        socket_timeout: float | None = None,
    ) -> None:
        self._destroyed = False
        self._pid = os.getpid()
        self._is_empty = False  # the last worker was lost, and no other could be started
        self._output = OutputReader(lambda event: self.sink(event))
        self._ends = threading.Event()
        self._running: dict[Any, Task] = {}  # by worker
        self._running_lock = threading.Lock()
        path = os.environ.get("PYTHONPATH")
        # ppft's default secret is public
        secret = secrets.token_hex(32) if secret is None else secret
        try:
            super().__init__(0, ppservers, secret, restart, proto, socket_timeout)
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
            # ppft has written sys.path into it; our workers get that path in another way
            del os.environ["PYTHONPATH"]
            os.environ.update({} if path is None else {"PYTHONPATH": path})
            self.set_ncpus(ncpus)
        except BaseException:
            self.destroy()
            raise

    def set_ncpus(self, ncpus: int | str = "autodetect") -> None:
        """Have this many local workers, starting the missing ones all at once."""
        wanted = usable_cpus() if ncpus == "autodetect" else int(ncpus)
        if wanted < 0:
            raise ValueError(f"ncpus must be 'autodetect' or an integer from 0 on, not {ncpus!r}")
        workers: list[Worker] = self._Server__workers
        started: list[Worker] = []
        try:
            for _ in range(wanted - len(workers)):
                started.append(Worker(self._output))
            for worker in started:
                worker.start()
        except BaseException:
            for worker in started:
                worker.stop()
            raise
        with self._Server__queue_lock:
            workers.extend(started)
            self._Server__ncpus = wanted
            self._is_empty = False
            while len(workers) > wanted and workers[-1].is_free:
                worker = workers.pop()
                worker.calls.put(False)
                worker.stop()
        for worker in started:
            self._employ(worker)

    def insert(
        self, sfunc: bytes, sargs: bytes, task: Task | None = None, if_free: bool = False
    ) -> Task:
        """Queue a serialised job.

        Raises
        ------
        DestroyedServerError
            The server was closed.
        Busy
            It is only to be queued `if_free`, and no worker is free for it.
        """
        if self._pid != os.getpid():
            raise RuntimeError("workers serve the process that started them, not its forks")
        task = task or Task(self)
        with self._Server__queue_lock:
            if self._exiting:  # set before `destroy` drops, with this lock, what waits
                raise ppft.DestroyedServerError("the server was closed")
            free = sum(worker.is_free for worker in self._Server__workers)
            if if_free and free <= len(self._Server__queue):
                raise Busy
            self._Server__queue.append((task, sfunc, sargs))
        if self._is_empty and not self._Server__rworkers:
            self.drop_waiting("no worker is left")
        self._Server__scheduler()
        return task

    def _Server__scheduler(self) -> None:
        """Wake one worker that is free, a local one if there is one; it wakes the next.

        ppft's own runs in the caller's thread, where Ctrl-C leaves its lock held, loses a job that
        was about to start, or is swallowed. Here a worker's own thread takes the job.
        """
        workers = (*self._Server__workers[: self._Server__ncpus], *self._Server__rworkers)
        for job, *_ in self._Server__queue[:1]:
            for worker in workers:
                if worker.is_free and self._is_for(worker, job):
                    worker.calls.put(True)
                    return

    def _watch(self) -> None:
        """End workers that are overdue or dead, until the server is closed.

        A child that C code has forked may hold the pipes of a dead one, which then have no end.
        """
        suspects: dict[Worker, Task] = {}
        while not self._ends.wait(OVERDUE):
            with self._running_lock:
                running = dict(self._running)
            ours = {w: job for w, job in running.items() if isinstance(w, Worker)}
            found = {w: job for w, job in ours.items() if w.is_overdue() or w.is_dead()}
            for worker, job in found.items():
                if suspects.get(worker) is job:
                    worker.end()
            suspects = found

    def _employ(self, worker: Any) -> None:
        """Give a worker, or a connection to one, a thread that has it do jobs."""
        threading.Thread(target=self._work, args=[worker], daemon=True).start()

    def _work(self, worker: Any) -> None:
        """Have a worker do jobs until it is dismissed."""
        going_on = True
        while going_on:
            self._work_off(worker)  # which holds nothing of its jobs when it is done
            going_on = worker.calls.get()

    def _work_off(self, worker: Any) -> None:
        """Have a worker do jobs, one after another, as long as there are some."""
        begun = self._begin(worker)
        while begun:
            job, error = begun
            result = self._finish(worker, job, error)
            is_worn = isinstance(worker, Worker) and worker.jobs == self.tasks_per_worker
            if not is_worn:
                begun = self._begin(worker)  # it need not wait while its last result is read
            self._forget(job)
            job.finalize(result)
            if is_worn:
                self._replace(worker)
                begun = self._begin(worker)

    def _begin(self, worker: Any) -> tuple[Task, Exception | None] | None:
        """Send the next job to a worker; return it, and why it could not be sent."""
        while (found := self._next(worker)) and not _is_wanted(found[0]):
            self._has_ended(worker)
            self._give_up(found[0], "it was cancelled")
        if found is None:
            return None
        job, sfunc, sargs = found
        try:
            sargs = self._place(worker, job, sargs)
            worker.t.csend(sfunc)
            worker.t.send(sargs)
        except Exception as exc:  # it is dead or dying
            return job, exc
        return job, None

    def _place(self, worker: Any, job: Task, sargs: bytes) -> bytes:
        """Return the arguments of a job as this worker needs them."""
        return sargs

    def _finish(self, worker: Worker, job: Task, error: Exception | None) -> bytes:
        """Return the result of a job that was begun."""
        try:
            if error is not None:
                raise error
            result = self._receive(worker.t, job)
            worker.drain()
            worker.jobs += 1
        except Exception:  # the pipe broke: the worker is dead or dying
            result = pack_result(self._replace(worker, patience=1))
        finally:
            self._has_ended(worker)
        return result

    def _receive(self, channel: Any, job: Task) -> bytes:
        """Return the result of a job, answering what it asks meanwhile."""
        while (message := channel.receive()).startswith(REQUEST):
            channel.send(self._answer(job, message))
        result: bytes = message
        return result

    def _answer(self, job: Task, request: bytes) -> bytes:
        """Return the answer to what a job has asked; raises if it is not to be had any more."""
        return pickle.dumps(("error", RuntimeError("this server knows nothing of nested tasks")))

    def _has_ended(self, worker: Any) -> None:
        with self._running_lock:
            self._running.pop(worker, None)

    def _next(self, worker: Any) -> tuple[Task, bytes, bytes] | None:
        """Take a job for a worker; without one, or if it is dismissed, it becomes free."""
        with self._Server__queue_lock:
            local = self._Server__workers[: self._Server__ncpus]
            employed = worker in local or worker in self._Server__rworkers
            waiting = self._Server__queue if employed else []
            worker.is_free = not (waiting and self._is_for(worker, waiting[0][0]))
            if worker.is_free:
                return None
            found = waiting.pop(0)
            with self._running_lock:  # `interrupt` finds it there, once it is not waiting
                self._running[worker] = found[0]
            if self._Server__queue:
                self._Server__scheduler()
            return found

    def _is_for(self, worker: Any, job: Task) -> bool:
        """Return whether a worker may do the job whose turn it is."""
        return True

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.pid for worker in self._Server__workers]

    def interrupt(self, jobs: Collection[Task] | None = None, grace: float = 2.0) -> None:
        """Give up jobs, all by default: drop the waiting ones, interrupt the running ones.

        A task sees KeyboardInterrupt; a worker that has not come back after `grace` seconds is
        killed and replaced. Every job gets its (`Lost`) result. Does not wait.
        """
        if jobs is None:
            with self._Server__queue_lock, self._running_lock:
                jobs = {*(entry[0] for entry in self._Server__queue), *self._running.values()}
        for job in jobs:
            job.is_interrupted = True  # one that is on its way into the queue is not begun, either
        self.drop_waiting("it was interrupted", jobs)
        with self._running_lock:  # no worker begins another job meanwhile
            self._interrupt({w: job for w, job in self._running.items() if job in jobs}, grace)

    def _interrupt(self, running: dict[Any, Task], grace: float) -> None:
        """Interrupt the jobs that workers run just now."""
        ready = {worker: job for worker, job in running.items() if worker.is_ready}
        # between items it ignores the signal
        early = {worker: job for worker, job in ready.items() if worker.is_between_items()}
        for worker in ready:
            worker.signal(signal.SIGINT)
        self._signal_later(AGAIN, early, signal.SIGINT)
        self._signal_later(grace, ready, signal.SIGKILL)

    def signal(self, job: Task, number: int) -> None:
        """Send a signal to the worker that runs a job, and do no more about it."""
        with self._running_lock:
            for worker in [worker for worker, one in self._running.items() if one is job]:
                self._signal(worker, number)

    def _signal(self, worker: Any, number: int) -> None:
        if worker.is_ready:
            worker.signal(number)

    def take(self, job: Task) -> bool:
        """Take a job out of the queue, of which it is likely to be one of the last."""
        with self._Server__queue_lock:
            queue = self._Server__queue
            for place in range(len(queue) - 1, -1, -1):
                if queue[place][0] is job:
                    del queue[place]
                    return True
        return False

    def drop_waiting(self, reason: str, jobs: Collection[Task] | None = None) -> None:
        """Give up the jobs, all by default, that no worker has begun."""
        with self._Server__queue_lock:
            queue = self._Server__queue
            dropped = [entry for entry in queue if jobs is None or entry[0] in jobs]
            self._Server__queue = [] if jobs is None else [e for e in queue if e[0] not in jobs]
        for job, _, _ in dropped:
            self._give_up(job, reason)

    def destroy(self) -> None:
        """End all workers and give up all jobs."""
        atexit.unregister(self.destroy)
        self._exiting = True
        if self._destroyed or self._pid != os.getpid():  # a fork that exits: they are not its
            return
        self._destroyed = True
        self._ends.set()
        with self._Server__queue_lock:  # nobody must see half of this
            workers, self._Server__workers = self._Server__workers, []
            self._Server__ncpus = 0
        self.drop_waiting("the server was closed")
        for worker in workers:
            worker.calls.put(False)
            worker.signal(signal.SIGKILL)
        for worker in workers:
            with worker.replacing:
                worker.stop()
        self._output.close()

    def _give_up(self, job: Task, reason: str) -> None:
        self._forget(job)
        job.finalize(pack_result(Lost(socket.gethostname(), 0, reason)))

    def _forget(self, job: Task) -> None:
        with self._Server__waittasks_lock, contextlib.suppress(ValueError):
            self._Server__waittasks.remove(job)

    def _signal_later(self, seconds: float, jobs: dict[Any, Task], number: int) -> None:
        """Send a signal to the workers that still run these jobs then."""

        def send() -> None:
            with self._running_lock:
                found = [w for w, job in jobs.items() if self._running.get(w) is job]
                for worker in found:
                    if worker.is_ready:  # else it has died, and another process is being started
                        worker.signal(number)

        if jobs:
            timer = threading.Timer(seconds, send)
            timer.daemon = True
            timer.start()

    def _replace(self, worker: Worker, patience: float = 0.0) -> Lost:
        """Put a new process in the place of one; return how that has ended."""
        pid = worker.pid
        with worker.replacing:
            if self._exiting:
                return Lost(socket.gethostname(), pid, "the server was closed")
            lost = worker.stop(patience)
            self._restart(worker)
        return lost

    def _restart(self, worker: Worker) -> None:
        for _ in range(STARTS):
            try:
                worker.launch()
                worker.start()
                return
            except Exception as exc:  # no process or no memory to be had, or it was killed
                reason = f"{exc}; {worker.stop().reason}"
            if self._exiting:
                return
        logger.error("no worker can be started, going on with fewer: %s", reason)
        with self._Server__queue_lock:
            if worker not in self._Server__workers:  # the server was closed meanwhile
                return
            self._Server__workers.remove(worker)
            self._Server__ncpus -= 1
            is_last = not self._Server__ncpus
        worker.calls.put(False)
        if is_last:
            self._is_empty = True
            if not self._Server__rworkers:
                self.drop_waiting("no worker is left")
            self.on_empty()


def _is_wanted(job: Task) -> bool:
    return not job.is_interrupted and job.is_wanted()
