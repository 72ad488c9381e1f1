"""The caller's server: local workers, and connections to the servers of hosts."""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import ppft
from ppft.transport import SocketTransport

from ostap_parallel.engine.nesting import Nesting
from ostap_parallel.engine.sharing import Abandoned, Deliveries
from ostap_parallel.errors import HostError
from ostap_parallel.supply.source import STEP
from ostap_parallel.supply.supervisor import EventHandler
from ostap_parallel.worker import execute, handshake, transport
from ostap_parallel.worker.endpoint import Endpoint
from ostap_parallel.worker.engine import Server, Task
from ostap_parallel.worker.execute import Lost
from ostap_parallel.worker.local import Worker
from ostap_parallel.worker.nested import REFUSED
from ostap_parallel.worker.shared import Store

LOCAL = "local"

# Seconds: a host whose round trip takes longer is sent the next short job while it does the last.
FAR = 0.005

# Seconds between two looks at connections that nobody uses.
LOOKS = 0.5


class Connection(transport.Connection, ppft._pp._RWorker):  # type: ignore[misc]
    """One connection to a server; unlike ppft's it says what is wrong, and it has no time-out."""

    def __init__(self, server: ClientServer, label: str, endpoint: Endpoint, purpose: str) -> None:
        self.label = label
        self.endpoint = endpoint
        self.calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # to its thread: go on, or end
        self.name = secrets.randbits(128)  # which the server calls it by
        self.jobs = 0  # that were sent
        self.is_spare = False  # for jobs that wait at the host
        self.is_shared = False
        message = f"{purpose} {self.name}"
        super().__init__(*endpoint.address, server.secret, server, message, False, None)

    @property
    def t(self) -> Connection:
        """A worker of ours has a transport, a remote one of ppft's is one."""
        return self

    def connect(self, message: str = "") -> bool:
        """Connect, and go on only with a server that knows the secret; raises HostError."""
        SocketTransport.__init__(self, None, handshake.TIMEOUT)
        try:
            self.socket.close()
            self.socket = socket.create_connection(self.endpoint.address, handshake.TIMEOUT)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake.greet_server(self.socket, self.endpoint.key)
            is_status = message.startswith("STAT")
            self.socket.settimeout(handshake.TIMEOUT if is_status else None)
            self.send(message)
        except handshake.GreetingError as exc:
            self.close()
            raise HostError(self.label, "server", str(exc)) from exc
        except (OSError, RuntimeError) as exc:
            self.close()
            reason = f"no server answers on port {self.port}: {exc}; is it up, and does sshd "
            reason += "there permit TCP forwarding?"
            raise HostError(self.label, "server", reason) from exc
        self.is_free = True
        return True


