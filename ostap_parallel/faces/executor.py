"""Executor: a `concurrent.futures.Executor` on local cores and on hosts reached by ssh."""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import multiprocessing
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ostap_parallel.config import Settings as HostSettings
from ostap_parallel.config import check_arguments, find_secret, load_settings, local_settings
from ostap_parallel.config.load import HostArguments
from ostap_parallel.engine.core import LOCAL
from ostap_parallel.engine.engine import PATIENCE, Engine
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.engine.future import Future
from ostap_parallel.errors import ConfigError, InitializerError, SerializeError
from ostap_parallel.faces import launch
from ostap_parallel.logs import logger_of
from ostap_parallel.runs.calls import Calls
from ostap_parallel.runs.checks import check_callable
from ostap_parallel.runs.display import HostList, title_of
from ostap_parallel.runs.report import relay
from ostap_parallel.runs.run import PAUSE, Run
from ostap_parallel.runs.snapshot import told
from ostap_parallel.runs.stream import Stream, ending_at_exit
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.supply.supervisor import EventHandler
from ostap_parallel.supply.syncing import Sync, find_sources
from ostap_parallel.worker import calls, standin
from ostap_parallel.worker.execute import Call
from ostap_parallel.worker.tasks import each_anew

if TYPE_CHECKING:
    from typing_extensions import Unpack


logger = logger_of(__name__)


class Settings(HostArguments, total=False):
    """What `Executor` takes by name for its workers and hosts; other faces pass it on."""

    config: Iterable[Path | str] | Path | str | None
    secret: str | None
    idle_timeout: float
    timeout: float | None
    patience: float
    sync: Sync | Iterable[Sync] | None
    tasks_per_worker: int | None


class _Arguments(HostArguments, total=False):
    max_workers: int | None
    max_tasks_per_child: int | None
    mp_context: Any


