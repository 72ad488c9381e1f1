"""WorkManager: run functions and tasks on every core within reach."""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Executor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ostap_parallel.config import HostConfig, load_settings
from ostap_parallel.dispatch import Outcome, Run
from ostap_parallel.errors import ConfigError
from ostap_parallel.executors.parallel import LOCAL, LOST_RETRIES, ParallelExecutor
from ostap_parallel.executors.pool import ParallelPool
from ostap_parallel.progress import open_progress
from ostap_parallel.report import Failure, Report, describe
from ostap_parallel.task import Collector, Merger, Task, TaskMerger
from ostap_parallel.worker.execute import Call

logger = logging.getLogger(__name__)

OnError = Literal["raise", "collect"]


class WorkManager:
    """Runs functions and tasks on local cores and on hosts reached by ssh.

    Local workers are there at once; hosts are started in the background, all at the same time,
    and join while work is already going on. Use it in ``with``, or `close` it: nothing then
    remains on any host. It can run many times; one run at a time is the usual way.

    Parameters
    ----------
    ncpus
        Local workers. ``"autodetect"``: as many as affinity and control groups grant this
        process; 0: none, the hosts do it all.
    servers
        Hosts: ``"host"``, ``"user@host"``, ``"host:port"`` (of ssh), ``"host*8"`` (at most 8
        workers), in a sequence or in one string; ``"auto"``, ``"config"`` or ``"*"``: those of
        the configuration and of ``OSTAP_PPSERVERS``; a number or ``"localhost:<number>"``: the
        local port of a server or a tunnel that is there already.
    ppservers
        Another name for `servers`.
    profile, environment, script
        What prepares a host, in this order: a script that is there, text for bash, a local
        script that is sent there. An argument wins over the configuration.
    python, tmpdir, user, port, ssh_options, python_mismatch
        Further settings of hosts, see the manual.
    secret
        Shared by this process and the servers; random by default. Existing servers need theirs:
        it is read from the file that ``OSTAP_PPSECRET_FILE`` names if it is not given.
    timeout
        Seconds of silence after which a server on a host ends itself.
    progress
        Whether runs show a progress bar.
    silent
        No progress, and no table of statistics after a run.
    config
        Configuration files to read in place of the usual ones.
    ssh_config
        Configuration file for ssh in place of the user's own.
    executor
        Computes in place of ours: any `concurrent.futures.Executor`. It is not shut down.

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
        ppservers: str | int | Iterable[str | int] | None = None,
        profile: str | None = None,
        environment: str | None = None,
        script: str | Path | None = None,
        python: str | None = None,
        tmpdir: str | None = None,
        user: str | None = None,
        port: int | None = None,
        ssh_options: str | Sequence[str] | None = None,
        python_mismatch: Literal["refuse", "allow"] | None = None,
        secret: str | None = None,
        timeout: float = 7200,
        progress: bool = True,
        silent: bool = False,
        config: Iterable[Path | str] | Path | str | None = None,
        ssh_config: Path | str | None = None,
        executor: Executor | None = None,
    ) -> None:
        _check_numbers(ncpus, timeout)
        if ppservers is not None:
            if servers != ():
                raise ConfigError("give either servers or ppservers: they are the same thing")
            servers = ppservers
        given = {
            "profile": profile,
            "environment": environment,
            "script": script,
            "python": python,
            "tmpdir": tmpdir,
            "user": user,
            "port": port,
            "ssh_options": ssh_options,
            "python_mismatch": python_mismatch,
            "ssh_config": ssh_config,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        settings = load_settings(servers, config=config, **arguments)  # type: ignore[arg-type]
        if executor is not None and settings.hosts:
            raise ConfigError("give either an executor of your own or servers, not both")
        self.report = Report()
        self._progress = progress and not silent
        self._silent = silent
        self._owned: ParallelExecutor | None = None
        self._pool: ParallelPool | None = None
        if executor is None:
            self._owned = executor = ParallelExecutor(
                ncpus,
                settings.hosts,
                secret=secret if secret is not None else _secret_of(settings.hosts),
                timeout=timeout,
                on_event=_show,
            )
        self.executor: Executor = executor

    def __enter__(self) -> WorkManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        workers = ", ".join(f"{host}: {count}" for host, count in self.workers.items())
        return f"<WorkManager {workers or 'without workers'}>"

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        if self._owned is not None:
            return self._owned.workers
        kind = type(self.executor).__name__
        return {kind: getattr(self.executor, "_max_workers", None) or os.cpu_count() or 1}

    @property
    def pool(self) -> ParallelPool:
        """The pathos ParallelPool that does the work: map, imap, uimap, amap, pipe, apipe."""
        if self._owned is None:
            raise TypeError("an executor of your own has no ParallelPool")
        if self._pool is None:
            self._pool = ParallelPool(self._owned)
        return self._pool

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up.

        There is no need to: hosts join a run that is going on.
        """
        return self._owned is None or self._owned.wait_for_hosts(timeout)

    def close(self) -> None:
        """End workers and servers. Nothing of ours remains on any host."""
        if self._pool is not None:
            self._pool.forget()
        if self._owned is not None:
            self._owned.shutdown(cancel_futures=True)

    def process(
        self,
        task: Task | Callable[..., Any],
        items: Iterable[Any],
        *,
        merger: Merger | None = None,
        collector: Collector | None = None,
        init: Any = None,
        ordered: bool | None = None,
        jobid: bool = False,
        chunk_size: int | None = None,
        on_error: OnError = "raise",
        retries: int = 0,
        lost_retries: int = LOST_RETRIES,
        progress: bool | None = None,
        shared: Mapping[str, Any] | None = None,
        seed: int | str | None = None,
        description: str | None = None,
    ) -> Any:
        """Run a function or a task on all items and merge what it returns.

        Parameters
        ----------
        task
            ``task(item)``, with `jobid` ``task(jobid, item)``; or a `Task`, which brings its
            own merging.
        items
            Any iterable; read as workers become free, never far ahead.
        merger
            ``merger(merged, result)`` returns what is merged then, e.g. `TaskMerger`.
        collector
            ``collector(merged, result, jobid)``, in place of `merger`.
        init
            What merging starts from; without it the first result is taken as it is.
        ordered
            Merge in the order of the items, not as results come. Without merger and collector
            this is the default, and the result is a list.
        chunk_size
            Items sent together; adapted to the time that they take by default.
        on_error
            ``"raise"``: the first failure stops the run, and the task's own exception is
            raised; ``"collect"``: the run goes on, failures are in `report`, and in the list of
            results a `Failure` stands in the place of the result.
        retries
            How often an item is run again when it raises.
        lost_retries
            How often an item is run again when its worker dies.
        shared
            Keyword arguments for the function, the same for all items; sent once per worker.
        seed
            Makes random numbers reproducible: ``random`` and, where they are used, numpy and
            ROOT are seeded from it and the item's index before each item.

        Returns
        -------
        What is merged, `init` if there are no items; the task's ``results()`` for a `Task`.

        Raises
        ------
        ServersUnavailable
            No worker is left and no host is about to join.
        WorkerLost
            The worker of an item died, again and again.
        SerializeError
            The function, an item or a result cannot be sent.
        """
        _check_run(on_error, retries, lost_retries, chunk_size)
        sink: _Sink
        if isinstance(task, Task):
            if merger is not None or collector is not None or init is not None or shared:
                raise TypeError("a Task brings its own merging and data: give it the items only")
            sink = _TaskSink(task)
        else:
            sink = _sink_for(merger, collector, init, ordered)
        run = Run(
            self.executor,
            _call_for(task, jobid, shared, seed),
            items,
            chunk_size=chunk_size,
            ordered=sink.ordered if ordered is None else ordered,
            retries=retries,
            lost_retries=lost_retries,
        )
        show = self._progress if progress is None else progress
        title = description or _title(task)
        outcomes = run.outcomes()
        with _Recorder(self, run, show, title) as recorder, closing(outcomes):
            sink.start()
            recorder.report.result = sink.result()
            for outcome in outcomes:
                recorder.take(outcome, sink, on_error)
            sink.finish()
            recorder.report.result = sink.result()
            recorder.report.complete = True
        return self.report.result

    def iexecute(
        self,
        func: Task | Callable[..., Any],
        items: Iterable[Any],
        *,
        ordered: bool = False,
        jobid: bool = False,
        chunk_size: int | None = None,
        retries: int = 0,
        lost_retries: int = LOST_RETRIES,
        progress: bool | None = None,
        shared: Mapping[str, Any] | None = None,
        seed: int | str | None = None,
        description: str | None = None,
    ) -> Iterator[Any]:
        """Yield the results as they come, or in the order of the items.

        `items` may have no end: it is read as the results are taken. Leaving the iteration
        stops the run. The first failure is raised. See `process` for the parameters.
        """
        _check_run("raise", retries, lost_retries, chunk_size)
        run = Run(
            self.executor,
            _call_for(func, jobid, shared, seed),
            items,
            chunk_size=chunk_size,
            ordered=ordered,
            retries=retries,
            lost_retries=lost_retries,
        )
        show = self._progress if progress is None else progress
        title = description or _title(func)
        return self._iterate(run, show, title)

    def _iterate(self, run: Run, show: bool, title: str) -> Iterator[Any]:
        outcomes = run.outcomes()
        with _Recorder(self, run, show, title) as recorder, closing(outcomes):
            sink = _Sink()
            for outcome in outcomes:
                recorder.take(outcome, sink, "raise")
                yield outcome.value
            recorder.report.complete = True


