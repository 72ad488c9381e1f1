"""The first job of each local worker: it runs the initializer while nothing else is to be done."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ostap_parallel.machine.jobs import Job
from ostap_parallel.supply.syncing import Modules
from ostap_parallel.worker.chunk import pack_call


class Greetings:
    """Makes jobs that do nothing but what goes before any other.

    Whether that fails is for the next job to tell, which finds the same.

    Attributes
    ----------
    futures
        Are done when the jobs have ended.
    initargs
        What the initializer is given, as long as workers may start: what a manager has ends with
        its last proxy.
    """

    def __init__(self, call: bytes, modules: Modules, initargs: tuple[Any, ...]) -> None:
        self._call, self._modules, self.initargs = call, modules, initargs
        self.futures: list[Future[None]] = []

    def make(self, ask: Callable[[Job, bytes], object]) -> Job:
        """Return a job."""
        future: Future[None] = Future()
        self.futures.append(future)

        def deliver(result: Any) -> None:
            future.set_result(None)

        chunk = pack_call(int, (), {})
        return Job(self._call, chunk, deliver, ask=ask, modules=self._modules.archive)
