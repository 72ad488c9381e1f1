"""Jobs, the queue in which they wait, and the machines whose workers do them."""

from __future__ import annotations

import itertools
import signal
import time
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from threading import get_ident, main_thread
from types import FrameType
from typing import Any

from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.usage import Doing
from ostap_parallel.worker.chunk import INTERRUPTED, Lost, pack_result

_numbers = itertools.count(1)

_SIGINT = int(signal.SIGINT)  # an enumeration takes longer


class Job:
    """A chunk to be run by a call; what becomes of it is delivered, once.

    Parameters
    ----------
    call, chunk
        Packed. What is the same for many jobs travels once to each worker.
    deliver
        Called with the packed result, by the loop, with its lock held. Must not raise.
    is_wanted
        Asked when its turn has come; one that is no longer wanted is given up.
    ask
        Called with what the job asks while it runs; the answer goes to its machine.
    hosts
        Labels of the machines that may do it; ``None``: any.
    is_short
        It may be sent to where it waits behind another one.
    if_free
        It is not to wait where other callers' jobs may come before it, see `engine.nesting`.

    Attributes
    ----------
    machine
        Where it runs, once it has begun.
    begun
        When that was, by `time.monotonic`.
    worker
        What the machine knows of the one that does it, if it is one of its own.
    is_interrupted
        Set by who gives it up.
    """

    __slots__ = (
        "__weakref__",
        "ask",
        "begun",
        "blobs",
        "call",
        "chunk",
        "client",
        "deliver",
        "hosts",
        "if_free",
        "is_interrupted",
        "is_short",
        "is_wanted",
        "label",
        "machine",
        "modules",
        "number",
        "state",
        "worker",
    )

    def __init__(
        self,
        call: bytes,
        chunk: bytes,
        deliver: Callable[[bytes], object],
        *,
        is_wanted: Callable[[], bool] | None = None,
        ask: Callable[[Job, bytes], object] | None = None,
        blobs: Sequence[Any] = (),
        modules: Any = None,
        hosts: frozenset[str] | None = None,
        is_short: bool = False,
        if_free: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.call, self.chunk = call, chunk
        self.deliver: Callable[[bytes], object] | None = deliver
        self.is_wanted, self.ask = is_wanted, ask
        self.blobs, self.modules = blobs, modules
        self.hosts, self.is_short, self.if_free = hosts, is_short, if_free
        self.machine: Machine | None = None
        self.worker: Any = None
        self.label = ""
        self.client: Any = None
        self.state = "new"
        self.begun = 0.0
        self.is_interrupted = False

    def finish(self, result: bytes) -> None:
        """Deliver the result."""
        deliver, self.deliver, self.state = self.deliver, None, "done"
        # not to wait for the garbage collector: those may refer to this
        self.blobs = ()
        self.modules = self.is_wanted = self.ask = None
        self.call = self.chunk = b""
        self.worker = None
        if deliver is not None:
            deliver(result)


class Machine(ABC):
    """Something whose workers do jobs: this machine's, or those of a host at a connection.

    Attributes
    ----------
    label
        What the user calls it.
    limit
        How many jobs it may have at once; ``None``: one for each worker.
    running
        The jobs that it has, by number.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.limit: int | None = None
        self.running: dict[int, Job] = {}

    @abstractmethod
    def count(self) -> int:
        """Return the number of workers."""

    @abstractmethod
    def begin(self, job: Job) -> None:
        """Have a worker do a job, which is among `running` already."""

    @abstractmethod
    def answer(self, job: Job, message: bytes) -> None:
        """Answer what a job has asked."""

    @abstractmethod
    def signal(self, job: Job, number: int) -> None:
        """Send a signal to the worker that runs a job, and do no more about it."""

    def place(self, job: Job, tell: Callable[[Doing], object]) -> None:  # noqa: B027
        """Tell what the worker of a job does, perhaps later."""

    @abstractmethod
    def interrupt(self, jobs: Collection[Job], grace: float) -> None:
        """Interrupt jobs; a worker that has not come back after `grace` seconds is replaced."""

    def has_room(self) -> bool:
        """Return whether a worker is free."""
        count = self.count() if self.limit is None else min(self.limit, self.count())
        return len(self.running) < count

    def has_spare_room(self, job: Job) -> bool:
        """Return whether a job may be sent on, to wait there."""
        return False


class Queue:
    """Jobs that wait, and the machines that take them, in order.

    All is used with the loop's lock held; `add` takes it.

    Attributes
    ----------
    on_end
        Called with each job that has ended on a machine and its result, which it may change.
    """

    def __init__(self, loop: Loop) -> None:
        self.machines: list[Machine] = []
        self.on_end: Callable[[Job, bytes], bytes] = lambda job, result: result
        self.is_closed = False
        self._loop = loop
        self._waiting: dict[Job, None] = {}  # that any machine may do, in order
        self._pinned: dict[str, dict[Job, None]] = {}  # by label: those that need it

    def add(self, job: Job) -> None:
        """Queue a job, or have a worker begin it at once.

        Raises RuntimeError when the queue is closed.
        """
        with deferring_interrupts(), self._loop.lock:
            if self.is_closed:
                raise RuntimeError("the workers have ended")
            job.state = "waiting"
            if not self._waiting or job.hosts is not None:
                for machine in self.machines:
                    if _may(machine, job) and machine.has_room():
                        self.begin(machine, job)
                        return
            self._keep(job)
            self.dispatch()

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return bool(self._waiting or any(self._pinned.values()))

    def _keep(self, job: Job) -> None:
        if job.hosts is None:
            self._waiting[job] = None
        for label in job.hosts or ():
            self._pinned.setdefault(label, {})[job] = None

    def dispatch(self) -> None:
        """Have free workers begin what waits."""
        if not self:
            return
        for machine in self.machines:
            while machine.has_room() and (job := self._next_for(machine)):
                self.begin(machine, job)
        if self._waiting:
            self._dispatch_spare()

    def _dispatch_spare(self) -> None:
        """Send short jobs to where they wait for a worker that is busy."""
        for machine in self.machines:
            while self._waiting:
                job = next(iter(self._waiting))
                if not machine.has_spare_room(job):
                    break
                self.take(job)
                self.begin(machine, job)

    def _next_for(self, machine: Machine) -> Job | None:
        """Take the oldest job that a machine may do."""
        pinned = self._pinned.get(machine.label)
        oldest = [next(iter(jobs)) for jobs in (pinned, self._waiting) if jobs]
        if not oldest:
            return None
        job = min(oldest, key=lambda job: job.number)
        self.take(job)
        return job

    def begin(self, machine: Machine, job: Job) -> None:
        """Have a machine do a job, unless that is no longer wanted."""
        if job.is_interrupted or (job.is_wanted is not None and not job.is_wanted()):
            self.give_up(job, "it was cancelled")
            return
        job.state, job.machine, job.label = "running", machine, machine.label
        job.begun = time.monotonic()
        machine.running[job.number] = job
        machine.begin(job)

    def take(self, job: Job) -> bool:
        """Take a job out of the queue; return whether it was there."""
        if job.state != "waiting":
            return False
        job.state = "taken"
        self._waiting.pop(job, None)
        for label in job.hosts or ():
            jobs = self._pinned[label]
            jobs.pop(job, None)
            if not jobs:
                del self._pinned[label]
        return True

    def end(self, machine: Machine, job: Job, result: bytes) -> None:
        """Take the result of a job that ran, and have its worker begin another one."""
        machine.running.pop(job.number, None)
        result = self.on_end(job, result)
        self.dispatch()
        job.finish(result)

    def give_up(self, job: Job, reason: str) -> None:
        """End a job that has not begun."""
        job.finish(pack_result(Lost("", 0, reason)))

    def give_up_waiting(self, reason: str, jobs: Collection[Job] | None = None) -> None:
        """Give up the jobs, all by default, that no worker has begun."""
        for job in list(self._all_waiting() if jobs is None else jobs):
            if self.take(job):
                self.give_up(job, reason)

    def _all_waiting(self) -> dict[Job, None]:
        waiting = {**self._waiting}
        for pinned in self._pinned.values():
            waiting |= pinned
        return waiting

    def give_up_pinned(self, labels: Collection[str]) -> None:
        """Give up the jobs that must run on machines of which none is among these, or to come."""
        pinned = {job: None for jobs in self._pinned.values() for job in jobs}
        for job in pinned:
            if job.hosts and job.hosts.isdisjoint(labels) and self.take(job):
                names = ", ".join(sorted(job.hosts))
                self.give_up(job, f"it must run on {names}, and that is not to be had")

    def interrupt(self, jobs: Collection[Job] | None = None, grace: float = 2.0) -> None:
        """Give up jobs, all by default: drop the waiting ones, interrupt the running ones."""
        with deferring_interrupts(), self._loop.lock:
            wanted = [*self._all_waiting(), *self.running()] if jobs is None else list(jobs)
            running: dict[Machine, list[Job]] = {}
            for job in wanted:
                job.is_interrupted = True  # one on its way into the queue is not begun, either
                if job.state == "running" and job.machine is not None:
                    running.setdefault(job.machine, []).append(job)
            self.give_up_waiting(INTERRUPTED, wanted)
            for machine, theirs in running.items():
                machine.interrupt(theirs, grace)

    def count_workers(self) -> int:
        """Return the number of workers of all machines."""
        return sum(machine.count() for machine in self.machines)

    def running(self) -> Iterator[Job]:
        """Yield the jobs that have begun."""
        for machine in self.machines:
            yield from machine.running.values()


def _may(machine: Machine, job: Job) -> bool:
    return job.hosts is None or machine.label in job.hosts


class deferring_interrupts:
    """Raise for Ctrl-C behind the body, which must not be left half done.

    Only the main thread is interrupted; and only by what Python code handles. No generator, as
    each call goes through this.
    """

    __slots__ = ("_handler", "_noted")

    def __enter__(self) -> None:
        self._handler: Any = None
        if get_ident() == main_thread().ident and callable(handler := getsignal(_SIGINT)):
            self._noted: list[int] = []
            self._handler = handler
            set_signal(_SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted.append(number)

    def __exit__(self, *error: object) -> None:
        if self._handler is not None:
            set_signal(_SIGINT, self._handler)
            if self._noted:
                signal.raise_signal(signal.SIGINT)
