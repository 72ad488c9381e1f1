"""Arrays of jobs as a backend: what other runs submit is done by them, chunk by chunk."""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from pathlib import Path

from ostap_parallel.arrays.layout import Header, Layout
from ostap_parallel.arrays.records import Told
from ostap_parallel.arrays.settings import Settings, start_file
from ostap_parallel.arrays.submitting import Submitter
from ostap_parallel.arrays.watching import Watcher
from ostap_parallel.engine.backend import (
    AnyFuture,
    Backend,
    Result,
    Submit,
    chunks_of,
    pack_function,
)
from ostap_parallel.errors import HostError, JobRefused, SchedulerUnavailable, ServersUnavailable
from ostap_parallel.schedulers.scheduler import End
from ostap_parallel.worker.chunk import Lost
from ostap_parallel.worker.execute import Call

# Jobs at the same time, if nobody tells.
JOBS = 16

# Seconds that a chunk waits for others to be submitted with.
TOGETHER = 0.05

# Seconds that the scheduler has to cancel jobs at the end.
END = 60.0

# Ends of a job for which its chunk may be to blame.
_BLAMED = {End.MEMORY.value, End.WALLTIME.value}


class ArrayBackend(Backend):
    """Runs chunks by jobs of a batch system, those that come together by one array.

    The directory ends with it, or with the process: such a run does not outlive its driver.
    """

    round_trip = 1.0

    def __init__(
        self, directory: Callable[[], Path], settings: Settings, polling: float, grace: float
    ) -> None:
        self._directory, self._settings = directory, settings
        # said by a pool that is left open at the exit, when the names of modules are gone
        self._workers = {settings.kind: (settings.limit or JOBS) * settings.processes}
        self._timing = polling, grace
        self._changed = threading.Condition()
        self._layout: Layout | None = None
        self._numbers, self._calls = itertools.count(), itertools.count()
        self._new: dict[int, tuple[Header, bytes]] = {}
        self._futures: dict[int, Future[Result]] = {}
        self._unwanted: set[int] = set()
        self._refusal: JobRefused | None = None
        self._submitter: Submitter | None = None
        self._watcher: Watcher | None = None
        self._is_served = self._is_closed = False
        self._ended = threading.Event()
        self._pid = os.getpid()

    @property
    def name(self) -> str:
        """The kind of the batch system."""
        return self._settings.kind

    @property
    def workers(self) -> Mapping[str, int]:
        """How many jobs there may be at the same time."""
        return self._workers

    def window(self) -> int:
        """Return how many chunks should be under way; raises `ServersUnavailable` if none can."""
        if self._refusal is not None:
            error = HostError(self.name, "submit", str(self._refusal))
            raise ServersUnavailable((error,)) from self._refusal
        return super().window()

    def open(self, call: Call) -> Submit:
        """Write down what is called."""
        packed = pack_function(call)
        layout, number = self._begun(), next(self._calls)
        try:
            layout.write(f"calls/{number}", packed)
        except OSError:
            if self._refusal is not None:  # with which the directory went
                self.window()
            raise

        def submit(
            chunk: bytes, *, is_short: bool = False, hosts: frozenset[str] | None = None
        ) -> Future[Result]:
            future: Future[Result] = Future()
            try:
                self._add(future, Header(number, ()), chunk)
                return future
            except BaseException:  # whoever was interrupted does not have it
                self.give_up([future])
                raise

        return submit

    def _add(self, future: Future[Result], header: Header, chunk: bytes) -> None:
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the pool was closed")
            if self._refusal is not None:
                self.window()  # which raises: nobody would settle it
            number = next(self._numbers)
            self._futures[number] = future
            self._new[number] = header, chunk
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.wake()

    def _begun(self) -> Layout:
        """Return the directory, which is made when it is first needed."""
        if self._is_of_fork():
            raise RuntimeError("a pool serves the process that has opened it, not its forks")
        with self._changed:
            if self._is_closed:
                raise RuntimeError("the pool was closed")
            if self._layout is None:
                self._layout = self._new_layout()
            if not self._is_served:
                atexit.register(self.close)
                serving = threading.Thread(
                    target=self._serve, args=[self._layout], name="arrays", daemon=True
                )
                serving.start()
            return self._layout

    def _is_of_fork(self) -> bool:
        """Return whether this is a fork: jobs and files are the other process's."""
        return os.getpid() != self._pid

    def _new_layout(self) -> Layout:
        layout = Layout(self._directory())
        try:
            layout.create()
            layout.write("start.py", start_file().encode())
            layout.write_json("settings", self._settings.to_json())
        except BaseException:
            layout.remove()
            raise
        return layout

    def _serve(self, layout: Layout) -> None:
        """Submit what is new, and settle what has ended, until there is nothing more."""
        with self._changed:
            if self._is_served:  # by a thread whose start was interrupted
                return
            self._is_served = True
            self._submitter = submitter = Submitter(layout, self._settings)
        leaving = contextlib.ExitStack()
        try:
            watcher = Watcher(layout, self._settings.scheduler(), *self._timing)
            leaving.callback(watcher.close)
            self._watcher = watcher
            while not self._is_closed:
                with self._changed:
                    while not (self._futures or self._is_closed):
                        self._changed.wait()
                    if self._new:
                        self._changed.wait(TOGETHER)
                    room = self._room(len(watcher) + len(submitter.waiting))
                    new = {n: self._new.pop(n) for n in list(self._new)[:room]}
                    unwanted, self._unwanted = self._unwanted, set()
                self._submit(submitter, watcher, new)
                self._cancel(submitter, watcher, unwanted)
                for number, told in watcher.news(1.0).items():
                    self._settle(number, result_of(told))
        except BaseException as exc:  # nobody waits for this thread: who waits must hear of it
            with self._changed:
                self._refusal = JobRefused(self.name, f"{type(exc).__name__}: {exc}")
            raise
        finally:
            leaving.close()
            for number in list(self._futures):
                reason = str(self._refusal or "the pool was closed")
                self._settle(number, Lost(self.name, 0, reason))
            _end(layout, submitter)
            self._ended.set()

    def _room(self, under_way: int) -> int:
        """Return how many jobs may be submitted now.

        The limit of an array is its own only, and each lot of chunks is another one.
        """
        limit = self._settings.limit
        return max(0, limit - under_way) if limit else len(self._new)

    def _submit(
        self, submitter: Submitter, watcher: Watcher, new: dict[int, tuple[Header, bytes]]
    ) -> None:
        assert self._layout is not None
        for number, (header, chunk) in new.items():
            future = self._futures.get(number)
            if future is not None and future.set_running_or_notify_cancel():
                self._layout.write_chunk(number, header, chunk)
            else:
                self._futures.pop(number, None)
        chunks = [(number, 1) for number in new if number in self._futures]
        tried, made = [*submitter.waiting, *chunks], list[int]()
        error: Exception | None = None
        try:
            submitter.submit_waiting(made)
            if chunks:
                submitter.submit(chunks, made)
        except (JobRefused, SchedulerUnavailable, CancelledError) as exc:
            error = exc
        for array in made:
            watcher.add(array)
        if error is not None:
            if isinstance(error, JobRefused):
                self._refusal = error
            submitter.waiting.clear()
            there = {number for array in made for number in self._layout.elements(array)}
            for number in {number for number, _ in tried} - there:
                self._settle(number, Lost(self.name, 0, str(error)))

    def _cancel(self, submitter: Submitter, watcher: Watcher, unwanted: set[int]) -> None:
        """End the jobs of chunks that nobody waits for."""
        if unwanted:
            submitter.drop(unwanted)
        watcher.cancel(unwanted & self._futures.keys())
        for number in unwanted:
            self._settle(number, Lost(self.name, 0, "it was interrupted"))

    def _settle(self, number: int, result: Result) -> None:
        if future := self._futures.pop(number, None):
            if not future.running() and not future.set_running_or_notify_cancel():
                return
            future.set_result(result)

    def give_up(self, futures: Iterable[AnyFuture] | None = None) -> None:
        """Drop what has not been submitted, and cancel the jobs of the rest."""
        if self._is_of_fork():
            return
        given = None if futures is None else list(futures)
        super().give_up(given)
        with self._changed:
            wanted = None if given is None else set(map(id, chunks_of(given)))
            for number, future in list(self._futures.items()):
                if wanted is not None and id(future) not in wanted:
                    continue
                if future.cancel():
                    self._futures.pop(number, None)
                    self._new.pop(number, None)
                else:
                    self._unwanted.add(number)
            self._changed.notify_all()
        if self._watcher is not None:
            self._watcher.wake()

    def close(self) -> None:
        """Cancel all jobs, and remove the directory; nothing in a fork."""
        if self._is_of_fork():
            return
        atexit.unregister(self.close)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            if self._submitter is not None:
                self._submitter.stopping.set()
        if self._watcher is not None:
            self._watcher.wake()
        if self._layout is None:
            return
        # the thread ends what there is: it may just be submitting
        if not self._is_served or not self._ended.wait(2 * self._settings.submit_timeout + END):
            _end(self._layout, Submitter(self._layout, self._settings))


def result_of(told: Told) -> Result:
    """Return what a run takes for what a job has told."""
    if told.whole is not None:
        return told.whole
    reason = f"{told.end}: {told.words}" if told.words else told.end
    return Lost(told.host, 0, reason, by_worker=told.end in _BLAMED)


def _end(layout: Layout, submitter: Submitter) -> None:
    """End the jobs of a backend."""
    if not (layout.exists() or submitter.ids):
        return
    with contextlib.suppress(OSError, SchedulerUnavailable, JobRefused):
        submitter.cancel()  # those that are left find that there is nothing to do
    layout.remove()
