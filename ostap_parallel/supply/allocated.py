"""Servers in jobs of a batch system: a source of workers for each job."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.supply.allocations import Allocations, Claim, Held
from ostap_parallel.supply.host import HostServer, HostSource
from ostap_parallel.supply.source import Grant, TryLater, Watch
from ostap_parallel.supply.steps import open_step, step_argv
from ostap_parallel.supply.ways import Way


class AllocationSource(HostSource):
    """One of the jobs of an entry, see `source.Source`."""

    def __init__(
        self,
        host: HostConfig,
        secret: str,
        allocations: Allocations,
        *,
        tasks_per_worker: int | None = None,
    ) -> None:
        super().__init__(host, secret, tasks_per_worker=tasks_per_worker)
        self.allocations = allocations

    def server(self, watch: Watch) -> AllocationServer:
        """Return a server that is about to be started, in a job that is still to be had."""
        return AllocationServer(self, self.allocations, watch)


class AllocationServer(HostServer):
    """A server in a job, which ends with it."""

    def __init__(self, source: HostSource, allocations: Allocations, watch: Watch) -> None:
        super().__init__(source, watch)
        self._allocations = allocations
        self._claim = Claim(self.host.label, watch)
        self._held: Held | None = None

    def start(self) -> Grant:
        """Wait for a job, and start the server in it."""
        self._held = self._allocations.claim(self._claim)
        self._watch.granted()
        try:
            grant = super().start()
        except HostError as exc:
            if exc.step != "connect" or isinstance(exc, TryLater) or self._closing.is_set():
                raise
            why = self._allocations.explain(self._held)
            reason = f"{why}; {exc.reason}" if why else exc.reason
            raise self._allocations.failed(HostError(exc.host, exc.step, reason)) from exc
        self._allocations.succeeded()
        return grant

    def hang_up(self) -> None:
        """Have the server end, and a wait for a job fail."""
        super().hang_up()
        self._allocations.abandon(self._claim)

    def close(self, patience: float = 3.0) -> None:
        """End the server and its job."""
        super().close(patience)
        held, self._held = self._held, None
        if held is not None:
            self._allocations.release(held)

    def open_way(self) -> AbstractContextManager[Way]:
        """Return the way to the node of the job."""
        held = self._held
        assert held is not None
        program = self._allocations.site.program(step_argv(held.number, held.node, self.cpus))
        return open_step(self.host, program, tag=f"ostap-parallel-job-{held.number}.")

    @property
    def cpus(self) -> int:
        """How many each job has."""
        return self._allocations.batch.cpus

    def why_ended(self) -> str:
        """Return why the session has ended, as its job tells."""
        assert self._held is not None
        return self._allocations.explain(self._held) or super().why_ended()
