"""The engine: local workers, and the servers of hosts as they come and go."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, InvalidStateError
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from ostap_parallel.config import HostConfig
from ostap_parallel.engine.backend import (
    Abilities,
    Backend,
    Place,
    Result,
    Submit,
    pack_laden,
    read_result,
    settle,
)
from ostap_parallel.engine.core import LOCAL, SHUT_DOWN, Core, check_open, let_daemons_go
from ostap_parallel.engine.fitness import Fitness
from ostap_parallel.engine.future import Future, weak
from ostap_parallel.engine.greetings import Greetings
from ostap_parallel.engine.retries import Attempts, Limits
from ostap_parallel.errors import ConfigError, SerializeError, ServersUnavailable
from ostap_parallel.lending.lender import Lender
from ostap_parallel.machine.handle import Handle
from ostap_parallel.machine.jobs import Job
from ostap_parallel.objects import serialize, settings
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.supply.sources import sources_of
from ostap_parallel.supply.supervisor import EventHandler, Supervisor
from ostap_parallel.supply.syncing import Archive, Modules, Source
from ostap_parallel.supply.ways import LOOPBACK
from ostap_parallel.worker.chunk import INTERRUPTED, ChunkOutcome, Lost, pack_call
from ostap_parallel.worker.execute import Call, apply
from ostap_parallel.worker.initializer import Initializer
from ostap_parallel.worker.shared import SMALL, Blob, Inline, Packed, Stored

# Seconds that work waits for lost hosts when no worker is left.
PATIENCE = 60.0


AnyFuture = concurrent.futures.Future[Any]


class Engine(Backend):
    """Local workers and servers on hosts.

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
    preload, fresh
        Modules that what starts local workers imports for them; whether they are new interpreters
        all the same. Hosts have their own.

    Attributes
    ----------
    hosts
        The state of each host, in their order.
    modules
        The user's modules; who begins a run looks at them.
    """

    abilities = Abilities(interrupt=True, time_limit=True, nesting=True)

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
        preload: Sequence[str] = (),
        fresh: bool = False,
    ) -> None:
        initargs, large = tuple(initargs), dict[str, Any]()
        _check(secret, tasks_per_worker)
        self._loans = Lender()
        with self._loans.lending():
            self._initializer = initializer and Initializer.of(initializer, initargs, large)
        self._secret = secret if secret is not None else secrets.token_hex(32)
        self.patience = patience
        self._tasks_per_worker = tasks_per_worker
        self.modules = Modules(sync)
        self._lock = threading.RLock()  # a signal's handler may come in between
        self._listeners: list[Callable[[], None]] = []
        # the present job of each future
        self._jobs: weakref.WeakKeyDictionary[AnyFuture, Job] = weakref.WeakKeyDictionary()
        self._fitness = Fitness()
        self._movable: weakref.WeakSet[Job] = weakref.WeakSet()  # calls that are pinned to hosts
        self._closed = threading.Event()
        self._alone_since: float | None = None  # when the last worker was lost
        self._interrupt = weak(self.give_up)
        self._alarm = threading.Timer(0, self._interrupt)  # rings when that is too long ago
        self._call = Call(apply, initializer=self._initializer, log_level=_log_level())
        self._apply = serialize.dumps(self._call)
        self.greetings = Greetings(self._apply, self.modules, initargs) if initializer else None
        how: Any = {"preload": preload, "fresh": fresh, "greetings": self.greetings}
        self._core = Core(ncpus, on_event, tasks_per_worker=tasks_per_worker, **how)
        self._core.nesting.call = self._apply
        for item in large.items():
            self.set_constant(*item)
        sources = sources_of(hosts, self._secret, tasks_per_worker)
        self._supervisor = Supervisor(self._core, sources, timeout, on_event, weak(self._changed))
        self._core.answer_to(self._supervisor)
        self.hosts: list[HostStatus] = self._supervisor.statuses
        owned = self._core, self._supervisor, self._loans
        self._finalizer = weakref.finalize(self, _close, os.getpid(), *owned)
        self._supervisor.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an executor stays in its process: use ostap_parallel.futures in tasks")

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        local = {LOCAL: self.ncpus} if self.ncpus else {}
        up = {host.name: host.workers for host in self.hosts if host.state == "up"}
        # a server may have had to go on with fewer
        counts = {link.label: link.count() for link in self._core.links()} if up else {}
        found = local | {name: counts.get(name, count) for name, count in up.items()}
        return self._core.limited(found)

    @property
    def ncpus(self) -> int:
        """Number of local workers."""
        return self._core.ncpus

    def set_ncpus(self, ncpus: int | str) -> None:
        """Have so many local workers from now on; nothing once this is closed."""
        if not self._closed.is_set():
            self._core.set_ncpus(ncpus)

    def processes(self) -> list[Handle]:
        """Return the processes of the local workers."""
        return self._core.processes()

    @property
    def round_trip(self) -> float:  # type: ignore[override]
        """Seconds that a message to the farthest host and its answer take."""
        return self._core.round_trip()

    def window(self) -> int:
        """Return how many chunks should be under way now: about two per worker."""
        self.check()
        return 2 * sum(self.workers.values())

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up.

        One that has failed for a reason that may pass, and is tried again, is not waited for;
        one that is queued is.
        """
        self._supervisor.wait(timeout)
        return all(host.state == "up" for host in self.hosts)

    def add_hosts(
        self, hosts: Iterable[HostConfig], secret: str | None = None
    ) -> list[HostStatus]:
        """Start servers on more hosts, without waiting; they join what is going on.

        `secret` is that of existing servers. Raises `ConfigError` if one of them is there.
        """
        check_open(self._closed, self._finalizer)
        known = secret if secret is not None else self._secret
        sources = sources_of(hosts, known, self._tasks_per_worker)
        labels = {host.name for host in self.hosts}
        for source in sources:
            if source.label in labels:
                raise ConfigError(f"{source.label} is among the hosts already")
        return [self._supervisor.add(source) for source in sources]

    def drop_host(self, name: str) -> None:
        """End the server on a host and do without it: what it was doing is done by others.

        Raises KeyError if there is no such host.
        """
        self._supervisor.remove(name)

    def limit_host(self, name: str, count: int | None) -> None:
        """Have a host, or ``"local"``, do so many jobs at once at most."""
        self._core.limit(name, count)
        self._changed()

    def check(self) -> None:
        """Raise `ServersUnavailable` if nothing can run and no host is about to come (back).

        Raises RuntimeError after `close`.
        """
        check_open(self._closed, self._finalizer)
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

    def hear(self, name: str, hearer: Callable[[Any], object] | None) -> bool:
        """Have `hearer` called with what tasks tell to a name; see `Backend.hear`."""
        self._core.nesting.hear(name, hearer)
        return True

    def open(self, call: Call) -> Submit:
        """Pack a call for workers, and see to it that they find what it needs."""
        shared = None
        if call.shared is not None:
            where, shared = self._share(Packed(call.shared))
            call = replace(call, shared=where)
        call = replace(call, initializer=self._initializer)
        with self._loans.lending():
            function, arrays = pack_laden(call, self._core.store)
        blobs = [blob for blob in (shared, arrays) if blob is not None]
        modules = self.modules.look()
        self._core.look()

        def submit(
            chunk: bytes, *, is_short: bool = False, hosts: frozenset[str] | None = None
        ) -> Future[Result]:
            future = self._new_future()

            def take(result: Result) -> None:
                with contextlib.suppress(InvalidStateError):  # cancelled
                    future.set_result(result)

            self._insert(future, function, chunk, take, blobs, modules, is_short, hosts)
            return future

        return submit

    def call(
        self,
        function: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] = {},
        shared: Any = None,
    ) -> Future[Any]:
        """Run one call; see `Backend.call`."""
        now = settings.pack()
        with self._loans.lending():
            chunk = pack_call(function, args, kwargs, b"" if now == self._call.settings else now)
        future = self._new_future()
        if self.modules and self._core.is_idle():
            self.modules.look()
        self._try(future, chunk, shared, Attempts())
        return future

    def _share(self, packed: Packed) -> tuple[Inline | Stored, Blob | None]:
        """Return where workers find a shared object, and the blob, if it is in one."""
        if packed.size <= SMALL:
            return Inline(b"".join(packed)), None
        try:
            blob = self._core.store.add(packed)
        except OSError as exc:
            raise SerializeError("the shared object", f"{exc.strerror}; set TMPDIR") from exc
        return Stored(blob.digest), blob

    def share(self, value: Any) -> Any:
        """Return a handle of something large, which hosts get once; ``None``: there is no room."""
        try:
            return self._core.store.add(Packed(value))
        except OSError:
            return None

    def give_up(self, futures: Iterable[AnyFuture] | None = None) -> None:
        """Give up what was submitted, queued or running, here and on hosts; workers stay.

        A task that runs gets KeyboardInterrupt; if its worker has not come back 2 seconds later,
        that is replaced. Does not wait for any of this. Futures of `call` then raise
        CancelledError, unless the call has ended before.
        """
        if self._core.is_of_fork():
            return
        with self._lock:
            wanted = list(self._jobs) if futures is None else futures
            jobs = {self._jobs[future] for future in wanted if future in self._jobs}
            for job in jobs:
                job.is_interrupted = True
        self._core.interrupt(jobs)

    def places(self, futures: Iterable[AnyFuture], wait: float = 0.0) -> dict[AnyFuture, Place]:
        """Return where chunks run; see `Backend.places`."""
        now = time.monotonic()
        found: dict[AnyFuture, Place] = {}
        with self._lock:
            jobs = {future: self._jobs[future] for future in futures if future in self._jobs}
        unknown = threading.Semaphore(0)
        asked = 0
        with self._core.loop.lock:
            for future, job in jobs.items():
                if job.state == "running" and job.machine is not None:
                    place = found[future] = Place(job.label, now - job.begun)
                    if wait:
                        job.machine.place(job, partial(place.complete, unknown))
                        asked += 1
        end = now + wait
        while asked and unknown.acquire(timeout=max(0.0, end - time.monotonic())):
            asked -= 1
        return found

    def set_constant(self, name: str, value: Any) -> None:
        """Give all tasks a value by a name; raises TypeError if it has one, or SerializeError."""
        packed = serialize.pack(value, f"the constant {name}")
        self._core.set_constant(name, packed)

    def constant(self, name: str, timeout: float | None = None) -> Any:
        """Return a value by its name, waiting for it; raises KeyError after `timeout` seconds."""
        packed = self._core.nesting.constant(name, timeout)
        if packed is None:
            raise KeyError(name)
        return serialize.loads(packed)

    def forward(self, label: str, port: int, to: str = LOOPBACK) -> int:
        """Return a port here that leads to a port of a host's loopback; raises HostError.

        With `to` it leads to that machine, as the host sees it.
        """
        return self._supervisor.server(label).forward(port, to)

    def withdraw(self, label: str, port: int) -> None:
        """Have a port here lead nowhere that `forward` has returned."""
        self._supervisor.server(label).withdraw(port)

    def backward(self, label: str, port: int) -> int:
        """Return a port of a host's loopback that leads to a port here; raises HostError."""
        return self._supervisor.server(label).backward(port)

    def flush(self) -> None:
        """Wait, a few seconds at most, until what workers have printed so far has arrived."""
        self._supervisor.ping()

    def close(self) -> None:
        """End all workers and servers at once; nothing of ours remains on any host."""
        self._closed.set()
        closing = threading.Thread(target=self._finalizer, name="closing")
        try:
            closing.start()
        except RuntimeError:  # at the exit of the interpreter there are no threads to be had
            self._finalizer()
        else:
            if not self._core.is_inside():  # which is to end, too
                closing.join()  # Ctrl-C ends the waiting, not the closing
        self._alarm.cancel()

    def _new_future(self) -> Future[Any]:
        return Future(self._interrupt)

    def _insert(
        self,
        future: Future[Any],
        call: bytes,
        chunk: bytes,
        take: Callable[[Result], None],
        blobs: Sequence[Blob] = (),
        modules: Archive | None = None,
        is_short: bool = False,
        hosts: frozenset[str] | None = None,
    ) -> None:
        """Queue a job on behalf of a future."""

        def deliver(message: bytes) -> None:
            core.hand_on_output()  # what it has printed comes before its result
            take(read_result(message, job.label or LOCAL))

        self.check()
        core, loop = self._core, self._core.loop
        job = Job(
            call,
            chunk,
            lambda message: loop.deliver(lambda: deliver(message)),
            is_wanted=future.begin,
            ask=self._core.nesting.ask,
            blobs=blobs,
            modules=modules or self.modules.archive,
            hosts=hosts,
            is_short=is_short,
        )
        with self._lock:
            before = self._jobs.get(future)
            job.is_interrupted = before is not None and before.is_interrupted
            self._jobs[future] = job
        self._core.add(job)
        if hosts is not None:
            self._give_up_pinned()
        if not self.ncpus:
            self._supervisor.wake()  # the last hosts may just have gone
            if self._is_hopeless():
                self._core.give_up_waiting("no worker is left")

    def _try(
        self,
        future: Future[Any],
        chunk: bytes,
        blob: Blob | None,
        attempts: Attempts,
        tried: frozenset[str] = frozenset(),
    ) -> None:
        """Run a call that was lost so often; on `tried` hosts workers could not be prepared."""
        call = self._apply
        if blob is not None:
            call = serialize.dumps(replace(self._call, shared=Stored(blob.digest)))

        def take(result: Result) -> None:
            if isinstance(result, ChunkOutcome) and not result.answers:
                result = Lost(result.host, result.pid, INTERRUPTED)
            if future.cancelled():
                return
            if isinstance(result, Lost) and self._jobs[future].is_interrupted:
                _cancel(future)
                return
            if isinstance(result, Lost) and self._core.is_closed:
                result = replace(result, reason=SHUT_DOWN)
            if isinstance(result, ChunkOutcome) and self._fitness.count(result):
                failed = tried | {result.host}
                if not self._closed.is_set() and self.workers.keys() - failed:
                    self._try(future, chunk, blob, attempts, failed)
                    return
            attempts.count(result)
            is_over = self._core.is_closed or not attempts.may_go_on(Limits())
            again = None if is_over else lambda: self._try(future, chunk, blob, attempts, tried)
            settle(future, result, again)

        places = self._fitness.places(self.workers, tried) if tried or self._fitness else None
        self._insert(future, call, chunk, take, [blob] if blob else (), hosts=places)
        if places is not None:
            self._movable.add(self._jobs[future])
            if places.isdisjoint(self.workers):  # they have just gone
                self._free_stranded()

    def _free_stranded(self) -> None:
        """Run calls elsewhere that wait for hosts that have gone."""
        workers, core = self.workers, self._core
        for job in list(self._movable):
            with core.loop.lock:
                if job.hosts and job.hosts.isdisjoint(workers) and core.queue.take(job):
                    core.queue.give_up(job, "its hosts have gone")

    def _is_hopeless(self) -> bool:
        """Return whether there is no worker and none is about to come (back)."""
        if self.ncpus or self.workers or self._supervisor.has("starting", "queued", "resting"):
            return False
        since = self._alone_since  # not known yet: a host is being lost right now
        patient = since is None or time.monotonic() - since < self.patience
        return not (patient and self._supervisor.has("lost"))

    def _give_up_pinned(self) -> None:
        """Give up what must run on hosts that do not come any more."""
        names = {host.name for host in self.hosts if host.state not in ("failed", "closed")}
        if self.ncpus:
            names.add(LOCAL)
        with self._core.loop.lock:
            self._core.queue.give_up_pinned(names)

    def _changed(self) -> None:
        """Take notice of a host that comes or goes."""
        with self._lock:
            alone = not self.workers
            if alone and self._alone_since is None and self._supervisor.has("lost"):
                self._alone_since = time.monotonic()
                self._alarm = threading.Timer(self.patience, weak(self._changed))
                self._alarm.daemon = True
                self._alarm.start()
            elif not alone:
                self._alone_since = None
                self._alarm.cancel()
        if self._is_hopeless():
            self._core.give_up_waiting("no worker is left")
        elif self._movable:
            self._free_stranded()
        self._give_up_pinned()
        for listener in list(self._listeners):
            listener()


def _check(secret: str | None, tasks_per_worker: Any) -> None:
    least = 1 if tasks_per_worker is None else tasks_per_worker
    if not isinstance(least, int) or least < 1:
        raise ConfigError(f"tasks_per_worker must be at least 1, not {tasks_per_worker!r}")
    if secret == "":
        raise ConfigError("secret: it is empty; leave it out for a random one")


def _log_level() -> int:
    return logging.getLogger().level


def _cancel(future: Future[Any]) -> None:
    if not future.cancel():  # it counts as running
        future.set_exception(CancelledError())


def _close(pid: int, core: Core, supervisor: Supervisor, loans: Lender) -> None:
    """Close what an executor owns; a function, so that a forgotten executor can be collected."""
    if os.getpid() != pid:  # a fork that exits: nothing of this is its own
        return
    let_daemons_go()
    with contextlib.ExitStack() as closing:  # each, from the last, whatever becomes of the others
        for step in supervisor.close, core.close, loans.close, supervisor.hang_up:
            closing.callback(step)
