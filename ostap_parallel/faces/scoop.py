"""Futures on a default executor, here and in tasks: the functions that SCOOP has.

In a program they use the executor that `use` was given, or else one that is made from the
settings. In a task on our workers they submit to the executor that runs it, and a worker that
waits helps; in a task on somebody else's executor, calls are done at once.

Tasks import this module on hosts that have nothing but Python: what only callers need is
imported where they need it.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    CancelledError,
    Executor,
    TimeoutError,
)
from functools import partial
from typing import TYPE_CHECKING, Any

from ostap_parallel.worker import calls, nested
from ostap_parallel.worker.calls import Operation
from ostap_parallel.worker.shared import shared as _shared_object

if TYPE_CHECKING:
    from ostap_parallel.engine.backend import Backend

    Future = concurrent.futures.Future[Any] | nested.Future

__all__ = [
    "ALL_COMPLETED",
    "FIRST_COMPLETED",
    "FIRST_EXCEPTION",
    "CancelledError",
    "TimeoutError",
    "as_completed",
    "map",
    "mapReduce",
    "mapScan",
    "map_as_completed",
    "map_reduce",
    "map_scan",
    "shutdown",
    "submit",
    "use",
    "wait",
]

# In a task more calls than this are sent in blocks, and so are those whose results are reduced.
BLOCKS = 256

_lock = threading.Lock()
_default: Any = None
_is_own = False  # whether the default executor was made here


def use(executor: Executor | Backend | None) -> None:
    """Have these functions use an executor, which stays the caller's to shut down.

    ``None``: one that is made from the settings, when it is first needed. Raises TypeError for
    what is no executor.
    """
    global _default, _is_own
    if executor is not None:
        from ostap_parallel.engine.foreign import backend_of

        backend_of(executor)  # raises TypeError
    with _lock:
        old, _default = _default if _is_own else None, executor
        _is_own = False
    if old is not None:
        old.shutdown()


def shutdown(wait: bool = True) -> None:
    """End the executor that was made here, if there is one; the next call makes another.

    Otherwise it ends with the program.
    """
    global _default, _is_own
    with _lock:
        old, _default = (_default, None) if _is_own else (None, _default)
        _is_own = False
    if old is not None:
        old.shutdown(wait)


def submit(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
    """Have a worker call ``fn(*args, **kwargs)``.

    Raises
    ------
    SerializeError
        The function or an argument cannot be sent.
    ServersUnavailable
        No worker is left and none is about to come.
    """
    if calls.on_foreign.get():
        return _done(fn, args, kwargs)
    if nested.available():
        return nested.submit(fn, *args, **kwargs)
    executor = _executor()
    backend = _backend()
    if backend.abilities.nesting and executor is not backend:  # ours, which may be shut down
        future: Future = executor.submit(fn, *args, **kwargs)
        return future
    return backend.call(fn, args, kwargs)


def map(
    fn: Callable[..., Any],
    /,
    *iterables: Iterable[Any],
    timeout: float | None = None,
    **kwargs: Any,
) -> Iterator[Any]:
    """Yield ``fn(*args, **kwargs)`` for all ``args`` in ``zip(*iterables)``, in order.

    They are read, and submitted, now. `timeout` seconds from now on, to wait for a result raises
    TimeoutError. Leaving the iteration cancels the rest.
    """
    return _map(_with(fn, kwargs), iterables, timeout, ordered=True)


def map_as_completed(
    fn: Callable[..., Any],
    /,
    *iterables: Iterable[Any],
    timeout: float | None = None,
    **kwargs: Any,
) -> Iterator[Any]:
    """Yield as `map` does, but as the results come."""
    return _map(_with(fn, kwargs), iterables, timeout, ordered=False)


def map_reduce(
    fn: Callable[..., Any],
    operation: Operation,
    /,
    *iterables: Iterable[Any],
    timeout: float | None = None,
    **kwargs: Any,
) -> Any:
    """Return what ``fn(*args, **kwargs)`` for all of ``zip(*iterables)`` are reduced to.

    The workers do that, block by block and in a tree: `operation` must be associative, and its
    operands keep their order. Raises TypeError if there is nothing to reduce, and TimeoutError
    after `timeout` seconds.
    """
    left = _clock(timeout)
    blocks = _blocks(iterables)
    if not blocks:
        raise TypeError("map_reduce() of empty iterables")
    reduce = partial(calls.reduce_block, _with(fn, kwargs), operation)
    values = list(map(reduce, blocks, timeout=left()))
    while len(values) > 1:
        pairs, rest = zip(values[::2], values[1::2], strict=False), values[len(values) & ~1 :]
        values = [*map(partial(calls.spread, operation), pairs, timeout=left()), *rest]
    return values[0]


def map_scan(
    fn: Callable[..., Any],
    operation: Operation,
    /,
    *iterables: Iterable[Any],
    timeout: float | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Return what the results of ``fn(*args, **kwargs)`` come to, one after another.

    Without `kwargs` it is ``itertools.accumulate(map(fn, *iterables), operation)``. Workers do it
    block by block: `operation` must be associative. Raises TimeoutError after `timeout` seconds.
    """
    left = _clock(timeout)
    blocks = _blocks(iterables)
    scan = partial(calls.scan_block, _with(fn, kwargs), operation)
    scans = list(map(scan, blocks, timeout=left()))
    if len(scans) < 2:
        return list(itertools.chain(*scans))
    ends = submit(calls.scan_block, _same, operation, [[one[-1]] for one in scans[:-1]])
    prepend = partial(calls.prepend, operation)
    rest = map(prepend, ends.result(left()), scans[1:], timeout=left())
    return list(itertools.chain(scans[0], *rest))


