"""The executor on ppft: local workers, and the servers of hosts as they come and go."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, Executor, InvalidStateError
from dataclasses import replace
from typing import Any

from ostap_parallel.config import HostConfig
from ostap_parallel.engine.client import LOCAL, ClientServer
from ostap_parallel.engine.future import Future
from ostap_parallel.engine.nesting import HOST_RETRIES, LOST_RETRIES
from ostap_parallel.errors import ConfigError, RemoteTraceback, ServersUnavailable, WorkerLost
from ostap_parallel.supply.host import sources_of
from ostap_parallel.supply.supervisor import EventHandler, Supervisor
from ostap_parallel.supply.syncing import Archive, Modules, Source
from ostap_parallel.worker import execute, serialize
from ostap_parallel.worker.engine import Task
from ostap_parallel.worker.execute import ChunkOutcome, Lost
from ostap_parallel.worker.initializer import Initializer
from ostap_parallel.worker.shared import Blob, Stored

logger = logging.getLogger(__name__)

# Seconds that work waits for lost hosts when no worker is left.
PATIENCE = 60.0


AnyFuture = concurrent.futures.Future[Any]


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
        Seconds without work after which the hosts' servers end; they start again when there is.
    patience
        Seconds that work waits for lost hosts to come back when no worker is left.
    tasks_per_worker
        Jobs, which are calls or chunks of items, after which a worker process is replaced;
        ``None`` for no limit. Not for existing servers.
    on_event
        Receives what workers print and log.
    initializer, initargs
        ``initializer(*initargs)`` is called in each worker process before its first job.
    sync
        Modules of the user's that workers are to find.

    Attributes
    ----------
    hosts
        The state of each host, in their order.
    modules
        The user's modules; who begins a run looks at them.
    """

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        hosts: Sequence[HostConfig] = (),
        *,
        secret: str | None = None,
        timeout: float = 7200,
        patience: float = PATIENCE,
        tasks_per_worker: int | None = None,
        on_event: EventHandler = lambda host, event: None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        sync: Sequence[Source] = (),
    ) -> None:
        self.initializer = initializer and Initializer.of(initializer, initargs)
        least = 1 if tasks_per_worker is None else tasks_per_worker
        if not isinstance(least, int) or least < 1:
            raise ConfigError(f"tasks_per_worker must be at least 1, not {tasks_per_worker!r}")
        if secret == "":
            raise ConfigError("secret: it is empty; leave it out for a random one")
        secret = secret if secret is not None else secrets.token_hex(32)
        self._patience = patience
        self.modules = Modules(sync)
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []
        # the present job of each future
        self._tasks: weakref.WeakKeyDictionary[AnyFuture, Task] = weakref.WeakKeyDictionary()
        self._closed = threading.Event()
        self._alone_since: float | None = None  # when the last worker was lost
        self._alarm = threading.Timer(0, _ignore)  # rings when that is too long ago
        call = execute.Call(execute.apply, initializer=self.initializer)
        self._call = replace(call, log_level=logging.getLogger().level)
        self._apply = serialize.dumps(self._call)
        self.server = ClientServer(ncpus, secret, on_event)
        self.server.tasks_per_worker = tasks_per_worker
        self.server.nesting.call = self._apply
        # Neither it nor its threads keep a forgotten executor alive.
        changed = weakref.WeakMethod(self._changed)
        self._supervisor = Supervisor(
            self.server,
            sources_of(hosts, secret, tasks_per_worker),
            timeout,
            on_event,
            lambda: (changed() or _ignore)(),
        )
        self.server.on_lost = self._supervisor.connection_lost
        self.server.on_useless = self._supervisor.give_up
        self.hosts = self._supervisor.statuses
        self._finalizer = weakref.finalize(
            self, _close, os.getpid(), self.server, self._supervisor
        )
        self._supervisor.start()

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        local = {LOCAL: self.server.get_ncpus()} if self.server.get_ncpus() else {}
        return local | {host.name: host.workers for host in self.hosts if host.state == "up"}

    @property
    def round_trip(self) -> float:
        """Seconds that a message to the farthest host and its answer take."""
        return max(self.server.round_trips.copy().values(), default=0.0)

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up.

        One that has failed for a reason that may pass, and is tried again, is not waited for;
        one that is queued is.
        """
        self._supervisor.wait(timeout)
        return all(host.state == "up" for host in self.hosts)

    def check(self) -> None:
        """Raise `ServersUnavailable` if nothing can run and no host is about to come (back).

        Raises RuntimeError after `shutdown`.
        """
        if self._closed.is_set():
            raise RuntimeError("the executor has been shut down")
        self._supervisor.wake()
        if not self._is_hopeless():
            return
        raise ServersUnavailable(tuple(host.error for host in self.hosts if host.error))

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Have `listener` called, from any thread, when `workers` changes; return the undoing.

        Who begins to listen has all the patience for lost hosts.
        """
        self._listeners.append(listener)
        if self._alone_since is not None:
            self._alone_since = None
            self._changed()
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
        return self.submit_with(None, fn, *args, **kwargs)

    def submit_with(
        self, blob: Blob | None, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Future[Any]:
        """Run a call for which `shared.shared` finds the object in a blob of `server.store`."""
        what = f"the call of {getattr(fn, '__qualname__', type(fn).__name__)}"
        item = execute.pack_value((serialize.Anew(), fn, args, kwargs), what)
        future = self._new_future()
        if self.modules and self.server.is_idle():
            self.modules.look()
        self._try(future, execute.pack_chunk([0], [item]), blob)
        return future

    def submit_chunk(
        self,
        call: bytes,
        chunk: bytes,
        blob: Blob | None = None,
        modules: Archive | None = None,
        is_short: bool = False,
    ) -> Future[ChunkOutcome | Lost]:
        """Run a chunk of a serialised `Call`; `execute.pack_chunk` makes the second message.

        A `blob`, of `server.store`, is on its host by then, and so are `modules`, by default
        those of the last look. If the future is cancelled before its turn comes, the chunk is not
        begun. A short one may wait at a far host while that does another one.
        """
        future = self._new_future()

        def settle(result: ChunkOutcome | Lost) -> None:
            with contextlib.suppress(InvalidStateError):  # cancelled
                future.set_result(result)

        self._insert(future, call, chunk, settle, blob, modules, is_short)
        return future

    def interrupt(self, futures: Iterable[AnyFuture] | None = None) -> None:
        """Give up what was submitted, queued or running, here and on hosts; workers stay.

        A task that runs gets KeyboardInterrupt; if its worker has not come back 2 seconds later,
        that is replaced. Does not wait for any of this. Futures of `submit` then raise
        CancelledError, unless the call has ended before.

        Parameters
        ----------
        futures
            Those of this executor to give up; ``None``: all.
        """
        with self._lock:
            wanted = list(self._tasks) if futures is None else futures
            tasks = {self._tasks[future] for future in wanted if future in self._tasks}
            for task in tasks:
                task.is_interrupted = True
        self.server.interrupt(tasks)

    def set_constant(self, name: str, value: Any) -> None:
        """Give all tasks a value by a name; raises TypeError if it has one, or SerializeError."""
        packed = serialize.pack(value, f"the constant {name}")
        self.server.nesting.set_constant(name, packed)

    def constant(self, name: str, timeout: float | None = None) -> Any:
        """Return a value by its name, waiting for it; raises KeyError after `timeout` seconds."""
        packed = self.server.nesting.constant(name, timeout)
        if packed is None:
            raise KeyError(name)
        return serialize.loads(packed)

    def flush(self) -> None:
        """Wait, a few seconds at most, until what workers have printed so far has arrived."""
        self._supervisor.ping()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End all workers and servers; nothing of ours remains on any host."""
        if wait and not cancel_futures:
            with self._lock:
                pending = list(self._tasks)
            concurrent.futures.wait(pending)
        self._closed.set()
        closing = threading.Thread(target=self._finalizer, name="closing")
        try:
            closing.start()
        except RuntimeError:  # at the exit of the interpreter there are no threads to be had
            self._finalizer()
        else:
            closing.join()  # Ctrl-C ends the waiting, not the closing
        self._alarm.cancel()

    def _new_future(self) -> Future[Any]:
        interrupt = weakref.WeakMethod(self.interrupt)
        future: Future[Any] = Future(lambda futures: (interrupt() or _ignore)(futures))
        future.add_done_callback(_tell_cancelled)
        return future

    def _insert(
        self,
        future: Future[Any],
        call: bytes,
        chunk: bytes,
        settle: Callable[[ChunkOutcome | Lost], None],
        blob: Blob | None = None,
        modules: Archive | None = None,
        is_short: bool = False,
    ) -> None:
        """Queue a job on behalf of a future."""

        def deliver(message: bytes) -> None:
            result: ChunkOutcome | Lost
            try:
                result = execute.unpack_result(message)
            except Exception as exc:
                result = Lost("", 0, f"its answer cannot be read: {exc}", by_worker=True)
            if isinstance(result, ChunkOutcome):
                result.host = task.host or LOCAL
            else:
                result = replace(result, host=task.host or LOCAL)
            settle(result)

        self.check()
        modules = modules or self.modules.archive
        task = Task(self.server, deliver, blob, future.begin, modules, is_short)
        with self._lock:
            before = self._tasks.get(future)
            task.is_interrupted = before is not None and before.is_interrupted
            self._tasks[future] = task
        self.server.insert(call, chunk, task)
        self._supervisor.wake()  # the last hosts may just have gone
        if self._is_hopeless():
            self.server.drop_waiting("no worker is left")

    def _try(
        self,
        future: Future[Any],
        chunk: bytes,
        blob: Blob | None,
        lost: int = 0,
        blameless: int = 0,
    ) -> None:
        """Run a call that was lost so many times, by its own fault and by that of others."""
        call = self._apply
        if blob is not None:
            call = serialize.dumps(replace(self._call, shared=Stored(blob.digest)))

        def settle(result: ChunkOutcome | Lost) -> None:
            if isinstance(result, ChunkOutcome) and not result.answers:
                result = Lost(result.host, result.pid, "it was interrupted")
            try:
                if future.cancelled():
                    return
                if isinstance(result, ChunkOutcome):
                    _settle(future, result)
                elif self._tasks[future].is_interrupted:
                    _cancel(future)
                elif self._closed.is_set() or lost == LOST_RETRIES or blameless == HOST_RETRIES:
                    future.set_exception(WorkerLost(0, result.host, result.reason))
                else:
                    by_it = result.by_worker
                    self._try(future, chunk, blob, lost + by_it, blameless + (not by_it))
            except BaseException as exc:  # user code
                with contextlib.suppress(InvalidStateError):
                    future.set_exception(exc)

        self._insert(future, call, chunk, settle, blob)

    def _is_hopeless(self) -> bool:
        """Return whether there is no worker and none is about to come (back)."""
        if self.workers or self._supervisor.has("starting", "queued", "resting"):
            return False
        since = self._alone_since  # not known yet: a host is being lost right now
        patient = since is None or time.monotonic() - since < self._patience
        return not (patient and self._supervisor.has("lost"))

    def _changed(self) -> None:
        """Take notice of a host that comes or goes."""
        with self._lock:
            alone = not self.workers
            if alone and self._alone_since is None and self._supervisor.has("lost"):
                self._alone_since = time.monotonic()
                this = weakref.WeakMethod(self._changed)
                self._alarm = threading.Timer(self._patience, lambda: (this() or _ignore)())
                self._alarm.daemon = True
                self._alarm.start()
            elif not alone:
                self._alone_since = None
                self._alarm.cancel()
        if self._is_hopeless():
            self.server.drop_waiting("no worker is left")
        for listener in list(self._listeners):
            listener()


def _ignore(*what: object) -> None:
    """Do nothing."""


def _tell_cancelled(future: AnyFuture) -> None:
    """Wake who waits for a future that was cancelled: `Future.cancel` itself does not."""
    if future.cancelled():
        future.set_running_or_notify_cancel()


def _cancel(future: Future[Any]) -> None:
    if not future.cancel():  # it counts as running
        future.set_exception(CancelledError())


def _settle(future: Future[Any], result: ChunkOutcome) -> None:
    packed = result.answers[0]
    if not result.failed:
        future.set_result(execute.unpack_value(packed))
        return
    error, text = execute.unpack_error(packed)
    assert error is not None  # such calls have no time limit
    error.__cause__ = RemoteTraceback(f"on {result.host}, process {result.pid}:\n{text}")
    future.set_exception(error)


def _close(pid: int, server: ClientServer, supervisor: Supervisor) -> None:
    """Close what an executor owns; a function, so that a forgotten executor can be collected."""
    if os.getpid() != pid:  # a fork that exits: nothing of this is its own
        return
    supervisor.hang_up()
    server.destroy()
    supervisor.close()