class _Recorder:
    """Keeps the report of a run up to date, however it ends, and shows its progress."""

    def __init__(self, manager: WorkManager, run: Run, show: bool, title: str) -> None:
        self._manager = manager
        self._run = run
        total = len(run.items) if isinstance(run.items, Sized) else None
        self._bar = open_progress(show, total, title, lambda: manager.workers)
        self.report = Report()

    def __enter__(self) -> _Recorder:
        self._manager.report = self.report
        self._start = time.monotonic()
        self._reporter = self._bar.__enter__()
        self._run.on_retry = self._retried
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._manager._owned is not None and kind is None:
            self._manager._owned.flush()
        self._bar.__exit__(kind, error, trace)
        self._update()
        if self._manager._owned is not None:
            self.report.hosts = [copy.copy(host) for host in self._manager._owned.hosts]
        if kind is None and self.report.stats and not self._manager._silent:
            print(self.report.stats.table())

    def take(self, outcome: Outcome, sink: _Sink, on_error: OnError) -> None:
        """Merge one outcome, or record its failure; raises what `on_error` says."""
        report = self.report
        if outcome.host:
            report.stats.add(outcome.host, outcome.seconds)
        if outcome.error is None:
            try:
                sink.merge(outcome.value, outcome.index)
            except Exception as exc:
                _add_note(exc, f"while the result of item {outcome.index} was merged")
                raise
            report.merged += 1
        else:
            failure = _failure(outcome)
            report.failures.append(failure)
            if on_error == "raise":
                where = f"on {failure.host}, process {failure.pid}"
                _add_note(outcome.error, f"item {failure.index} ({failure.item}) {where}")
                raise outcome.error
            sink.fail(failure)
        report.result = sink.result()
        self._update()
        self._reporter.advance(1, int(outcome.error is not None))

    def _update(self) -> None:
        self.report.submitted = self._run.submitted
        self.report.wall = time.monotonic() - self._start

    def _retried(self) -> None:
        self.report.retried += 1


