"""Tasks as Ostap has them; hosts import this module, too, with the tasks of users."""

from __future__ import annotations

import importlib
import operator
import os
import random
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType
from typing import Any

from ostap_parallel.logs import logger_of
from ostap_parallel.runs import task as tasks
from ostap_parallel.runs.report import Statistics
from ostap_parallel.runs.shapes import as_merger, surroundings_of
from ostap_parallel.worker.execute import surroundings_of as hold
from ostap_parallel.worker.modes import modes_of

Directory = str | os.PathLike[str] | None
Variables = Mapping[str, Any]

logger = logger_of(__name__)

_FUNCTIONS = FunctionType, BuiltinFunctionType, type

# For functions; they matter where one of the others is loaded.
_MODES = {"batch": "if_loaded", "cleanup": True}
_LOADED = frozenset({"ROOT", "ostap.utils.cleanup"})


class Task(tasks.Task):
    """A computation with its own way of merging.

    As `ostap_parallel.Task`, and with what Ostap's has besides. What is not set leaves workers as
    they are.

    Attributes
    ----------
    directory
        Where the items are processed, if it is there.
    batch
        Whether ROOT draws nothing while an item runs; `batch_set`: this was set.
    build
        Where ROOT compiles meanwhile; `build_set`.
    implicitMT
        Whether ROOT uses threads of its own meanwhile, or how many; `implicitMT_set`.
    cleanup
        Whether temporary files that Ostap has made are removed after each item.
    """

    cleanup: bool = True
    _batch: bool | None = None
    _build: str | None = None
    _implicit_mt: bool | int = True

    @abstractmethod
    def process(self, jobid: int, *params: Any) -> Any:
        """Return the result of one item; called on a worker. `jobid` counts items from 0."""

    def __call__(self, jobid: int, *params: Any) -> Any:
        return self.process(jobid, *params)

    @property
    def surroundings(self) -> dict[str, Any]:
        """The attributes that a worker applies before an item, as plain data."""
        return {**super().surroundings, **surroundings_of(self), "directory": None}

    @property
    def batch(self) -> bool | None:
        """Whether ROOT draws nothing while an item runs."""
        return self._batch

    @batch.setter
    def batch(self, value: object) -> None:
        self._batch = bool(value)

    @property
    def batch_set(self) -> bool:
        """Whether `batch` was set."""
        return "_batch" in vars(self)

    @property
    def build(self) -> str | None:
        """Where ROOT compiles while an item runs."""
        return self._build

    @build.setter
    def build(self, value: Directory) -> None:
        self._build = None if value is None else os.fspath(value)

    @property
    def build_set(self) -> bool:
        """Whether `build` was set."""
        return "_build" in vars(self)

    @property
    def implicitMT(self) -> bool | int:
        """Whether ROOT uses threads of its own while an item runs, or how many."""
        return self._implicit_mt

    @implicitMT.setter
    def implicitMT(self, value: bool | int) -> None:
        self._implicit_mt = value

    @property
    def implicitMT_set(self) -> bool:
        """Whether `implicitMT` was set."""
        return "_implicit_mt" in vars(self)


class GenericTask(Task):
    """A task made of functions.

    Parameters
    ----------
    processor
        ``processor(jobid, item)`` returns the result of one item.
    merger
        ``merger(merged, result)`` returns the new merged value; for the first result, too, with
        the initial value. Default: ``operator.add``.
    collector
        ``collector(merged, result, jobid)``, in place of `merger`.
    initializer
        Returns the initial value of each run; ``None``: it is ``None``.
    directory, environment, append_to, prepend_to, cleanup
        See `Task`.
    """

    def __init__(
        self,
        processor: Callable[..., Any],
        merger: Any = None,
        collector: tasks.Collector | None = None,
        initializer: Callable[[], Any] | None = tuple,
        directory: Directory = None,
        environment: Variables | None = None,
        append_to: Variables | None = None,
        prepend_to: Variables | None = None,
        cleanup: bool = True,
    ) -> None:
        if not callable(processor):
            raise TypeError(f"processor must be callable, not {type(processor).__name__}")
        self._processor, self._collector = processor, collector
        self._merger = operator.add if merger is None and collector is None else merger
        self._initializer, self._output = initializer, None
        self.directory = None if directory is None else os.fspath(directory)
        self.environment, self.append_to = environment or {}, append_to or {}
        self.prepend_to, self.cleanup = prepend_to or {}, bool(cleanup)

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        """Whether there is no state: an item sees nothing of a task but a function, then."""
        inherited = type(self).process is GenericTask.process
        return inherited and isinstance(self._processor, _FUNCTIONS)

    @property
    def processor(self) -> Callable[..., Any]:
        """What computes."""
        return self._processor

    @property
    def merger(self) -> Any:
        """What merges, but for a collector."""
        return self._merger

    @property
    def collector(self) -> tasks.Collector | None:
        """What merges and is told the `jobid`."""
        return self._collector

    @property
    def initializer(self) -> Callable[[], Any] | None:
        """What returns the initial value."""
        return self._initializer

    def __getstate__(self) -> dict[str, Any]:
        # workers compute only, and what has been merged may be large
        merging = {"_output": None, "_merger": None, "_collector": None, "_initializer": None}
        return {**vars(self), **merging}

    def initialize_local(self) -> None:
        """Start from the initial value."""
        self._output = self._initializer() if self._initializer else None

    def initialize_remote(self, jobid: int = -1) -> None:
        """Do nothing: the initial value belongs to the merging side."""

    def process(self, jobid: int, *params: Any) -> Any:
        """Return ``processor(jobid, item)``."""
        return self._processor(jobid, *params)

    def merge_results(self, result: Any, jobid: int = -1) -> None:
        """Merge one result by the collector or the merger."""
        if self._collector is not None:
            self._output = self._collector(self._output, result, jobid)
        else:
            self._output = as_merger(self._merger)(self._output, result)

    def results(self) -> Any:
        """Return what is merged so far."""
        return self._output