class ClientServer(Server):
    """The caller's server: its own workers, and connections to those of hosts."""

    def __init__(self, ncpus: int | str, secret: str, on_event: EventHandler) -> None:
        self.sink = lambda event: on_event(LOCAL, event)
        self.on_lost: Callable[[HostError], None] = lambda error: None
        self.on_useless: Callable[[HostError], None] = lambda error: None
        self.store = Store()
        self._deliveries = Deliveries(lambda label: self._connect_to(label, "STORE"))
        self._last_work = time.monotonic()
        self.round_trips: dict[str, float] = {}  # seconds
        self._connections: dict[str, list[Connection]] = {}
        self._is_watched = False
        self._owner = os.getpid()
        self.nesting = Nesting(self)
        super().__init__(ncpus, secret=secret)

    def attach(
        self, label: str, endpoint: Endpoint, limit: int | None = None, is_shared: bool = False
    ) -> int:
        """Connect to a server; return the number of its workers.

        One that is shared may have other clients, whose jobs its workers do, too.
        Raises `HostError` if it does not answer, has another version or another secret.
        """
        status = Connection(self, label, endpoint, "STAT")
        begin = time.monotonic()
        try:
            count = min(int(status.receive()), limit or 1 << 16)
            round_trip = time.monotonic() - begin
            status.close()
            # One per worker; ppft makes as many again, to have a job wait at each host. There it
            # would wait behind a long one while others are idle: only far hosts get short ones.
            found = [Connection(self, label, endpoint, "EXEC") for _ in range(count)]
            if round_trip > FAR:
                found += [Connection(self, label, endpoint, "EXEC") for _ in range(count)]
            for spare in found[count:]:
                spare.is_spare = True
            for connection in found:
                connection.is_shared = is_shared
        except HostError:
            raise
        except (OSError, RuntimeError, ValueError) as exc:
            raise HostError(label, "server", f"the connection broke: {exc}") from exc
        with self._Server__queue_lock:
            self._connections[label] = found
            self.round_trips[label] = round_trip
            self._Server__rworkers.extend(found)
            self._Server__rworkers.sort(key=lambda connection: connection.is_spare)
        if self._exiting:  # `destroy` has not seen these
            self.detach(label)
            raise HostError(label, "server", "closed while it was starting")
        for connection in found:
            self._employ(connection)
        if not self._is_watched:
            self._is_watched = True
            threading.Thread(target=self._watch_hosts, name="watch-hosts", daemon=True).start()
        return count

    def detach(self, label: str) -> None:
        """Close the connections to a host; the jobs that it had end as `Lost`."""
        with self._Server__queue_lock:
            gone = self._connections.pop(label, [])
            self.round_trips.pop(label, None)
            workers: list[Connection] = self._Server__rworkers
            workers[:] = [worker for worker in workers if worker not in gone]
        self._deliveries.forget(label)
        for connection in gone:
            connection.calls.put(False)
            with contextlib.suppress(OSError):  # wakes the thread that waits for a result
                connection.socket.shutdown(socket.SHUT_RDWR)

    def insert(
        self, sfunc: bytes, sargs: bytes, task: Task | None = None, if_free: bool = False
    ) -> Task:
        """Queue a serialised job."""
        self._last_work = time.monotonic()
        return super().insert(sfunc, sargs, task, if_free)

    def _is_for(self, worker: Any, job: Task) -> bool:
        if isinstance(worker, Worker) or not worker.is_spare:
            return True
        # where all is short; behind a long one it would wait though others were idle
        there = map(self._running.get, self._connections.get(worker.label, ()))
        return job.is_short and all(one is None or one.is_short for one in there)

    def _watch_hosts(self) -> None:
        """Tell of hosts whose connections were closed while nobody used them."""
        while not self._exiting:
            time.sleep(LOOKS)
            for label in self._broken_hosts():
                self.on_lost(HostError(label, "run", "its connections were closed"))

    def _broken_hosts(self) -> set[str]:
        """Return the hosts with a connection that was closed while nobody used it."""
        with self._Server__queue_lock:  # nobody begins to
            idle = {c.socket.fileno(): c for c in self._Server__rworkers if c.is_free}
            poll = select.poll()
            for descriptor in idle:
                poll.register(descriptor, select.POLLIN)  # a server says nothing by itself
            return {idle[descriptor].label for descriptor, _ in poll.poll(0)}

    def is_idle(self) -> bool:
        """Return whether there is nothing to do."""
        with self._Server__queue_lock:
            workers = (*self._Server__workers, *self._Server__rworkers)
            return not self._Server__queue and all(worker.is_free for worker in workers)

    def seconds_idle(self) -> float:
        """Return for how long there has been nothing to do."""
        if not self.is_idle():
            self._last_work = time.monotonic()
        return time.monotonic() - self._last_work

    def count_workers(self) -> int:
        """Return the number of workers that are up, here and on hosts."""
        with self._Server__queue_lock:
            return len(self._Server__workers) + len(self._Server__rworkers)

    def _answer(self, job: Task, request: bytes) -> bytes:
        return self.nesting.answer(job, request)

    def interrupt(self, jobs: Collection[Task] | None = None, grace: float = 2.0) -> None:
        """Give up jobs, all by default, here and on hosts."""
        super().interrupt(jobs, grace)
        self.nesting.wake()

    def _signal(self, worker: Any, number: int) -> None:
        if isinstance(worker, Worker):
            super()._signal(worker, number)
        else:
            self._stop_soon(worker.label, [f"{worker.name} {worker.jobs} {number}"])

    def _interrupt(self, running: dict[Any, Task], grace: float) -> None:
        """Interrupt jobs here and on hosts, and those that wait for a shared object to be sent."""
        super()._interrupt({w: j for w, j in running.items() if isinstance(w, Worker)}, grace)
        there: dict[str, list[str]] = {}
        for worker in running:
            if isinstance(worker, Connection):
                there.setdefault(worker.label, []).append(f"{worker.name} {worker.jobs}")
        for label, jobs in there.items():
            self._stop_soon(label, jobs)
        self._deliveries.interrupt({job.blob for job in running.values() if job.blob})

    def _stop_soon(self, label: str, jobs: list[str]) -> None:
        def stop() -> None:
            with contextlib.suppress(HostError, OSError):  # a host that is lost has no jobs
                connection = self._connect_to(label, "STOP")
                connection.send("\n".join(jobs))
                connection.close()

        threading.Thread(target=stop, name="stop", daemon=True).start()

    def destroy(self) -> None:
        """End all workers, close all connections and give up all jobs."""
        if os.getpid() != self._owner:  # a fork that exits: they are not its own
            return
        self._exiting = True
        for label in list(self._connections):
            self.detach(label)
        super().destroy()
        self.store.clear()

    def _connect_to(self, label: str, purpose: str) -> Connection:
        with self._Server__queue_lock:
            known = self._connections.get(label)
        if not known:
            raise HostError(label, "run", "it was lost")
        return Connection(self, label, known[0].endpoint, purpose)

    def _place(self, worker: Any, job: Task, sargs: bytes) -> bytes:
        blob, modules, is_local = job.blob, job.modules, isinstance(worker, Worker)
        if is_local and (blob or modules):
            places = modules.local if modules else b""
            return execute.locate(sargs, blob.location if blob else "", places)
        if blob or modules:
            location = self._deliveries.locate(blob, worker.label) if blob else ""
            there = self._deliveries.locate(modules, worker.label) if modules else ""
            sargs = execute.locate(sargs, location, modules.at(there) if modules else b"")
        if not is_local:
            with self._running_lock:  # from here on, an interrupt has to go there, too
                if job.is_interrupted:
                    raise Abandoned("it was interrupted")
                worker.jobs += 1
            if job.is_nested and worker.is_shared:  # see `nesting` for the reason
                return REFUSED + sargs
        return sargs

    def _finish(self, worker: Any, job: Task, error: Exception | None) -> bytes:
        if not isinstance(worker, Connection):
            return self.nesting.close(job, super()._finish(worker, job, error))
        job.host = worker.label
        try:
            if error is not None:
                raise error
            return self.nesting.close(job, self._receive(worker, job))
        except Abandoned as exc:  # nothing was sent on this connection
            return execute.pack_result(Lost(worker.label, 0, str(exc)))
        except Exception as exc:
            worker.close()
            if not isinstance(exc, HostError):
                reason = f"the connection to {worker.label} was lost: {exc}"
                exc = HostError(worker.label, "run", reason)
            self._break(worker, exc)
            return self.nesting.close(job, execute.pack_result(Lost(worker.label, 0, exc.reason)))
        finally:
            self._has_ended(worker)

    def _break(self, connection: Connection, error: HostError) -> None:
        """Use a connection no more, and tell of that unless it was closed on purpose."""
        with self._Server__queue_lock:
            if connection not in self._Server__rworkers:
                return
            self._Server__rworkers.remove(connection)
        tell = self.on_lost
        if error.step == STEP:  # the job must not come back to this host
            self.detach(connection.label)
            tell = self.on_useless
        threading.Thread(target=tell, args=[error], name="lost", daemon=True).start()
