"""Running items with a task, which each of them finds as the run has begun with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from ostap_parallel.worker import calls
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


class EachAnew:
    """Calls a function that is a method of an object, or an object, for items.

    Each item has a copy of its own of the object, as where each is sent with the object: what one
    has changed of it, others do not see.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        owner = function.__self__ if isinstance(function, MethodType) else function
        self.__self__: Any = owner
        self.__qualname__ = _member(function, "__qualname__", type(owner).__qualname__)
        self._function = function
        self._copy: Callable[[], Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return EachAnew, (self._function,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of one item."""
        if self._copy is None:  # nobody has changed it yet
            self._copy = copier_of(self.__self__, _large_of(self.__self__))
        function, owner = self._function, self._copy()
        if isinstance(function, MethodType):
            return function.__func__(owner, *args, **kwargs)
        return owner(*args, **kwargs)


# Bytes of an array from which on it is not copied for each item.
_LARGE = 64 << 20


def _large_of(owner: Any) -> list[Any]:
    sizes = ((one, _member(one, "nbytes", 0)) for one in _member(owner, "__dict__", {}).values())
    return [one for one, size in sizes if isinstance(size, int) and size >= _LARGE]


def _member(obj: Any, name: str, default: Any) -> Any:
    """Return a member of an object of the user's, whose class may find members its own way."""
    try:
        return getattr(obj, name, default)
    except Exception:
        return default


def each_anew(function: Any) -> Any:
    """Return a function that finds for each item what it holds as it was sent.

    A function that holds nothing is returned as it is; so is one of an object that `keeps_state`.
    """
    if type(function) is functools.partial:  # a class that derives from it may add to it
        first = function.func
        args = list(function.args)
        if first is calls.spread:
            args[:1] = map(each_anew, args[:1])
        return functools.partial(each_anew(first), *args, **function.keywords)
    owner = function.__self__ if isinstance(function, MethodType) else function
    called = [vars(cls)["__call__"] for cls in type(function).__mro__ if "__call__" in vars(cls)]
    own = isinstance(function, MethodType) or isinstance(next(iter(called), None), FunctionType)
    keeps_state = _member(owner, "keeps_state", False) is True  # an object may have any name
    if not own or isinstance(owner, type | ModuleType) or keeps_state:
        return function
    return function if isinstance(function, EachAnew) else EachAnew(function)