class _Sink:
    """Where results go; this one forgets them."""

    ordered = False

    def start(self) -> None:
        """Begin a run."""

    def merge(self, result: Any, index: int) -> None:
        """Take one result."""

    def fail(self, failure: Failure) -> None:
        """Take notice of an item without a result."""

    def finish(self) -> None:
        """End a run."""

    def result(self) -> Any:
        """Return what is merged so far."""


class _TaskSink(_Sink):
    def __init__(self, task: Task) -> None:
        self._task = task

    def start(self) -> None:
        self._task.initialize_local()

    def merge(self, result: Any, index: int) -> None:
        self._task.merge_results(result, index)

    def finish(self) -> None:
        self._task.finalize()

    def result(self) -> Any:
        return self._task.results()


class _ListSink(_Sink):
    ordered = True

    def __init__(self) -> None:
        self._results: list[Any] = []

    def merge(self, result: Any, index: int) -> None:
        self._results.append(result)

    def fail(self, failure: Failure) -> None:
        self._results.append(failure)

    def result(self) -> list[Any]:
        return self._results


class _MergerSink(_Sink):
    def __init__(self, merger: TaskMerger) -> None:
        self._merger = merger

    def merge(self, result: Any, index: int) -> None:
        self._merger.merge(result)

    def result(self) -> Any:
        return self._merger.result


