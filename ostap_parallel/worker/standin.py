"""What pools, executors and managers are in a task: their verbs, by way of nested tasks.

An object that holds its pool brings it along to the workers, and a function may name one. There
it submits to the caller's executor, as `ostap_parallel.futures` does; back at the caller's it is
the original.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from ostap_parallel.objects import kinds
from ostap_parallel.worker import calls, nested

# In a task more calls than this are sent in blocks.
BLOCKS = 256

_tokens: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
_originals: WeakValueDictionary[str, Any] = WeakValueDictionary()

Function = Callable[..., Any]


def register(cls: type, is_lazy: bool = False) -> None:
    """Have objects of a class travel as stand-ins; `is_lazy`: their `map` returns an iterator."""

    def reduce(pickler: Any, obj: Any) -> Any:
        token = _tokens.setdefault(obj, uuid.uuid4().hex)
        _originals[token] = obj
        return stand_in, (token, is_lazy)

    kinds.stand_ins[cls] = reduce


def stand_in(token: str, is_lazy: bool) -> Any:
    """Return the original where it is at home, elsewhere what stands for it."""
    original = _originals.get(token)
    return StandIn(token, is_lazy) if original is None else original


class Result:
    """The outcome of calls, as ``multiprocessing.pool.AsyncResult`` is."""

    def __init__(self, futures: list[Any], take: Callable[[list[Any]], Any]) -> None:
        self._futures, self._take = futures, take

    def get(self, timeout: float | None = None) -> Any:
        """Wait; return what was computed, or raise what a call has raised."""
        return self._take([future.result(timeout) for future in self._futures])

    def wait(self, timeout: float | None = None) -> None:
        """Wait until all have ended, or so many seconds."""
        nested.wait(self._futures, timeout)

    def ready(self) -> bool:
        """Return whether all have ended."""
        return all(future.done() for future in self._futures)

    def successful(self) -> bool:
        """Return whether none has raised."""
        if not self.ready():
            raise ValueError(f"{self!r} not ready")
        return not any(future.exception() for future in self._futures)


class _Done:
    """A future of a call that was done here."""

    def __init__(self, function: Function, args: Any) -> None:
        self._value = function(*args)

    def result(self, timeout: float | None = None) -> Any:
        return self._value

    def done(self) -> bool:
        return True

    def exception(self) -> None:
        return None


class StandIn:
    """Stands in a task for what the caller has: a pool, an executor, or a manager."""

    def __init__(self, token: str, is_lazy: bool) -> None:
        self._token, self._is_lazy = token, is_lazy

    def __reduce__(self) -> Any:
        return stand_in, (self._token, self._is_lazy)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *error: object) -> None:
        """Leave it to who has opened it."""

    def submit(self, fn: Function, /, *args: Any, **kwargs: Any) -> Any:
        """Have a worker call a function; return a future."""
        return nested.submit(fn, *args, **kwargs)

    def apply(self, func: Function, args: Iterable[Any] = (), kwds: Any = None) -> Any:
        """Have a worker call a function; return what that returns."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(self, func: Function, args: Iterable[Any] = (), kwds: Any = None) -> Result:
        """Have a worker call a function."""
        return Result([self.submit(func, *args, **(kwds or {}))], lambda values: values[0])

    def pipe(self, f: Function, /, *args: Any, **kwds: Any) -> Any:
        """Do as `apply` does, for pathos."""
        return self.apply(f, args, kwds)

    def apipe(self, f: Function, /, *args: Any, **kwds: Any) -> Result:
        """Do as `apply_async` does, for pathos."""
        return self.apply_async(f, args, kwds)

    def map(self, func: Function, *iterables: Any, **how: Any) -> Any:
        """Return the results of calls with the items; `how` they are sent is for workers."""
        values = self.amap(func, *iterables).get(how.get("timeout"))
        return iter(values) if self._is_lazy else values

    def amap(self, func: Function, *iterables: Any, **how: Any) -> Result:
        """Begin to do what `map` does."""
        if len(iterables) == 2 and isinstance(iterables[1], int):  # a size of chunks
            iterables = iterables[:1]
        return _call_all(func, list(zip(*iterables, strict=False)))

    def starmap(self, func: Function, iterable: Iterable[Any], *how: Any, **more: Any) -> Any:
        """Return the results of calls with the items as arguments."""
        return _call_all(func, list(map(tuple, iterable))).get()

    def starmap_async(self, func: Function, iterable: Iterable[Any], *how: Any) -> Result:
        """Begin to do what `starmap` does."""
        return _call_all(func, list(map(tuple, iterable)))

    def imap(self, func: Function, *iterables: Any, **how: Any) -> Iterator[Any]:
        """Do as `map` does, and return an iterator."""
        return iter(self.amap(func, *iterables).get())

    map_async = amap
    imap_unordered = uimap = imap

    def process(self, task: Any, items: Iterable[Any]) -> Any:
        """Do as a manager does with a function: return the results."""
        if not callable(task) or hasattr(task, "merge_results"):
            raise TypeError("in a task, process() takes a function: a Task is for the caller")
        return self.amap(task, items).get()

    def close(self, *args: Any, **kwargs: Any) -> None:
        """Leave that to the caller."""

    join = terminate = shutdown = clear = restart = close

    @property
    def pool(self) -> StandIn:
        """What stands for a manager's pool."""
        return self

    @property
    def executor(self) -> StandIn:
        """What stands for a manager's executor."""
        return StandIn("", is_lazy=True)

    @property
    def nodes(self) -> int:
        """The number of workers."""
        return 1 if calls.on_foreign.get() else nested.count_workers()

    ncpus = _processes = _max_workers = nodes


def _call_all(func: Function, items: list[tuple[Any, ...]]) -> Result:
    if calls.on_foreign.get():
        return Result([_Done(func, item) for item in items], list)
    if len(items) <= BLOCKS:
        return Result(nested.submit_all((func, item, {}) for item in items), list)
    size = -(-len(items) // BLOCKS)
    blocks = [items[start : start + size] for start in range(0, len(items), size)]
    futures = nested.submit_all((calls.call_each, (func, block), {}) for block in blocks)
    return Result(futures, lambda values: [one for block in values for one in block])
