"""Results that a thread fetches: for who waits with a time limit, or in asyncio."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import sys
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import closing, suppress
from typing import Any, NamedTuple, ParamSpec, TypeVar

from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.run import Run, on_run

P = ParamSpec("P")
T = TypeVar("T")

# While nobody takes them, so many results are held and the thread waits.
AHEAD = 256

Arrivals = Generator[Batch | Outcome, None, None]

# What users have in hand. When the interpreter ends, it must end before the modules do that it
# needs for that.
_unfinished: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


@atexit.register
def _end_unfinished() -> None:
    for arrivals in list(_unfinished):
        with suppress(Exception):  # a thread may be at it just now
            arrivals.close()


def ending_at_exit(
    function: Callable[P, Generator[T, None, None]],
) -> Callable[P, Generator[T, None, None]]:
    """Have what a generator function returns end when the interpreter does."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Generator[T, None, None]:
        generator = function(*args, **kwargs)
        _unfinished.add(generator)
        return generator

    return call


def timeout_error() -> Exception:
    """Return what says that a pool's result is not there in time.

    Who has loaded `multiprocess`, the fork of `multiprocessing` that pathos uses, may expect its
    class: it is of both then.
    """
    fork = sys.modules.get("multiprocess.context")
    return (_of_both(fork.TimeoutError) if fork else multiprocessing.TimeoutError)()


@functools.cache
def _of_both(other: type[Exception]) -> type[Exception]:
    return type("TimeoutError", (multiprocessing.TimeoutError, other), {})


class _Failed(NamedTuple):
    """In place of a result."""

    error: BaseException


class _Buffer:
    """What the thread of a stream shares with it; the thread does not keep the stream alive."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel
        self.changed = threading.Condition()
        self.held: deque[Any] = deque()
        self.ended: Future[None] = Future()
        self.limit = float(AHEAD)
        self.is_discarded = False
        self.waiting: list[Future[None]] = []  # of event loops

    def is_ready(self) -> bool:
        return bool(self.held) or self.ended.done()

    def fill(self, arrivals: Arrivals) -> None:
        """Hold what arrives until somebody takes it; an error is the last that is held."""
        try:
            with closing(arrivals):
                for arrival in arrivals:
                    self._hold(_values(arrival))
                    del arrival  # not to be kept while the next one is awaited
        except BaseException as exc:
            self._hold([_Failed(exc)])
        with self.changed:
            self.ended.set_result(None)
            self._tell()

    def _hold(self, values: list[Any]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: len(self.held) < self.limit)
            if not self.is_discarded:
                self.held.extend(values)
            self._tell()

    def _tell(self) -> None:
        self.changed.notify_all()
        for waiter in self.waiting:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
        self.waiting.clear()

    def stop(self) -> None:
        """End the run; its error is the last that is held."""
        self.cancel()
        self.unlimit()

    def unlimit(self) -> None:
        """Let the thread go on though nobody takes anything."""
        with self.changed:
            self.limit = float("inf")
            self.changed.notify_all()

    def discard(self) -> None:
        """Let the thread go on, for nobody."""
        self.is_discarded = True
        self.unlimit()


class Stream(Iterator[Any]):
    """The results of a run, fetched by a thread that is never far ahead of who takes them.

    An item's exception is raised in its place, and the next results can be taken afterwards. If
    the stream is dropped, the run goes on all the same. Leaving ``async for`` ends it.

    Parameters
    ----------
    arrivals
        What becomes of the items.
    cancel
        Has `arrivals` end soon.
    owner
        Is kept alive as long as the stream.

    Attributes
    ----------
    ended
        Is done when nothing more arrives.
    cancel
        Ends the run. It does not keep the stream alive.
    unlimit
        Has all results fetched, though nobody takes them.
    """

    def __init__(
        self, arrivals: Arrivals, cancel: Callable[[], None], owner: object = None
    ) -> None:
        self._owner = owner
        self._buffer = _Buffer(cancel)
        self.ended, self.unlimit = self._buffer.ended, self._buffer.unlimit
        self.cancel = self._buffer.stop
        weakref.finalize(self, self._buffer.discard).atexit = False
        threading.Thread(
            target=self._buffer.fill, args=[arrivals], name="results", daemon=True
        ).start()

    def __next__(self) -> Any:
        return self.next()

    def next(self, timeout: float | None = None) -> Any:
        """Return the next result.

        Raises
        ------
        multiprocessing.TimeoutError
            There is none after `timeout` seconds.
        StopIteration
            There will be no more.
        """
        buffer = self._buffer
        with buffer.changed:
            try:
                is_ready = buffer.changed.wait_for(buffer.is_ready, timeout)
            except KeyboardInterrupt:
                self.cancel()
                raise
            if not is_ready:
                raise timeout_error()
            if not buffer.held:
                raise StopIteration
            value = buffer.held.popleft()
            buffer.changed.notify_all()
        if isinstance(value, _Failed):
            raise value.error
        return value

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while await self._wait():
                yield self.next()
        finally:
            self.cancel()

    async def _wait(self) -> bool:
        """Wait in an event loop; return whether there is a result."""
        import asyncio

        await asyncio.sleep(0)  # the loop's other tasks have their turn
        buffer = self._buffer
        while True:  # others may take what has come
            with buffer.changed:
                if buffer.is_ready():
                    return bool(buffer.held)
                waiter: Future[None] = Future()
                buffer.waiting.append(waiter)
            await asyncio.wrap_future(waiter)


class Results(Iterator[Any]):
    """The results of a run, by ``for`` and by ``async for``; leaving the loop ends the run."""

    def __init__(self, arrivals: Arrivals, cancel: Callable[[], None]) -> None:
        self._arrivals, self._cancel = arrivals, cancel
        _unfinished.add(arrivals)
        self._all = (value for arrival in arrivals for value in _values(arrival))

    def __iter__(self) -> Iterator[Any]:
        return self._all

    def __next__(self) -> Any:
        return next(self._all)

    def close(self) -> None:
        """End the run."""
        self._all.close()
        self._arrivals.close()

    def __aiter__(self) -> AsyncIterator[Any]:
        return aiter(Stream(self._arrivals, self._cancel))


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Await a function that is called in a thread; who cancels that cancels its runs."""
    runs: list[Run] = []
    is_cancelled = False

    def begin(run: Run) -> None:
        runs.append(run)
        if is_cancelled:
            run.cancel()

    def call() -> T:
        on_run.set(begin)  # in a context of the thread's own
        return function(*args, **kwargs)

    import asyncio

    called = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(called)
    except asyncio.CancelledError:
        is_cancelled = True
        for run in runs:
            run.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await called
        raise


def _values(arrival: Batch | Outcome) -> list[Any]:
    if isinstance(arrival, Batch):
        return arrival.values
    return [arrival.value if arrival.error is None else _Failed(arrival.error)]
