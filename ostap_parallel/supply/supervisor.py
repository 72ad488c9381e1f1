"""Keeping a server up on each host: all are started at the same time, lost ones again."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError
from ostap_parallel.supply.host import STEP, HostServer, HostStatus
from ostap_parallel.supply.ssh import BEATS, control_directory
from ostap_parallel.worker.endpoint import Endpoint
from ostap_parallel.worker.handshake import derive_key

if TYPE_CHECKING:
    from ostap_parallel.engine.core import Core

logger = logging.getLogger(__name__)

# Hosts that are started at the same time.
MAX_STARTS = 16

# Seconds before a lost host is started again: the first time, and at most. One that was up for
# the longest pause is as good as new.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0

# Seconds that hosts get to answer.
PATIENCE = 5.0

# Receives the name of a host and what one of its workers printed or logged, see `output.Sink`.
EventHandler = Callable[[str, dict[str, Any]], None]


class Supervisor:
    """Starts the servers of hosts, and starts again those that are lost.

    Parameters
    ----------
    client
        What connects to them.
    hosts
        Hosts to start servers on, or existing servers.
    secret
        Shared by us and the servers.
    rest
        Seconds without work after which the servers end until there is work again.
    on_event
        Receives what workers print and log.
    on_change
        Called, from any thread, after a status has changed.
    tasks_per_worker
        Jobs after which a server replaces a worker process; ``None`` for no limit.

    Attributes
    ----------
    statuses
        One per host, in their order.
    """

    def __init__(
        self,
        client: Core,
        hosts: Sequence[HostConfig],
        secret: str,
        rest: float,
        on_event: EventHandler,
        on_change: Callable[[], None],
        tasks_per_worker: int | None = None,
    ) -> None:
        self.statuses = [HostStatus(host.label) for host in hosts]
        self._client = client
        self._secret = secret
        self._rest = rest
        self._on_event = on_event
        self._on_change = on_change
        self._tasks_per_worker = tasks_per_worker
        self._hosts = {host.label: host for host in hosts}
        self._servers: dict[str, HostServer] = {}
        self._leaving: set[HostServer] = set()  # no longer in use, and not ended yet
        self._errors: dict[str, HostError] = {}  # of hosts that were lost before they were up
        self._pauses: dict[str, float] = {}
        self._up_since: dict[str, float] = {}
        self._changed = threading.Condition()
        self._starting = threading.BoundedSemaphore(MAX_STARTS)
        self._closed = threading.Event()
        self._cleanup = contextlib.ExitStack()
        self._control = Path()
        self._numbers = itertools.count()

    def start(self) -> None:
        """Start all hosts, without waiting."""
        if not self.statuses:
            return
        self._control = self._cleanup.enter_context(control_directory())
        for status in self.statuses:
            self._start_soon(status)
        threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def has(self, *states: str) -> bool:
        """Return whether any host is in one of these states."""
        return any(status.state in states for status in self.statuses)

    def wait(self, timeout: float | None) -> None:
        """Wait until no host is starting for the first time, or for `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: not self.has("starting"), timeout)

    def wake(self) -> None:
        """Start the hosts that are resting."""
        for status in self.statuses if self.has("resting") else ():
            if self._set_state(status, "starting", of="resting"):
                self._start_soon(status)

    def ping(self) -> None:
        """Wait, not for long, until all that the servers have said so far has arrived."""
        deadline = time.monotonic() + PATIENCE
        for answer in [server.ask("ping") for server in self._all_servers()]:
            answer.wait(max(0.0, deadline - time.monotonic()))

    def connection_lost(self, error: HostError) -> None:
        """Take notice that a connection to a host has broken."""
        server = self._servers.get(error.host)
        # Mostly the whole session has ended, which is about to be told with ssh's own words.
        ended = server is not None and server.has_ended(timeout=1.0)
        if not ended and self._servers.get(error.host) is server:
            self._lose(error)

    def give_up(self, error: HostError) -> None:
        """Do without a host from now on, as it would fail in the same way again."""
        status = next(status for status in self.statuses if status.name == error.host)
        self._errors[status.name] = error  # if it is only about to be up
        if self._set_state(status, "failed", of="up", error=error):
            logger.warning("not available any more: %s", error)
            self._drop(status, self._servers.get(status.name))

    def hang_up(self) -> None:
        """Have all servers end, without waiting until they have; nothing is started any more."""
        self._closed.set()
        for server in self._all_servers():
            server.hang_up()

    def close(self) -> None:
        """End all servers; nothing of ours remains on any host."""
        self.hang_up()
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            servers = {*self._servers.values(), *self._leaving}
        for server in servers:
            server.close(max(0.0, deadline - time.monotonic()))
        self._cleanup.close()
        with self._changed:
            self._servers.clear()
            for status in self.statuses:
                if status.state != "failed":
                    status.state, status.workers = "closed", 0
            self._changed.notify_all()

    def _all_servers(self) -> list[HostServer]:
        with self._changed:
            return list(self._servers.values())

    def _set_state(self, status: HostStatus, state: Any, of: str, **fields: Any) -> bool:
        """Change the state of a host if it still is `of`; return whether it was."""
        with self._changed:
            if self._closed.is_set() or status.state != of:
                return False
            for name, value in {"state": state, "workers": 0, **fields}.items():
                setattr(status, name, value)
            self._changed.notify_all()
        self._on_change()
        return True

    def _start_soon(self, status: HostStatus, pause: float = 0.0) -> None:
        def start() -> None:
            if not self._closed.wait(pause):
                with self._starting:
                    self._start(status)

        threading.Thread(target=start, name="start-host", daemon=True).start()

    def _start(self, status: HostStatus) -> None:
        begin, host, state = time.monotonic(), self._hosts[status.name], status.state
        self._errors.pop(status.name, None)
        try:
            port, about = host.server_port or 0, None
            if not port:
                server = self._open(host, status.port)
                port, about = server.port, server.about
            endpoint = Endpoint(("127.0.0.1", port), derive_key(self._secret, port))
            is_shared = bool(host.server_port)
            workers = self._client.attach(host.label, endpoint, host.ncpus, is_shared)
        except Exception as exc:
            if not isinstance(exc, HostError):
                if not self._closed.is_set():
                    logger.exception("%s could not be started", status.name)
                exc = HostError(status.name, "start", str(exc))
            self._fail(status, exc)
            return
        now = self._up_since[status.name] = time.monotonic()
        up = {"workers": workers, "port": port, "about": about, "seconds": now - begin}
        self._set_state(status, "up", of=state, **up)
        if error := self._errors.pop(status.name, None):
            (self.give_up if error.step == STEP else self._lose)(error)

    def _open(self, host: HostConfig, port: int | None) -> HostServer:
        label, on_event = host.label, self._on_event
        server = HostServer(
            host,
            self._secret,
            self._control / str(next(self._numbers)),
            on_event=lambda event: on_event(label, event),
            on_lost=self._session_lost,
            port=port,
            tasks_per_worker=self._tasks_per_worker,
        )
        with self._changed:
            if self._closed.is_set():
                raise HostError(label, "start", "closed while it was starting")
            if label in self._servers:  # it rests, and was woken before it had ended
                self._leaving.add(self._servers[label])
            self._servers[label] = server
        return server.__enter__()

    def _session_lost(self, server: HostServer, error: HostError) -> None:
        if self._servers.get(error.host) is server:  # not one that came before it
            self._lose(error)

    def _fail(self, status: HostStatus, error: HostError) -> None:
        """Take notice that a host could not be started."""
        self._drop(status, self._servers.get(status.name))
        if self._set_state(status, "failed", of="starting", error=error):
            logger.warning("not available: %s", error)
        elif self._set_state(status, "lost", of="lost", error=error):
            logger.info("still not available: %s", error)
            self._start_again(status)

    def _lose(self, error: HostError) -> None:
        """Take notice that a host that was up is lost; each of its connections may tell."""
        status = next(status for status in self.statuses if status.name == error.host)
        self._errors[status.name] = error  # if it is only about to be up
        if not self._set_state(status, "lost", of="up", lost=status.lost + 1, error=error):
            return
        logger.warning("lost %s; it is being started again", error)
        if time.monotonic() - self._up_since[status.name] > LONGEST_PAUSE:
            self._pauses.pop(status.name, None)
        server = self._servers.get(status.name)
        self._client.detach(status.name)  # its jobs go elsewhere, however long its end takes

        def replace() -> None:
            self._drop(status, server)
            self._start_again(status)

        # Not here: others may be lost at the same time, which their heartbeat must find out.
        threading.Thread(target=replace, name="replace-host", daemon=True).start()

    def _drop(self, status: HostStatus, server: HostServer | None) -> None:
        self._client.detach(status.name)
        if server is None:
            return
        with self._changed:
            self._leaving.add(server)
            if self._servers.get(status.name) is server:
                del self._servers[status.name]
        server.close()
        with self._changed:
            self._leaving.discard(server)

    def _start_again(self, status: HostStatus) -> None:
        pause = self._pauses.get(status.name, FIRST_PAUSE)
        self._pauses[status.name] = min(2 * pause, LONGEST_PAUSE)
        # Hosts that were lost together must not all come back at once.
        self._start_soon(status, pause * random.uniform(0.5, 1.0))

    def _watch(self) -> None:
        """See that the servers answer, and have them rest when there is nothing to do."""
        period = min(host.keepalive for host in self._hosts.values()) / BEATS
        while not self._closed.wait(period):
            for server in self._all_servers():
                server.beat(period)
            if self._client.seconds_idle() > self._rest:
                self._rest_all()

    def _rest_all(self) -> None:
        """End the servers until there is work again."""
        for status in self.statuses:
            server = self._servers.get(status.name)
            if server is not None and self._set_state(status, "resting", of="up"):
                self._drop(status, server)
        if self._client.seconds_idle() < self._rest:  # there was work before they rested
            self.wake()