class _CollectorSink(_Sink):
    def __init__(self, collector: Collector, init: Any) -> None:
        self._collector = collector
        self._result = init

    def merge(self, result: Any, index: int) -> None:
        self._result = self._collector(self._result, result, index)

    def result(self) -> Any:
        return self._result


def _sink_for(
    merger: Merger | None, collector: Collector | None, init: Any, ordered: bool | None
) -> _Sink:
    if merger is not None and collector is not None:
        raise TypeError("give either merger or collector, not both")
    if collector is not None:
        return _CollectorSink(collector, TaskMerger(None, init).result)
    if isinstance(merger, TaskMerger):
        if init is not None:
            raise TypeError("this TaskMerger brings its own initial value: do not give init too")
        return _MergerSink(merger.fresh())
    if merger is not None or init is not None:
        return _MergerSink(TaskMerger(merger, init))
    return _ListSink()


def _call_for(
    task: Task | Callable[..., Any],
    jobid: bool,
    shared: Mapping[str, Any] | None,
    seed: int | str | None,
) -> Call:
    level = logging.getLogger().level
    if isinstance(task, Task):
        return Call(
            task.process,
            with_index=True,
            before_item=task.initialize_remote,
            worker_init=task.worker_init,
            surroundings={name: value for name, value in task.surroundings.items() if value},
            seed=seed,
            log_level=level,
        )
    if not callable(task):
        raise TypeError(f"task must be a function or a Task, not {type(task).__name__}")
    function = functools.partial(task, **shared) if shared else task
    return Call(function, with_index=jobid, seed=seed, log_level=level)


def _title(task: Task | Callable[..., Any]) -> str:
    return str(getattr(task, "__name__", type(task).__name__))


def _failure(outcome: Outcome) -> Failure:
    assert outcome.error is not None
    return Failure(
        index=outcome.index,
        item=describe(outcome.item),
        error=outcome.error,
        traceback=outcome.traceback,
        host=outcome.host or LOCAL,
        pid=outcome.pid,
        attempts=outcome.attempts,
    )


def _add_note(error: BaseException, note: str) -> None:
    if sys.version_info >= (3, 11):
        error.add_note(note)


def _show(host: str, event: Mapping[str, Any]) -> None:
    """Print what a worker printed, log what it logged; a host's name goes before it."""
    if event["kind"] == "log":
        record = logging.makeLogRecord(dict(event["record"]))
        record.name = f"{host}.{record.name}"
        log = logging.getLogger(record.name)
        if log.isEnabledFor(record.levelno):
            log.handle(record)
        return
    stream = sys.stdout if event["kind"] == "stdout" else sys.stderr
    prefix = "" if host == LOCAL else f"{host}: "
    with _print_lock:
        print(f"{prefix}{event['text']}", file=stream, flush=True)


_print_lock = threading.Lock()


def _secret_of(hosts: Sequence[HostConfig]) -> str | None:
    """Return the secret for existing servers, from the file that the environment names."""
    if not any(host.server_port for host in hosts):
        return None
    name = os.environ.get("OSTAP_PPSECRET_FILE")
    if name is None:
        raise ConfigError(
            "an existing server needs its secret: give secret=..., or the name of a file that "
            "holds it in OSTAP_PPSECRET_FILE, as ostap-parallel launch prints it"
        )
    try:
        return Path(name).read_text().strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"OSTAP_PPSECRET_FILE: {name} cannot be read: {exc}") from exc


def _check_numbers(ncpus: int | str, timeout: float) -> None:
    if isinstance(ncpus, str):
        if ncpus != "autodetect":
            raise ConfigError(f"ncpus must be 'autodetect' or a number from 0 on, not {ncpus!r}")
    elif isinstance(ncpus, bool) or not isinstance(ncpus, int) or ncpus < 0:
        raise ConfigError(f"ncpus must be 'autodetect' or a number from 0 on, not {ncpus!r}")
    if timeout <= 0:
        raise ConfigError(f"timeout must be a positive number of seconds, not {timeout!r}")


def _check_run(on_error: str, retries: int, lost_retries: int, chunk_size: int | None) -> None:
    if on_error not in ("raise", "collect"):
        raise ValueError(f"on_error must be 'raise' or 'collect', not {on_error!r}")
    for name, value in ("retries", retries), ("lost_retries", lost_retries):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, not {value}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, not {chunk_size}")
