"""`multiprocessing.Pool` by arrays of jobs."""

from __future__ import annotations

import contextlib
import functools
import secrets
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ostap_parallel.arrays import run as runs
from ostap_parallel.arrays import settings as arrays
from ostap_parallel.arrays.backend import ArrayBackend
from ostap_parallel.arrays.layout import DIRECTORY
from ostap_parallel.arrays.run import GRACE, POLLING, Run
from ostap_parallel.arrays.settings import RETRIES, Amount
from ostap_parallel.batch.calls import Calls, Doing
from ostap_parallel.faces.pool import TERMINATED, AsyncResult, Callback, Pool
from ostap_parallel.runs.checks import check_callable, check_number
from ostap_parallel.runs.outcome import Outcome
from ostap_parallel.runs.stream import Stream
from ostap_parallel.worker.tasks import each_anew

T = TypeVar("T")

Function = Callable[..., Any]

# Seconds that the end of a pool waits for the scheduler to cancel its jobs.
PATIENCE = 60.0


class ArrayPool(Pool):
    """What `SlurmPool` and `SgePool` have in common."""

    kind: ClassVar[str]
    commands: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        cpus: int = 1,
        processes: int | None = None,
        memory: Amount = "",
        walltime: Amount = "",
        options: str | Collection[str] = "",
        skip: str | Collection[str] = (),
        environment: str | Collection[str] = "",
        limit: int | None = None,
        chunks: int | None = None,
        retries: int = RETRIES,
        python: str = sys.executable,
        keep: bool | None = None,
        polling: float = POLLING,
        grace: float = GRACE,
        submit_timeout: float = 30.0,
        verbose: bool = False,
        **commands: str,
    ) -> None:
        if unknown := sorted(commands.keys() - set(self.commands)):
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}")
        check_number("chunks", chunks, 1, or_none=True)
        self._timing = _timing(polling, grace)
        self.directory = _directory(directory)
        self._settings = arrays.make(
            self.kind,
            cpus=cpus,
            processes=processes,
            memory=memory,
            walltime=walltime,
            options=options,
            skip=skip,
            environment=environment,
            limit=limit,
            retries=retries,
            python=python,
            submit_timeout=submit_timeout,
            commands=commands,
            root=self.directory,
        )
        self._keep, self._chunks, self._verbose = keep, chunks, verbose
        self._calls = Calls(2 * submit_timeout + PATIENCE)
        weakref.finalize(self, self._calls.end)  # at exit at the latest
        new = _new_in(self.directory)
        super().__init__(executor=ArrayBackend(new, self._settings, *self._timing))

    def submit(self, func: Function, items: Iterable[Any], chunksize: int | None = None) -> Run:
        """Submit ``func(item)`` for all items, and return without waiting.

        The run goes on when this process has ended; it is kept until it is removed. Where this is
        interrupted, nothing is left.

        Raises
        ------
        SerializeError
            The function, or an item, cannot be sent.
        JobRefused
            Jobs can never run so, with the scheduler's words.
        SchedulerUnavailable
            The scheduler does not answer.
        """
        return self._run(func, items, chunksize).submit()

    def apply(self, func: Function, args: Iterable[Any] = (), kwds: Mapping[str, Any] = {}) -> Any:
        """Call a function in a job of its own; return what it returns."""
        return self._map_here(_call, [functools.partial(func, *args, **kwds)], 1)[0]

    def apply_async(
        self,
        func: Function,
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Call a function in a job of its own; return at once."""
        return self._or_cancelled(
            lambda: self._apply_async(func, args, kwds, callback, error_callback)
        )

    def _apply_async(
        self,
        func: Function,
        args: Iterable[Any],
        kwds: Mapping[str, Any],
        callback: Callback,
        error_callback: Callback,
    ) -> AsyncResult:
        doing = self._run(_call, [functools.partial(func, *args, **kwds)], 1)
        result = AsyncResult(self, doing.cancel, callback, error_callback)
        return self._begin(result, doing.begin(_only))

    def _map_async(self, *args: Any, **kwargs: Any) -> AsyncResult:
        return self._or_cancelled(lambda: super(ArrayPool, self)._map_async(*args, **kwargs))

    def _count(self, run: Doing, left: object) -> None:  # type: ignore[override]
        """Do nothing: all is left until all is done."""

    def _map_here(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None
    ) -> list[Any]:
        doing = self._run(func, iterable, chunksize)
        try:
            self._track(doing.ended, doing.cancel)
            return doing.apart(_all)
        except CancelledError:
            raise CancelledError(TERMINATED) from None
        except BaseException:
            doing.cancel()  # if it has not been begun
            raise

    def _run(  # type: ignore[override]
        self,
        func: Function,
        items: Iterable[Any],
        chunksize: int | None = None,
        order: bool = True,
        anew: bool = False,
    ) -> Doing:
        self._check_running()
        check_callable("func", func)
        if anew:
            func = each_anew(func)
        check_number("chunksize", chunksize, 1, or_none=True)
        polling, grace = self._timing
        held = items if isinstance(items, (list, tuple, range)) else list(items)
        # each run has jobs by a name of its own
        settings = arrays.renamed(self._settings)
        root, chunks = _new_in(self.directory)(), self._chunks

        def make(stopping: threading.Event) -> Run:
            timing = {"polling": polling, "grace": grace}
            return runs.create(root, settings, func, held, chunksize, chunks, stopping, **timing)

        backend = self.backend
        assert isinstance(backend, ArrayBackend)
        how: dict[str, Any] = {"keep": self._keep, "verbose": self._verbose, "order": order}
        return Doing(self._calls, backend, held, make, **how)

    def _stream(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None, ordered: bool
    ) -> Stream:
        items = list(iterable)
        stream = super()._stream
        return self._or_cancelled(lambda: stream(func, items, chunksize, ordered))

    def _or_cancelled(self, call: Callable[[], T]) -> T:
        """Call, and cancel what that has begun if it is interrupted: nobody has it then."""
        before = self._calls.mine()
        try:
            return call()
        except BaseException:
            for doing in self._calls.mine() - before:
                doing.cancel()
            raise

    def terminate(self) -> None:
        """Stop all work, and cancel its jobs."""
        super().terminate()
        self._calls.end()
        backend = self.backend
        assert isinstance(backend, ArrayBackend)
        backend.close()
        if self.directory.name == DIRECTORY:
            with contextlib.suppress(OSError):  # others may be in there
                self.directory.rmdir()


def _directory(directory: Path | str | None) -> Path:
    if isinstance(directory, int | float):  # as multiprocessing.Pool has it
        what = "how many jobs there are at a time is limit="
        raise TypeError(f"directory must be a path, not {directory!r}: {what}")
    return Path(directory or DIRECTORY).absolute()


def _timing(polling: float, grace: float) -> tuple[float, float]:
    if polling <= 0 or grace < 0:
        raise ValueError("polling and grace are seconds, and not negative")
    return polling, grace


def _new_in(directory: Path) -> Callable[[], Path]:
    """Return what names a directory for a run, in a directory."""
    return lambda: directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"


class SlurmPool(ArrayPool):
    """`multiprocessing.Pool` by arrays of SLURM jobs, over a directory that all hosts share.

    Parameters
    ----------
    directory
        Where each call keeps its files, in a directory of its own; by default
        ``.ostap_parallel_jobs`` in the working directory.
    cpus
        Cores of each job.
    processes
        Items that a job does at the same time; by default as many as it has cores.
    memory, walltime
        Of each job, such as ``"4G"``, and ``"4:00:00"`` or a ``timedelta``; or a function that
        gets the number of the attempt, from 1 on: items whose job has run out of it are begun
        again, with more.
    options
        Directives as in the site's manual, such as ``"--partition=gpu --account=abc"``, or a list
        of them; they win over ours.
    skip
        Directives of ours to be left out, such as ``"--mem"``.
    environment
        Lines of the job's script before anything else, such as ``"module load root"``.
    limit
        Jobs of a call at the same time at most; by default as many as there can be. Of other
        faces that run on the pool, all of theirs.
    chunks
        Jobs of a call, each with items in it that follow one another. By default four for each
        that may run at the same time, by `limit` or else by the cores that the scheduler tells of,
        but not more than 1000, nor than there are items.
    retries
        How often items are submitted again whose jobs were ended by the loss of their node,
        preemption, the wall time or a want of memory.
    python
        Python on the nodes.
    keep
        Keep the files of all calls, or of none; by default those of calls that have failed.
    polling, grace
        Seconds between looks at the files, at most; and for how long a file may not be seen here
        that another host has written.
    submit_timeout
        Seconds that ``sbatch`` may take, before the job is looked for by its name.
    verbose
        Print how many items are done when that changes.
    sbatch, squeue, scancel, clusters
        Where the commands are, and ``--clusters`` for them.

    Raises
    ------
    ValueError, TypeError
        A setting is wrong; nothing has been submitted.
    """

    kind = "slurm"
    commands = ("sbatch", "squeue", "scancel", "clusters")


class SgePool(ArrayPool):
    """`multiprocessing.Pool` by arrays of SGE jobs, over a directory that all hosts share.

    Parameters
    ----------
    directory, cpus, processes, walltime, environment, limit, chunks, retries, python, keep
        As of `SlurmPool`, and so are the others.
    memory
        Of each job; it is divided among its cores, as SGE asks for it by core.
    options, skip
        Such as ``"-q long -l gpu=1"``, and ``"-notify h_rt"``.
    qsub, qstat, qdel
        Where the commands are.
    parallel_environment, memory_resource
        What gives cores of one host, by default ``smp``; and the resource for memory, by default
        ``h_vmem``; several with commas.
    error
        What in the state of a job means that it is stuck.

    Raises
    ------
    ValueError, TypeError
        A setting is wrong; nothing has been submitted.
    """

    kind = "sge"
    commands = ("qsub", "qstat", "qdel", "parallel_environment", "memory_resource", "error")


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _only(doing: Doing) -> Any:
    """Return the value of the one item of a call, or raise its error."""
    (outcome,) = doing.arrivals()
    assert isinstance(outcome, Outcome)
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def _all(doing: Doing) -> list[Any]:
    """Return all values; raise the first error once all items have ended."""
    values: list[Any] = []
    error: BaseException | None = None
    for outcome in doing.arrivals():
        assert isinstance(outcome, Outcome)
        values.append(outcome.value)
        error = outcome.error if error is None else error
    if error is not None:
        raise error
    return values
