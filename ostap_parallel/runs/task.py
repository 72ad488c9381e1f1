"""What users hand in: tasks, and how their results are merged.

Standard library only: this module is imported on bare hosts too.
"""

from __future__ import annotations

import contextlib
import copy
import operator
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from ostap_parallel.errors import ConfigError

Merger = Callable[[Any, Any], Any]
Collector = Callable[[Any, Any, int], Any]
Variables = Mapping[str, Any]
_FUNCTIONS = FunctionType, BuiltinFunctionType, type


class TaskMerger:
    """Merge results one by one.

    Parameters
    ----------
    merger
        ``merger(merged, result)`` returns the new merged value. With ``None`` the values merge
        themselves: ``+=``, then ``+``, then the ``append`` or ``add`` method of `merged`.
        Of lists, only lists and tuples are joined with ``+=``; all else is appended.
    init
        What to start from, copied deeply for every start. ``None`` means that the first result
        is taken as it is; `merger` is not called for it.
    combine
        Merge the results of items that travel together on their worker, so that they travel as
        one. `merger` must be associative then, `init` must be of the kind of the results, and
        neither may be left to the values.

    Attributes
    ----------
    combiner
        What merges on workers: `merger`, or ``None`` without `combine`.
    result
        What is merged so far; a copy of the initial value when nothing is.
    nmerged
        Number of merged results.
    """

    def __init__(
        self, merger: Merger | None = operator.add, init: Any = None, *, combine: bool = False
    ) -> None:
        _check_callable("merger", merger, optional=True)
        if combine and merger is None:
            raise ValueError("combine=True needs a merger, such as operator.iadd")
        self._merger = merger
        self.combiner = merger if combine else None
        self._init = copy.deepcopy(init)  # the caller may go on filling its own
        self.result: Any = copy.deepcopy(init)
        self.nmerged = 0

    def __call__(self, merged: Any, result: Any) -> Any:
        """Return `merged` and `result` merged; what this object has merged does not change.

        ``None`` is a value like any other here. `merged` itself may be changed by ``+=``,
        ``append`` or ``add`` when the merger is ``None``.
        """
        if self._merger is not None:
            return self._merger(merged, result)
        return _merge_by_themselves(merged, result)

    def __iadd__(self, result: Any) -> TaskMerger:
        return self.merge(result)

    def __len__(self) -> int:
        return self.nmerged

    def __bool__(self) -> bool:
        return True  # an empty one is still a merger: ``if merger`` must not depend on len()

    def merge(self, result: Any) -> TaskMerger:
        """Merge one more result; return this object."""
        # Counting tells "nothing merged yet" from a merged None.
        first = self.nmerged == 0 and self._init is None
        self.result = result if first else self(self.result, result)
        self.nmerged += 1
        return self

    def reset(self) -> None:
        """Forget what was merged and start again from a copy of the initial value."""
        self.result = copy.deepcopy(self._init)
        self.nmerged = 0

    def fresh(self) -> TaskMerger:
        """Return a new merger of the same kind that has merged nothing yet."""
        return TaskMerger(self._merger, self._init, combine=self.combiner is not None)


class _Variables:
    """A dictionary of environment variables in a task; assigning to it updates it.

    It is made on first use, as classes of users often forget ``super().__init__()``.
    """

    def __set_name__(self, owner: type[Task], name: str) -> None:
        self._name = name

    def __get__(self, task: Task | None, owner: type[Task]) -> Any:
        return self if task is None else vars(task).setdefault(self._name, {})

    def __set__(self, task: Task, values: Variables) -> None:
        vars(task).setdefault(self._name, {}).update(_as_strings(self._name, values))


class Task(ABC):
    """A computation with its own way of merging.

    The task is sent to the workers by pickle. There `initialize_remote` and `process` run for
    each item, with a fresh copy of the task; here `merge_results` takes what `process` returned.

    Attributes
    ----------
    directory
        Where the items are processed; ``None`` leaves the workers where they are.
    environment
        Variables to set on the workers; ``$NAME`` is expanded there.
    prepend_to, append_to
        Paths to put before or behind those of a variable such as ``PATH``.
    dot_in_path
        Whether ``"."`` is added to ``sys.path`` on the workers.
    keeps_state
        Whether all items of a worker have the same task, and find what others have left in it.
    """

    directory: str | os.PathLike[str] | None = None
    environment = _Variables()
    prepend_to = _Variables()
    append_to = _Variables()
    dot_in_path: bool = False
    keeps_state: bool = False

    def initialize_local(self) -> None:  # noqa: B027
        """Prepare the run; called once, here."""

    def initialize_remote(self, jobid: int = -1) -> None:
        """Prepare one item; called on the worker before each."""
        self.initialize_local()

    def worker_init(self) -> None:  # noqa: B027
        """Prepare a worker; called there once per run, before its first item."""

    @abstractmethod
    def process(self, jobid: int, item: Any) -> Any:
        """Return the result of one item; called on a worker. `jobid` counts items from 0."""

    @abstractmethod
    def merge_results(self, result: Any, jobid: int = -1) -> None:
        """Take the result of item `jobid`; called here, in the order of arrival."""

    @abstractmethod
    def results(self) -> Any:
        """Return what is merged so far."""

    def finalize(self) -> None:  # noqa: B027
        """End the run; called once, here, after the last result is merged."""

    def __call__(self, jobid: int, item: Any) -> Any:
        return self.process(jobid, item)

    @property
    def output(self) -> Any:
        """What is merged so far."""
        return self.results()

    @property
    def surroundings(self) -> dict[str, Any]:
        """The attributes that a worker applies before an item, as plain data."""
        directory = self.directory
        return {
            "directory": directory and _check_text("directory", os.fspath(directory)),
            # Checked again: the dictionaries can be filled directly, or be class attributes.
            "environment": _as_strings("environment", self.environment),
            "prepend_to": _as_strings("prepend_to", self.prepend_to),
            "append_to": _as_strings("append_to", self.append_to),
            "dot_in_path": bool(self.dot_in_path),
        }


