"""Tasks that submit tasks and wait for them, in a worker of ours: what a task calls.

A worker that waits runs others meanwhile; see `ostap_parallel.executors.nesting`, which decides
what. Futures of here belong to the task that has made them, and do not travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ALL_COMPLETED
from typing import Any, NamedTuple, NoReturn


class Future:
    """The outcome of a call that a task has submitted, as `concurrent.futures.Future` is.

    It is none, as what waits for those would wait for ever: use `wait` and `as_completed` of here.
    """

    def result(self, timeout: float | None = None) -> Any:
        """Wait; return what the call returned, or raise what it raised.

        Raises
        ------
        TimeoutError
            It has not ended after `timeout` seconds.
        CancelledError
            It was cancelled.
        """
        raise NotImplementedError

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait; return what the call raised, or ``None``; raises as `result` does."""
        raise NotImplementedError

    def done(self) -> bool:
        """Return whether it has ended; asks the caller unless that is known."""
        raise NotImplementedError

    def running(self) -> bool:
        """Return whether a worker is at it; asks the caller."""
        raise NotImplementedError

    def cancelled(self) -> bool:
        """Return whether it was cancelled."""
        raise NotImplementedError

    def cancel(self, interrupt: bool = False) -> bool:
        """Cancel it unless it has begun, or also then; return whether it is cancelled."""
        raise NotImplementedError

    def add_done_callback(self, fn: Callable[[Future], Any]) -> None:
        """Call ``fn(self)`` when this process learns that it has ended, or now if it has."""
        raise NotImplementedError

    def __reduce__(self) -> NoReturn:
        raise TypeError("a future of a nested task stays in the task that has submitted it")


class DoneAndNotDone(NamedTuple):
    """What `wait` returns."""

    done: set[Future]
    not_done: set[Future]


def available() -> bool:
    """Return whether this process runs a task, in a worker of ours."""
    return False


def submit(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
    """Have any worker of the caller's executor call a function."""
    return submit_all([(fn, args, kwargs)])[0]


def submit_all(
    calls: Iterable[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]],
) -> list[Future]:
    """Have workers do calls, each ``(function, arguments, keywords)``, with one message for all.

    Raises
    ------
    SerializeError
        A function or an argument cannot be sent; no call is submitted then.
    RuntimeError
        This process runs no task of ours, see `available`; or the executor is being shut down.
    """
    raise NotImplementedError


def wait(
    futures: Iterable[Future], timeout: float | None = None, return_when: str = ALL_COMPLETED
) -> DoneAndNotDone:
    """Wait as `concurrent.futures.wait` does; this process may run other tasks meanwhile."""
    raise NotImplementedError


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """Yield futures as they end; raises TimeoutError `timeout` seconds after the first `next`."""
    raise NotImplementedError


def set_constant(name: str, value: Any) -> None:
    """Give all tasks of the executor a value by a name; raises TypeError if it has one."""
    raise NotImplementedError


def constant(name: str, timeout: float | None = None) -> Any:
    """Return the value with a name, waiting for it; raises KeyError after `timeout` seconds.

    The caller has the same: `ParallelExecutor.set_constant` and `ParallelExecutor.constant`.
    """
    raise NotImplementedError
