"""Profiles of functions, in this process and on workers, by the names of `pathos.profile`."""

from __future__ import annotations

import base64
import functools
import logging
import marshal
import operator
import os
import threading
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ostap_parallel.worker.process import LogToServer

if TYPE_CHECKING:
    import cProfile

Generator = Callable[[], Any]

# Name of the records that bring profiles of decorated functions, packed.
PROFILED = "ostap_parallel.worker.profiled"


class _Current:
    """What is profiled in this process.

    Attributes
    ----------
    profiler
        Collects; ``None`` while profiling is off.
    """

    profiler: cProfile.Profile | None = None


def process_id() -> int:
    """Return the number of this process."""
    return os.getpid()


def thread_id() -> int:
    """Return the number of this thread."""
    return threading.get_ident()


def enable_profiling(*args: Any) -> None:
    """Have functions that are `profiled` be so, in this process and where they are sent."""
    _Current.profiler = new_profile()


def disable_profiling(*args: Any) -> None:
    """Have functions not be profiled."""
    stop_profiling()
    _Current.profiler = None


def start_profiling(*args: Any) -> None:
    """Profile all that runs in this thread from now on."""
    if _Current.profiler is None:
        enable_profiling()
    assert _Current.profiler is not None
    _Current.profiler.enable()


def stop_profiling(*args: Any) -> None:
    """Profile nothing but what is `profiled`."""
    if _Current.profiler is not None:
        _Current.profiler.disable()


def clear_stats(*args: Any) -> None:
    """Forget what was collected in this process."""
    if _Current.profiler is not None:
        _Current.profiler.clear()


def get_stats(*args: Any) -> list[Any] | None:
    """Return what was collected in this process; ``None`` while profiling is off."""
    return None if _Current.profiler is None else _Current.profiler.getstats()


def print_stats(*args: Any, sort: str | int = -1) -> None:
    """Print what was collected in this process."""
    if _Current.profiler is not None:
        _Current.profiler.print_stats(sort)


def dump_stats(
    *args: Any, gen: Generator | None = None, prefix: str = "id-", suffix: str = ".prof"
) -> None:
    """Write what was collected in this process to ``<prefix><gen()><suffix>``."""
    if _Current.profiler is not None:
        _Current.profiler.dump_stats(f"{prefix}{(gen or process_id)()}{suffix}")


class profiled:
    """Makes a function be profiled while profiling is enabled, wherever it runs.

    Parameters
    ----------
    gen
        Called where it runs, for the name of the file ``<prefix><gen()><suffix>``, by default the
        number of the process; what comes from workers is added up and written here, with the name
        of its host behind the prefix. Text (or a truth value) is a column, by which it is printed
        in place of that.
    """

    def __init__(
        self, gen: Generator | str | bool | None = None, prefix: str = "id-", suffix: str = ".prof"
    ) -> None:
        self._settings = (gen, prefix, suffix)

    def __call__(self, function: Callable[..., Any]) -> Profiled:
        """Return what calls the function."""
        return Profiled(function, *self._settings)


class Profiled:
    """A function that is profiled; it takes along whether profiling is enabled."""

    def __init__(
        self,
        function: Callable[..., Any],
        gen: Generator | str | bool | None,
        prefix: str,
        suffix: str,
        is_on: bool = False,
    ) -> None:
        functools.update_wrapper(self, function)
        self._gen, self._prefix, self._suffix = gen, prefix, suffix
        self._is_on = is_on

    def __reduce__(self) -> tuple[Any, ...]:
        is_on = self._is_on or _Current.profiler is not None
        function = self.__wrapped__  # type: ignore[attr-defined]
        return Profiled, (function, self._gen, self._prefix, self._suffix, is_on)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        function = self.__wrapped__  # type: ignore[attr-defined]
        log = next(
            (one for one in logging.getLogger().handlers if isinstance(one, LogToServer)), None
        )
        current = _Current.profiler
        if not (self._is_on or current is not None):
            return function(*args, **kwargs)
        profile = new_profile() if log is not None or current is None else current
        profile.enable()
        try:
            return function(*args, **kwargs)
        finally:
            profile.disable()
            self._tell(profile, log)

    def _tell(self, profile: cProfile.Profile, log: LogToServer | None) -> None:
        if isinstance(self._gen, str | bool):
            profile.print_stats(self._gen if isinstance(self._gen, str) else -1)
            return
        name = str((self._gen or process_id)())
        if log is None:
            profile.dump_stats(f"{self._prefix}{name}{self._suffix}")
            return
        record = logging.LogRecord(PROFILED, logging.INFO, "", 0, packed(profile), None, None)
        vars(record).update(prefix=self._prefix, id=name, suffix=self._suffix)
        log.emit(record)


def not_profiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without what `profiled` has made of it."""
    return function.__wrapped__ if isinstance(function, Profiled) else function  # type: ignore[attr-defined]


class profile:
    """Calls a function, and prints or writes its profile.

    Parameters
    ----------
    sort
        The column by which it is printed.
    pipe
        Of a pool: calls it there.
    config
        Settings of `profiled`, in place of printing.
    """

    def __init__(
        self,
        sort: str | int | bool | None = None,
        pipe: Callable[..., Any] | None = None,
        **config: Any,
    ) -> None:
        self._pipe = pipe
        gen = config.pop("gen", None if config else False)
        if sort is not None and not isinstance(sort, bool):
            gen = str(sort)
        self._settings = (gen, config.pop("prefix", "id-"), config.pop("suffix", ".prof"))
        if config:
            raise TypeError(f"there is no setting {', '.join(config)}")

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call it, and return what it returns."""
        called = Profiled(not_profiled(function), *self._settings, is_on=True)
        return (
            called(*args, **kwargs) if self._pipe is None else self._pipe(called, *args, **kwargs)
        )


def new_profile() -> cProfile.Profile:
    """Return a profile that is empty."""
    import cProfile  # it wants `profile`, which may be a file of the user's beside the script

    return cProfile.Profile()


def packed(profile: cProfile.Profile) -> str:
    """Return a profile as text for a record."""
    return base64.b64encode(zlib.compress(marshal.dumps(_stats_of(profile)))).decode()


def unpacked(text: str) -> dict[Any, Any]:
    """Return what `pstats` reads."""
    found: dict[Any, Any] = marshal.loads(zlib.decompress(base64.b64decode(text)))
    return found


def _stats_of(profile: cProfile.Profile) -> dict[Any, Any]:
    """Return what `pstats` reads.

    cProfile's own way keeps one of several functions with the same name and place, and each time
    that one is sent it is another.
    """
    from cProfile import label

    stats: dict[Any, Any] = {}
    entries: list[Any] = profile.getstats()
    for entry in entries:
        name, count = label(entry.code), entry.callcount
        new = count - entry.reccallcount, count, entry.inlinetime, entry.totaltime
        *old, callers = stats.get(name, (0, 0, 0, 0, {}))
        stats[name] = (*map(operator.add, old, new), callers)
    for entry in entries:
        caller = label(entry.code)
        for call in entry.calls or ():
            callers, count = stats[label(call.code)][4], call.callcount
            new = count, count - call.reccallcount, call.inlinetime, call.totaltime
            callers[caller] = tuple(map(operator.add, callers.get(caller, (0, 0, 0, 0)), new))
    return stats
