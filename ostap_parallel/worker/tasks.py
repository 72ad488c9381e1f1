"""Running items with a task, which each of them finds as the run has begun with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ostap_parallel.worker.copies import copier_of


class TaskCall:
    """Calls a task for an item: ``initialize_remote(index)``, then ``process(index, item)``.

    Each item has a copy of its own of the task, so that no item sees what another has left in
    it; but for a task that says ``keeps_state``. What `prepare` gives to the members of the task
    is not copied: it may be large, or open files.
    """

    def __init__(self, task: Any) -> None:
        self.__self__: Any = task
        self.__qualname__ = f"{type(task).__qualname__}.process"
        self._copy: Callable[[], Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return TaskCall, (self.__self__,)

    def prepare(self) -> None:
        """Have the task prepare its worker; call this there once, before the first item."""
        task = self.__self__
        before = dict(getattr(task, "__dict__", {}))
        task.worker_init()
        if task.keeps_state:
            self._copy = lambda: task
            return
        now = getattr(task, "__dict__", {}).items()
        new = [value for name, value in now if name not in before or before[name] is not value]
        self._copy = copier_of(task, new)
        self.__self__ = None  # it may be large, and the copies come from elsewhere

    def __call__(self, index: int, item: Any) -> Any:
        """Return the result of one item."""
        assert self._copy is not None
        task = self._copy()
        task.initialize_remote(index)
        return task.process(index, item)