mapReduce, mapScan = map_reduce, map_scan


def wait(
    futures: Iterable[Future], timeout: float | None = None, return_when: str = ALL_COMPLETED
) -> Any:
    """Wait as `concurrent.futures.wait` does; a `timeout` below 0 is none, as in SCOOP."""
    futures = list(futures)
    limit = None if timeout is None or timeout < 0 else timeout
    return _waiting_for(futures).wait(futures, limit, return_when)


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Any]:
    """Yield futures as they end, as `concurrent.futures.as_completed` does."""
    futures = list(futures)
    yield from _waiting_for(futures).as_completed(futures, timeout)


class _Shared:
    """`ostap_parallel.shared`: what a run was given as ``shared=``, and SCOOP's constants."""

    def __call__(self, name: str | None = None) -> Any:
        return _shared_object(name)

    def __reduce__(self) -> str:
        return "shared"

    def setConst(self, **constants: Any) -> None:
        """Give all tasks, and the program, values by names; each name takes one.

        Raises
        ------
        TypeError
            A name has a value.
        """
        for name, value in constants.items():
            _keeper().set_constant(name, value)

    def getConst(self, name: str, timeout: float | None = 0.1, default: Any = None) -> Any:
        """Return the value with a name; `default` if it has none within `timeout` seconds."""
        try:
            return _keeper().constant(name, timeout)
        except KeyError:
            return default

    set_const, get_const = setConst, getConst


_Shared.__call__.__doc__ = _shared_object.__doc__
shared = _Shared()


def _executor() -> Any:
    """Return the default executor, made now if there is none."""
    global _default, _is_own
    if nested.in_worker():
        raise RuntimeError("on a worker, futures are to be had in a task only")
    with _lock:
        if _default is None:
            from ostap_parallel.config import load_settings
            from ostap_parallel.faces.executor import Executor as OurExecutor

            servers = "auto" if load_settings("auto").hosts else ()
            _default, _is_own = OurExecutor(servers=servers), True
        return _default


def _backend() -> Backend:
    from ostap_parallel.engine.foreign import backend_of

    return backend_of(_executor())


def _keeper() -> Any:
    """Return what keeps the constants."""
    if nested.available():
        return nested
    if not calls.on_foreign.get():
        backend = _backend()
        if backend.abilities.nesting:
            return backend
    raise RuntimeError("constants are shared by ostap_parallel's own workers only")


def _waiting_for(futures: list[Future]) -> Any:
    is_nested = any(isinstance(future, nested.Future) for future in futures)
    return nested if is_nested else concurrent.futures


def _done(fn: Callable[..., Any], args: Any, kwargs: Any) -> Future:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()
    try:
        future.set_result(fn(*args, **kwargs))
    except Exception as exc:
        future.set_exception(exc)
    return future


def _map(
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    timeout: float | None,
    ordered: bool,
) -> Iterator[Any]:
    if calls.on_foreign.get():
        return iter([fn(*args) for args in zip(*iterables, strict=False)])
    if not nested.available():
        from ostap_parallel.faces.executor import run_all

        end = None if timeout is None else time.monotonic() + timeout
        return run_all(_executor(), fn, iterables, end, ordered=ordered)
    blocks = _blocks(iterables)
    many = nested.submit_all((calls.call_each, (fn, block), {}) for block in blocks)
    return _take(many, _clock(timeout), ordered)


def _take(
    many: list[nested.Future], left: Callable[[], float | None], ordered: bool
) -> Iterator[Any]:
    try:
        for future in many if ordered else nested.as_completed(many, left()):
            yield from future.result(left())
    finally:
        for future in many:
            future.cancel()


def _clock(timeout: float | None) -> Callable[[], float | None]:
    """Return what tells how many seconds are left, from now on."""
    if timeout is None:
        return lambda: None
    end = time.monotonic() + timeout
    return lambda: max(0.0, end - time.monotonic())


def _blocks(iterables: tuple[Iterable[Any], ...]) -> list[list[tuple[Any, ...]]]:
    items = list(zip(*iterables, strict=False))
    size = -(-len(items) // BLOCKS) or 1
    return [items[n : n + size] for n in range(0, len(items), size)]


def _with(fn: Callable[..., Any], keywords: dict[str, Any]) -> Callable[..., Any]:
    return partial(fn, **keywords) if keywords else fn


def _same(value: Any) -> Any:
    return value


def _size() -> int:
    if calls.on_foreign.get():
        return 1
    if nested.available():
        return nested.count_workers()
    backend = _backend()
    backend.wait_for_hosts()
    return sum(backend.workers.values())


# SCOOP's constants, which are attributes of the package; each is found out when it is asked for.
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "IS_ORIGIN": lambda: not (nested.available() or calls.on_foreign.get()),
    "IS_RUNNING": lambda: True,
    "SIZE": _size,
    "MAIN_MODULE": lambda: getattr(sys.modules["__main__"], "__file__", None),
    "WORKING_DIRECTORY": os.getcwd,
    "CONFIGURATION": dict,
    "DEBUG": lambda: False,
    "logger": lambda: logging.getLogger("ostap_parallel.program"),
}


def __getattr__(name: str) -> Any:
    if name not in _CONSTANTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _CONSTANTS[name]()
