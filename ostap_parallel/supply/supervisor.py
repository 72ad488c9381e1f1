"""Keeping the servers of all sources up: started at the same time, lost ones started again."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

from ostap_parallel.errors import ConfigError, HostError, see
from ostap_parallel.logs import logger_of
from ostap_parallel.supply.source import (
    STEP,
    Consumer,
    HostStatus,
    Leave,
    Server,
    Source,
    State,
    TryLater,
    explained,
)

logger = logger_of(__name__)

# Hosts that are connected to, or copied to, at the same time; and seconds after which one of them
# that is slow, or hangs, is no longer counted.
MAX_STARTS = 16
LEASE = 5.0

# Seconds before a lost host is started again: the first time, and at most. One that was up for
# the longest pause is as good as new.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0

# Seconds that hosts get to answer.
PATIENCE = 5.0

# In the time that makes a silent server a lost one, it is asked this often; and seconds between
# two looks at whether there is anything to do.
BEATS = 3
LOOKS = 15.0

# Seconds until more spare sources are started, if work still waits; and until one that has none
# ends.
PACE, SPARE_REST = 2.0, 60.0

# Receives the name of a host and what one of its workers printed or logged, see `output.Sink`.
EventHandler = Callable[[str, dict[str, Any]], None]


class Slots:
    """Leave to do what costs much here: few have it at a time, and nobody has it for long."""

    def __init__(self, count: int, lease: float) -> None:
        self._count, self._lease = count, lease
        self._ends: list[float] = []  # of the leases that are running
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def held(self, given_up: Callable[[], bool]) -> Iterator[None]:
        """Hold one during the block, or until its lease ends; wait for it unless `given_up`."""
        with self._changed:
            while not given_up():
                now = time.monotonic()
                self._ends = [end for end in self._ends if end > now]
                if len(self._ends) < self._count:
                    break
                self._changed.wait(min(self._ends) - now)
            end = time.monotonic() + self._lease
            self._ends.append(end)
        try:
            yield
        finally:
            with self._changed:
                if end in self._ends:
                    self._ends.remove(end)
                self._changed.notify()

    def wake(self) -> None:
        """Have those who wait look whether they have given up."""
        with self._changed:
            self._changed.notify_all()


class _Watch:
    """Passes on to the supervisor what becomes of one server, see `source.Watch`."""

    def __init__(self, supervisor: Supervisor, status: HostStatus) -> None:
        self._supervisor = supervisor
        self._status = status
        self._noticed = False

    def slot(self) -> contextlib.AbstractContextManager[None]:
        return self._supervisor.slot()

    def queued(self, reason: str) -> None:
        self._supervisor.queued(self._status, reason)

    def granted(self) -> None:
        self._supervisor.granted(self._status)

    def step(self, name: str) -> None:
        self._status.step = name

    def event(self, event: dict[str, Any]) -> None:
        try:
            self._supervisor.on_event(self._status.name, event)
        except Exception:  # the user's handler, or an output that cannot show it
            notice, self._noticed = not self._noticed, True
            if notice:
                text = "%s: what it printed or logged cannot be shown, in part at least"
                logger.warning(text, self._status.name, exc_info=True)

    def ended(self, error: HostError) -> None:
        self._supervisor.session_lost(self, error)

    def retire(self, leave: Leave) -> None:
        self._supervisor.retire(self, self._status, leave)

    def longest(self) -> float:
        return self._supervisor.longest(self._status.name)


class Supervisor:
    """Starts the servers of sources, and starts again those that are lost.

    Parameters
    ----------
    consumer
        What connects to them.
    sources
        Where workers come from; there may be more later, see `add`.
    rest
        Seconds without work after which the servers end until there is work again.
    on_event
        Receives what workers print and log.
    on_change
        Called, from any thread, after a status has changed.

    Attributes
    ----------
    statuses
        One per source, in their order.
    """

    def __init__(
        self,
        consumer: Consumer,
        sources: Iterable[Source],
        rest: float,
        on_event: EventHandler,
        on_change: Callable[[], None],
    ) -> None:
        self.statuses: list[HostStatus] = []
        self.on_event = on_event
        self._consumer = consumer
        self._rest = rest
        self._on_change = on_change
        self._owner = os.getpid()  # a fork has no servers
        self._sources: dict[str, Source] = {}
        self._servers: dict[str, Server] = {}
        self._watches: dict[str, _Watch] = {}  # of these servers
        self._leaving: set[Server] = set()  # no longer in use, and not ended yet
        self._errors: dict[str, HostError] = {}  # of hosts that were lost before they were up
        self._pauses: dict[str, float] = {}
        self._up_since: dict[str, float] = {}
        self._changed = threading.Condition()
        self._slots = Slots(MAX_STARTS, LEASE)
        self._closed = threading.Event()
        self._is_watched = False
        self._asked = 0.0  # when spare sources were started last
        for source in sources:
            self._enter(source)

    def start(self) -> None:
        """Start all sources, without waiting."""
        for status in list(self.statuses):
            if status.state == "starting":
                self._start_soon(status)
        if self.statuses:
            self._see_to_it()

    def add(self, source: Source) -> HostStatus:
        """Start one more source, without waiting; raises ConfigError if there is one like it."""
        status = self._enter(source)
        if status.state == "starting":
            self._start_soon(status)
        self._see_to_it()
        return status

    def remove(self, label: str) -> None:
        """End the server of a source and forget that; raises KeyError if there is none.

        What its workers were doing is done by others.
        """
        with self._changed:
            del self._sources[label]
            (status,) = [one for one in self.statuses if one.name == label]
            self.statuses.remove(status)
            status.state, status.workers = "closed", 0
            server = self._servers.get(label)
            for known in (self._errors, self._pauses, self._up_since):
                known.pop(label, None)
            self._changed.notify_all()
        self._slots.wake()
        self._on_change()
        self._drop(status, server)

    def has(self, *states: State) -> bool:
        """Return whether any source is in one of these states."""
        return any(status.state in states for status in list(self.statuses))

    def wait(self, timeout: float | None) -> None:
        """Wait until each source is up or has failed once, or for `timeout` seconds.

        One that is queued is waited for: its turn comes. One whose start has failed is not,
        though it may be tried again.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.has("starting", "queued"), timeout)

    def wake(self) -> None:
        """Start the hosts that are resting; of the spare ones as many as seem to be needed."""
        if not self.has("resting"):
            return
        resting = [status for status in list(self.statuses) if status.state == "resting"]
        spare = [status for status in resting if self._is_spare(status)]
        more = spare[: self._count_needed()] if spare else []
        for status in [*(status for status in resting if status not in spare), *more]:
            if self._set_state(status, "starting", of="resting", reason=""):
                self._start_soon(status)

    def _is_spare(self, status: HostStatus) -> bool:
        source = self._sources.get(status.name)
        return source is not None and source.is_spare

    def _count_needed(self) -> int:
        """Return how many spare sources to start: as many as there are, while work waits."""
        now = time.monotonic()
        with self._changed:
            there = sum(one.state not in ("resting", "failed", "closed") for one in self.statuses)
            if there and (now - self._asked < PACE or not self._consumer.is_short()):
                return 0
            self._asked = now
        return max(1, there)

    def _rest_spares(self) -> None:
        """End the spare servers that have had nothing to do for a while."""
        for status in list(self.statuses):
            idle = self._is_spare(status) and self._consumer.idle(status.name)
            server = self._servers.get(status.name)
            if server is None or not idle or idle < min(SPARE_REST, self._rest):
                continue
            if self._set_state(status, "resting", of="up", reason="nothing waits for it"):
                self._drop(status, server)

    def ping(self) -> None:
        """Wait, not for long, until all that the servers have said so far has arrived."""
        deadline = time.monotonic() + PATIENCE
        for answer in [server.ask("ping") for server in self._all_servers()]:
            answer.wait(max(0.0, deadline - time.monotonic()))

    def server(self, label: str) -> Server:
        """Return the server of a source; raises HostError if it has none now."""
        with self._changed:
            if (server := self._servers.get(label)) is None:
                raise HostError(label, "run", "it is not up")
            return server

    def connection_lost(self, error: HostError) -> None:
        """Take notice that a connection to a host has broken."""
        server = self._servers.get(error.host)
        # Mostly the whole session has ended, which is about to be told with ssh's own words.
        ended = server is not None and server.has_ended(timeout=1.0)
        if not ended and self._servers.get(error.host) is server:
            self._lose(error)

    def give_up(self, error: HostError) -> None:
        """Do without a host from now on, as it would fail in the same way again."""
        if (status := self._status_of(error.host)) is None:
            return
        self._errors[status.name] = error  # if it is only about to be up
        if self._set_state(status, "failed", of="up", error=error):
            logger.warning("not available any more: %s", error)
            self._drop(status, self._servers.get(status.name))

    def slot(self) -> contextlib.AbstractContextManager[None]:
        """Return what a start holds while it costs much here, see `source.Watch`."""
        return self._slots.held(self._closed.is_set)

    def queued(self, status: HostStatus, reason: str) -> None:
        """Take notice that a source waits for its turn; it is told once for all that do alike."""
        if (status.state, status.reason) == ("queued", reason):
            return
        alike = any(one.state == "queued" and one.reason == reason for one in self.statuses)
        if self._set_state(status, "queued", of=("starting", "lost", "queued"), reason=reason):
            level = logging.INFO if alike or self.has("up") else logging.WARNING
            logger.log(level, "%s is queued: %s", status.name, reason)

    def granted(self, status: HostStatus) -> None:
        """Take notice that its turn has come."""
        self._set_state(status, "starting", of="queued", reason="")

    def session_lost(self, watch: _Watch, error: HostError) -> None:
        """Take notice that a server has ended, unless another one has come after it."""
        if self._watches.get(error.host) is watch:
            self._lose(error)

    def retire(self, watch: _Watch, status: HostStatus, leave: Leave) -> None:
        """Have a server rest that is about to end; another one comes if there is work for it."""
        server = self._servers.get(status.name)
        if server is None or self._watches.get(status.name) is not watch:
            return
        if not self._set_state(status, "resting", of="up", reason=leave.reason):
            return
        logger.info("%s rests: %s", status.name, leave.reason)
        with self._changed:
            self._leaving.add(server)
            if self._servers.get(status.name) is server:  # it may have been woken since
                del self._servers[status.name], self._watches[status.name]
        if self._consumer.is_short():
            self.wake()
        self._consumer.retire(status.name, leave)
        self._close(server)
        if self._consumer.is_short():  # what it has not done, too
            self.wake()

    def longest(self, label: str) -> float:
        """Return the seconds that the longest job of a server has taken."""
        return self._consumer.longest(label)

    def explanation(self, label: str) -> Callable[[], str] | None:
        """Return what finds out why a server has ended, see `source.Server`."""
        server = self._servers.get(label)
        return None if server is None else server.explain

    def hang_up(self) -> None:
        """Have all servers end, without waiting until they have; nothing is started any more."""
        if os.getpid() != self._owner:
            return
        self._closed.set()
        self._slots.wake()
        with self._changed:
            self._changed.notify_all()
        for server in self._all_servers():
            server.hang_up()

    def close(self) -> None:
        """End all servers; nothing of ours remains on any host."""
        if os.getpid() != self._owner:
            return
        self.hang_up()
        deadline = time.monotonic() + PATIENCE
        with self._changed:
            servers = {*self._servers.values(), *self._leaving}
        for server in servers:
            server.close(max(0.0, deadline - time.monotonic()))
        with self._changed:
            self._servers.clear()
            self._watches.clear()
            for status in self.statuses:
                if status.state != "failed":
                    status.state, status.workers = "closed", 0
            self._changed.notify_all()

    def _enter(self, source: Source) -> HostStatus:
        with self._changed:
            if source.label in self._sources:
                raise ConfigError(f"there is a source named {source.label} already")
            self._sources[source.label] = source
            self.statuses.append(status := HostStatus(source.label))
            if source.is_spare:
                status.state, status.reason = "resting", "nothing waits for it"
        return status

    def _status_of(self, label: str) -> HostStatus | None:
        return next((status for status in list(self.statuses) if status.name == label), None)

    def _all_servers(self) -> list[Server]:
        with self._changed:
            return list(self._servers.values())

    def _set_state(
        self, status: HostStatus, state: State, of: str | Collection[str], **fields: Any
    ) -> bool:
        """Change the state of a source if it still is `of`; return whether it was."""
        with self._changed:
            if self._closed.is_set() or status.state not in ({of} if isinstance(of, str) else of):
                return False
            for name, value in {"state": state, "workers": 0, "step": "", **fields}.items():
                setattr(status, name, value)
            self._changed.notify_all()
        self._on_change()
        return True

    def _start_soon(self, status: HostStatus, pause: float = 0.0) -> None:
        def start() -> None:
            if not self._closed.wait(pause) and status.state != "closed":
                self._start(status)

        threading.Thread(target=start, name="start-host", daemon=True).start()

    def _start(self, status: HostStatus) -> None:
        begin, label = time.monotonic(), status.name
        self._errors.pop(label, None)
        server: Server | None = None
        try:
            server = self._open(status)
            grant = server.start()
            workers = self._consumer.attach(label, grant.endpoint, grant.limit, grant.is_shared)
        except Exception as exc:
            if not isinstance(exc, HostError):
                if not self._closed.is_set():
                    logger.exception("%s could not be started", label)
                exc = HostError(label, "start", str(exc))
            self._fail(status, server, exc)
            return
        now = self._up_since[label] = time.monotonic()
        up = {"workers": workers, "port": grant.endpoint.address[1], "about": grant.about}
        of = ("starting", "lost", "queued")
        if not self._set_state(status, "up", of, seconds=now - begin, reason="", **up):
            self._drop(status, server)  # it was removed meanwhile, or we are closing
        elif error := self._errors.pop(label, None):
            (self.give_up if error.step == STEP else self._lose)(error)

    def _open(self, status: HostStatus) -> Server:
        label, watch = status.name, _Watch(self, status)
        with self._changed:
            if self._closed.is_set() or label not in self._sources:
                raise HostError(label, "start", "closed while it was starting")
            server = self._sources[label].server(watch)
            if label in self._servers:  # it rests, and was woken before it had ended
                self._leaving.add(self._servers[label])
            self._servers[label], self._watches[label] = server, watch
        return server

    def _fail(self, status: HostStatus, server: Server | None, error: HostError) -> None:
        """Take notice that a source could not be started."""
        self._drop(status, server)
        first = status.name not in self._up_since  # else it can be had, as we have seen
        is_final = first and not isinstance(error, TryLater)
        error = HostError(error.host, error.step, error.reason)  # a worker may come to read it
        if is_final:
            if self._set_state(status, "failed", ("starting", "queued", "lost"), error=error):
                logger.warning("not available: %s%s", error, see("steps"))
            return
        is_known = status.state == "lost"
        if self._set_state(status, "lost", ("starting", "queued", "lost"), error=error):
            level = logging.INFO if is_known else logging.WARNING
            logger.log(level, "not available, and tried again: %s", error)
            self._start_again(status)

    def _lose(self, error: HostError) -> None:
        """Take notice that a host that was up is lost; each of its connections may tell."""
        if (status := self._status_of(error.host)) is None:
            return
        self._errors[status.name] = error  # if it is only about to be up
        if not self._set_state(status, "lost", of="up", lost=status.lost + 1, error=error):
            return
        logger.warning("lost %s; it is being started again", error)
        if time.monotonic() - self._up_since[status.name] > LONGEST_PAUSE:
            self._pauses.pop(status.name, None)
        server = self._servers.get(status.name)
        self._consumer.detach(status.name)  # its jobs go elsewhere, however long its end takes

        def replace() -> None:
            if (more := explained(error, server)) is not error:
                self._set_state(status, "lost", "lost", error=more)
            self._drop(status, server)
            self._start_again(status)

        # Not here: others may be lost at the same time, which their heartbeat must find out.
        threading.Thread(target=replace, name="replace-host", daemon=True).start()

    def _drop(self, status: HostStatus, server: Server | None) -> None:
        now = self._status_of(status.name)
        if now is None or now is status:  # else another source has the name by now
            self._consumer.detach(status.name)
        if server is None:
            return
        with self._changed:
            self._leaving.add(server)
            if self._servers.get(status.name) is server:
                del self._servers[status.name]
                self._watches.pop(status.name, None)
        self._close(server)

    def _close(self, server: Server) -> None:
        server.close()
        with self._changed:
            self._leaving.discard(server)

    def _start_again(self, status: HostStatus) -> None:
        pause = self._pauses.get(status.name, FIRST_PAUSE)
        self._pauses[status.name] = min(2 * pause, LONGEST_PAUSE)
        # Hosts that were lost together must not all come back at once.
        self._start_soon(status, pause * random.uniform(0.5, 1.0))

    def _see_to_it(self) -> None:
        """Have a thread look after the servers; it looks more often from now on if need be."""
        with self._changed:
            self._changed.notify_all()
            begin, self._is_watched = not self._is_watched, True
        if begin:
            threading.Thread(target=self._watch, name="heartbeat", daemon=True).start()

    def _period(self) -> float:
        limits = [source.keepalive for source in self._sources.values() if source.keepalive]
        return min(limits) / BEATS if limits else LOOKS

    def _watch(self) -> None:
        """See that the servers answer, and have them rest when there is nothing to do."""
        while True:
            with self._changed:
                begin, period = time.monotonic(), self._period()
                while (left := begin + period - time.monotonic()) > 0:
                    if self._closed.is_set():
                        return
                    self._changed.wait(left)
                    period = min(period, self._period())
            if self._closed.is_set():
                return
            for server in self._all_servers():
                server.beat(period)
            if self._consumer.seconds_idle() > self._rest:
                self._rest_all()
            self._rest_spares()

    def _rest_all(self) -> None:
        """End the servers until there is work again."""
        for status in list(self.statuses):
            server, source = self._servers.get(status.name), self._sources.get(status.name)
            may_rest = server is not None and source is not None and source.may_rest
            if may_rest and self._set_state(status, "resting", of="up"):
                self._drop(status, server)
        if self._consumer.seconds_idle() < self._rest:  # there was work before they rested
            self.wake()
