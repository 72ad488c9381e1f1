"""What ``ostap-parallel run`` has each worker do before its first item."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ostap_parallel.worker.execute import executing
from ostap_parallel.worker.process import LogToServer
from ostap_parallel.worker.profiling import new_profile, packed

# Name of the records of the log that bring profiles, packed.
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
        self._profile = new_profile()
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
        text = packed(self._profile)
        self._profile.clear()
        self._log.emit(logging.LogRecord(PROFILE, logging.INFO, "", 0, text, None, None))
