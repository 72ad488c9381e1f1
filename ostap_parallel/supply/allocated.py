"""Servers in jobs of a batch system: a source of workers for each job."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.supply.allocations import Allocations, Claim, Held
from ostap_parallel.supply.host import HostServer, HostSource
from ostap_parallel.supply.source import Grant, TryLater, Watch
from ostap_parallel.supply.steps import open_step, step_argv
from ostap_parallel.supply.ways import Way
from ostap_parallel.worker.mux import SIGNALLED

# Seconds before the wall time is over from which on nothing is begun, at least; the share of it
# that this is at most; and how often is looked at how long jobs take.
MARGIN, MOST_OF_IT, LOOKS = 5.0, 0.3, 5.0

# Seconds to end what runs when the batch system has warned: by SIGTERM, which it follows up soon,
# or by another signal.
GRACE_OF_TERM, GRACE = 1.0, 30.0


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
        self._asking, self._answer = threading.Lock(), ""
        self.explain = self._why

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
        if self._held.ends is not None:
            threading.Thread(target=self._mind_the_time, name="wall time", daemon=True).start()
        return grant

    def _mind_the_time(self) -> None:
        """Have the server rest before its wall time is over, as early as its jobs are long."""
        held = self._held
        if held is None or held.ends is None:
            return
        most = MOST_OF_IT * (held.ends - time.monotonic())
        while True:
            margin = min(max(MARGIN, 1.2 * self._watch.longest() + 1), most)
            left = held.ends - margin - time.monotonic()
            if left <= 0:
                break
            if self._closing.wait(max(0.2, min(left, LOOKS))) or self._ended.is_set():
                return
        wall = self._allocations.batch.walltime
        reason = f"the wall time{f' of {wall}' if wall else ''} of job {held.id} is over"
        self._watch.retire(reason, held.ends, blame=True)

    def _overhear(self, line: str) -> None:
        """Take notice of signals that the batch system sends before it ends the job."""
        name = line.removeprefix(SIGNALLED)
        if name == line:
            super()._overhear(line)
            return
        held = self._held
        if self._is_up and held is not None and not self._closing.is_set():
            reason = f"job {held.id} is about to be ended by the batch system ({name})"
            until = time.monotonic() + (GRACE_OF_TERM if name == "SIGTERM" else GRACE)
            threading.Thread(
                target=self._watch.retire, args=[reason, until], name="retire", daemon=True
            ).start()

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
        return self._why() or super().why_ended()

    def _why(self) -> str:
        """Return how the job has ended; asked for once, though each connection wants to know."""
        with self._asking:
            held = self._held
            if not self._answer and held is not None and not self._closing.is_set():
                self._answer = self._allocations.explain(held)
            return self._answer
