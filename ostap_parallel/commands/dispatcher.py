"""Runs commands on the hosts of a backend."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from typing import Any

from ostap_parallel.commands.command import Done
from ostap_parallel.commands.course import Levels, Step, course_of
from ostap_parallel.commands.outputs import Outputs
from ostap_parallel.commands.pace import Pace
from ostap_parallel.commands.slots import Job, Queues
from ostap_parallel.commands.transfer import StepFailed
from ostap_parallel.engine.backend import AnyFuture, Backend, Submit, result_of
from ostap_parallel.engine.retries import Limits
from ostap_parallel.machine.jobs import deferring_interrupts
from ostap_parallel.runs.report import Running, describe
from ostap_parallel.worker.chunk import Lost, pack_chunk, pack_value, traced, unpack_answer
from ostap_parallel.worker.command import Ended, run_all
from ostap_parallel.worker.command import run as run_command
from ostap_parallel.worker.execute import Call

# Seconds that commands get to end when a run is stopped.
STOP_PATIENCE = 4.0

# So many wait at most for hosts that are busy while others are idle, where more are to be read.
AHEAD = 1000

_names = itertools.count(1)


class Dispatcher:
    """Runs commands on a backend: as many as its hosts have slots for.

    Attributes
    ----------
    backend
        The backend.
    retried
        How many times commands were run again.
    """

    def __init__(
        self,
        backend: Backend,
        max_per_node: int | None,
        outputs: Outputs,
        levels: Levels,
        pace: Pace,
    ) -> None:
        self.backend, self._outputs, self._levels = backend, outputs, levels
        self._pace = pace
        self._pid = os.getpid()
        self._queues = Queues(backend, max_per_node, self)
        self._running: dict[Job, None] = {}
        self.retried = 0
        self._ended: deque[Done] = deque()
        self._news: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._source: Iterator[Job | Done | None] = iter(())
        self._is_read = self._is_paused = False
        self._ahead: float = AHEAD
        self._seats: list[int] = []  # the numbers of those that were left
        self._last_seat = 0
        self._submits: dict[Callable[[Any], Any], Submit] = {}
        self._name = f"commands {next(_names)}"  # that workers tell to
        self._numbers = itertools.count(1)
        self._together: dict[int, list[Job]] = {}  # that run, sent with one message
        self._stop_listening: Callable[[], object] = lambda: None

    def run(self, source: Iterator[Job | Done | None], ahead: float = AHEAD) -> Iterator[Done]:
        """Run what comes from a source; yield what becomes of it, and what has already.

        Parameters
        ----------
        ahead
            How many may be read at most for which no host is free.
        """
        self._source, self._ahead = source, ahead
        self._listen()
        while True:
            self._queues.look()
            self._read()
            for job, reason in self._queues.hopeless():
                job.done.error = reason
                self._ended.append(job.done)
            self._begin_all()
            while self._ended:
                yield self._ended.popleft()
            if not self._running and not self._queues.waiting and self._is_read:
                return
            if self._running or self._queues.waiting or self._is_paused:
                self._wait()
                while self._ended and self._pace.one_by_one:
                    yield self._ended.popleft()

    def running(self) -> list[Running]:
        """Return what runs, the longest first; which processes these are is not known here."""
        now = time.monotonic()
        jobs = [job for job in list(self._running) if job.seat and job is job.seat.first]
        return [
            Running(job.number, describe(str(job.command)), 1, job.label, 0, now - job.begun)
            for job in sorted(jobs, key=lambda job: job.begun)
        ]

    def wake(self) -> None:
        """Have `run` look again, from any thread."""
        self._news.put(self._take_back)

    def stop_feeding(self) -> None:
        """Begin no more commands; what runs goes on."""
        self._is_read = True
        self._source = iter(())
        self._queues.drop()

    def close_with(self, stack: contextlib.ExitStack) -> None:
        """Close this with a stack."""
        stack.callback(self.leave)  # whatever comes between in what is before it
        stack.callback(self.close)

    def close(self) -> None:
        """End what runs, in the process that has begun it, and leave its slots to others."""
        if os.getpid() != self._pid:
            return
        try:
            futures = [job.future for job in self._running if job.future is not None]
            self.backend.give_up(futures)
            if futures:
                wait(futures, STOP_PATIENCE)
        finally:
            self.leave()

    def leave(self) -> None:
        """Have nothing of the backend any more; this may be called again."""
        if os.getpid() != self._pid:
            return
        with deferring_interrupts():
            self._stop_listening()
            self._stop_listening = lambda: None
            self.backend.hear(self._name, None)
            self._queues.load.listeners.discard(self.wake)
            self._queues.load.leave(self)
            for job in self._running:
                job.stop()
            self._running.clear()

    def _listen(self) -> None:
        with deferring_interrupts():
            self._stop_listening = self.backend.listen(self.wake)
            self._queues.load.listeners.add(self.wake)
            tell = lambda told: self._news.put(lambda: self._hear_sooner(*told))  # noqa: E731
            if not self.backend.hear(self._name, tell):
                self._pace.one_by_one = True

    def _read(self) -> None:
        """Take from the source what can be begun soon; begin it as it comes."""
        self._is_paused = False
        while not self._is_read and len(self._ended) < AHEAD and self._may_read():
            try:
                job = next(self._source)
            except StopIteration:
                self._is_read = True
                return
            if job is None:  # `wake` tells when there is more
                self._is_paused = True
                return
            if isinstance(job, Done):
                self._ended.append(job)
            else:
                names = job.command.pinned
                job.labels = self._queues.labels(names) if names else None
                self._queues.put(job)
                if self._ahead < float("inf"):  # else the next one is there already
                    self._begin_all()

    def _may_read(self) -> bool:
        """Return whether there is use for more than what waits."""
        queues, capacities = self._queues, self._queues.capacities
        enough = 2 * sum(capacities.values()) * self._pace.together + 1
        if queues.waiting < enough or self._ahead == float("inf"):
            return queues.unpinned < enough
        are_idle = any(queues.load.free(label, count) > 0 for label, count in capacities.items())
        return are_idle and queues.unpinned < enough and queues.waiting < self._ahead

    def _begin_all(self) -> None:
        if self._queues.waiting and not self._running:
            with contextlib.suppress(ConnectionError):  # `hopeless` tells the reasons
                self.backend.window()  # which wakes hosts that rest
        while self._queues.waiting and self._pace.may_begin():
            number = self._seats[0] if self._seats else self._last_seat + 1
            slots = sum(self._queues.capacities.values())
            most = min(self._pace.together, self._queues.waiting // max(1, slots))
            seat = self._queues.next(number, most)
            if seat is None:
                self._pace.take_back()
                return
            if self._seats:
                heapq.heappop(self._seats)
            self._last_seat = max(number, self._last_seat)
            self._running |= seat.jobs
            jobs = list(seat.jobs)
            for job in jobs:
                job.begin(course_of(job, self._outputs, self._levels))
            self._go_on(jobs, [None] * len(jobs))
            if jobs[0].is_waiting:  # its host has just gone
                return

    def _go_on(self, jobs: Sequence[Job], values: Sequence[Any]) -> None:
        """Have the next steps of jobs of a seat done; take note of those that have none."""
        specs: dict[Job, Any] = {}
        over: list[Job] = []
        for job, value in zip(jobs, values, strict=True):
            step = _next_step(job, value)
            if step is None:
                over.append(job)
            elif step[0] is run_command:
                specs[job] = step[1]
            else:
                self._submit([job], *step)
        if specs:
            number = next(self._numbers)
            self._together[number] = list(specs)
            work = self._name, number, list(specs.values())
            self._submit(list(specs), run_all, work, number)
        for job in over:
            self._free(job)
            self._end(job)

    def _submit(
        self, jobs: list[Job], function: Callable[[Any], Any], item: Any, together: int = 0
    ) -> None:
        """Have a host call a function, for jobs that have begun there or are to."""
        first = jobs[0]
        try:
            if function not in self._submits:
                level = logging.getLogger().level
                self._submits[function] = self.backend.open(Call(function, log_level=level))
            chunk = pack_chunk([first.number], [pack_value(item, f"command {first.number}")])
            with deferring_interrupts():  # what has begun is known
                future = self._submits[function](chunk, hosts=frozenset([first.label]))
                for job in jobs:
                    job.future, job.is_taken_back = future, False
        except ConnectionError as exc:
            self._together.pop(together, None)
            if first.future is not None:
                self._lose(jobs, Lost(first.label, 0, str(exc)))
            else:
                self._give_back(jobs)
            return
        future.add_done_callback(
            lambda future: self._news.put(lambda: self._hear(jobs, together, future))
        )

    def _give_back(self, jobs: Sequence[Job]) -> None:
        """Have jobs wait again that have not begun where they were sent to."""
        for job in reversed(jobs):
            job.tries -= 1
            self._free(job)
            job.done = Done(job.command, job.number)
            self._queues.put(job, first=True)

    def _free(self, job: Job) -> None:
        if job in self._running:
            del self._running[job]
            seat = job.seat
            assert seat is not None
            del seat.jobs[job]
            if not seat.jobs:
                self._queues.load.give(self, seat.label, seat.slots)
                heapq.heappush(self._seats, seat.number)
        job.stop()

    # -- what comes back

    def _wait(self) -> None:
        """Wait for something to happen, and take it."""
        overdue = self._pace.overdue(self._running)
        for job in overdue:
            job.is_overdue = True
        if overdue:
            self.backend.give_up([job.future for job in overdue if job.future is not None])
        patience = self._pace.wait(self._running, bool(self._queues.waiting))
        with contextlib.suppress(queue.Empty):
            self._news.get(timeout=patience)()

    def _take_back(self) -> None:
        """Take from hosts that are up no more what has not begun there: it would wait for them."""
        self._queues.look()
        up = self._queues.capacities.keys()
        gone: dict[AnyFuture, list[Job]] = {}
        for job in self._running:
            if job.future and job.label not in up:
                gone.setdefault(job.future, []).append(job)
        if gone:
            begun = self.backend.places(gone)
            for future in gone.keys() - begun.keys():
                for job in gone[future]:
                    job.is_taken_back = True
                self.backend.give_up([future])

    def _hear(self, jobs: list[Job], together: int, future: AnyFuture) -> None:
        jobs = self._together.pop(together, jobs)
        value = self._value(jobs[0], future)
        if isinstance(value, Lost):
            self._lose(jobs, value)
        elif not together:
            self._go_on(jobs, [value])
        elif not isinstance(value, BaseException):
            self._give_back(jobs[len(value) :])
            self._go_on(jobs[: len(value)], value)
        elif len(jobs) == 1:
            self._go_on(jobs, [value])
        else:  # one of them has ended what ran them: who it was will be seen
            for job in jobs:
                self._free(job)
                job.lost += 1
                self._again(job)

    def _hear_sooner(self, number: int, ended: list[Ended]) -> None:
        """Take notice that one of some jobs takes long: the others need not wait for it."""
        jobs = self._together.get(number, [])
        if len(jobs) > len(ended):
            self._together[number] = [jobs[len(ended)]]
            self._give_back(jobs[len(ended) + 1 :])
            self._go_on(jobs[: len(ended)], ended)

    def _lose(self, jobs: Sequence[Job], lost: Lost) -> None:
        for job in jobs:
            self._free(job)
            done = job.done
            if job.is_overdue:
                done.timed_out, done.seconds = True, self._pace.limit
                done.host, done.attempts = job.label, job.tries
                self._end(job)
                continue
            job.attempts.count(lost)
            if job.is_taken_back:
                job.tries -= 1
            else:
                job.lost += 1
            if job.attempts.may_go_on(Limits()):
                self._again(job)
                continue
            done.host, done.error, done.attempts = job.label, lost.reason, job.tries
            self._ended.append(done)

    @staticmethod
    def _value(job: Job, future: AnyFuture) -> Any:
        """Return what came back: a value, an error, or that it is lost."""
        result = result_of(future, job.label)
        if isinstance(result, Lost):
            return result
        value, error, text = unpack_answer(result, 0, f"command {job.number}")
        return value if error is None else traced(error, result, text)

    def _end(self, job: Job) -> None:
        """Take note of what has become of a command, unless it is to run again."""
        self._pace.note(job.done)
        failures = job.tries - job.lost  # with this one
        if job.done.succeeded or not 0 < failures <= job.command.retries:
            self._ended.append(job.done)
            return
        job.failed_on.add(job.label)
        pinned, up = self._queues.labels(job.command.pinned), self._queues.capacities.keys()
        elsewhere = (pinned & up if pinned else up) - job.failed_on
        job.labels = frozenset(elsewhere) or pinned or None
        self._again(job)

    def _again(self, job: Job) -> None:
        self.retried += 1
        job.done = Done(job.command, job.number)
        self._queues.put(job)


def _next_step(job: Job, value: Any) -> Step | None:
    """Return the next step of a job; of one that has none more it is noted why if it failed."""
    try:
        step: Step = job.step(value)
    except StopIteration:
        return None
    except StepFailed as exc:
        job.done.error = str(exc)
    except Exception as exc:
        job.done.error = f"{type(exc).__name__}: {exc}"
    else:
        return step
    return None
