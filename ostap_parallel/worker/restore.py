"""What a task may leave behind in its worker, and how the worker gets its own back."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from _signal import getsignal, pthread_sigmask  # type: ignore[import-not-found]
from typing import IO, Any

# What `signal` itself offers makes enumerations of all, and takes a hundred times as long as
# the same functions of `_signal`.
SIGNALS = tuple(
    int(getattr(signal, f"SIG{name}"))
    for name in ("INT", "TERM", "ALRM", "CHLD", "PIPE", "HUP", "USR1", "USR2")
)
_TIMERS = signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF
_STREAMS = "stdin", "stdout", "stderr"


class Baseline:
    """This process as it was when this was made; `restore` brings it back to that.

    Part of it are the working directory, ``sys.path``, the environment, handlers and mask of
    signals, timers, the descriptors 0 to 2 and the streams on them, umask and recursion limit.
    That takes some microseconds also when nothing has changed.
    """

    def __init__(self) -> None:
        # By descriptor: it leads back also when the directory was renamed or removed.
        self._directory = os.open(".", os.O_PATH)
        self._path = sys.path
        self._encoded = os.environ._data.copy()  # type: ignore[attr-defined]
        self._handlers = [(number, getsignal(number)) for number in SIGNALS]
        self._mask: set[int] = pthread_sigmask(signal.SIG_BLOCK, ())
        found = [(number, os.fstat(number)) for number in range(3)]
        self._descriptors = [(n, stat.st_dev, stat.st_ino, os.dup(n)) for n, stat in found]
        self._streams: list[Any] = [sys.stdin, sys.stdout, sys.stderr]
        self._umask = os.umask(0o077)
        os.umask(self._umask)
        self.note_settings()

    def note_settings(self) -> None:
        """Take for the process's own what the caller has set meanwhile."""
        self.recursion_limit = sys.getrecursionlimit()
        self._entries = list(sys.path)

    def close(self) -> None:
        """Give back the descriptors that `restore` needs."""
        for descriptor in (self._directory, *(entry[-1] for entry in self._descriptors)):
            os.close(descriptor)

    def is_intact(self) -> bool:
        """Return whether nothing of what can be seen in a moment has changed."""
        try:
            stdin, stdout, stderr = self._streams
            return (
                sys.stdout is stdout
                and sys.stderr is stderr
                and sys.stdin is stdin
                and (path := sys.path) is self._path
                and path == self._entries
                and sys.getrecursionlimit() == self.recursion_limit
            )
        except BaseException:  # code of a task's own, asked for a comparison
            return False

    def restore(self) -> None:
        """Bring the process back; what is impossible is left as it is."""
        self.restore_signals()
        self._restore_descriptors()
        try:  # noqa: SIM105 - suppressing costs more than all of it
            os.fchdir(self._directory)
        except OSError:  # it may no longer be entered
            pass
        # os.environ would decode all of it to compare: three times what all else here costs
        if os.environ._data != self._encoded:  # type: ignore[attr-defined]
            encoded = self._encoded.items()
            set_environ({os.fsdecode(name): os.fsdecode(text) for name, text in encoded})
        os.umask(self._umask)
        if sys.path is not self._path or sys.path != self._entries:
            sys.path = self._path
            sys.path[:] = self._entries
        if sys.getrecursionlimit() != self.recursion_limit:
            sys.setrecursionlimit(self.recursion_limit)
        sys.stdin, sys.stdout, sys.stderr = self._streams

    def restore_signals(self) -> None:
        """Have no timer of a task's go on, and signals mean what they meant before."""
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        for number, handler in self._handlers:
            if getsignal(number) is not handler and handler is not None:
                signal.signal(number, handler)
        pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def _restore_descriptors(self) -> None:
        for number, device, inode, copy in self._descriptors:
            try:
                found = os.fstat(number)
                if found.st_ino == inode and found.st_dev == device:
                    continue
            except OSError:  # closed
                pass
            with contextlib.suppress(Exception):  # what was printed goes where the task meant it
                getattr(sys, _STREAMS[number]).flush()
            os.dup2(copy, number)
        for number, name in enumerate(_STREAMS):
            if getattr(self._streams[number], "closed", False):
                self._streams[number] = _open_stream(number)
                setattr(sys, f"__{name}__", self._streams[number])


def set_environ(wanted: dict[str, str]) -> None:
    """Have this environment, and the time zone in it."""
    zone = os.environ.get("TZ")
    os.environ.clear()
    os.environ.update(wanted)
    if zone != wanted.get("TZ"):
        time.tzset()


class NoBaseline:
    """Stands for the state of processes that are not ours: they are left as they are."""

    recursion_limit = 0

    def note_settings(self) -> None:
        """Do nothing."""

    def is_intact(self) -> bool:
        """Return whether nothing has to be done."""
        return True

    def restore(self) -> None:
        """Do nothing."""

    restore_signals = restore


def _open_stream(descriptor: int) -> IO[Any]:
    mode, buffering = ("w", 1) if descriptor else ("r", -1)
    return open(descriptor, mode, buffering, errors="backslashreplace", closefd=False)
