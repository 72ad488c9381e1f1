"""ppft's server, made trustworthy: it loses no job, reads what workers print, and can be stopped.

The same class runs the local workers of a caller and the workers of a host.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import queue
import secrets
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ppft

from ostap_parallel.worker.cpus import thread_limits, usable_cpus
from ostap_parallel.worker.execute import Lost, pack_result
from ostap_parallel.worker.output import OutputReader, Sink
from ostap_parallel.worker.process import POSITION, command, disconnect, open_position
from ostap_parallel.worker.shared import Blob
from ostap_parallel.worker.transport import Pipe

logger = logging.getLogger(__name__)

# How often a worker that dies as it starts is started: it may be killed just then, too.
STARTS = 3

# Seconds until a worker is interrupted again that had not begun an item when it was interrupted.
AGAIN = 0.2

# Seconds between two looks for workers that have not ended themselves, though the time of their
# item is over: a process that is stopped cannot. Two must find one, so long after its end is due.
OVERDUE = 1.0


class Task(ppft._pp._Task):  # type: ignore[misc]
    """A job whose raw result goes to a function as soon as it is there.

    `deliver` must not raise. A job that is no longer wanted when its turn comes is given up.
    `host` is set by the server to where the job ran. `blob` and `modules` are what it needs there.
    """

    def __init__(
        self,
        server: Server,
        deliver: Callable[[bytes], None] | None = None,
        blob: Blob | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
        modules: Any = None,
    ) -> None:
        super().__init__(server, server._Server__gentid())
        self.deliver = deliver
        self.blob, self.modules = blob, modules
        self.is_wanted = is_wanted
        self.host = ""
        self.is_interrupted = False

    def finalize(self, sresult: bytes) -> None:
        self.blob = self.modules = (
            None  # not to wait for the garbage collector: who delivers refers to this
        )
        super().finalize(sresult)
        if self.deliver is not None:
            self.deliver(sresult)


# A process that the caller forks must not keep workers alive when the caller dies.
_lifelines: set[int] = set()
os.register_at_fork(after_in_child=lambda: disconnect(*_lifelines))


class Worker(ppft._pp._Worker):  # type: ignore[misc]
    """A worker process as its server sees it."""

    def __init__(self, output: OutputReader) -> None:
        # not ppft's own, which starts the process and waits for it
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # to its thread: go on, or end
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
        self._stopped = self._is_too_late = self.is_ready = False
        self.t = Pipe(os.fdopen(results, "rb"), os.fdopen(jobs, "wb"))
        self._position = position
        self._lifeline = life
        _lifelines.add(life)
        self._pipes = {out: "stdout", err: "stderr", log: "log"}
        for descriptor, kind in self._pipes.items():
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
        for descriptor in self._pipes:
            self._output.read(descriptor, final=True)


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


class Server(ppft.Server):  # type: ignore[misc]
    """ppft's server with workers that may print, crash and be interrupted without loss.

    A job whose worker dies ends with `Lost` as its result, and the worker is replaced. Takes
    ppft's arguments in ppft's order; `sink` is set on a subclass or before the constructor, and so
    is `on_empty`, which is called from a thread when the last worker is lost for good.
    """

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
        self._running: dict[Worker, Task] = {}
        self._running_lock = threading.Lock()
        self._replace_lock = threading.Lock()
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

    def insert(self, sfunc: bytes, sargs: bytes, task: Task | None = None) -> Task:
        """Queue a serialised job; raises DestroyedServerError once the server is closed."""
        if self._pid != os.getpid():
            raise RuntimeError("workers serve the process that started them, not its forks")
        task = task or Task(self)
        with self._Server__queue_lock:
            if self._exiting:  # set before `destroy` drops, with this lock, what waits
                raise ppft.DestroyedServerError("the server was closed")
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
        for worker in (*self._Server__workers[: self._Server__ncpus], *self._Server__rworkers):
            if worker.is_free:
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
            found = {w: job for w, job in running.items() if w.is_overdue() or w.is_dead()}
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
            begun = self._begin(worker)  # it need not wait while its last result is read
            self._forget(job)
            job.finalize(result)

    def _begin(self, worker: Any) -> tuple[Task, Exception | None] | None:
        """Send the next job to a worker; return it, and why it could not be sent."""
        while (found := self._next(worker)) and not found[0].is_wanted():
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
            result: bytes = worker.t.receive()
            worker.drain()
        except Exception:  # the pipe broke: the worker is dead or dying
            result = self._replace(worker)
        finally:
            self._has_ended(worker)
        return result

    def _has_ended(self, worker: Any) -> None:
        with self._running_lock:
            self._running.pop(worker, None)

    def _next(self, worker: Any) -> tuple[Task, bytes, bytes] | None:
        """Take a job for a worker; without one, or if it is dismissed, it becomes free."""
        with self._Server__queue_lock:
            local = self._Server__workers[: self._Server__ncpus]
            employed = worker in local or worker in self._Server__rworkers
            worker.is_free = not (employed and self._Server__queue)
            if worker.is_free:
                return None
            found = self._Server__queue.pop(0)
            if isinstance(worker, Worker):  # `interrupt` finds it here, once it is not waiting
                with self._running_lock:
                    self._running[worker] = found[0]
            if self._Server__queue:
                self._Server__scheduler()
            return found

    def pids(self) -> list[int]:
        """Return the process ids of the workers."""
        return [worker.pid for worker in self._Server__workers]

    def interrupt(self, grace: float = 2.0) -> None:
        """Give up all jobs: drop the waiting ones, interrupt the running ones.

        A task sees KeyboardInterrupt; a worker that has not come back after `grace` seconds is
        killed and replaced. Every job gets its (`Lost`) result. Does not wait.
        """
        self.drop_waiting("the run was stopped")
        with self._running_lock:
            jobs = [(w, job) for w, job in self._running.items() if w.is_ready]
            running = {worker: job for worker, job in jobs if not job.is_interrupted}
        for job in running.values():  # a second call is for jobs that have come since
            job.is_interrupted = True
        # between items it ignores the signal
        early = {worker: job for worker, job in running.items() if worker.is_between_items()}
        for worker in running:
            worker.signal(signal.SIGINT)
        self._signal_later(AGAIN, early, signal.SIGINT)
        self._signal_later(grace, running, signal.SIGKILL)

    def drop_waiting(self, reason: str) -> None:
        """Give up the jobs that no worker has begun."""
        with self._Server__queue_lock:
            waiting, self._Server__queue = self._Server__queue, []
        for job, _, _ in waiting:
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
        with self._replace_lock:
            for worker in workers:
                worker.stop()
        self._output.close()

    def _give_up(self, job: Task, reason: str) -> None:
        self._forget(job)
        job.finalize(pack_result(Lost(socket.gethostname(), 0, reason)))

    def _forget(self, job: Task) -> None:
        with self._Server__waittasks_lock, contextlib.suppress(ValueError):
            self._Server__waittasks.remove(job)

    def _signal_later(self, seconds: float, jobs: dict[Worker, Task], number: int) -> None:
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

    def _replace(self, worker: Worker) -> bytes:
        """Put a new process in the place of a dead one; return its job's result."""
        pid = worker.pid
        with self._replace_lock:
            if self._exiting:
                lost = Lost(socket.gethostname(), pid, "the server was closed")
            else:
                lost = worker.stop(patience=1)
                self._restart(worker)
        return pack_result(lost)

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
        worker.calls.put(False)
        if not self._Server__ncpus:
            self._is_empty = True
            if not self._Server__rworkers:
                self.drop_waiting("no worker is left")
            self.on_empty()
