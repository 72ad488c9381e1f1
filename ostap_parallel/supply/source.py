"""Where workers come from, as the supervisor sees it: sources, their servers, who uses them.

A source is asked for a server, again after one has been lost. A server is started, waits where it
has to (in the queue of a batch system, say), grants what it has, and ends.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from ostap_parallel.errors import HostError
from ostap_parallel.logs import logger_of
from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.supply.ways import LOOPBACK

logger = logger_of(__name__)

# The step that has failed on a host which cannot take a shared object.
STEP = "shared"

State = Literal["queued", "starting", "up", "failed", "lost", "resting", "closed"]


class TryLater(HostError):
    """A source could not be had for a reason that may pass: refused, dropped, too late, full."""


@dataclass
class HostStatus:
    """Where a host, or another source of workers, stands.

    Attributes
    ----------
    state
        ``"queued"``: it waits for its turn, for as long as that takes. ``"lost"``: it is started
        again, until it is up. ``"resting"``: ended because there was nothing to do; started again
        when there is.
    workers
        Number of its workers, 0 while it is not up.
    seconds
        How long it took to come up.
    lost
        How often it was lost. One that is lost and was never up has failed for a reason that may
        pass.
    error
        Why it is not up, with the step that failed, or why it was lost last.
    port
        The local port that leads to its server.
    about
        What the server told: ``host``, ``python``, ``executable``, ``pid``, ``ppft``, ``port``
        and ``cpus``, the number that the host grants.
    reason
        Why it is queued, or rests.
    step
        What its start is at, as in `HostError`: ``connect``, ``copy``, ``profile`` and so on;
        empty unless it is being started.
    """

    name: str
    state: State = "starting"
    workers: int = 0
    seconds: float | None = None
    lost: int = 0
    error: HostError | None = None
    port: int | None = None
    about: dict[str, Any] | None = None
    reason: str = ""
    step: str = ""

    def _repr_html_(self) -> str:
        stage = f"{self.state} ({self.step})" if self.step else self.state
        why = self.reason or (str(self.error) if self.error and self.state != "up" else "")
        text = f"{self.name}: {stage}, {self.workers} workers" + (f": {why}" if why else "")
        return f"<p>{html.escape(text)}</p>"

    def since(self, lost: int) -> HostStatus:
        """Return a copy that tells what has happened since it had been lost `lost` times."""
        times = self.lost - lost
        return replace(self, lost=times, error=self.error if times or not self.workers else None)


@dataclass(frozen=True)
class Grant:
    """What a source gives: where its workers are reached, and on what terms.

    Attributes
    ----------
    limit
        Workers at most; ``None``: all that there are.
    is_shared
        Whether they may have other clients, too.
    about
        What else is known, see `HostStatus`.
    """

    endpoint: Endpoint
    limit: int | None = None
    is_shared: bool = False
    about: dict[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Leave:
    """How a server takes its leave.

    Attributes
    ----------
    until
        What it does may take until that time of `time.monotonic`; then it is closed.
    blame
        Whether a job that has not ended by then, although it had nearly all the time, is to blame.
    explain
        Finds out, which may take a while, whether there is a better reason if anything has not;
        empty if there is none.
    """

    reason: str
    until: float
    blame: bool = False
    explain: Callable[[], str] = str


class Watch(Protocol):
    """Who is told what becomes of a server, from any thread; nothing of it raises."""

    def slot(self) -> AbstractContextManager[None]:
        """Return what to hold while a start costs much here, as connecting and copying do.

        Few have one at a time. One that is held for long is given to the next all the same.
        """

    def queued(self, reason: str) -> None:
        """Tell that the server has to wait for its turn."""

    def granted(self) -> None:
        """Tell that its turn has come."""

    def step(self, name: str) -> None:
        """Tell what its start is at."""

    def event(self, event: dict[str, Any]) -> None:
        """Pass on what a worker prints or logs, see `machine.output.Sink`."""

    def ended(self, error: HostError) -> None:
        """Tell that the server has ended, or does not answer, once it has been up."""

    def retire(self, leave: Leave) -> None:
        """Tell that the server will end, as was to be expected: it gets nothing more to do."""

    def longest(self) -> float:
        """Return the seconds that the longest of its jobs has taken so far."""


class Server:
    """One start of a source. Made by `Source.server`, it has done nothing yet.

    What is here does for one that has nothing to be asked and nothing to be ended.

    Attributes
    ----------
    explain
        Finds out, which may take a while, why it has ended, if more can be known of that than its
        connections tell.
    """

    explain: Callable[[], str] | None = None

    def start(self) -> Grant:
        """Wait until it is up; raises HostError, `TryLater` if that may be different later."""
        raise NotImplementedError

    def ask(self, command: str, **details: str) -> threading.Event:
        """Have the server do something; what is returned is set when it has, or has ended."""
        done = threading.Event()
        done.set()
        return done

    def forward(self, port: int, to: str = LOOPBACK) -> int:
        """Return a port here that leads to a port of loopback there; raises HostError.

        With `to` it leads to that machine, as this one sees it.
        """
        raise NotImplementedError

    def withdraw(self, port: int) -> None:
        """Have a port here lead nowhere that `forward` has returned."""
        raise NotImplementedError

    def backward(self, port: int) -> int:
        """Return a port of loopback there that leads to a port here; raises HostError."""
        raise NotImplementedError

    def beat(self, period: float) -> None:
        """See whether the server answers; called every `period` seconds."""

    def has_ended(self, timeout: float) -> bool:
        """Wait until it has ended; return whether it has."""
        return False

    def hang_up(self) -> None:
        """Have it end, without waiting until it has; a start that is under way fails."""

    def close(self, patience: float = 3.0) -> None:
        """End it; wait for that for not much more than `patience` seconds."""


class Source(Protocol):
    """Where workers come from.

    Attributes
    ----------
    label
        Its name, which no other one has.
    keepalive
        Seconds of silence after which it counts as lost; ``None`` if it need not be asked.
    may_rest
        Whether its servers end while there is nothing to do.
    is_spare
        Whether it is only to be started while work waits for workers.
    """

    label: str
    keepalive: float | None
    may_rest: bool
    is_spare: bool

    def server(self, watch: Watch) -> Server:
        """Return a server that is about to be started."""


class Consumer(Protocol):
    """Who uses the workers."""

    def attach(self, label: str, endpoint: Endpoint, limit: int | None, is_shared: bool) -> int:
        """Connect to a server; return the number of its workers.

        Raises `HostError` if it does not answer, has another version or another key.
        """

    def detach(self, label: str) -> None:
        """Use a server no more; what it was doing is done elsewhere."""

    def retire(self, label: str, leave: Leave) -> None:
        """Give a server nothing more to do, and use it no more once it has done what it has.

        Returns then.
        """

    def longest(self, label: str) -> float:
        """Return the seconds that the longest of a server's jobs has taken."""

    def is_short(self) -> bool:
        """Return whether jobs wait for workers."""

    def idle(self, label: str) -> float:
        """Return for how long a server has had nothing to do."""

    def seconds_idle(self) -> float:
        """Return for how long there has been nothing to do."""


def explained(error: HostError, server: Server | None) -> HostError:
    """Return the error of a server that is lost with what that knows of it, if it does."""
    why = server.explain() if server is not None and server.explain else ""
    if not why or why in error.reason:
        return error
    logger.warning("%s: %s", error.host, why)
    return HostError(error.host, error.step, f"{error.reason}: {why}")
