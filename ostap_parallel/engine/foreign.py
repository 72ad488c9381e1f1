"""Executors of somebody else's as backends."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from concurrent.futures import BrokenExecutor, Executor, Future
from typing import Any

from ostap_parallel.engine.backend import Backend, Result, Submit, pack_function
from ostap_parallel.worker.execute import Call, run_foreign

# They tell attempts apart: dask takes calls that are alike for one, also those of other programs.
_numbers = itertools.count(int.from_bytes(os.urandom(8), "big"))


class Foreign(Backend):
    """Runs chunks on any `concurrent.futures.Executor`, which is not shut down."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    @property
    def name(self) -> str:
        """The executor's class."""
        return type(self._executor).__name__

    @property
    def workers(self) -> Mapping[str, int]:
        """How many calls the executor runs at the same time."""
        return {self.name: count_workers(self._executor)}

    def open(self, call: Call) -> Submit:
        """Pack a call, which then travels with each of its chunks."""
        packed = pack_function(call)

        def submit(
            chunk: bytes, *, is_short: bool = False, hosts: frozenset[str] | None = None
        ) -> Future[Result]:
            number = next(_numbers)
            try:
                return self._executor.submit(run_foreign, packed, chunk, number)
            except BrokenExecutor as exc:  # a worker's death has ended it
                broken: Future[Result] = Future()
                broken.set_exception(exc)
                return broken

        return submit


def backend_of(executor: Any) -> Backend:
    """Return what computes for anything that has it: the one place that looks at types.

    Raises
    ------
    TypeError
        It is neither a backend, nor has one, nor is it a `concurrent.futures.Executor`.
    """
    if isinstance(executor, Backend):
        return executor
    backend = getattr(executor, "backend", None)
    if isinstance(backend, Backend):
        return backend
    if isinstance(executor, Executor):
        return Foreign(executor)
    raise TypeError(f"executor must be a concurrent.futures.Executor, not {executor!r}")


def count_workers(executor: Executor) -> int:
    """Return how many calls an executor runs at the same time, as far as it tells.

    One that has no worker at the moment may start some when there is work.
    """
    threads = getattr(getattr(executor, "_client", None), "nthreads", None)
    if threads is not None:  # dask's; its workers may come and go
        return sum(threads().values()) or 1
    return getattr(executor, "_max_workers", None) or os.cpu_count() or 1