class FuncTask(GenericTask):
    """A task made of one function, ``func(jobid, item)``; without a merger results are a tuple."""

    def __init__(
        self,
        func: Callable[..., Any],
        merger: Any = None,
        initializer: Callable[[], Any] | None = tuple,
        directory: Directory = None,
        environment: Variables | None = None,
        append_to: Variables | None = None,
        prepend_to: Variables | None = None,
        cleanup: bool = True,
    ) -> None:
        where = directory, environment, append_to, prepend_to
        super().__init__(func, merger or _append, None, initializer, *where, cleanup)


def function_task(
    func: Callable[..., Any],
    imports: Iterable[str],
    merger: Any = None,
    collector: tasks.Collector | None = None,
    init: Any = None,
) -> Function:
    """Return the task that a run of a function is; `init` itself is what merging starts from."""
    if merger is not None and collector is not None:
        logger.warning("both a merger and a collector: the merger merges")
        collector = None
    if merger is None and collector is None:
        logger.warning("neither a merger nor a collector: the results come as a list")
        if init is None:
            return Function(func, imports, merger=_append_to, initializer=list)
        merger = tasks.TaskMerger(None)
    elif isinstance(merger, tasks.TaskMerger):
        fresh = merger.fresh()
        init = fresh.result if init is None else init
        merger = partial(_merge_by, fresh)
    start = partial(_same, init)
    return Function(func, imports, merger=merger, collector=collector, initializer=start)


def _merge_by(merger: tasks.TaskMerger, merged: Any, result: Any) -> Any:
    return result if merged is None else merger(merged, result)


def _append_to(merged: list[Any], result: Any) -> list[Any]:
    merged.append(result)
    return merged


def _same(value: Any) -> Any:
    return value


def _append(merged: Any, result: Any) -> tuple[Any, ...]:
    return (*(merged or ()), result)


class Function(GenericTask):
    """What `WorkManager.process` makes of a function; ROOT draws nothing while it runs."""

    def __init__(self, func: Callable[..., Any], imports: Iterable[str], **merging: Any) -> None:
        super().__init__(func, **merging)
        self._imports = tuple(imports)

    @property
    def is_list(self) -> bool:
        """Whether the results are a list, for want of anything that merges them."""
        return self._merger is _append_to

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        """Whether it is a function and no object that could change."""
        return isinstance(self._processor, _FUNCTIONS)

    def worker_init(self) -> None:
        """Import the modules."""
        for name in self._imports:
            importlib.import_module(name)

    def process(self, jobid: int, *params: Any) -> Any:
        """Return ``func(jobid, item)``."""
        if not _LOADED.isdisjoint(sys.modules):
            with modes_of(_MODES):
                return self._processor(jobid, *params)
        return self._processor(jobid, *params)


def task_executor(item: tuple[Any, ...]) -> tuple[int, Any, Statistics]:
    """Run one item ``(task, jobid, *params)``; return jobid, result and who took how long."""
    task, jobid, *params = item
    with hold(surroundings_of(task)):
        if hasattr(task, "initialize_remote"):
            task.initialize_remote(jobid)
        with Statistics() as stat:
            result = task.process(jobid, *params)
    return jobid, result, stat


def func_executor(item: tuple[Any, ...]) -> tuple[int, Any, Statistics]:
    """Run one item ``(function, jobid, *params)``; return as `task_executor` does."""
    function, jobid, *params = item
    with modes_of(_MODES), Statistics() as stat:
        result = function(jobid, *params)
    return jobid, result, stat


def random_random(*jobid: object) -> None:
    """Seed ``random`` and, where loaded, numpy, ROOT and RooFit, from the system's entropy.

    `jobid` has a part in it. A task that calls this is not reproducible by ``seed=``.
    """
    seed = f"{jobid}:{os.urandom(32).hex()}"
    random.seed(seed)
    number = random.getrandbits(31) | 1  # 0 would mean "from the clock"
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(number)
    if "ROOT" in sys.modules:
        root = sys.modules["ROOT"]
        root.gRandom.SetSeed(number)
        root.RooRandom.randomGenerator().SetSeed(number)
