"""pathos' ParallelPool on our executor: its signature, with errors that arrive."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, as_completed, wait
from typing import Any

from multiprocess import TimeoutError as MultiprocessTimeoutError
from pathos.parallel import ParallelPool as PathosParallelPool

from ostap_parallel.executors.parallel import ParallelExecutor


class Result:
    """The outcome of `ParallelPool.apipe` or `ParallelPool.amap`, now or later."""

    def __init__(self, futures: list[Future[Any]], collect: Callable[[list[Any]], Any]) -> None:
        self._futures = futures
        self._collect = collect

    def ready(self) -> bool:
        """Return whether all is done."""
        return all(future.done() for future in self._futures)

    def successful(self) -> bool:
        """Return whether nothing raised; raises ValueError while it is not ready."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return all(future.exception() is None for future in self._futures)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is ready, or for `timeout` seconds."""
        wait(self._futures, timeout)

    def get(self, timeout: float | None = None) -> Any:
        """Return the value, or raise what the function raised.

        Raises
        ------
        multiprocess.TimeoutError
            It is not ready after `timeout` seconds.
        """
        self.wait(timeout)
        if not self.ready():
            raise MultiprocessTimeoutError
        return self._collect([future.result() for future in self._futures])

    __call__ = get


class ParallelPool(PathosParallelPool):  # type: ignore[misc]
    """pathos' ParallelPool, as the face of an executor that somebody else owns.

    Differs from pathos where pathos loses something: exceptions are raised here, keyword
    arguments arrive, ``get(timeout)`` keeps to its time, nothing polls. ``close``, ``join`` and
    ``clear`` act on the executor's server, as pathos does on its own.
    """

    def __init__(self, executor: ParallelExecutor) -> None:
        self._executor = executor
        name = f"ostap_parallel-{id(executor)}"
        self.__state__[name] = executor.server
        super().__init__(ncpus=executor.server.get_ncpus(), servers=(), id=name)

    def forget(self) -> None:
        """Take the executor's server out of pathos' registry."""
        self.__state__.pop(self._id, None)

    def map(self, f: Callable[..., Any], *args: Iterable[Any], **kwds: Any) -> list[Any]:
        """Return the results, in order."""
        return list(self.imap(f, *args, **kwds))

    def imap(self, f: Callable[..., Any], *args: Iterable[Any], **kwds: Any) -> Iterator[Any]:
        """Yield the results in order; everything is submitted now."""
        futures = self._submit_all(f, args)
        return (future.result() for future in futures)

    def uimap(self, f: Callable[..., Any], *args: Iterable[Any], **kwds: Any) -> Iterator[Any]:
        """Yield the results as they come; everything is submitted now."""
        futures = self._submit_all(f, args)
        return (future.result() for future in as_completed(futures))

    def amap(self, f: Callable[..., Any], *args: Iterable[Any], **kwds: Any) -> Result:
        """Return at once; `Result.get` gives the list of results."""
        return Result(self._submit_all(f, args), list)

    def pipe(self, f: Callable[..., Any], /, *args: Any, **kwds: Any) -> Any:
        """Return the result of one call."""
        return self.apipe(f, *args, **kwds).get()

    def apipe(self, f: Callable[..., Any], /, *args: Any, **kwds: Any) -> Result:
        """Return at once; `Result.get` gives the result of the call."""
        return Result(
            [self._submit(functools.partial(f, *args, **kwds))], lambda values: values[0]
        )

    def _submit_all(
        self, f: Callable[..., Any], args: tuple[Iterable[Any], ...]
    ) -> list[Future[Any]]:
        return [self._submit(f, *items) for items in zip(*args, strict=False)]

    def _submit(self, f: Callable[..., Any], *args: Any) -> Future[Any]:
        if self._exiting or self._executor.server._exiting:
            raise ValueError("Pool not running")
        return self._executor.submit(f, *args)
