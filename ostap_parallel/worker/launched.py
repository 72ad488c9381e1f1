"""What ``ostap-parallel run`` has each worker do before its first item."""

from __future__ import annotations

import base64
import contextlib
import cProfile
import logging
import marshal
import operator
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ostap_parallel.worker.execute import executing
from ostap_parallel.worker.process import LogToServer

# Name of the records of the log that bring profiles: marshalled, compressed, in base64.
PROFILE = "ostap_parallel.worker.profile"


def prepare(
    directory: str, must_exist: bool, path: Sequence[str], nice: int, profile: bool
) -> None:
    """Make this worker as the command wants it.

    Parameters
    ----------
    directory, must_exist
        Where tasks run; unless it must exist, they stay where they are without it.
    path
        Further directories of modules, also for programs that tasks start.
    nice
        By how much others come first.
    profile
        Whether to send a profile of each chunk.
    """
    if must_exist or Path(directory).is_dir():
        os.chdir(directory)
    sys.path[1:1] = [entry for entry in path if entry not in sys.path]
    if path:
        os.environ["PYTHONPATH"] = os.pathsep.join(path)
    os.nice(nice)
    if profile:
        executing.watch = _Profiler().watch


def in_turn(calls: Sequence[tuple[Callable[..., Any], Sequence[Any]]]) -> None:
    """Call one function after the other, each with its arguments."""
    for function, args in calls:
        function(*args)


class _Profiler:
    """Profiles chunks, and sends the profile of each when it ends."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile()
        self._depth = 0
        handlers = logging.getLogger().handlers
        self._log = next(one for one in handlers if isinstance(one, LogToServer))

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Profile the body, which may hold another one: that of a task that is run meanwhile."""
        self._depth += 1
        if self._depth == 1:
            self._profile.enable()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._send()

    def _send(self) -> None:
        self._profile.disable()
        stats = _stats_of(self._profile)
        self._profile.clear()
        text = base64.b64encode(zlib.compress(marshal.dumps(stats))).decode()
        self._log.emit(logging.LogRecord(PROFILE, logging.INFO, "", 0, text, None, None))


def _stats_of(profile: cProfile.Profile) -> dict[Any, Any]:
    """Return what `pstats` reads.

    cProfile's own way keeps one of several functions with the same name and place, and each time
    that one is sent it is another.
    """
    stats: dict[Any, Any] = {}
    entries: list[Any] = profile.getstats()
    for entry in entries:
        name, count = cProfile.label(entry.code), entry.callcount
        new = count - entry.reccallcount, count, entry.inlinetime, entry.totaltime
        *old, callers = stats.get(name, (0, 0, 0, 0, {}))
        stats[name] = (*map(operator.add, old, new), callers)
    for entry in entries:
        caller = cProfile.label(entry.code)
        for call in entry.calls or ():
            callers, count = stats[cProfile.label(call.code)][4], call.callcount
            new = count, count - call.reccallcount, call.inlinetime, call.totaltime
            callers[caller] = tuple(map(operator.add, callers.get(caller, (0, 0, 0, 0)), new))
    return stats