class Executor(concurrent.futures.Executor):
    """Local workers and hosts reached by ssh, made from arguments and configuration.

    Parameters
    ----------
    ncpus, servers
        Local workers and hosts, as of `WorkManager`, and so are the other settings.
    initializer, initargs
        ``initializer(*initargs)`` is called in each worker process before its first task.
    max_workers, max_tasks_per_child, mp_context
        As of `ProcessPoolExecutor`: other names of `ncpus` and `tasks_per_worker`; the last has
        no effect, and a warning says so.
    on_event
        Receives what workers print and log, see `report.relay`, in place of that.

    Attributes
    ----------
    backend
        The engine that does the work.

    Raises
    ------
    ConfigError
        A setting is missing or malformed; no host has been contacted.
    """

    def __init__(
        self,
        ncpus: int | str = "autodetect",
        servers: str | int | Iterable[str | int] = (),
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        config: Iterable[Path | str] | Path | str | None = None,
        secret: str | None = None,
        idle_timeout: float = 7200,
        timeout: float | None = None,
        patience: float = PATIENCE,
        sync: Sync | Iterable[Sync] | None = None,
        tasks_per_worker: int | None = None,
        on_event: EventHandler = relay,
        **settings: Unpack[_Arguments],
    ) -> None:
        ncpus, tasks_per_worker = _take_standard(settings, ncpus, tasks_per_worker)
        idle_timeout = _idle_timeout(idle_timeout, timeout)
        _check(ncpus, idle_timeout, patience, secret)
        _check_all(initializer, initargs, on_event, settings)
        launched = launch.for_program(ncpus, servers)
        if launched is not None:
            ncpus, servers = launched.ncpus, launched.servers
            initializer, initargs = launched.prepared(initializer, initargs)
            on_event = launched.hearing(on_event)
            config, sync = launched.filled(config, sync)
            settings = {**launched.settings, **settings}  # type: ignore[typeddict-item]
        self._load = partial(_load, config=config, **settings)
        self._secret = secret
        # without servers the configuration, right or wrong, does not matter
        found = HostSettings() if servers == () else self._load(servers)
        local = local_settings(found, preload=settings.get("preload"), start=settings.get("start"))
        self._note(initializer is not None)
        self.backend = Engine(
            ncpus,
            found.hosts,
            secret=secret if secret is not None else find_secret(found.hosts),
            timeout=idle_timeout,
            patience=patience,
            tasks_per_worker=tasks_per_worker,
            on_event=on_event,
            initializer=initializer,
            initargs=initargs,
            sync=find_sources(found.sync if sync is None else sync),
            preload=local.preload,
            fresh=local.start == "spawn",
        )
        if launched is not None:
            launched.add(self)

    def _note(self, watches_initializer: bool) -> None:
        self._is_open = True
        # Until the interpreter ends, by which all ends: who is deleted even later finds nothing
        # any more of what is named in this module.
        self._lives = weakref.finalize(self, _nothing)
        self._broken: InitializerError | None = None
        self._watches_initializer = watches_initializer
        self._lock = threading.Lock()

    @cached_property
    def _told(self) -> Calls:
        return Calls(self.backend, "calls of an Executor")

    @property
    def hosts(self) -> list[HostStatus]:
        """The state of each host, in their order."""
        return HostList(self.backend.hosts)

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        return self.backend.workers

    @property
    def _max_workers(self) -> int:
        """The number of workers, which many programs ask for."""
        return sum(self.workers.values())

    @property
    def num_workers(self) -> int:
        """The number of workers that are up; 0 of an executor that takes no calls."""
        return self._max_workers if self._is_open and self._broken is None else 0

    def bootup(self, wait: bool = True) -> Executor:
        """Return this; with `wait` when each host is up or has failed.

        Raises
        ------
        RuntimeError
            The executor has been shut down.
        """
        self._check_open()
        if wait:
            self.wait_for_hosts()
        return self

    @property
    def _processes(self) -> dict[int, Any]:
        """The local workers by process id, for programs that look after them."""
        return {process.pid: process for process in self.backend.processes()}

    @property
    def _pending_work_items(self) -> dict[int, Any]:
        """The calls that have not ended by number, for programs that count them."""
        pending = self._told.pending()
        return {number: future for future, (number, _) in pending.items()}

    def add_hosts(self, servers: str | int | Iterable[str | int]) -> list[HostStatus]:
        """Start servers on more hosts, without waiting: they join what is going on.

        The settings that this was made with hold for them, too. Returns their states.

        Raises
        ------
        ConfigError
            A setting is malformed, or one of the hosts is among those that there are.
        """
        found = self._load(servers)
        return self.backend.add_hosts(found.hosts, self._secret or find_secret(found.hosts))

    def drop_host(self, name: str) -> None:
        """End the server on a host and do without it: what it was doing is done by others.

        Raises
        ------
        ValueError
            There is no such host.
        """
        self._check_host(name)
        self.backend.drop_host(name)

    def _check_host(self, name: str) -> None:
        known = [host.name for host in self.hosts]
        if name not in known:
            raise ValueError(f"there is no host {name!r}: known are {', '.join(known) or 'none'}")

    def limit_host(self, name: str, count: int | None) -> None:
        """Use so many workers of a host, or of ``"local"``, at most from now on.

        What runs there is not ended. ``None``: all of them again.

        Raises
        ------
        ValueError
            There is no such host, or `count` is no number from 1 on.
        """
        if count is not None and (not isinstance(count, Integral) or count < 1):
            raise ValueError(f"count must be a number from 1 on, or None, not {count!r}")
        if name != LOCAL:
            self._check_host(name)
        self.backend.limit_host(name, None if count is None else int(count))

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up."""
        return self.backend.wait_for_hosts(timeout)

    def interrupt(self, futures: Iterable[concurrent.futures.Future[Any]] | None = None) -> None:
        """Give up what was submitted, all by default, queued or running; see `Engine.give_up`."""
        self.backend.give_up(futures)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or issubclass(kind, Exception):
            self.shutdown()
        else:  # Ctrl-C, for example: nobody wants to wait now
            self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an executor stays in its process: use ostap_parallel.futures in tasks")

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run a call on any worker; that it cannot be sent is the error of its future.

        Raises
        ------
        BrokenExecutor
            No worker is left and none is about to come; or the initializer has failed.
        RuntimeError
            The executor has been shut down.
        """
        self._check_open()
        try:
            future = self.backend.call(fn, args, kwargs)
        except SerializeError as exc:
            failed: Future[Any] = Future(lambda futures: None)
            failed.set_exception(exc)
            return failed
        with self._lock:
            told = self._told
        told.add(future, fn)
        if self._watches_initializer:
            future.add_done_callback(self._notice)
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        unordered: bool = False,
    ) -> Iterator[Any]:
        """Yield the results of ``fn(*args)`` for all ``args`` in ``zip(*iterables)``, in order.

        Parameters
        ----------
        timeout
            Seconds from now on after which to wait for a result raises TimeoutError.
        chunksize
            Calls that are sent together; 1 leaves that to the dispatcher.
        buffersize
            So many results at most are under way or not yet taken; the iterables are read as
            results are. Without it they are read now. Each chunk is submitted by itself.
        unordered
            As they come, in place of in order; not with `buffersize`.

        Raises
        ------
        BrokenExecutor, RuntimeError
            As `submit` does.
        """
        _check_sizes(chunksize, buffersize, unordered)
        self._check_open()
        end = None if timeout is None else time.monotonic() + timeout
        if buffersize is None:
            return run_all(self, fn, iterables, end, chunksize, not unordered)
        feed = _Feed(zip(*iterables, strict=False), chunksize, buffersize)
        function = partial(calls.spread, each_anew(fn) if chunksize == 1 else fn)
        return _run(self, function, feed, end, chunksize, title_of(fn), feed=feed)

    def starmap(
        self,
        fn: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        unordered: bool = False,
    ) -> Iterator[Any]:
        """Yield the results of ``fn(*args)`` for all ``args`` in an iterable; see `map`."""
        return self.map(
            partial(calls.spread, fn),
            iterable,
            timeout=timeout,
            chunksize=chunksize,
            buffersize=buffersize,
            unordered=unordered,
        )

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls, and end workers and servers when those that there are have ended.

        Parameters
        ----------
        wait
            Wait until then; Ctrl-C ends all at once. Otherwise the interpreter waits at its end.
        cancel_futures
            Cancel what has not begun; a `map` is stopped.
        """
        self._is_open = False
        if not self._lives.alive:
            return
        if cancel_futures:
            for run in list(_runs_of(self).values()):
                run.cancel()
            for future in self._told.pending():
                future.cancel()
        if wait:
            self._end()
        else:
            threading.Thread(target=self._end, name="shutdown").start()

    def close(self) -> None:
        """End all workers and servers at once, whatever they do."""
        self._is_open = False
        if self._lives.alive:
            self._told.close()
            self.backend.close()

    # As in Python 3.14; workers have nothing that a milder signal would let them end.
    terminate_workers = kill_workers = close

    def _end(self) -> None:
        try:
            concurrent.futures.wait([*_runs_of(self), *self._told.pending()])
        finally:
            self.close()

    def _check_open(self) -> None:
        if not self._is_open:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._broken is not None:
            raise self._broken
        self.backend.check()

    def _notice(self, future: concurrent.futures.Future[Any]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, InitializerError):
            self._broken = error


standin.register(Executor, is_lazy=True)


# Of any executor, by what tells that they have ended.
_runs: weakref.WeakKeyDictionary[Any, dict[concurrent.futures.Future[None], Run]]
_runs = weakref.WeakKeyDictionary()


def _runs_of(executor: Any) -> dict[concurrent.futures.Future[None], Run]:
    return _runs.setdefault(executor, {})


class _Feed:
    """The input of a `map` with a buffer: one chunk more for each that is taken.

    The iterable is read by who takes results.
    """

    def __init__(self, items: Iterator[Any], chunksize: int, buffersize: int) -> None:
        self.wake: Callable[[], None] = lambda: None
        self._items, self._chunksize = items, chunksize
        self._taken = 0
        self._held: deque[Any] = deque()
        self._is_read = False
        self._read(chunksize * buffersize)

    def __iter__(self) -> Iterator[Any]:
        while True:
            is_read = self._is_read  # first: the other thread sets it last
            if self._held:
                yield self._held.popleft()
            elif is_read:
                return
            else:
                yield PAUSE

    def take(self) -> None:
        """Count a result as taken."""
        if self._taken % self._chunksize == 0:
            self._read(self._chunksize)
        self._taken += 1

    def _read(self, count: int) -> None:
        items = list(itertools.islice(self._items, count))
        self._held.extend(items)
        self._is_read = len(items) < count
        self.wake()


def run_all(
    executor: Any,
    fn: Callable[..., Any],
    iterables: Sequence[Iterable[Any]],
    end: float | None = None,
    chunksize: int = 1,
    ordered: bool = True,
) -> Iterator[Any]:
    """Yield the results of ``fn(*args)`` on any executor, in order or as they come.

    The iterables are read now, and work goes on by itself. `end` is a time of
    ``time.monotonic``, from which on to wait raises TimeoutError. See `Executor.map`.
    """
    items = list(zip(*iterables, strict=False)) if iterables[1:] else list(*iterables)
    title = title_of(fn)
    fn = each_anew(fn) if chunksize == 1 else fn
    function = partial(calls.spread, fn) if iterables[1:] else fn
    size = None if chunksize == 1 else chunksize
    return _run(executor, function, items, end, size, title, ordered)


def _run(
    executor: Any,
    function: Callable[..., Any],
    items: Iterable[Any],
    end: float | None,
    chunksize: int | None,
    title: str,
    ordered: bool = True,
    feed: _Feed | None = None,
) -> Iterator[Any]:
    call = Call(function, log_level=logging.getLogger().level, goes_on=True)
    run = Run(backend_of(executor), call, items, chunksize, ordered=ordered)
    with suppress(Exception):  # which the run raises
        _ = run.submit
    take = _nothing
    if feed is not None:
        feed.wake, take = run.wake, feed.take
    stream = Stream(told(run, title), run.cancel, executor)
    stream.unlimit()
    runs = _runs_of(executor)
    runs[stream.ended] = run
    stream.ended.add_done_callback(runs.pop)
    return _results(stream, end, take)


def _nothing() -> None:
    """Do nothing."""


@ending_at_exit
def _results(
    stream: Stream, end: float | None, take: Callable[[], None]
) -> Generator[Any, None, None]:
    """Yield the results of a stream; who stops before its end cancels the rest."""
    try:
        while True:
            yield _next(stream, end, take)  # which is kept nowhere here
    except (StopIteration, GeneratorExit):
        return
    except multiprocessing.TimeoutError:
        if end is None or time.monotonic() < end:  # it is a task's
            raise
        raise concurrent.futures.TimeoutError from None
    finally:
        stream.cancel()


def _next(stream: Stream, end: float | None, take: Callable[[], None]) -> Any:
    value = stream.next(None if end is None else max(0.0, end - time.monotonic()))
    take()
    return value


def _take_standard(
    settings: Any, ncpus: int | str, tasks_per_worker: int | None
) -> tuple[int | str, int | None]:
    """Take what `ProcessPoolExecutor` calls otherwise out of settings; return what it means.

    Raises TypeError for what is no setting.
    """
    if settings.pop("mp_context", None) is not None:
        text = "mp_context= has no effect: the workers are our own, see start= for how they start"
        warnings.warn(text, stacklevel=3)
    workers, tasks = settings.pop("max_workers", None), settings.pop("max_tasks_per_child", None)
    for name, value in ("max_workers", workers), ("max_tasks_per_child", tasks):
        if not isinstance(value, Integral | None):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
    if workers is not None:
        if ncpus not in ("autodetect", workers):
            raise TypeError("max_workers and ncpus are the same: give one of them")
        if workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        ncpus = workers
    if unknown := sorted(settings.keys() - HostArguments.__annotations__.keys()):
        raise TypeError(f"there is no setting {', '.join(unknown)}")
    tasks = tasks_per_worker if tasks is None else tasks
    if isinstance(tasks, bool):
        raise ConfigError(f"tasks_per_worker must be a number from 1 on, not {tasks}")
    return ncpus, int(tasks) if isinstance(tasks, Integral) else tasks


def _check_sizes(chunksize: int, buffersize: int | None, unordered: bool) -> None:
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if not isinstance(buffersize, int | None):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    if buffersize is not None and unordered:
        raise ValueError("buffersize bounds results in their order: not with unordered")


def _idle_timeout(idle_timeout: float, timeout: float | None) -> float:
    if timeout is None:
        return idle_timeout
    logger.warning("timeout= of a manager or executor is called idle_timeout= now")  # once it was
    return timeout


def _load(servers: Any, **given: Any) -> HostSettings:
    found = load_settings(servers, **given)
    if found.notice:
        logger.warning("servers: %s", found.notice)
    return found


def _check_all(initializer: Any, initargs: Any, on_event: Any, settings: Any) -> None:
    check_arguments(**settings)
    check_callable("initializer", initializer)
    check_callable("on_event", on_event)
    if not isinstance(initargs, Iterable):
        raise TypeError(f"initargs must be arguments, (value,) for example, not {initargs!r}")


def _check(ncpus: int | str, idle_timeout: float, patience: float, secret: str | None) -> None:
    is_number = isinstance(ncpus, Integral) and not isinstance(ncpus, bool) and ncpus >= 0
    if ncpus != "autodetect" and not is_number:
        raise ConfigError(f"ncpus must be 'autodetect' or a number from 0 on, not {ncpus!r}")
    if not isinstance(idle_timeout, Real) or not idle_timeout > 0:
        text = f"idle_timeout must be a positive number of seconds, not {idle_timeout!r}"
        raise ConfigError(text)
    if not isinstance(patience, Real) or not patience >= 0:
        raise ConfigError(f"patience must be a number of seconds from 0 on, not {patience!r}")
    if not isinstance(secret, str | None):
        raise ConfigError("secret: text is wanted")  # which is not told here
