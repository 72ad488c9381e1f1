"""`multiprocessing.Pool` by arrays of jobs."""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ostap_parallel.arrays import run as runs
from ostap_parallel.arrays import settings as arrays
from ostap_parallel.arrays.backend import ArrayBackend
from ostap_parallel.arrays.layout import DIRECTORY
from ostap_parallel.arrays.run import GRACE, POLLING, Run
from ostap_parallel.arrays.settings import RETRIES, Amount
from ostap_parallel.errors import SchedulerUnavailable, add_note
from ostap_parallel.faces.pool import AsyncResult, Callback, Pool
from ostap_parallel.runs.outcome import Batch, Outcome
from ostap_parallel.runs.stream import Stream

logger = logging.getLogger(__name__)

Function = Callable[..., Any]


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
        options: str = "",
        skip: str | Collection[str] = (),
        environment: str = "",
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
        if chunks is not None and chunks < 1:
            raise ValueError(f"chunks must be at least 1, not {chunks}")
        if polling <= 0 or grace < 0:
            raise ValueError("polling and grace are seconds, and not negative")
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
        )
        self.directory = Path(directory or DIRECTORY).absolute()
        self._keep, self._chunks, self._timing = keep, chunks, (polling, grace)
        self._verbose = verbose
        backend = ArrayBackend(self._new_directory, self._settings, polling, grace)
        super().__init__(executor=backend)

    def _new_directory(self) -> Path:
        return self.directory / f"{time.strftime('%Y%m%dT%H%M%S')}-{secrets.token_hex(3)}"

    def submit(self, func: Function, items: Iterable[Any], chunksize: int | None = None) -> Run:
        """Submit ``func(item)`` for all items, and return without waiting.

        The run goes on when this process has ended; it is kept until it is removed.

        Raises
        ------
        SerializeError
            The function, or an item, cannot be sent.
        JobRefused
            Jobs can never run so, with the scheduler's words.
        SchedulerUnavailable
            The scheduler does not answer.
        """
        self._check_running()
        return self._create(func, items, chunksize)

    def _create(self, func: Function, items: Iterable[Any], chunksize: int | None) -> Run:
        root = self._new_directory()
        # each run has jobs by a name of its own
        settings = arrays.renamed(self._settings)
        runs.create(root, settings, func, items, chunksize, self._chunks)
        polling, grace = self._timing
        return Run(root, polling=polling, grace=grace)

    def apply_async(  # type: ignore[override]
        self,
        func: Function,
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] = {},
        callback: Callback = None,
        error_callback: Callback = None,
    ) -> AsyncResult:
        """Call a function in a job of its own; return at once."""
        doing = self._run(_call, [functools.partial(func, *args, **kwds)], 1)
        future: Future[Any] = Future()
        threading.Thread(target=_fill, args=[future, doing], name="pool", daemon=True).start()
        return self._result(future, doing.cancel, callback, error_callback)

    def _run(  # type: ignore[override]
        self,
        func: Function,
        items: Iterable[Any],
        chunksize: int | None = None,
        order: bool = True,
    ) -> Doing:
        self._check_running()
        return Doing(self, func, items, chunksize, order)

    def _stream(
        self, func: Function, iterable: Iterable[Any], chunksize: int | None, ordered: bool
    ) -> Stream:
        return super()._stream(func, list(iterable), chunksize, ordered)

    def terminate(self) -> None:
        """Stop all work, and cancel its jobs."""
        super().terminate()
        backend = self.backend
        assert isinstance(backend, ArrayBackend)
        backend.close()
        if self.directory.name == DIRECTORY:
            with contextlib.suppress(OSError):  # others may be in there
                self.directory.rmdir()


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
        Of each job, such as ``"4G"`` and ``"4:00:00"``; or a function that gets the number of the
        attempt, from 1 on: items whose job has run out of it are begun again, with more.
    options
        Directives as in the site's manual, such as ``"--partition=gpu --account=abc"``; they win
        over ours.
    skip
        Directives of ours to be left out, such as ``"--mem"``.
    environment
        Lines of the job's script before anything else, such as ``"module load root"``.
    limit
        Jobs at the same time at most; by default as many as there can be.
    chunks
        Jobs of a call; by default one for each item and not more than 1000, or with a `limit`
        four for each of these.
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


@dataclass
class Doing:
    """A call of a pool's: a run that is made when its results are asked for, and then removed."""

    pool: ArrayPool
    function: Function
    items: Iterable[Any]
    chunk_size: int | None
    order: bool
    _run: Run | None = None
    _is_cancelled: bool = field(default=False)

    @property
    def backend(self) -> ArrayBackend:
        """Of the pool."""
        backend = self.pool.backend
        assert isinstance(backend, ArrayBackend)
        return backend

    def wake(self) -> None:
        """Nothing waits for input."""

    def cancel(self) -> None:
        """Have `arrivals` end soon, from any thread."""
        self._is_cancelled = True
        if self._run is not None:
            self._run.stop()

    def arrivals(self) -> Generator[Batch | Outcome, None, None]:
        """Yield what becomes of the items; what is left of the run is kept if one has failed."""
        if not isinstance(self.items, (list, tuple, range)):
            self.items = list(self.items)
        if not self.items:
            return
        run = self._run = self.pool._create(self.function, self.items, self.chunk_size)
        is_over, done, failures = False, 0, 0
        try:
            if self._is_cancelled:
                raise CancelledError("it was cancelled")
            for outcome in run.arrivals(self.order):
                assert isinstance(outcome, Outcome)
                failures += outcome.error is not None
                if outcome.error is not None and self.pool._keep is not False:
                    note = f"the run is kept, see: ostap-parallel jobs {run.directory}"
                    add_note(outcome.error, note)
                done += 1
                if self.pool._verbose:
                    now = time.strftime("%H:%M:%S")
                    print(f"[{now}] {done} of {run.total} done, {failures} failed", flush=True)
                yield outcome
            is_over = True
        finally:
            self._finish(run, is_over, failures)

    def _finish(self, run: Run, is_over: bool, failures: int) -> None:
        keep = self.pool._keep
        if not is_over:
            try:
                run.cancel()
            except SchedulerUnavailable as exc:  # what has stopped us is more important
                logger.warning("jobs of %s may be left, and will do nothing: %s", run, exc)
            if keep is not False and run.ended:
                text = "stopped: what is done is in %s, and Run(...).resubmit() goes on"
                logger.warning(text, run.directory)
                return
        if keep is False or (keep is None and not failures) or not (is_over or run.ended):
            run.remove()


def _call(function: Callable[[], Any]) -> Any:
    return function()


def _fill(future: Future[Any], doing: Doing) -> None:
    """Give a future the outcome of the one item of a call."""
    try:
        (outcome,) = doing.arrivals()
        assert isinstance(outcome, Outcome)
    except BaseException as exc:
        future.set_exception(exc)
    else:
        if outcome.error is not None:
            future.set_exception(outcome.error)
        else:
            future.set_result(outcome.value)
