"""Runs commands on the hosts of a backend."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from typing import Any

from ostap_parallel.commands.command import Done
from ostap_parallel.commands.course import Levels, course_of
from ostap_parallel.commands.outputs import Outputs
from ostap_parallel.commands.pace import Pace
from ostap_parallel.commands.slots import Job, Queues
from ostap_parallel.commands.transfer import StepFailed
from ostap_parallel.engine.backend import AnyFuture, Backend, Submit, result_of
from ostap_parallel.engine.retries import Limits
from ostap_parallel.runs.report import Running, describe
from ostap_parallel.worker.chunk import Lost, pack_chunk, pack_value, traced, unpack_answer
from ostap_parallel.worker.execute import Call

# Seconds that commands get to end when a run is stopped.
STOP_PATIENCE = 4.0

# So many wait at most for hosts that are busy while others are idle, where more are to be read.
AHEAD = 1000


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
        self._queues = Queues(backend, max_per_node)
        self._running: dict[Job, None] = {}
        self.retried = 0
        self._news: queue.SimpleQueue[tuple[Job, AnyFuture] | None] = queue.SimpleQueue()
        self._source: Iterator[Job | Done | None] = iter(())
        self._is_read = self._is_paused = False
        self._ahead: float = AHEAD
        self._seats: list[int] = []
        self._last_seat = itertools.count(1)
        self._submits: dict[Callable[[Any], Any], Submit] = {}
        self._stop_listening = backend.listen(self.wake)
        self._queues.load.listeners.add(self.wake)

    def run(self, source: Iterator[Job | Done | None], ahead: float = AHEAD) -> Iterator[Done]:
        """Run what comes from a source; yield what becomes of it, and what has already.

        Parameters
        ----------
        ahead
            How many may be read at most for which no host is free.
        """
        self._source, self._ahead = source, ahead
        while True:
            yield from self._read()
            for job, reason in self._queues.hopeless():
                job.done.error = reason
                yield job.done
            yield from self._begin_all()
            if not self._running and not self._queues.waiting and self._is_read:
                return
            if self._running or self._queues.waiting or self._is_paused:
                yield from self._wait()

    def running(self) -> list[Running]:
        """Return what runs, the longest first; which processes these are is not known here."""
        now = time.monotonic()
        return [
            Running(job.number, describe(str(job.command)), 1, job.label, 0, now - job.begun)
            for job in sorted(self._running, key=lambda job: job.begun)
        ]

    def wake(self) -> None:
        """Have `run` look again, from any thread."""
        self._news.put(None)

    def stop_feeding(self) -> None:
        """Begin no more commands; what runs goes on."""
        self._is_read = True
        self._source = iter(())
        self._queues.drop()

    def close(self) -> None:
        """End what runs, in the process that has begun it."""
        if os.getpid() != self._pid:
            return
        self._stop_listening()
        self._queues.load.listeners.discard(self.wake)
        futures = [job.future for job in self._running if job.future is not None]
        self.backend.give_up(futures)
        if futures:
            wait(futures, STOP_PATIENCE)
        for job in list(self._running):
            self._free(job)

    def _read(self) -> Iterator[Done]:
        """Take from the source what can be begun soon; begin it as it comes."""
        self._is_paused = False
        while not self._is_read and self._may_read():
            try:
                job = next(self._source)
            except StopIteration:
                self._is_read = True
                return
            if job is None:  # `wake` tells when there is more
                self._is_paused = True
                return
            if isinstance(job, Done):
                yield job
            else:
                names = job.command.pinned
                job.labels = self._queues.labels(names) if names else None
                self._queues.put(job)
                if self._ahead < float("inf"):  # else the next one is there already
                    yield from self._begin_all()

    def _may_read(self) -> bool:
        """Return whether there is use for more than what waits."""
        queues, capacities = self._queues, self._queues.capacities()
        enough = 2 * sum(capacities.values()) + 1
        if queues.waiting < enough or self._ahead == float("inf"):
            return queues.unpinned < enough
        are_idle = any(queues.load.free(label, count) > 0 for label, count in capacities.items())
        return are_idle and queues.unpinned < enough and queues.waiting < self._ahead

    def _begin_all(self) -> Iterator[Done]:
        if self._queues.waiting and not self._running:
            with contextlib.suppress(ConnectionError):  # `hopeless` tells the reasons
                self.backend.window()  # which wakes hosts that rest
        while self._queues.waiting and self._pace.may_begin():
            job = self._queues.next()
            if job is None:
                self._pace.take_back()
                return
            self._running[job] = None
            job.seat = heapq.heappop(self._seats) if self._seats else next(self._last_seat)
            job.begin(course_of(job, self._outputs, self._levels))
            try:
                yield from self._go_on(job, None)
            except ConnectionError:  # the host has just gone, and nothing has begun there
                job.tries -= 1
                self._free(job)
                self._queues.put(job)
                return

    def _go_on(self, job: Job, value: Any) -> Iterator[Done]:
        """Have the next step of a job done; yield what has become of it after the last."""
        try:
            function, item = job.step(value)
        except StopIteration:
            pass
        except StepFailed as exc:
            job.done.error = str(exc)
        except Exception as exc:
            job.done.error = f"{type(exc).__name__}: {exc}"
        else:
            if function not in self._submits:
                level = logging.getLogger().level
                self._submits[function] = self.backend.open(Call(function, log_level=level))
            chunk = pack_chunk([job.number], [pack_value(item, f"command {job.number}")])
            future = self._submits[function](chunk, hosts=frozenset([job.label]))
            job.future, job.is_taken_back = future, False
            future.add_done_callback(lambda future: self._news.put((job, future)))
            return
        self._free(job)
        yield from self._end(job)

    def _free(self, job: Job) -> None:
        if job in self._running:
            del self._running[job]
            self._queues.load.give(job.label, job.slots, self.wake)
            heapq.heappush(self._seats, job.seat)
        job.stop()

    # -- what comes back

    def _wait(self) -> Iterator[Done]:
        """Wait for something to happen, and take it."""
        overdue = self._pace.overdue(self._running)
        for job in overdue:
            job.is_overdue = True
        if overdue:
            self.backend.give_up([job.future for job in overdue if job.future is not None])
        patience = self._pace.wait(self._running, bool(self._queues.waiting))
        try:
            news = self._news.get(timeout=patience)
        except queue.Empty:
            return
        if news is not None:
            yield from self._hear(*news)
        else:
            self._take_back()

    def _take_back(self) -> None:
        """Take from hosts that are up no more what has not begun there: it would wait for them."""
        up = self._queues.capacities().keys()
        gone = {job.future: job for job in self._running if job.future and job.label not in up}
        if gone:
            begun = self.backend.places(gone)
            for future in gone.keys() - begun.keys():
                gone[future].is_taken_back = True
                self.backend.give_up([future])

    def _hear(self, job: Job, future: AnyFuture) -> Iterator[Done]:
        value = self._value(job, future)
        if not isinstance(value, Lost):
            try:
                yield from self._go_on(job, value)
                return
            except ConnectionError as exc:
                value = Lost(job.label, 0, str(exc))
        self._free(job)
        done = job.done
        if job.is_overdue:
            done.timed_out, done.seconds = True, self._pace.limit
            done.host, done.attempts = job.label, job.tries
            yield from self._end(job)
            return
        job.attempts.count(value)
        if job.is_taken_back:
            job.tries -= 1
        else:
            job.lost += 1
        if job.attempts.may_go_on(Limits()):
            self._again(job)
            return
        done.host, done.error, done.attempts = job.label, value.reason, job.tries
        yield done

    @staticmethod
    def _value(job: Job, future: AnyFuture) -> Any:
        """Return what came back: a value, an error, or that it is lost."""
        result = result_of(future, job.label)
        if isinstance(result, Lost):
            return result
        value, error, text = unpack_answer(result, 0, f"command {job.number}")
        return value if error is None else traced(error, result, text)

    def _end(self, job: Job) -> Iterator[Done]:
        """Yield what has become of a command, unless it is to run again."""
        self._pace.note(job.done)
        failures = job.tries - job.lost  # with this one
        if job.done.succeeded or not 0 < failures <= job.command.retries:
            yield job.done
            return
        job.failed_on.add(job.label)
        pinned, up = self._queues.labels(job.command.pinned), self._queues.capacities().keys()
        elsewhere = (pinned & up if pinned else up) - job.failed_on
        job.labels = frozenset(elsewhere) or pinned or None
        self._again(job)

    def _again(self, job: Job) -> None:
        self.retried += 1
        job.done = Done(job.command, job.number)
        self._queues.put(job)
