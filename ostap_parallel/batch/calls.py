"""Calls of a pool that are under way: none of them leaves jobs behind that nobody waits for."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

from ostap_parallel.arrays.backend import ArrayBackend
from ostap_parallel.arrays.run import Run
from ostap_parallel.errors import SchedulerUnavailable, add_note
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.report import Running

logger = logging.getLogger(__name__)

T = TypeVar("T")

BETWEEN = 0.5  # seconds between lines that tell how many are done

# Seconds between looks at whether there was a signal: one that comes just before the waiting
# begins does not end that.
LOOKING = 2.0

CANCELLED = "the run was cancelled"


class Calls:
    """Those of a pool, which wait so many seconds at the end of that."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._pid = os.getpid()
        self._lock = threading.RLock()
        # to the thread that has called; one that has not begun goes with who holds it
        self._all: weakref.WeakKeyDictionary[Doing, int] = weakref.WeakKeyDictionary()

    def add(self, doing: Doing) -> None:
        """Know of one, until it has ended."""
        with self._lock:
            self._all[doing] = threading.get_ident()

    def discard(self, doing: Doing) -> None:
        """Know of one no longer."""
        with self._lock:
            self._all.pop(doing, None)

    def all(self) -> dict[Doing, int]:
        """Return them, and the threads that have called."""
        with self._lock:
            return dict(self._all)

    def mine(self) -> set[Doing]:
        """Return those of this thread."""
        me = threading.get_ident()
        return {one for one, thread in self.all().items() if thread == me}

    def is_of_fork(self) -> bool:
        """Return whether this is a fork: the calls are those of the other process."""
        return os.getpid() != self._pid

    def end(self) -> None:
        """Cancel all, and wait until they have ended; nothing in a fork."""
        if self.is_of_fork():
            return
        under_way = self.all()
        for one in under_way:
            one.cancel()
        wait([one.ended for one in under_way], self._patience)


class Doing:
    """A call: a run that is made when its results are asked for, and then removed.

    It is done by a thread: Ctrl-C, which only the main one gets, cuts off no submission.

    Parameters
    ----------
    make
        Makes the run; gets what is set when that is not wanted any more.
    order
        Yield results in the order of the items.
    keep
        Keep the files of the run, or not; ``None``: if an item has failed.
    verbose
        Print how many items are done when that changes.

    Attributes
    ----------
    ended
        Is done when nothing of it is under way any more.
    """

    def __init__(
        self,
        calls: Calls,
        backend: ArrayBackend,
        items: Sequence[Any],
        make: Callable[[threading.Event], Run],
        *,
        order: bool,
        keep: bool | None,
        verbose: bool,
    ) -> None:
        self.backend = backend
        self.ended: Future[None] = Future()
        self._calls, self._items, self._make = calls, items, make
        self._order, self._keep, self._is_verbose = order, keep, verbose
        self._run: Run | None = None
        self._stopping = threading.Event()
        self._lock = threading.RLock()
        self._has_begun = False
        calls.add(self)

    @property
    def total(self) -> int:
        """Number of items."""
        return len(self._items)

    @property
    def retried(self) -> int:
        """Nothing: the directory of the run tells that."""
        return 0

    def running(self) -> list[Running]:
        """Return nothing: the directory of the run tells what runs."""
        return []

    def wake(self) -> None:
        """Nothing waits for input."""

    def cancel(self) -> None:
        """Have it end soon, from any thread."""
        if self._calls.is_of_fork():
            return
        with self._lock:
            self._stopping.set()
            if not self._has_begun:
                self._end()
        if self._run is not None:
            self._run.stop()

    def begin(self, work: Callable[[Doing], T]) -> Future[T]:
        """Have a thread do it."""
        done: Future[T] = Future()
        # it does not keep the interpreter from exiting, which then cancels it
        threading.Thread(target=_fill, args=[done, work, self], name="pool", daemon=True).start()
        return done

    def apart(self, work: Callable[[Doing], T]) -> T:
        """Have a thread do it, and wait; if that is interrupted, nothing is left of it."""
        try:
            done = self.begin(work)
            while not wait([done], LOOKING).done:
                pass
            return done.result()
        except BaseException:
            self.cancel()
            wait([self.ended])
            raise

    def submit(self) -> Run:
        """Have a thread make the run, and return it; then it is the caller's."""
        try:
            return self.apart(Doing._submit)
        except BaseException:
            if self._run is not None:
                self._run.remove()
            raise

    def arrivals(self) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items; what is left of the run is kept if one has failed."""
        self._begin()
        try:
            if self._items:
                yield from self._arrivals()
        finally:
            self._end()

    def _begin(self) -> None:
        with self._lock:
            if self._stopping.is_set():
                raise CancelledError(CANCELLED)
            self._has_begun = True

    def _end(self) -> None:
        self._calls.discard(self)
        if not self.ended.done():
            self.ended.set_result(None)

    def _submit(self) -> Run:
        self._begin()
        try:
            run = self._run = self._make(self._stopping)
            return run
        finally:
            self._end()

    def _arrivals(self) -> Generator[Batch | Outcome, None, None]:
        run = self._run = self._make(self._stopping)
        is_over, done, failures, next_line = False, 0, 0, 0.0
        try:
            for outcome in run.arrivals(self._order, keep=False):
                assert isinstance(outcome, Outcome)
                failures += outcome.error is not None
                if outcome.error is not None and self._keep is not False:
                    note = f"the run is kept, see: ostap-parallel jobs {run.directory}"
                    add_note(outcome.error, note)
                done += 1
                if self._is_verbose and (done == run.total or time.monotonic() > next_line):
                    next_line = time.monotonic() + BETWEEN
                    now = time.strftime("%H:%M:%S")
                    print(f"[{now}] {done} of {run.total} done, {failures} failed", flush=True)
                yield outcome
            is_over = True
        finally:
            self._finish(run, is_over, failures)

    def _finish(self, run: Run, is_over: bool, failures: int) -> None:
        if not is_over:
            try:
                run.cancel()
            except SchedulerUnavailable as exc:  # what has stopped us is more important
                logger.warning("jobs of %s may be left, and will do nothing: %s", run, exc)
            if self._keep is not False and run.ended:
                text = "stopped: what is done is in %s, and Run(...).resubmit() goes on"
                logger.warning(text, run.directory)
                return
        is_kept = self._keep is True or (self._keep is None and failures)
        if not is_kept or not (is_over or run.ended):
            run.remove()


def _fill(done: Future[T], work: Callable[[Doing], T], doing: Doing) -> None:
    """Do it in a thread."""
    try:
        done.set_result(work(doing))
    except BaseException as exc:
        done.set_exception(exc)
