"""The executor on ppft: local workers, and the servers of hosts as they come and go."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import queue
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, InvalidStateError
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import ppft
from ppft.transport import SocketTransport

from ostap_parallel.config import HostConfig
from ostap_parallel.errors import HostError, RemoteTraceback, ServersUnavailable, WorkerLost
from ostap_parallel.hosts.server import HostServer, HostStatus
from ostap_parallel.hosts.ssh import control_directory
from ostap_parallel.worker import execute, handshake, serialize
from ostap_parallel.worker.engine import Server, Task
from ostap_parallel.worker.execute import ChunkOutcome, Lost
from ostap_parallel.worker.process import Remembering

logger = logging.getLogger(__name__)

# Hosts that are started at the same time.
MAX_STARTS = 16

# How often a call whose worker was lost is tried again.
LOST_RETRIES = 2

# Seconds that hosts get to answer.
PATIENCE = 5.0

LOCAL = "local"

# Receives the name of a host and what one of its workers printed or logged, see `engine.Sink`.
EventHandler = Callable[[str, dict[str, Any]], None]


class Connection(Remembering, ppft._pp._RWorker):  # type: ignore[misc]
    """One connection to a server; unlike ppft's it says what is wrong, and it has no time-out."""

    def __init__(self, server: ClientServer, label: str, port: int, purpose: str) -> None:
        self.label = label
        super().__init__("127.0.0.1", port, server.secret, server, purpose, False, None)

    def connect(self, message: str | None = None) -> bool:
        """Connect, and go on only with a server that knows the secret; raises HostError."""
        SocketTransport.__init__(self, None, handshake.TIMEOUT)
        try:
            self._connect(self.host, self.port)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake.greet_server(self.socket, handshake.derive_key(self.secret, self.port))
            self.socket.settimeout(handshake.TIMEOUT if message == "STAT" else None)
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

    def __init__(
        self,
        ncpus: int | str,
        secret: str,
        on_event: EventHandler,
        on_lost: Callable[[HostError], None],
    ) -> None:
        self.sink = lambda event: on_event(LOCAL, event)
        self._on_lost = on_lost
        self._connections: dict[str, list[Connection]] = {}
        super().__init__(ncpus, secret=secret)

    def add_host(self, label: str, port: int, limit: int | None = None) -> int:
        """Connect to a server on a port of this machine; return the number of its workers.

        Raises `HostError` if it does not answer, has another version or another secret.
        """
        status = Connection(self, label, port, "STAT")
        try:
            count = min(int(status.receive()), limit or 1 << 16)
            status.close()
            # One per worker; ppft makes as many again, to have a job wait at each host. There it
            # would wait behind a long one while others are idle.
            found = [Connection(self, label, port, "EXEC") for _ in range(count)]
        except HostError:
            raise
        except (OSError, RuntimeError, ValueError) as exc:
            raise HostError(label, "server", f"the connection broke: {exc}") from exc
        with self._Server__queue_lock:
            self._connections[label] = found
            self._Server__rworkers.extend(found)
        if self._exiting:  # `destroy` has not seen these
            self.drop_host(label)
            raise HostError(label, "server", "closed while it was starting")
        self._Server__scheduler()
        return count

    def drop_host(self, label: str) -> None:
        """Close the connections to a host; the jobs that it had end as `Lost`."""
        with self._Server__queue_lock:
            gone = self._connections.pop(label, [])
            workers: list[Connection] = self._Server__rworkers
            workers[:] = [worker for worker in workers if worker not in gone]
        for connection in gone:
            connection.is_free = False
            with contextlib.suppress(OSError):  # wakes the thread that waits for a result
                connection.socket.shutdown(socket.SHUT_RDWR)

    def destroy(self) -> None:
        """End all workers, close all connections and give up all jobs."""
        self._exiting = True
        for label in list(self._connections):
            self.drop_host(label)
        super().destroy()

    def _run_remote(self, job: Task, sfunc: bytes, sargs: bytes, rworker: Connection) -> None:
        job.host = rworker.label
        try:
            rworker.csend(sfunc)
            rworker.send(sargs)
            sresult = rworker.receive()
        except Exception as exc:
            rworker.close()
            reason = f"the connection to {rworker.label} was lost: {exc}"
            sresult = execute.pack_result(Lost(rworker.label, 0, reason))
        else:
            reason = ""
            rworker.is_free = True
        self._forget(job)
        job.finalize(sresult)
        if reason and rworker.label in self._connections:  # nobody has closed it on purpose
            self._on_lost(HostError(rworker.label, "run", reason))
        self._Server__scheduler()


