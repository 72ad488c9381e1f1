"""Pool: the interface of `multiprocessing.Pool` on every core within reach."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import math
import multiprocessing.pool
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing.pool import CLOSE, INIT, RUN, TERMINATE
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from ostap_parallel.engine.backend import Backend
from ostap_parallel.engine.core import let_daemons_go
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.faces.executor import Executor
from ostap_parallel.faces.lazy import Source, in_thread
from ostap_parallel.faces.left import Left, Waiting
from ostap_parallel.logs import logger_of
from ostap_parallel.runs.checks import check_callable
from ostap_parallel.runs.display import title_of
from ostap_parallel.runs.outcome import Batch
from ostap_parallel.runs.run import Run
from ostap_parallel.runs.snapshot import told
from ostap_parallel.runs.stream import Stream, timeout_error
from ostap_parallel.runs.tally import Tally
from ostap_parallel.worker import calls, standin
from ostap_parallel.worker.execute import Call
from ostap_parallel.worker.tasks import each_anew

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ostap_parallel.faces.executor import Settings

logger = logger_of(__name__)

# Said where work was stopped from outside.
TERMINATED = "the pool was terminated, or the waiting cancelled"

Function = Callable[..., Any]
Callback = Callable[[Any], object] | None
Stop = Callable[[], object]


@dataclass(eq=False, repr=False)
class AsyncResult(multiprocessing.pool.AsyncResult[Any]):
    """What a pool's ``..._async`` methods return; it can be awaited in asyncio, too.

    Ctrl-C in `get`, and cancelling the asyncio task that awaits it, stop the work.
    """

    _pool: Pool | None  # is kept alive until the work is done
    _stop: Stop
    _callback: Callback
    _error_callback: Callback
    _is_cancelled: bool = False
    _settled: Future[Any] = field(default_factory=Future)  # when the callback has returned

    def ready(self) -> bool:
        """Return whether the work is done, and the callback has returned."""
        return self._settled.done()

    def successful(self) -> bool:
        """Return whether nothing was raised; raises ValueError while it is not ready."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return self._settled.exception() is None

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is ready, or for `timeout` seconds."""
        with suppress(concurrent.futures.TimeoutError):
            self._settled.exception(timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Return the value, or raise what was raised.

        Raises
        ------
        multiprocessing.TimeoutError
            It is not ready after `timeout` seconds.
        concurrent.futures.CancelledError
            The pool was terminated.
        """
        try:
            self.wait(timeout)
        except KeyboardInterrupt:
            self._cancel()
            raise
        if not self.ready():
            raise timeout_error()
        error = self._settled.exception()
        if error is not None:  # `Future.result` asks for its truth
            raise error
        return self._settled.result()

    def __await__(self) -> Generator[Any, None, Any]:
        import asyncio  # whoever awaits has it; others need not load it

        told: Future[None] = Future()  # not the outcome: nobody takes that who is cancelled
        self._settled.add_done_callback(functools.partial(_tell, told))
        try:
            yield from asyncio.wrap_future(told).__await__()
        except asyncio.CancelledError:
            self._cancel()
            raise
        try:
            return self.get()
        except CancelledError as exc:
            raise asyncio.CancelledError(*exc.args) from None

    def _cancel(self) -> None:
        self._is_cancelled = True
        self._stop()

    def _settle(self, done: Future[Any]) -> None:
        """Take the outcome of the work, after telling the callback."""
        error = CancelledError() if done.cancelled() else done.exception()
        if error is not None and self._is_cancelled:
            error = CancelledError(TERMINATED)
        elif callback := self._callback if error is None else self._error_callback:
            try:
                callback(done.result() if error is None else error)
            except BaseException:
                logger.exception("the callback of %r has failed", self)
        self._pool = None
        if error is None:
            self._settled.set_result(done.result())
        else:
            self._settled.set_exception(error)


@dataclass(eq=False, repr=False)
class MapResult(AsyncResult):
    """What `map_async` and `starmap_async` return."""

    _left: Left = field(kw_only=True)

    @property
    def _chunksize(self) -> int:
        return self._left.chunksize

    @property
    def _number_left(self) -> int:
        """The number of chunks that are not done, by which many programs show progress."""
        return 0 if self.ready() else self._left.chunks()