class GenericTask(Task):
    """A task made of functions.

    Parameters
    ----------
    processor
        ``processor(jobid, item)`` returns the result of one item.
    merger
        ``merger(merged, result)`` returns the new merged value; a `TaskMerger` may bring its
        own initial value. Default: ``operator.add``.
    collector
        ``collector(merged, result, jobid)``, in place of `merger`. Without an initial value it
        is called with ``None`` for the first result.
    initializer
        Returns the initial value of each run. Without one, or when it returns ``None``, the
        first result is taken as it is and `merger` is not called for it.
    directory, environment, append_to, prepend_to, dot_in_path
        See `Task`.
    """

    def __init__(
        self,
        processor: Callable[..., Any],
        merger: Merger | None = None,
        collector: Collector | None = None,
        initializer: Callable[[], Any] | None = None,
        directory: str | os.PathLike[str] | None = None,
        environment: Variables | None = None,
        append_to: Variables | None = None,
        prepend_to: Variables | None = None,
        dot_in_path: bool = False,
    ) -> None:
        _check_callable("processor", processor)
        _check_callable("collector", collector, optional=True)
        _check_callable("initializer", initializer, optional=True)
        if merger is not None and collector is not None:
            raise ValueError("give either merger or collector, not both")
        if not isinstance(merger, TaskMerger):
            merger = TaskMerger(operator.add if merger is None else merger)
        self._processor = processor
        self._merger = merger.fresh()  # what the caller merged before stays with the caller
        self._collector = collector
        self._initializer = initializer
        self._output: Any = None
        self._nmerged = 0
        self.directory = None if directory is None else os.fspath(directory)
        self.environment, self.append_to = environment or {}, append_to or {}
        self.prepend_to, self.dot_in_path = prepend_to or {}, dot_in_path

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        """Whether there is no state: an item sees nothing of a task but a function, then."""
        inherited = type(self).process in (GenericTask.process, FuncTask.process)
        return inherited and isinstance(self._processor, _FUNCTIONS)

    @property
    def combiner(self) -> Merger | None:
        """What merges results on workers; ``None``: nothing does."""
        return None if self._collector is not None else self._merger.combiner

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_output": None, "_nmerged": 0}  # workers need no results

    def initialize_local(self) -> None:
        """Start from the initial value."""
        self._nmerged = 0
        self._output = self._initializer() if self._initializer else self._merger.fresh().result

    def initialize_remote(self, jobid: int = -1) -> None:
        """Do nothing: the initial value belongs to the merging side."""

    def process(self, jobid: int, item: Any) -> Any:
        """Return ``processor(jobid, item)``."""
        return self._processor(jobid, item)

    def merge_results(self, result: Any, jobid: int = -1) -> None:
        """Merge one result by the collector or the merger."""
        if self._collector is not None:
            self._output = self._collector(self._output, result, jobid)
        elif self._nmerged == 0 and self._output is None:
            self._output = result
        else:
            self._output = self._merger(self._output, result)
        self._nmerged += 1

    def results(self) -> Any:
        """Return what is merged so far."""
        return self._output


class FuncTask(GenericTask):
    """A task made of a function of the item alone; else as `GenericTask`."""

    def process(self, jobid: int, item: Any) -> Any:
        """Return ``processor(item)``."""
        return self._processor(item)


def _check_callable(name: str, value: object, optional: bool = False) -> None:
    if not callable(value) and not (optional and value is None):
        raise TypeError(f"{name} must be callable, not {type(value).__name__}")


def _as_strings(name: str, values: Variables) -> dict[str, str]:
    """Return `values` with paths and numbers as strings, as the environment takes them."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} must be a mapping, not {type(values).__name__}")
    strings = {}
    for key, value in values.items():
        # None would silently become the text "None"
        if not isinstance(key, str) or not isinstance(value, (str, int, float, os.PathLike)):
            raise TypeError(f"{name}: {key!r} must be a name with a string, not {value!r}")
        strings[_check_text(name, key)] = _check_text(f"{name}: {key}", str(value))
        if not key or "=" in key:
            raise ConfigError(f"{name}: not the name of a variable: {key!r}")
    return strings


def _check_text(name: str, text: str) -> str:
    """Return `text` if the system takes it for a path or a variable."""
    with contextlib.suppress(UnicodeEncodeError):
        if b"\0" not in os.fsencode(text):
            return text
    raise ConfigError(f"{name}: with characters that the system does not take: {text!r}")


def _merge_by_themselves(merged: Any, result: Any) -> Any:
    operators: tuple[Merger, ...] = (operator.iadd, operator.add)
    if isinstance(merged, list) and not isinstance(result, (list, tuple)):
        operators = ()  # += would take a string apart, and keep only the keys of a dictionary
    failure: TypeError | None = None
    for combine in operators:  # + may go where += does not: floats into integers of numpy
        try:
            return combine(merged, result)
        except TypeError as exc:
            failure = failure or exc
    for name in ("append", "add"):
        method = getattr(merged, name, None)
        if callable(method):
            method(result)
            return merged
    kinds = f"{type(result).__name__} into {type(merged).__name__}"
    raise TypeError(f"do not know how to merge {kinds}") from failure
