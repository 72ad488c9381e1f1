"""WorkManager: run functions and tasks on every core within reach."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

from ostap_parallel.engine.backend import Backend
from ostap_parallel.engine.foreign import backend_of
from ostap_parallel.engine.retries import LOST_RETRIES
from ostap_parallel.errors import ConfigError
from ostap_parallel.faces.executor import Executor, Settings
from ostap_parallel.logs import logger_of
from ostap_parallel.runs.checkpoint import Checkpoint
from ostap_parallel.runs.checks import check_callable, check_seed
from ostap_parallel.runs.display import HostList, Shown, show_as, title_of
from ostap_parallel.runs.dump import Database, Dump
from ostap_parallel.runs.ordering import HELD_BYTES
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.placed import PlacedRun
from ostap_parallel.runs.progress import open_progress
from ostap_parallel.runs.reading import ReadingRun
from ostap_parallel.runs.recorder import ListTask, OnError, Recorder
from ostap_parallel.runs.report import Report, relay
from ostap_parallel.runs.run import Run
from ostap_parallel.runs.shapes import as_merger, as_task
from ostap_parallel.runs.snapshot import Coming, Snapshots
from ostap_parallel.runs.speculation import SpeculatingRun
from ostap_parallel.runs.stream import Results, in_thread
from ostap_parallel.runs.tails import Tails
from ostap_parallel.runs.task import Collector, FuncTask, GenericTask, Merger, Task, TaskMerger
from ostap_parallel.runs.trust import DEFAULT_RULES, HostRules
from ostap_parallel.supply.source import HostStatus
from ostap_parallel.views.live import runs, telling
from ostap_parallel.views.page import hosts_table
from ostap_parallel.views.screen import NOTHING, text_of
from ostap_parallel.views.timeline import Timeline
from ostap_parallel.worker import standin
from ostap_parallel.worker.execute import Call
from ostap_parallel.worker.tasks import TaskCall, each_anew

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ostap_parallel.faces.pathos_pool import ParallelPool

logger = logger_of(__name__)

_MOST = 5  # items that are named when a run is interrupted

_ATTRIBUTES = frozenset({"backend", "executor", "report"})
_HINT = "settings are given to WorkManager(...), and those of one run to process() and iexecute()"


class WorkManager(Shown):
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
        Hosts: ``"host"``, ``"user@host"``, ``"host:port"`` (of ssh), ``"host*8"`` (with 8
        workers), in a sequence or in one string; ``"auto"``, ``"config"`` or ``"*"``: those of
        the configuration and of ``OSTAP_PPSERVERS``; a number or ``"localhost:<number>"``: the
        local port of a server or a tunnel that is there already.
    ppservers
        Another name for `servers`.
    profile, environment, script
        What prepares a host, in this order: a script that is there, text for bash, a local
        script that is sent there. An argument wins over the configuration.
    environment_more, requires, nice
        What is added to `environment`; modules that hosts must have; how nice processes there are.
    python, tmpdir, user, port, ncpus_per_host, ssh_options, python_mismatch, keepalive, \
    start_timeout
        Further settings of hosts, see the manual.
    preload, start
        Modules that are imported once on each machine, for all its workers, which are forks of
        the process that has imported them; ``start="spawn"``: they are new interpreters.
    secret
        Shared by this process and the servers; random by default. Existing servers need theirs:
        it is read from the file that ``OSTAP_PPSECRET_FILE`` names if it is not given.
    idle_timeout
        Seconds without work after which the servers on hosts end; they start again when there is.
        (`timeout`, as it was called before, is accepted with a note: it is no limit for items.)
    patience
        Seconds that a run with no worker left waits for lost hosts to come back.
    progress
        Whether runs show a progress bar.
    silent
        No progress, and no table of statistics after a run.
    sync
        Your own modules that tasks import: files, directories, packages, imported modules. Hosts
        get what is in them, and again when that has changed at the beginning of a run.
    config
        Configuration files to read in place of the usual ones.
    ssh_config
        Configuration file for ssh in place of the user's own.
    executor
        Computes in place of ours: any `concurrent.futures.Executor`, or a `Backend`. It is not
        shut down.
    dump_dbase, dump_jobs, dump_freq
        A data base that `process` writes results to: the first `dump_jobs` of them (all, if
        negative), and what is merged, every `dump_freq` results.
    host_rules
        When a host where items fail is not used any more, see `HostRules`.
    held_bytes
        So many bytes of results, about, are held back at most where they come in the order of
        the items; no more input is read then until the next one in turn has come.
    timeline
        Whether reports keep when each item ran, and where: some ten bytes for each.

    Attributes
    ----------
    executor
        What computes, as it was given or made.
    backend
        What computes, as runs see it.
    report
        The report of the run that is going on, or of the last one.

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
        progress: bool = True,
        silent: bool = False,
        executor: concurrent.futures.Executor | Backend | None = None,
        dump_dbase: Database | None = None,
        dump_jobs: int = 0,
        dump_freq: int = 0,
        host_rules: HostRules = DEFAULT_RULES,
        held_bytes: float = HELD_BYTES,
        timeline: bool = True,
        **settings: Unpack[Settings],
    ) -> None:
        named = _one_of(servers, ppservers)
        given = _check(executor, named, settings)
        if not isinstance(host_rules, HostRules):
            raise ConfigError(f"host_rules must be HostRules(...), not {host_rules!r}")
        self.report = Report()
        self._dump = Dump(dump_dbase, dump_jobs, dump_freq)
        self._run_settings: dict[str, Any] = {
            "host_rules": host_rules,
            "held_bytes": _check_bytes(held_bytes),
        }
        self._progress, self._silent = progress and not silent, silent
        self._pool: ParallelPool | None = None
        self._keeps_timeline = timeline
        options: dict[str, Any] = {**settings}
        on_event = options.pop("on_event", relay)
        check_callable("on_event", on_event)
        self._tails = Tails(on_event)
        options["on_event"] = self._tails.hear
        self._owned = Executor(ncpus, named, **options) if executor is None else None
        self.executor: Any = self._owned if executor is None else executor
        self.backend = backend_of(self._owned) if given is None else given

    def __setattr__(self, name: str, value: Any) -> None:
        if type(self) is WorkManager and not name.startswith("_") and name not in _ATTRIBUTES:
            raise AttributeError(f"a WorkManager has no attribute {name!r} to be set: {_HINT}")
        super().__setattr__(name, value)

    def __enter__(self) -> WorkManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aenter__(self) -> WorkManager:
        return self

    async def __aexit__(self, *error: object) -> None:
        import asyncio  # whoever is here has it; others need not load it

        await asyncio.to_thread(self.close)

    def __repr__(self) -> str:
        workers = ", ".join(f"{host}: {count}" for host, count in self.workers.items())
        return f"<WorkManager {workers or 'without workers'}>"

    def _repr_html_(self) -> str:
        return super()._repr_html_() + hosts_table(self._hosts())

    def _hosts(self) -> Sequence[HostStatus]:
        return () if self._owned is None else self._owned.hosts

    @property
    def workers(self) -> dict[str, int]:
        """Number of workers by host, of those that are up; the local ones are ``"local"``."""
        if self._owned is not None:
            return self._owned.workers
        return {type(self.executor).__name__: sum(self.backend.workers.values())}

    @property
    def pool(self) -> ParallelPool:
        """A pathos ParallelPool on the same workers: map, imap, uimap, amap, pipe, apipe."""
        if self._owned is None:
            raise TypeError("an executor of your own has no ParallelPool")
        if self._pool is None:
            # Now, not before: it needs pathos, which a bare host does not have where a task makes
            # a manager of local workers.
            from ostap_parallel.faces.pathos_pool import ParallelPool

            self._pool = ParallelPool(executor=self._owned)
        return self._pool

    def top(self) -> None:
        """Print what runs of yours are doing now, by any process of yours on this machine.

        ``ostap-parallel top`` shows it in another terminal, again and again.
        """
        print("\n".join(map(text_of, runs())) or NOTHING)

    def wait_for_hosts(self, timeout: float | None = None) -> bool:
        """Wait until every host is up or has failed; return whether all are up.

        There is no need to: hosts join a run that is going on.
        """
        return self._owned is None or self._owned.wait_for_hosts(timeout)

    def add_hosts(self, servers: str | int | Iterable[str | int]) -> list[HostStatus]:
        """Start servers on more hosts, without waiting; they join a run that is going on.

        `servers` is as of the manager, whose settings hold for them, too. Returns their states.

        Raises
        ------
        ConfigError
            A setting is malformed, or one of the hosts is among those that there are.
        TypeError
            The manager has an executor of your own.
        """
        return self._own().add_hosts(servers)

    def drop_host(self, name: str) -> None:
        """End the server on a host, by its name; others do what it was doing, and the rest.

        Raises
        ------
        ValueError
            There is no such host.
        TypeError
            The manager has an executor of your own.
        """
        self._own().drop_host(name)

    def limit_host(self, name: str, count: int | None) -> None:
        """Use so many workers of a host, or of ``"local"``, at most, also while a run goes on.

        What runs there is not ended. ``None``: all of them again.

        Raises
        ------
        ValueError
            There is no such host, or `count` is no number from 1 on.
        TypeError
            The manager has an executor of your own.
        """
        self._own().limit_host(name, count)

    def _own(self) -> Executor:
        if self._owned is None:
            raise TypeError("an executor of your own has no hosts of ours")
        return self._owned

    def close(self) -> None:
        """End workers and servers. Nothing of ours remains on any host."""
        if self._pool is not None:
            self._pool.terminate()
        if self._owned is not None:
            self._owned.close()

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
        window: int | None = None,
        on_error: OnError = "raise",
        retries: int = 0,
        lost_retries: int = LOST_RETRIES,
        timeout: float | None = None,
        progress: bool | None = None,
        shared: Any = None,
        seed: int | str | None = None,
        description: str | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        dump_freq: int | None = None,
        where: Callable[[Any], str | None] | None = None,
        strict: bool = True,
        speculate: bool = False,
    ) -> Any:
        """Run a function or a task on all items and return what its results are merged to.

        Parameters
        ----------
        task
            Called as ``task(item)``, with `jobid` as ``task(jobid, item)``; or a `Task`.
        merger, collector
            ``merger(merged, result)`` or ``collector(merged, result, jobid)`` returns what is
            merged then. Without them the results come as a list, in the order of the items.
        init
            What merging starts from; without it the first result is taken as it is.
        on_error
            ``"raise"``: the first failure stops the run, and the task's own exception is
            raised. ``"collect"``: the run goes on; failures are in `report`, and in a list
            each stands, as a `Failure`, in the place of its result.
        dump_freq
            In place of the manager's.
        where, strict
            ``where(item)`` returns the host that an item must run on, or ``None``. Items of one
            that cannot be had fail by `HostError`. With ``strict=False`` others help when they
            have nothing of their own.

        For the others see `iexecute`.
        """
        __tracebackhide__ = True
        merging = _merging(task, merger, collector, init)
        if on_error not in ("raise", "collect"):
            raise ValueError(f"on_error must be 'raise' or 'collect', not {on_error!r}")
        if ordered is None:
            ordered = isinstance(merging, ListTask)
        call = _call(task, jobid, shared, seed, timeout)
        dump = self._dump.every(dump_freq)
        combine = _combiner(merging, checkpoint is not None, dump)
        limits = _limits(chunk_size, window, ordered, retries, lost_retries, checkpoint)
        limits |= self._run_settings | {"collects": on_error == "collect"}
        call = replace(call, combine=combine)
        check_callable("where", where)
        if where is not None:
            if speculate:
                raise TypeError("speculate=True needs items that may run anywhere: not where=")
            limits |= {"where": where, "strict": strict}
        kind = SpeculatingRun if speculate else Run if where is None else PlacedRun
        run = kind(self.backend, call, items, **limits)
        with self._record(run, progress, description or title_of(task)) as recorder:
            recorder.merge(merging, on_error, dump)
        return recorder.report.result

    async def aprocess(
        self, task: Task | Callable[..., Any], items: Iterable[Any], **options: Any
    ) -> Any:
        """Await `process`, which goes on in a thread; cancelling this stops the run."""
        return await in_thread(self.process, task, items, **options)

    def iexecute(
        self,
        func: Task | Callable[..., Any],
        items: Iterable[Any],
        *,
        ordered: bool = False,
        jobid: bool = False,
        chunk_size: int | None = None,
        window: int | None = None,
        retries: int = 0,
        lost_retries: int = LOST_RETRIES,
        timeout: float | None = None,
        progress: bool | None = None,
        shared: Any = None,
        seed: int | str | None = None,
        description: str | None = None,
        checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
        speculate: bool = False,
    ) -> Results:
        """Iterate over the results as they come; the first failure is raised.

        ``async for`` works, too: a thread fetches the results.

        Parameters
        ----------
        items
            Any iterable, also without an end: it is read as results are taken, never far ahead,
            and unless it is all there, by a thread, so that results need not wait for input.
            Leaving the iteration stops the run.
        ordered
            Yield in the order of the items, holding back what comes early.
        chunk_size
            Items sent together; adapted to the time that they take by default.
        window
            Chunks that are under way at most; about two per worker by default.
        retries, lost_retries
            How often an item is run again when it raises or takes too long, and when its worker
            dies.
        timeout
            Seconds that an item may take on a worker. Then it is interrupted, as by Ctrl-C, or
            ended with its worker if it does not heed that, and fails with `TaskTimeout`.
        shared
            What all items need, sent once to each host: a mapping holds keyword arguments for
            the function; anything else, and all that is for a `Task`, is what
            `ostap_parallel.shared` returns there. Large arrays are read-only.
        seed
            ``random``, and numpy and ROOT where they are used, are seeded from it and the
            item's index before each item, whatever worker that is on.
        checkpoint
            A file that keeps the results: a run that is stopped, however that comes, goes on
            from it when it is started again. See `Checkpoint`.
        speculate
            Near the end workers with nothing to do run a second copy of what takes long on
            another host. The first result counts, the other copy is interrupted: for functions
            that may run twice at the same time.

        Raises
        ------
        ServersUnavailable, WorkerLost, TaskTimeout, SerializeError, CheckpointError
            No worker is left; an item's worker died too often; an item took too long; something
            cannot be sent; the checkpoint cannot be used, or is that of something else.
        """
        call = _call(func, jobid, shared, seed, timeout)
        limits = _limits(chunk_size, window, ordered, retries, lost_retries, checkpoint)
        kind = SpeculatingRun if speculate else ReadingRun
        run = kind(self.backend, call, items, **limits, **self._run_settings)
        return Results(self._arrivals(run, progress, description or title_of(func)), run.cancel)

    def _arrivals(
        self, run: Run, progress: bool | None, title: str
    ) -> Generator[Batch | Outcome, None, None]:
        __tracebackhide__ = True
        with self._record(run, progress, title) as recorder:
            for arrival in recorder.arrivals("raise"):
                recorder.report.merged += len(arrival) if isinstance(arrival, Batch) else 1
                yield arrival
            recorder.complete()

    @contextmanager
    def _record(self, run: Run, progress: bool | None, title: str) -> Iterator[Recorder]:
        """Keep `report` up to date during a run, however it ends, and show its progress."""
        show = self._progress if progress is None else progress
        coming = Coming(self.backend)
        opened = open_progress(show, run.total, title, lambda: self.workers, coming=coming)
        with opened as reporter:
            timeline = Timeline(title) if self._keeps_timeline else None
            recorder = Recorder(run, reporter, timeline, self._tails)
            self.report = recorder.report
            lost = {host.name: host.lost for host in self._hosts()}
            try:
                with telling(Snapshots(run, reporter, title, coming).look):
                    yield recorder
            except KeyboardInterrupt as exc:
                show_as(exc, f"interrupted: {self.report.summary}")
                if (ran := recorder.report.ran) and not self._silent:
                    self._tell("stopped; running: " + "; ".join(map(str, ran[:_MOST])))
                raise
            finally:
                self.backend.flush()
                self._tails.close()
                told = (host.since(lost.get(host.name, 0)) for host in self._hosts())
                recorder.report.hosts = HostList(told)
        report = recorder.report
        if failed := report.failed_in_short() if self._silent else report.failed_in_groups():
            self._tell(failed)
        if report.stats and not self._silent:
            print(report.table())

    def _tell(self, text: str) -> None:
        with suppress(OSError, ValueError):  # a standard error that is full or closed
            print(text, file=sys.stderr, flush=True)


standin.register(WorkManager)


def _merging(
    task: Task | Callable[..., Any], merger: Merger | None, collector: Collector | None, init: Any
) -> Task:
    """Return the task whose way of merging a run uses."""
    task = as_task(task)
    adapted = as_merger(merger)
    if adapted is not merger and collector is None:
        merger, collector = None, adapted  # it is to have the first result, too
    if isinstance(task, Task):
        if merger is not None or collector is not None or init is not None:
            raise TypeError("a Task brings its own merging: give it the items only")
        return task
    if merger is None and collector is None:
        if init is None:
            return ListTask()
        merger = TaskMerger(None)
    if isinstance(merger, TaskMerger) and merger.fresh().result is not None and init is not None:
        raise TypeError("this TaskMerger brings its own initial value: do not give init too")
    initializer = None if init is None else functools.partial(copy.deepcopy, init)
    return FuncTask(task, merger, collector, initializer)


def _combiner(merging: Task, checkpoint: bool, dump: Dump) -> Merger | None:
    """Return what merges results on the workers, if that is wanted."""
    combiner = merging.combiner if isinstance(merging, GenericTask) else None
    if combiner is None:
        return None
    own = type(merging).merge_results is not GenericTask.merge_results
    needs = {"checkpoint=": checkpoint, "dump_dbase=": bool(dump), "merge_results()": own}
    for name, needed in needs.items():
        if needed:
            raise TypeError(f"{name} needs each result by itself: merge without combine=True")
    return combiner


def _call(
    task: Task | Callable[..., Any],
    jobid: bool,
    shared: Any,
    seed: int | str | None,
    timeout: float | None,
) -> Call:
    check_seed(seed)
    level, task = logging.getLogger().level, as_task(task)
    if isinstance(task, Task):
        call = TaskCall(task)
        return Call(
            call,
            with_index=True,
            worker_init=call.prepare,
            surroundings={name: value for name, value in task.surroundings.items() if value},
            seed=seed,
            log_level=level,
            timeout=timeout,
            shared=shared,
            is_numbered=True,
        )
    if not callable(task):
        raise TypeError(f"task must be a function or a Task, not {type(task).__name__}")
    with_keywords = isinstance(shared, Mapping)
    for name in shared if with_keywords else ():
        if not isinstance(name, str):
            remedy = "give a mapping that is one argument as shared={'its name': mapping}"
            raise TypeError(f"shared: {name!r} is not the name of an argument; {remedy}")
    return Call(
        each_anew(task),
        with_index=jobid,
        seed=seed,
        log_level=level,
        timeout=timeout,
        shared=shared,
        with_keywords=with_keywords,
        is_numbered=True,
    )


def _limits(
    chunk_size: int | None,
    window: int | None,
    ordered: bool,
    retries: int,
    lost_retries: int,
    checkpoint: Checkpoint | str | os.PathLike[str] | None,
) -> dict[str, Any]:
    """Return the keywords of a `Run` besides what it runs."""
    sizes = {"chunk_size": chunk_size, "window": window, "ordered": ordered}
    again = {"retries": retries, "lost_retries": lost_retries}
    return {**sizes, **again, "checkpoint": _checkpoint(checkpoint)}


def _checkpoint(given: Checkpoint | str | os.PathLike[str] | None) -> Checkpoint | None:
    if given is None or isinstance(given, Checkpoint):
        return given
    if not isinstance(given, str | os.PathLike):
        raise TypeError(f"checkpoint must be a path or a Checkpoint, not {given!r}")
    return Checkpoint(given)


def _check_bytes(number: Any) -> float:
    if not isinstance(number, Real) or isinstance(number, bool) or not float(number) > 0:
        raise ConfigError(f"held_bytes must be a positive number, not {number!r}")
    return float(number)


def _one_of(servers: Any, ppservers: Any) -> Any:
    if ppservers is not None and servers != ():
        raise ConfigError("give either servers or ppservers: they are the same thing")
    return servers if ppservers is None else ppservers


def _check(executor: object, named: object, settings: Mapping[str, Any]) -> Backend | None:
    """Return the backend that was given, if one was."""
    if executor is None:
        return None
    if named != () or settings:
        what = ", ".join(["servers"] * (named != ()) + [*settings])
        raise ConfigError(f"give either an executor of your own or {what}, not both")
    try:
        return backend_of(executor)
    except TypeError as exc:
        raise ConfigError(str(exc)) from None
