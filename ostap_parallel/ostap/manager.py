"""The names of Ostap's `ostap.parallel`, with the same meaning, on the workers of ours.

Ostap adopts them by importing them in its ``parallel.py`` and ``task.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

from ostap_parallel.logs import logger_of
from ostap_parallel.ostap.checker import Checker
from ostap_parallel.ostap.options import (
    count_cpus,
    executor_of,
    manager_options,
    positive,
    run_options,
)
from ostap_parallel.ostap.task import (
    FuncTask,
    Function,
    GenericTask,
    Task,
    func_executor,
    function_task,
    random_random,
    task_executor,
)
from ostap_parallel.runs.report import Statistics, StatMerger
from ostap_parallel.runs.shapes import ShapedTask, as_task
from ostap_parallel.runs.task import Task as OurTask
from ostap_parallel.runs.task import TaskMerger

__all__ = [
    "Checker",
    "FuncTask",
    "GenericTask",
    "StatMerger",
    "Statistics",
    "Task",
    "TaskManager",
    "TaskMerger",
    "WorkManager",
    "func_executor",
    "has_dill",
    "keyboard_interrupt",
    "random_random",
    "task_executor",
]

keyboard_interrupt = "Keyboard interrupt"
has_dill = importlib.util.find_spec("dill") is not None

logger = logger_of(__name__)

_DUMP = "dump_dbase", "dump_jobs", "dump_freq"
_OWN = "silent", "progress", "hyper_block_size", *_DUMP
_OF_PROCESS = {"silent", "merger", "collector", "init", "imports", "on_error", "hyper_block_size"}


class TaskManager(ABC):
    """The settings of a manager, and `process` by the `iexecute` of a class derived from this.

    Parameters
    ----------
    ncpus
        Local workers; anything but a number from 1 on: all CPUs but one, and of no more than
        ``OSTAP_NCPUS`` tells.
    silent
        No table of statistics after a run.
    progress
        Whether runs show a progress bar, be they silent or not.
    block_size
        Chunks that are under way at most.
    hyper_block_size
        What is merged is also dumped after so many results, if it is at all.
    dump_dbase, dump_jobs, dump_freq
        As of `ostap_parallel.WorkManager`; without a data base it is a temporary one.
    """

    def __init__(
        self,
        ncpus: object = "autodetect",
        *,
        silent: object = True,
        progress: object = True,
        block_size: object = -1,
        hyper_block_size: object = -1,
        dump_dbase: Any = None,
        dump_jobs: int = 0,
        dump_freq: int = 0,
        **kwargs: Any,
    ) -> None:
        self.ncpus = positive(ncpus) or max(1, count_cpus() - 1)
        self.silent, self.progress = bool(silent), bool(progress)
        self.block_size = positive(block_size) or 2 * self.ncpus
        self.hyper_block_size = positive(hyper_block_size) or 100 * self.ncpus
        if dump_dbase is None and (dump_jobs or dump_freq):
            dump_dbase = Path(tempfile.mkdtemp(prefix="ostap-dump-")) / "results.db"
            logger.warning("results are dumped into %s", dump_dbase)
        self.dump_dbase, self.dump_jobs, self.dump_freq = dump_dbase, dump_jobs, dump_freq
        self.params = dict(kwargs)

    def process(self, task: Any, args: Iterable[Any], **kwargs: Any) -> Any:
        """Run a function ``f(jobid, item)``, or a task, on all items; return what is merged."""
        imports = {name: kwargs[name] for name in ("imports",) if name in kwargs}
        merging = self._merging(task, kwargs)
        is_function = isinstance(merging, Function)
        executor: Callable[[Any], Any] = func_executor if is_function else task_executor
        merging.initialize_local()
        start, stats = time.monotonic(), StatMerger()
        jobs = zip(itertools.repeat(task), itertools.count(), args)
        for jobid, result, stat in self.iexecute(executor, jobs, **imports, **kwargs):
            merging.merge_results(result, jobid)
            stats += stat
        merging.finalize()
        self.print_statistics(self.get_pp_stat() or StatMerger(), stats, time.monotonic() - start)
        return merging.results()

    def _merging(self, task: Any, options: dict[str, Any]) -> OurTask:
        """Return the task that a run of `task` is; take from `options` what it is made of."""
        names = "merger", "collector", "init"
        merging = {name: options.pop(name) for name in names if options.get(name) is not None}
        imports = options.pop("imports", ())
        imports = (imports,) if isinstance(imports, str) else tuple(imports)
        task = as_task(task)
        if not isinstance(task, OurTask):
            return function_task(task, imports, **merging)
        self.extra_arguments(**merging)  # a task brings its own
        return ShapedTask(task, imports) if imports else task

    @abstractmethod
    def iexecute(
        self,
        job: Callable[[Any], Any],
        jobs_args: Iterable[Any],
        progress: Any = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Iterate over ``job(item)`` for all items, as the results come."""

    @abstractmethod
    def get_pp_stat(self) -> StatMerger | None:
        """Return the statistics of the last run by host, if they are to be had."""

    @abstractmethod
    def __enter__(self) -> TaskManager: ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...

    @property
    def config(self) -> dict[str, Any]:
        """All settings by name."""
        return {
            **self.params,
            **{name: getattr(self, name) for name in ("ncpus", "block_size", *_OWN)},
        }

    def table(self, title: str = "", prefix: str = "# ") -> str:
        """Return a table of the settings; `prefix` begins each line."""
        cls = type(self)
        rows = [("Parameter", "type", "value")]
        rows += [(name, type(value).__name__, repr(value)) for name, value in self.config.items()]
        first, second = (max(len(row[n]) for row in rows) for n in (0, 1))
        lines = [title or f"{cls.__name__} from {cls.__module__}"]
        lines += [f"{name:>{first}}  {kind:{second}}  {value}" for name, kind, value in rows]
        return "\n".join(prefix + line for line in lines)

    def __str__(self) -> str:
        return self.table(prefix="")

    __repr__ = __str__

    def print_statistics(
        self, stat_pp: StatMerger, stat_loc: StatMerger, cputime: float | None = None
    ) -> None:
        """Print the statistics of a run, those by server if they are complete, unless silent."""
        if not self.silent:
            by_server = len(stat_pp) and stat_pp.njobs == stat_loc.njobs
            (stat_pp if by_server else stat_loc).print_stats(cputime=cputime)

    def extra_arguments(self, *args: object, **kwargs: object) -> None:
        """Warn of arguments that are not used."""
        if args or kwargs:
            texts = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
            logger.warning("%s: not used: %s", type(self).__name__, ", ".join(texts))

    def chunksize_guess(self, jobs: object, njobs: int | None = None) -> int:
        """Return how many of `jobs`, or of so many, to send together."""
        count = len(jobs) if isinstance(jobs, Sized) else positive(jobs) or positive(njobs)
        return max(1, (count or 0) // (4 * (self.ncpus + 1)))


class WorkManager(TaskManager):
    """Ostap's manager on workers of ours: a face of `ostap_parallel.WorkManager`.

    Parameters
    ----------
    ncpus
        As of `TaskManager`; 0, with servers, is none.
    ppservers
        Hosts, as the `servers` of `ostap_parallel.WorkManager`.
    kwargs
        Settings of that one, also ``pp`` and ``Parallel``, which mean nothing here; and what
        `process` takes, for all runs. What is not known is told, once.

    Attributes
    ----------
    manager
        The manager that does the work; it starts when it is needed.
    """

    def __init__(self, ncpus: object = "autodetect", **kwargs: Any) -> None:
        executor = kwargs.pop("executor", None)
        self._hosts, options = manager_options(kwargs)
        self._window, self._every = options.get("window"), options.get("hyper_block_size")
        own = {name: options.pop(name) for name in _OWN if name in options}
        super().__init__(ncpus, block_size=options.pop("window", -1), **own, **options)
        self._servers = self._hosts.pop("servers", ())
        if isinstance(ncpus, int) and ncpus == 0 and self._servers:
            self.ncpus = 0
        self._executor, self._manager = executor, None

    @property
    def manager(self) -> Any:
        """The `ostap_parallel.WorkManager` that does the work."""
        if self._manager is None:
            # Hosts import this module with the tasks of users, and need no manager.
            cls = importlib.import_module("ostap_parallel.faces.manager").WorkManager
            executor = self._executor or executor_of(self.ncpus)
            where: dict[str, Any] = {"executor": executor}
            if executor is None:
                where = {"ncpus": self.ncpus, "servers": self._servers, **self._hosts}
            dump = {name: getattr(self, name) for name in _DUMP}
            self._manager = manager = cls(silent=True, **where, **dump)
            # Ostap makes one in each function, and closes none.
            self._closing = weakref.finalize(self, manager.close)
        return self._manager

    def process(self, task: Any, args: Iterable[Any], **kwargs: Any) -> Any:
        """Run a function ``f(jobid, item)``, or a task, on all items; return what is merged.

        Ctrl-C ends the run with a message, and what is merged by then is returned.

        Parameters
        ----------
        merger, collector, init
            For functions: ``merger(merged, result)`` or ``collector(merged, result, jobid)``
            returns what is merged then, with `init` for the first result. A `TaskMerger` starts
            from its own. Without them the results come as a list, in order, with a warning.
        njobs, max_value, max_jobs, total_jobs
            Number of items, for an input that does not tell.
        chunk_size, batch_size
            Items sent together; adapted to the time that they take if it is not 1 or more.
        block_size
            Chunks under way at most.
        hyper_block_size
            What is merged is dumped, if it is at all, after so many results at the latest.
        imports
            Modules that workers import before their first item.
        progress, silent, description
            As of the manager, for this run.
        ordered, on_error, retries, lost_retries, timeout, shared, seed, checkpoint
            As of `ostap_parallel.WorkManager.process`.
        """
        options = self._options(kwargs)
        silent = options.pop("silent", self.silent)
        items = _counted(args, options.pop("total", None))
        merging = self._merging(task, options)
        if isinstance(merging, Function) and merging.is_list:
            options.setdefault("ordered", True)
        every = positive(options.pop("hyper_block_size", self._every))
        if every is not None and self.dump_dbase is not None:
            options["dump_freq"] = min(self.dump_freq or every, every)
        try:
            self.manager.process(merging, items, **options)
        except KeyboardInterrupt:
            self._tell_interrupt()
            merging.finalize()
        if not silent:
            self.report.stats.print_stats(cputime=self.report.wall)
        return merging.results()

    def iexecute(
        self,
        job: Callable[[Any], Any],
        jobs_args: Iterable[Any],
        progress: Any = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Iterate over ``job(item)`` for all items: as the results come, or `ordered`.

        Ctrl-C ends that with a message.
        """
        options = self._options({**kwargs, "progress": progress})
        items = _counted(jobs_args, options.pop("total", None))
        for name in _OF_PROCESS & options.keys():
            del options[name]
        try:
            yield from self.manager.iexecute(job, items, **options)
        except KeyboardInterrupt:
            self._tell_interrupt()

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the keywords of a run for our manager, by the names that it has for them."""
        options = run_options(given, self.params)
        options.setdefault("progress", self.progress)
        options.setdefault("description", "Jobs")
        options.setdefault("window", self._window)
        options["progress"] = bool(options["progress"])
        for name in "chunk_size", "window":
            options[name] = positive(options.get(name))
        return options

    def _tell_interrupt(self) -> None:
        count = self.report.merged
        logger.warning("%s: %d jobs only are processed", keyboard_interrupt, count)

    @property
    def report(self) -> Any:
        """The report of the run that is going on, or of the last one."""
        return self.manager.report

    def get_pp_stat(self) -> StatMerger:
        """Return the statistics of the last run by host."""
        stats = StatMerger()
        stats += self.report.stats
        return stats

    @property
    def pool(self) -> Any:
        """What computes: our manager's pathos ParallelPool, or an executor of another kind."""
        foreign = self._executor or executor_of(self.ncpus)
        return self.manager.pool if foreign is None else self.manager.executor

    @property
    def ppservers(self) -> tuple[str, ...]:
        """The hosts, be they up or not."""
        return tuple(host.name for host in self._known_hosts())

    @property
    def locals(self) -> tuple[str, ...]:
        """The near ends of the tunnels to the hosts that are up."""
        return tuple(f"localhost:{host.port}" for host in self._known_hosts() if host.port)

    @property
    def remotes(self) -> tuple[str, ...]:
        """The hosts that are up."""
        return tuple(host.name for host in self._known_hosts() if host.state == "up")

    def _known_hosts(self) -> list[Any]:
        return list(getattr(self.manager.executor, "hosts", ()))

    def close(self) -> None:
        """End workers and servers; the next run starts new ones."""
        if self._manager is not None:
            self._manager = None
            self._closing()

    def __enter__(self) -> WorkManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Counted:
    """An input that tells how long it is."""

    def __init__(self, items: Iterable[Any], total: int) -> None:
        self._items, self._total = items, total

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __len__(self) -> int:
        return self._total


def _counted(items: Iterable[Any], total: object) -> Iterable[Any]:
    count = positive(total)
    return items if count is None or isinstance(items, Sized) else _Counted(items, count)
