"""A backend of joblib: its parallel loops, and scikit-learn's ``n_jobs``, run on our workers."""

from __future__ import annotations

import concurrent.futures
import math
import pickle
import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from joblib import register_parallel_backend
from joblib.parallel import AutoBatchingMixin, Parallel, ParallelBackendBase

from ostap_parallel.engine.backend import Backend
from ostap_parallel.engine.core import LOCAL
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.faces.executor import Executor, Settings
from ostap_parallel.faces.manager import WorkManager
from ostap_parallel.objects import serialize
from ostap_parallel.runs import calls as looked
from ostap_parallel.worker.batch import Mapped, run_batch
from ostap_parallel.worker.shared import KEPT, shared

if TYPE_CHECKING:
    from typing_extensions import Unpack

Calls = Sequence[tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]]
Callback = Callable[[Future[Any]], Any]

# Seconds that a loop which is stopped waits for callbacks of joblib's that are under way.
STOP_PATIENCE = 5.0

# What joblib gives to every backend, and does not concern this one.
_NOT_OURS = {"temp_folder", "mmap_mode", "prefer", "require", "verbose", "context"}


def register() -> None:
    """Make ``joblib.parallel_config(backend="ostap")`` known."""
    register_parallel_backend("ostap", OstapBackend)


class OstapBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs the batches of `joblib.Parallel` on local workers and on hosts.

    These start with the first loop, and end soon after the backend is forgotten, such as at the
    end of ``with joblib.parallel_config(...)``.

    Parameters
    ----------
    ncpus, servers
        Local workers and hosts, and by name the other settings, as of `WorkManager`.
    executor
        Computes in place of workers of its own: a `WorkManager`, or any
        `concurrent.futures.Executor`, or a `Backend`. It is not shut down.
    nesting_level
        For joblib's own use.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        servers: Any = (),
        *,
        executor: WorkManager | concurrent.futures.Executor | Backend | None = None,
        nesting_level: int | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(nesting_level=nesting_level)
        if executor is not None and (servers or settings or ncpus != "autodetect"):
            raise TypeError("an executor of your own brings its workers: leave out other settings")
        try:
            self._backend = None if executor is None else backend_of(executor)
        except TypeError:
            kinds = "a WorkManager or an Executor"
            raise TypeError(f"executor must be {kinds}, not {executor!r}") from None
        self._given = executor  # is kept alive
        self._settings: dict[str, Any] = {"ncpus": ncpus, "servers": servers, **settings}
        # weakly, so that no cycle keeps the workers alive
        self._loops: weakref.WeakKeyDictionary[Parallel, _Loop] = weakref.WeakKeyDictionary()

    @property
    def parallel(self) -> Parallel | None:
        """What was configured last, by which joblib finds out how much it is to tell."""
        return self._parallel()

    def configure(
        self, n_jobs: int, parallel: Parallel, *, max_nbytes: int | None = None, **options: Any
    ) -> int:
        """Prepare for the loops of `parallel`; return how many jobs run at the same time."""
        given = {name: options[name] for name in options.keys() - _NOT_OURS}
        if given and self._backend is not None:
            raise ValueError(f"the workers are there already: {', '.join(given)} is too late")
        self._settings |= given
        found = self.effective_n_jobs(n_jobs)
        limit = found if self._backend and found < _count(self._backend) else math.inf
        nested = pickle.dumps(self.get_nested_backend())
        self._loops[parallel] = _Loop(self._backend, limit, max_nbytes, nested)
        self._parallel = weakref.ref(parallel)
        return found

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many jobs run at the same time, when each host is up or has failed."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs in (None, 1):
            return 1
        if self._backend is None:
            executor = Executor(**self._settings)
            self._backend = executor.backend
            # not by the executor's own finalizer: threads of its own may still refer to it
            weakref.finalize(self, _close, executor).atexit = False
        self._backend.wait_for_hosts()
        self._backend.window()  # raises if nothing can run
        here = not self._backend.hosts or LOCAL in self._backend.workers
        workers = _count(self._backend)
        found = min(n_jobs, workers) if n_jobs > 0 else max(1, workers + 1 + n_jobs)
        return max(found, 1 if here else 2)  # a single job would run in this process

    def submit(self, func: Any, callback: Any) -> None:
        """Run a batch as soon as fewer than ``n_jobs`` are running."""
        self._loops[callback.parallel].submit(func.items, callback)

    apply_async = submit  # as joblib before 1.5 calls it

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """Return what a batch gave, or raise what it raised."""
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Drop what waits, and interrupt what runs, of the loop that has failed."""
        for parallel, loop in list(self._loops.items()):
            if parallel._aborting:  # and not a generator that is read at the same time
                loop.stop()

    def terminate(self) -> None:
        """Forget how long the batches of the last loop took."""
        self.reset_batch_stats()


class _Loop:
    """The batches of one `joblib.Parallel`.

    Parameters
    ----------
    limit
        How many run at the same time.
    max_nbytes
        Arguments larger than that are sent once to each host if they come again; ``None``: none.
    nested
        The pickled backend of loops within this one.
    """

    def __init__(self, backend: Any, limit: float, max_nbytes: int | None, nested: bytes) -> None:
        self._backend: Backend = backend
        self._nested = nested
        self._max_nbytes = max_nbytes
        self._lock = threading.Lock()
        self._calling = Counter[int]()  # callbacks under way, by the thread that they are in
        self._called = threading.Condition(self._lock)  # one of them has returned
        self._free = limit
        self._queue: deque[tuple[Calls, Callback]] = deque()
        self._running: dict[Future[Any], tuple[Callback, int]] = {}
        self._stops = 0
        self._told = looked.Calls(backend, "a loop of joblib")
        self._seen: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._handles: deque[tuple[dict[int, Any], Any]] = deque(maxlen=KEPT)

    def submit(self, calls: Calls, callback: Callback) -> None:
        """Queue a batch; `callback` gets its future when that is done."""
        self._queue.append((calls, callback))
        self._start()

    def stop(self) -> None:
        """Drop what waits, interrupt what runs, and wait for callbacks of other threads.

        Until joblib has given the next loop of the same object a number, it would take what such
        a callback brings for an outcome of that loop.
        """
        self._drop()
        with self._lock:
            mine = threading.get_ident()
            if not self._calling.keys() - {mine}:
                return
            self._called.wait_for(lambda: not self._calling.keys() - {mine}, STOP_PATIENCE)
        self._drop()  # what these have submitted

    def _drop(self) -> None:
        with self._lock:
            self._stops += 1
            self._queue.clear()
            running = list(self._running)
        self._backend.give_up(running)

    def _start(self) -> None:
        with self._lock:
            if not self._free or not self._queue:
                return
            self._free -= 1
            stops = self._stops
            calls, callback = self._queue.popleft()
        future = self._send(calls)
        with self._lock:
            self._running[future] = callback, stops
            stopped = self._stops > stops
        if stopped:
            self._backend.give_up([future])
        future.add_done_callback(self._settle)

    def _settle(self, done: Future[Any]) -> None:
        with self._lock:
            callback, stops = self._running.pop(done)
            self._free += 1
        self._start()
        thread = threading.get_ident()
        with self._lock:
            if self._stops > stops:
                return
            self._calling[thread] += 1
        try:  # without our lock: joblib has one of its own while it submits
            callback(done)
        finally:
            with self._lock:
                self._calling[thread] -= 1
                self._calling += Counter()  # drops those that are zero
                self._called.notify_all()

    def _send(self, calls: Calls) -> Future[Any]:
        try:
            handle, calls = self._share(calls)
            future = self._backend.call(run_batch, (calls, self._nested), shared=handle)
            self._told.add(future, calls[0][0])
            return future
        except Exception as exc:  # joblib often calls from a thread of ours, where nobody listens
            failed: Future[Any] = Future()
            failed.set_exception(exc)
            return failed

    def _share(self, calls: Calls) -> tuple[Any, Calls]:
        """Share large arguments that have come before, and put references in their place."""
        calls = [
            (function, [*map(_map, args)], {name: _map(arg) for name, arg in kwargs.items()})
            for function, args, kwargs in calls
        ]
        found: dict[int, Any] = {}
        large: set[int] = set()
        for _, args, kwargs in calls:
            for arg in filter(self._is_large, (*args, *kwargs.values())):
                large.add(id(arg))
                if self._is_common(arg):
                    found[id(arg)] = arg
        known, handle = self._handle(found) if found else ({}, None)
        places = {key: place for place, key in enumerate(known)}

        def refer(arg: Any) -> Any:
            if id(arg) in places:
                return _Reference(places[id(arg)])
            return _Lone(arg) if id(arg) in large else arg

        return handle, [
            (function, [*map(refer, args)], {name: refer(arg) for name, arg in kwargs.items()})
            for function, args, kwargs in calls
        ]

    def _is_large(self, arg: Any) -> bool:
        return self._max_nbytes is not None and _size(arg) > self._max_nbytes

    def _is_common(self, arg: Any) -> bool:
        """Return whether an argument was seen before in this loop."""
        if self._seen.get(id(arg)) is arg:
            return True
        with suppress(TypeError):  # no weak references to it
            self._seen[id(arg)] = arg
        return False

    def _handle(self, found: dict[int, Any]) -> tuple[dict[int, Any], Any]:
        """Return the handle of these objects, and what else it is of, by id; or nothing."""
        for known, handle in list(self._handles):
            if found.keys() <= known.keys():  # kept alive by this, and so the same
                return known, handle
        handle = self._backend.share(list(found.values()))
        if handle is None:
            return {}, None
        self._handles.append((found, handle))
        return found, handle


def _map(arg: Any) -> Any:
    """Return an argument, or what has tasks write to the file that it is in."""
    return arg if (mapped := Mapped.of(arg)) is None else mapped


class _Reference:
    """Stands for an entry of the object that is shared with a batch."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __reduce__(self) -> Any:
        return shared, (self._place,)


class _Lone:
    """Stands for a large argument of one batch: its arrays are as read-only as shared ones."""

    def __init__(self, arg: Any) -> None:
        self._arg = arg

    def __reduce__(self) -> Any:
        buffers: list[pickle.PickleBuffer] = []
        data = serialize.dumps(self._arg, buffers=buffers)
        fixed = [pickle.PickleBuffer(buffer.raw().toreadonly()) for buffer in buffers]
        return partial(pickle.loads, data, buffers=fixed), ()


def _size(arg: Any) -> int:
    """Return the bytes of an array or of a data frame; other objects are small."""
    size = getattr(arg, "nbytes", None)
    return size if isinstance(size, int) else sys.getsizeof(arg)


def _count(backend: Backend) -> int:
    return sum(backend.workers.values())


def _close(executor: Executor) -> None:
    """End an executor, in a thread: that its backend is forgotten may happen in one of its own."""
    threading.Thread(target=executor.close).start()