class ParallelExecutor(Executor):
    """Local workers and servers on hosts, as one executor.

    Returns at once: hosts join while work is already going on; see `hosts` and `wait_for_hosts`.

    Parameters
    ----------
    ncpus
        Local workers; ``"autodetect"``: as many as affinity and control groups grant; 0: none.
    hosts
        Hosts to start servers on, or existing servers.
    secret
        Shared by us and the servers; random by default.
    timeout
        Seconds of silence after which a host's server ends itself.
    on_event
        Receives what workers print and log.
    """

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        hosts: Sequence[HostConfig] = (),
        *,
        secret: str | None = None,
        timeout: float = 7200,
        on_event: EventHandler = lambda host, event: None,
    ) -> None:
        self._secret = secret if secret is not None else secrets.token_hex(32)
        self._on_event = on_event
        self._timeout = timeout
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._listeners: list[Callable[[], None]] = []
        self._futures: weakref.WeakSet[Future[Any]] = weakref.WeakSet()
        self._servers: dict[str, HostServer] = {}
        self._closed = threading.Event()
        self._cleanup = contextlib.ExitStack()
        self._apply = execute.shim(serialize.dumps(execute.Call(execute.apply)))
        self.hosts = [HostStatus(host.label) for host in hosts]
        self.server = ClientServer(ncpus, self._secret, on_event, self._on_lost())
        self._finalizer = weakref.finalize(
            self, _close, os.getpid(), self.server, self._servers, self._cleanup
        )
        if hosts:
            self._start_hosts(hosts)
            self._start_heartbeat(min(60.0, timeout / 4))

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        local = {LOCAL: self.server.get_ncpus()} if self.server.get_ncpus() else {}
        return local | {host.name: host.workers for host in self.hosts if host.state == "up"}

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_starting(), timeout)
        return all(host.state == "up" for host in self.hosts)

    def check(self) -> None:
        """Raise `ServersUnavailable` if nothing can run and nothing is still starting.

        Raises RuntimeError after `shutdown`.
        """
        if self._closed.is_set():
            raise RuntimeError("the executor has been shut down")
        if not self.workers and not self._is_starting():
            raise ServersUnavailable(tuple(host.error for host in self.hosts if host.error))

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called, from any thread, when `workers` changes; return the undoing."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call on any worker; see `concurrent.futures.Executor.submit`.

        Raises
        ------
        SerializeError
            The function or an argument cannot be sent.
        RuntimeError
            The executor has been shut down.
        """
        what = f"the call of {getattr(fn, '__qualname__', type(fn).__name__)}"
        item = execute.pack_value((fn, args, kwargs), what)
        future = self._new_future()
        self._try(future, execute.pack_chunk([0], [item]), LOST_RETRIES)
        return future

    def submit_chunk(self, call: bytes, chunk: bytes) -> Future[ChunkOutcome | Lost]:
        """Run a chunk: `execute.shim` and `execute.pack_chunk` make its two messages."""
        future = self._new_future()

        def deliver(message: bytes) -> None:
            result: ChunkOutcome | Lost
            try:
                result = execute.unpack_result(message)
            except Exception as exc:
                result = Lost("", 0, f"its answer cannot be read: {exc}", by_worker=True)
            with contextlib.suppress(InvalidStateError):  # cancelled
                future.set_result(replace(result, host=task.host or LOCAL))

        self.check()
        task = Task(self.server, deliver)
        self.server.insert(call, chunk, task)
        return future

    def interrupt(self) -> None:
        """Give up all that is queued and running, here and on the hosts; workers stay."""
        self.server.interrupt()
        self._ask_hosts("interrupt")

    def flush(self) -> None:
        """Wait, a few seconds at most, until what workers have printed so far has arrived."""
        self._ask_hosts("ping")

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all workers and servers; nothing of ours remains on any host."""
        if wait and not cancel_futures:
            with self._lock:
                pending = list(self._futures)
            concurrent.futures.wait(pending)
        with self._lock:
            self._closed.set()
        self._finalizer()
        for host in self.hosts:
            if host.state in ("starting", "up"):
                self._update(host, state="closed", workers=0)

    def _new_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._futures.add(future)
        return future

    def _try(self, future: Future[Any], chunk: bytes, retries: int) -> None:
        def settle(done: Future[ChunkOutcome | Lost]) -> None:
            result = done.result()
            if isinstance(result, ChunkOutcome) and not result.entries:
                result = Lost(result.host, result.pid, "it was interrupted")
            try:
                if isinstance(result, ChunkOutcome):
                    _settle(future, result)
                elif retries and not self._closed.is_set():
                    self._try(future, chunk, retries - 1)
                else:
                    future.set_exception(WorkerLost(0, result.host, result.reason))
            except Exception as exc:
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(exc)

        self.submit_chunk(self._apply, chunk).add_done_callback(settle)

    def _is_starting(self) -> bool:
        return any(host.state == "starting" for host in self.hosts)

    def _update(self, host: HostStatus, **fields: Any) -> None:
        with self._changed:
            if fields.get("state") == "up" and host.state != "starting":
                return  # lost or closed meanwhile
            for name, value in fields.items():
                setattr(host, name, value)
            self._changed.notify_all()
        for listener in list(self._listeners):
            listener()

    def _ask_hosts(self, command: str) -> None:
        """Have all hosts do something; wait, not for long, until they have."""
        with self._lock:
            servers = list(self._servers.values())
        deadline = time.monotonic() + PATIENCE
        for answer in [server.ask(command) for server in servers]:
            answer.wait(max(0.0, deadline - time.monotonic()))

    def _start_hosts(self, hosts: Sequence[HostConfig]) -> None:
        control = self._cleanup.enter_context(control_directory())
        waiting: queue.SimpleQueue[tuple[int, HostConfig]] = queue.SimpleQueue()
        for number, host in enumerate(hosts):
            waiting.put((number, host))
        this = weakref.ref(self)

        def start() -> None:
            while (executor := this()) is not None and not executor._closed.is_set():
                try:
                    number, host = waiting.get_nowait()
                except queue.Empty:
                    return
                executor._start_host(host, executor.hosts[number], control / str(number))
                del executor

        for _ in range(min(MAX_STARTS, len(hosts))):
            threading.Thread(target=start, name="start-host", daemon=True).start()

    def _start_heartbeat(self, period: float) -> None:
        """Tell the servers now and then that we are there, so that they do not end themselves."""
        this, closed = weakref.ref(self), self._closed

        def beat() -> None:
            while not closed.wait(period) and (executor := this()) is not None:
                executor._ask_hosts("ping")
                del executor

        threading.Thread(target=beat, name="heartbeat", daemon=True).start()

    def _start_host(self, host: HostConfig, status: HostStatus, control: Path) -> None:
        start = time.monotonic()
        try:
            if host.server_port is not None:
                port, about = host.server_port, None
            else:
                port, about = self._open_server(host, status, control)
            workers = self.server.add_host(host.label, port, host.ncpus)
        except HostError as exc:
            self._lose(status, exc, "failed")
        except Exception as exc:
            if not self._closed.is_set():
                logger.exception("%s could not be started", status.name)
            self._lose(status, HostError(status.name, "start", str(exc)), "failed")
        else:
            seconds = time.monotonic() - start
            up = {"state": "up", "workers": workers, "port": port, "about": about}
            self._update(status, seconds=seconds, **up)

    def _on_lost(self) -> Callable[[HostError], None]:
        """Return what to call when a host is lost; it does not keep this executor alive."""
        this = weakref.ref(self)

        def on_lost(error: HostError) -> None:
            if (executor := this()) is not None:
                status = next(host for host in executor.hosts if host.name == error.host)
                executor._lose(status, error, "lost")

        return on_lost

    def _open_server(
        self, host: HostConfig, status: HostStatus, control: Path
    ) -> tuple[int, dict[str, Any]]:
        on_event = self._on_event
        server = HostServer(
            host,
            self._secret,
            control,
            on_event=lambda event: on_event(status.name, event),
            on_lost=self._on_lost(),
            timeout=self._timeout,
        )
        with self._lock:
            if self._closed.is_set():
                raise HostError(host.label, "start", "closed while it was starting")
            self._servers[host.label] = server
        server.__enter__()
        return server.port, server.about

    def _lose(
        self, status: HostStatus, error: HostError, state: Literal["failed", "lost"]
    ) -> None:
        with self._lock:
            if self._closed.is_set() or status.state not in ("starting", "up"):
                return  # each of its connections tells
            status.state, status.workers, status.error = state, 0, error
            server = self._servers.pop(status.name, None)
        self.server.drop_host(status.name)
        if server is not None:
            server.close()
        logger.warning("%s %s", "lost" if state == "lost" else "not available:", error)
        self._update(status)
        if not self.workers and not self._is_starting():
            self.server.drop_waiting("no worker is left")


def _settle(future: Future[Any], result: ChunkOutcome) -> None:
    ok, packed, _ = result.entries[0]
    if ok:
        future.set_result(execute.unpack_value(packed))
        return
    error, text = serialize.loads(packed)
    error.__cause__ = RemoteTraceback(f"on {result.host}, process {result.pid}:\n{text}")
    future.set_exception(error)


def _close(
    pid: int, server: ClientServer, servers: dict[str, HostServer], cleanup: contextlib.ExitStack
) -> None:
    """Close what an executor owns; a function, so that a forgotten executor can be collected."""
    if os.getpid() != pid:  # a fork that exits: nothing of this is its own
        return
    # No threads: at the exit of the interpreter there are none to be had.
    hosts = list(servers.values())
    for host in hosts:
        host.hang_up()
    server.destroy()
    for host in hosts:
        host.close()
    servers.clear()
    cleanup.close()
