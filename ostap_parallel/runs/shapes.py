"""Tasks and mergers of other libraries, taken by what they can do.

Standard library and this package's part for bare hosts only: this module is imported there too.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from ostap_parallel.runs.task import Task

_METHODS = "process", "merge_results", "results"
_VARIABLES = "environment", "prepend_to", "append_to"


class ShapedTask(Task):
    """A task that does what another object, with the methods of one, does.

    Parameters
    ----------
    task
        Has `process`, `merge_results` and `results`, and any other method or attribute of a `Task`
        or of Ostap's.
    imports
        Modules that are imported on workers before their first item.
    """

    def __init__(self, task: Any, imports: Sequence[str] = ()) -> None:
        self.task, self.imports = task, tuple(imports)

    @property
    def keeps_state(self) -> bool:  # type: ignore[override]
        """What the task says, which need not say anything."""
        return bool(getattr(self.task, "keeps_state", False))

    @property
    def surroundings(self) -> dict[str, Any]:
        """The attributes of the task that a worker applies before an item."""
        if isinstance(self.task, Task):
            return self.task.surroundings
        return surroundings_of(self.task)

    def initialize_local(self) -> None:
        """Have the task prepare the run."""
        self._call("initialize_local")

    def initialize_remote(self, jobid: int = -1) -> None:
        """Have the task prepare one item."""
        if hasattr(self.task, "initialize_remote"):
            self.task.initialize_remote(jobid)
        else:
            self._call("initialize_local")

    def worker_init(self) -> None:
        """Import the modules, and have the task prepare a worker."""
        for name in self.imports:
            importlib.import_module(name)
        self._call("worker_init")

    def process(self, jobid: int, item: Any) -> Any:
        """Return what the task returns for an item."""
        return self.task.process(jobid, item)

    def merge_results(self, result: Any, jobid: int = -1) -> None:
        """Have the task take a result."""
        self.task.merge_results(result, jobid)

    def results(self) -> Any:
        """Return what the task has merged."""
        return self.task.results()

    def finalize(self) -> None:
        """Have the task end the run."""
        self._call("finalize")

    def _call(self, name: str) -> None:
        method = getattr(self.task, name, None)
        if method is not None:
            method()


def as_task(task: Any) -> Any:
    """Return `task` as a `Task` if it has the methods of one, else itself."""
    if isinstance(task, Task | type) or not all(
        callable(getattr(task, m, None)) for m in _METHODS
    ):
        return task
    return ShapedTask(task)


def as_merger(merger: Any) -> Any:
    """Return `merger`, or a function for one that merges by ``merge(result)`` into ``result``.

    The function takes the place of a merger and that of a collector.
    """
    if callable(merger) or not callable(getattr(merger, "merge", None)):
        return merger
    return _Merging(merger)


class _Merging:
    def __init__(self, merger: Any) -> None:
        self._merger = merger

    def __call__(self, merged: Any, result: Any, jobid: int = -1) -> Any:
        self._merger.merge(result)
        return self._merger.result


def surroundings_of(task: Any) -> dict[str, Any]:
    """Return what Ostap's attributes of a task ask for, as `Task.surroundings` does.

    A directory counts where it exists. Those that take effect in ROOT are there only if they were
    set: ``batch_set`` and the like.
    """
    modes: dict[str, Any] = {}
    directory = getattr(task, "directory", None)
    if directory:
        modes["directory"] = os.fspath(directory)
    if getattr(task, "cleanup", False) and "ostap.utils.cleanup" in sys.modules:
        modes["cleanup"] = True
    for mode, name in ("batch", "batch"), ("build", "build"), ("implicit_mt", "implicitMT"):
        if getattr(task, f"{name}_set", False):
            modes[mode] = getattr(task, name)
    found = {name: dict(getattr(task, name, None) or {}) for name in _VARIABLES}
    dot = bool(getattr(task, "dot_in_path", False))
    return {**found, "dot_in_path": dot, "modes": modes}
