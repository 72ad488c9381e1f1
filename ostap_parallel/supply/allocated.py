"""Servers in jobs of a batch system: a source of workers for each job."""

from __future__ import annotations

import threading
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.schedulers.quantities import parse_walltime
from ostap_parallel.schedulers.scheduler import Phase
from ostap_parallel.supply.allocations import Allocations, Claim, Held
from ostap_parallel.supply.host import HostServer, HostSource, make_bundle
from ostap_parallel.supply.relay import make_texts
from ostap_parallel.supply.source import Grant, Leave, TryLater, Watch
from ostap_parallel.supply.steps import open_session, open_step, step_argv
from ostap_parallel.supply.ways import Way
from ostap_parallel.worker.mux import SIGNALLED

# Seconds before the wall time is over from which on nothing is begun, at least; the share of it
# that this is at most; and how often is looked at how long jobs take.
MARGIN, MOST_OF_IT, LOOKS = 5.0, 0.3, 5.0

FIRST_LOOK = 0.5  # seconds until a session's place in the queue is asked for

# Seconds to end what runs when the batch system has warned: by SIGTERM, which it follows up soon,
# or by another signal.
GRACE_OF_TERM, GRACE = 1.0, 30.0

# Seconds for which a job is awaited that was about to end, to see how it does.
LAST_WORDS = 5.0


class AllocationSource(HostSource):
    """One of the jobs of an entry, see `source.Source`."""

    def __init__(
        self,
        host: HostConfig,
        secret: str,
        allocations: Allocations,
        *,
        tasks_per_worker: int | None = None,
        is_spare: bool = False,
    ) -> None:
        super().__init__(host, secret, tasks_per_worker=tasks_per_worker)
        self.allocations = allocations
        self.is_spare = is_spare

    def server(self, watch: Watch) -> JobServer:
        """Return a server that is about to be started, in a job that is still to be had."""
        kind = StepServer if self.allocations.batch.batch == "slurm" else SessionServer
        return kind(self, self.allocations, watch)


class JobServer(HostServer):
    """A server in a job, which ends with it."""

    def __init__(self, source: HostSource, allocations: Allocations, watch: Watch) -> None:
        super().__init__(source, watch)
        self._allocations = allocations
        self._held: Held | None = None
        self._asking, self._answer = threading.Lock(), ""
        self._knowing = threading.Lock()  # more of the job
        self.explain = self._why

    def start(self) -> Grant:
        """Get a job, and start the server in it."""
        try:
            grant = super().start()
        except HostError as exc:
            held = self._held
            if exc.step != "connect" or isinstance(exc, TryLater) or self._closing.is_set():
                raise
            why = self._allocations.explain(held) if held is not None else ""
            reason = f"{why}; {exc.reason}" if why else exc.reason
            raise self._allocations.failed(HostError(exc.host, exc.step, reason)) from exc
        self._allocations.succeeded()
        if self._held is not None and self._held.ends is not None:
            threading.Thread(target=self._mind_the_time, name="wall time", daemon=True).start()
        return grant

    def close(self, patience: float = 3.0) -> None:
        """End the server and its job."""
        super().close(patience)
        with self._knowing:
            held, self._held = self._held, None
        if held is not None:
            self._allocations.release(held)

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
        self._watch.retire(Leave(reason, held.ends, blame=True))

    def _overhear(self, line: str) -> None:
        """Take notice of signals that the batch system sends before it ends the job."""
        name = line.removeprefix(SIGNALLED)
        if name == line:
            super()._overhear(line)
            return
        held = self._held
        if self._is_up and held is not None and not self._closing.is_set():
            # SGE warns so of a suspension, too
            is_sge = self._allocations.batch.batch == "sge"
            what = "ended or suspended" if is_sge and name == "SIGUSR1" else "ended"
            reason = f"job {held.id} is about to be {what} by the batch system ({name})"
            if name == "SIGTERM":
                until = time.monotonic() + GRACE_OF_TERM
                leave = Leave(reason, until, explain=self._await_end)
            else:
                leave = Leave(reason, time.monotonic() + GRACE)
            threading.Thread(
                target=self._watch.retire, args=[leave], name="retire", daemon=True
            ).start()

    def _await_end(self) -> str:
        """Return how the job ends that has been told to; that does not wait for us any more."""
        held, session = self._held, self._session
        if held is None or session is None or self._closing.is_set():
            return ""
        session.hang_up()
        return self._allocations.explain(held, LAST_WORDS)

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


class StepServer(JobServer):
    """A server in a step of a job that waits for sessions; see `holder.bash`."""

    def __init__(self, source: HostSource, allocations: Allocations, watch: Watch) -> None:
        super().__init__(source, allocations, watch)
        self._claim = Claim(self.host.label, watch)

    def start(self) -> Grant:
        """Wait for a job, and start the server in it."""
        _prepare()
        self._held = self._allocations.claim(self._claim)
        self._watch.granted()
        return super().start()

    def hang_up(self) -> None:
        """Have the server end, and a wait for a job fail."""
        super().hang_up()
        self._allocations.abandon(self._claim)

    def open_way(self) -> AbstractContextManager[Way]:
        """Return the way to the node of the job."""
        held, allocations = self._held, self._allocations
        assert held is not None
        argv = [*step_argv(held.number, held.node, allocations.batch.cpus), "--chdir=/"]
        tag = f"ostap-parallel-job-{held.number}."
        return open_step(self.host, allocations.site.program(argv), tag=tag)


class SessionServer(JobServer):
    """A server whose session is a job by itself, as SGE's qrsh has them."""

    def start(self) -> Grant:
        """Submit a job, and start the server in it when it runs."""
        _prepare()
        self._allocations.check(self.host.label)
        self._held = self._allocations.enter()
        self._stuck = ""
        threading.Thread(target=self._watch_queue, name="queue", daemon=True).start()
        try:
            return super().start()
        except HostError as exc:
            if self._stuck:
                raise HostError(self.host.label, "queue", self._stuck) from exc
            raise

    def open_way(self) -> AbstractContextManager[Way]:
        """Return the way into a new job."""
        held = self._held
        assert held is not None
        return open_session(self.host, self._allocations.session_argv(held))

    def _watch_queue(self) -> None:
        """Tell why the job waits, until it runs; give it up if it never will.

        qrsh keeps to itself what it has to say until the job runs.
        """
        pause = FIRST_LOOK
        while not self._closing.wait(pause) and self._step == "connect":
            held = self._held
            if held is None:
                return
            if not held.number and (number := self._allocations.number_of(held)):
                self._change(number=number)
                continue
            state = self._allocations.state(held)
            if state is not None and state.phase is Phase.STUCK and self._session is not None:
                self._stuck = f"it will never start: {state.words}"
                self._session.hang_up()
                return
            if state is not None and state.phase is Phase.QUEUED and self._step == "connect":
                self._news.put(("queued", state.reason or "pending"))
            pause = min(LOOKS, 1.5 * pause)

    def _change(self, **known: Any) -> None:
        with self._knowing:
            if self._held is not None:
                self._held = replace(self._held, **known)

    def _connect(self) -> str:
        directory = super()._connect()
        if wall := parse_walltime(self._allocations.batch.walltime):
            self._change(ends=time.monotonic() + wall)
        return directory


def _prepare() -> None:
    """Begin to make what sessions need, while there is no job for them yet."""

    def make() -> None:
        make_texts()
        make_bundle()

    threading.Thread(target=make, name="prepare", daemon=True).start()