class Pool(multiprocessing.pool.Pool):
    """`multiprocessing.Pool` on local cores and on hosts reached by ssh.

    Parameters
    ----------
    processes
        Local workers: by default as many as CPU affinity and control groups grant; 0: none.
    initializer, initargs
        ``initializer(*initargs)`` is called in each worker process before its first task.
    maxtasksperchild
        A worker process is replaced after so many chunks.
    context
        Has no effect, and a warning says so: see ``start=`` for how workers start.
    servers
        Hosts, and `settings` for them, as of `WorkManager`.
    executor
        Computes in place of ours: any `concurrent.futures.Executor`, or a `Backend`. It is not
        shut down.

    Raises
    ------
    ValueError
        A number or a setting is wrong; no host has been contacted.
    """

    tally: Tally | None = None
    _state = INIT  # `__del__` looks at it, also if `__init__` has raised

    def __init__(
        self,
        processes: int | None = None,
        initializer: Function | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        *,
        servers: str | int | Iterable[str | int] | None = None,
        executor: concurrent.futures.Executor | Backend | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        if context is not None:
            text = "context= has no effect: the workers are our own, see start= for how they start"
            warnings.warn(text, stacklevel=2)
        options: dict[str, Any] = {
            "ncpus": processes,
            "servers": servers,
            "initializer": initializer,
            "initargs": initargs if not isinstance(initargs, tuple | list) else initargs or None,
            "tasks_per_worker": maxtasksperchild,
            **settings,
        }
        given = {name: value for name, value in options.items() if value is not None}
        if executor is not None and given:
            raise TypeError(f"an executor of your own brings its workers: leave out {[*given]}")
        if not isinstance(processes, Integral | None):
            raise TypeError(f"processes must be a whole number, not {processes!r}")
        if processes is not None and (processes < 0 or (processes == 0 and not servers)):
            raise ValueError("Number of processes must be at least 1, or 0 with servers")
        owned = None if executor is not None else Executor(**given)
        self.backend = backend_of(executor or owned)
        self._streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        # what is not done yet, and how it is stopped
        self._under_way: dict[Future[Any], Stop] = {}
        self._callbacks = ThreadPoolExecutor(1, "callbacks")
        self._terminate = weakref.finalize(self, _end, self._under_way, owned, self._callbacks)
        greetings = None if owned is None else owned.backend.greetings
        for greeted in greetings.futures if greetings else ():
            self._track(greeted, _nothing)
        self._closing: Future[None] | None = None
        self._pid = os.getpid()
        self._state = RUN

    def __repr__(self) -> str:
        return f"<{type(self).__name__} state={self._state} pool_size={self._processes}>"

    def _check_running(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("a pool serves the process that has opened it, not its forks")
        if self._state != RUN:
            raise ValueError("Pool not running")

    async def __aenter__(self) -> Pool:
        return self.__enter__()

    async def __aexit__(self, *error: object) -> None:
        import asyncio

        await asyncio.to_thread(self.terminate)

    @property
    def _processes(self) -> int:
        """The number of workers, which many programs ask for."""
        return sum(self.backend.workers.values())

    @property
    def _pool(self) -> list[Any]:
        """The local processes, and ``None`` for each worker of a host, for who looks at them."""
        local = list(self.backend.processes())
        return [*local, *[None] * (self._processes - len(local))]

    @property
    def _cache(self) -> dict[int, Any]:
        """What is not done, for programs that count it."""
        stops = list(self._under_way.items())
        return dict(enumerate(done for done, stop in stops if stop is not _nothing))

    @property
    def _taskqueue(self) -> Waiting:
        """What no worker has begun, for programs that wait until that is little."""
        return Waiting(len(self._under_way) - self._processes)

    def _repopulate_pool(self) -> None:
        """Do nothing, as workers that have ended are replaced at once."""

    def apply(self, func: Function, args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:
        """Call a function on a worker and return what it returns, or raise what it raises."""
        self._check_running()
        future = _submit(self.backend, func, args, kwds)
        stop = functools.partial(self.backend.give_up, [future])
        self._under_way[future] = stop
        if self.tally is not None:
            future.add_done_callback(self.tally.hear)
        try:
            error = future.exception()
        except CancelledError:
            error = CancelledError(TERMINATED)
        except BaseException:
            future.add_done_callback(self._under_way.pop)
            stop()
            raise
        del self._under_way[future]
        if error is not None:  # `Future.result` asks for its truth
            raise error
        return future.result()

    def apply_async(
        self,
        func: Function,
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Call a function on a worker; return at once."""
        self._check_running()
        _check_callbacks(callback, error_callback)
        future = _submit(self.backend, func, args, kwds)
        if self.tally is not None:
            future.add_done_callback(self.tally.hear)
        stop = functools.partial(self.backend.give_up, [future])
        return self._begin(AsyncResult(self, stop, callback, error_callback), future)

    def map(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """Return the results in the order of the items."""
        return self._map_here(func, iterable, chunksize)

    def starmap(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None = None
    ) -> list[Any]:
        """Return the results of ``func(*args)`` for each ``args`` of the items, in their order."""
        return self._map_here(functools.partial(calls.spread, func), iterable, chunksize)

    def imap(  # type: ignore[override]
        self, func: Function, iterable: Iterable[Any], chunksize: int | None = None
    ) -> Stream:
        """Return an iterator over the results in the order of the items."""
        return self._stream(func, iterable, chunksize, ordered=True)

    def imap_unordered(  # type: ignore[override]
        self, func: Function, iterable: Iterable[Any], chunksize: int | None = None
    ) -> Stream:
        """Return an iterator over the results as they come."""
        return self._stream(func, iterable, chunksize, ordered=False)

    def close(self) -> None:
        """Take no more work; the workers end when all is done."""
        if self._state == RUN:
            self._state = CLOSE
            if self._terminate.alive:  # else the interpreter ends, and starts no threads any more
                self._closing = in_thread(_finish, self._under_way, self._terminate)

    def terminate(self) -> None:
        """Stop all work and end the workers."""
        self._state = TERMINATE
        self._terminate()

    def join(self) -> None:
        """Wait until all is done and the workers have ended, after `close` or `terminate`."""
        if not self._terminate.alive and self._closing is None and not self._under_way:
            return  # maybe the interpreter has ended, and what is named below has gone
        if self._state == RUN:
            raise ValueError("Pool is still running")
        for stream in list(self._streams):
            stream.unlimit()  # nobody takes results while this waits
        if self._closing is not None:
            self._closing.result()
        concurrent.futures.wait(list(self._under_way))

    def _map_async(
        self,
        func: Function,
        iterable: Iterable[Any],
        mapper: Function,
        chunksize: int | None = None,
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Do what `map`, `map_async`, `starmap` and `starmap_async` have in common."""
        _check_callbacks(callback, error_callback)
        if mapper is multiprocessing.pool.starmapstar:  # type: ignore[attr-defined]
            func = functools.partial(calls.spread, func)
        run = self._map_run(func, iterable, chunksize)
        left = Left(run.total or 0, self._size(run.total or 0, chunksize))
        self._count(run, left)
        result = MapResult(self, run.cancel, callback, error_callback, _left=left)
        return self._begin(result, in_thread(_collect, run, title_of(func)))

    def _map_here(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None
    ) -> list[Any]:
        """Do what `map` and `starmap` have in common: no other thread need be woken for them."""
        run = self._map_run(func, iterable, chunksize)
        ended: Future[None] = Future()
        self._track(ended, run.cancel)
        try:
            return _collect(run, title_of(func))
        except CancelledError:
            raise CancelledError(TERMINATED) from None
        finally:
            ended.set_result(None)

    def _map_run(self, func: Function, iterable: Iterable[Any], chunksize: int | None) -> Run:
        """Return the run of a map; as the original's, it sends a small one's items one by one."""
        items = _sized(iterable)
        _check_size(chunksize)
        return self._run(func, items, chunksize, anew=self._size(len(items), chunksize) <= 1)

    def _count(self, run: Run, left: Left) -> None:
        """Have a run count what is left of it."""
        run.heard = left.hearing(run.heard)

    def _size(self, count: int, chunksize: int | None) -> int:
        """Return how many of so many items the original sends together."""
        return chunksize or math.ceil(count / (4 * (self._processes or 1)))

    def _run(
        self,
        func: Function,
        items: Iterable[Any],
        chunksize: int | None = None,
        order: bool = True,
        anew: bool = False,
    ) -> Run:
        self._check_running()
        if anew:
            func = each_anew(func)
        call = Call(func, log_level=logging.getLogger().level, goes_on=True)
        run = Run(self.backend, call, items, chunksize, order)
        with suppress(Exception):  # which the run raises
            _ = run.submit
        if self.tally is not None:
            run.heard = self.tally.hear
        return run

    def _stream(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None, ordered: bool
    ) -> Stream:
        _check_size(chunksize)
        # what has a length may be lazy all the same: a progress bar around a generator
        source = iterable if hasattr(iterable, "__getitem__") else Source(iterable, chunksize or 1)
        run = self._run(func, source, chunksize, ordered, anew=chunksize in (None, 0, 1))
        arrivals = told(run, title_of(func))
        if isinstance(source, Source):
            source.wake, arrivals = run.wake, source.follow(arrivals)
        stream = Stream(arrivals, run.cancel, self)
        self._streams.add(stream)
        self._track(stream.ended, stream.cancel)
        return stream

    def _begin(self, result: AsyncResult, future: Future[Any]) -> AsyncResult:
        """Have a result take what becomes of its work."""
        self._track(result._settled, result._cancel)
        settle: Callable[[Future[Any]], object] = result._settle
        if result._callback is not None or result._error_callback is not None:  # may take long
            settle = functools.partial(_deliver, self._callbacks, result)
        future.add_done_callback(settle)
        return result

    def _track(self, done: Future[Any], stop: Stop) -> None:
        self._under_way[done] = stop
        done.add_done_callback(self._under_way.pop)


standin.register(Pool)


def _check_callbacks(callback: Any, error_callback: Any) -> None:
    check_callable("callback", callback)
    check_callable("error_callback", error_callback)


def _check_size(chunksize: Any) -> None:
    """Raise TypeError if it is no number; which it may be is for the run to say."""
    if not isinstance(chunksize, Real | None):
        raise TypeError(f"chunksize must be a whole number from 1 on, not {chunksize!r}")


def _sized(iterable: Any) -> Any:
    return iterable if isinstance(iterable, Sized) else list(iterable)


def _collect(run: Run, title: str) -> list[Any]:
    """Return all values; raise the first error once all items have been run."""
    values: list[Any] = []
    error = None
    with closing(told(run, title)) as arrivals:
        for arrival in arrivals:
            if isinstance(arrival, Batch):
                values.extend(arrival.values)
            else:
                values.append(arrival.value)
                error = arrival.error if error is None else error
    run.backend.flush()  # what tasks have printed is there, too
    if error is not None:
        raise error
    return values


def _submit(
    backend: Backend, func: Function, args: Iterable[Any], kwds: Mapping[str, Any]
) -> Future[Any]:
    """Submit a call; that it cannot be sent is its outcome."""
    try:
        return backend.call(func, args, kwds)
    except Exception as exc:
        future: Future[Any] = Future()
        future.set_exception(exc)
        return future


def _deliver(callbacks: ThreadPoolExecutor, result: AsyncResult, done: Future[Any]) -> None:
    try:
        callbacks.submit(result._settle, done)
    except RuntimeError:  # the pool, or the interpreter, has come to its end
        result._settle(done)


def _nothing() -> None:
    """Do nothing: the end of workers ends their initializers, too."""


def _tell(waiter: Future[None], done: Future[Any]) -> None:
    if waiter.set_running_or_notify_cancel():
        waiter.set_result(None)


def _finish(under_way: dict[Future[Any], Stop], end: Callable[[], object]) -> None:
    concurrent.futures.wait(list(under_way))
    end()


def _end(
    under_way: dict[Future[Any], Stop], owned: Executor | None, callbacks: ThreadPoolExecutor
) -> None:
    """End what a pool owns; a function, so that a forgotten pool can be collected."""
    let_daemons_go()
    for stop in reversed(list(under_way.values())):  # so that none begins as another ends
        stop()
    if owned is not None:
        owned.close()
    callbacks.shutdown(wait=False)
