"""Processes that the terminal's signals never reach, and descriptors that forks let go of."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

# What a terminal sends to all processes in its foreground.
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGHUP)

# Descriptors that a fork of this process must not keep open: who reads from the other end would
# never see its end, however dead we are. No fork may come while they are made or closed.
_ours: dict[int, tuple[int, int] | None] = {}
forking = threading.RLock()


@contextlib.contextmanager
def holding_signals(signals: Collection[signal.Signals] = TERMINAL_SIGNALS) -> Iterator[None]:
    """Have what this thread starts begin with the terminal's signals held back.

    `subprocess` gives them their usual effect before it makes the process a session of its own:
    one that came between the two would end it.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_apart(argv: Sequence[str], **how: Any) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; it inherits that terminal signals are held back."""
    with holding_signals():
        return subprocess.Popen(argv, start_new_session=True, **how)


def release_signals() -> None:
    """Undo what `start_apart` has handed down; to be called in the process."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, TERMINAL_SIGNALS)


def adopt_orphans(wanted: bool = True) -> None:
    """Have this process become the parent of what its children leave behind, or no more."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(SUBREAPER, int(wanted), 0, 0, 0)


def children(pid: int | str = "self") -> list[int]:
    """Return the pids of the children of a process."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread, or all of it, has just ended
            found += map(int, file.read_text().split())
    return found


def kill_tree(pid: int) -> None:
    """Kill a child of this process, with all below it."""
    for child in children(pid):
        kill_tree(child)
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGKILL)


def describe_status(status: int) -> str:
    """Return how a process has ended, by its exit status as `subprocess` has it."""
    if status >= 0:
        return f"ended with exit status {status}"
    names = {number.value: number.name for number in signal.Signals}
    return f"was killed by {names.get(-status, f'signal {-status}')}"


def interpreter_options() -> list[str]:
    """Return the options of this interpreter that code may depend on, for another one."""
    options = ["-O"] * sys.flags.optimize + ["-b"] * sys.flags.bytes_warning
    for option in sys.warnoptions:
        options.append(f"-W{option}")
    for name, value in sys._xoptions.items():
        if name in ("utf8", "dev", "int_max_str_digits", "warn_default_encoding"):
            options += ["-X", name if value is True else f"{name}={value}"]
    return options


def disconnect(*descriptors: int) -> None:
    """Make descriptors lead nowhere; their numbers stay taken."""
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.dup2(null, descriptor, inheritable=False)
    os.close(null)


def keep_from_forks(descriptor: int) -> None:
    """Have forks of this process disconnect a descriptor."""
    _ours[descriptor] = _identity(descriptor)


def let_forks_keep(descriptor: int) -> None:
    """Undo `keep_from_forks`; to be called before the descriptor is closed."""
    _ours.pop(descriptor, None)


def close_kept(descriptor: int) -> None:
    """Close a descriptor that was kept from forks."""
    with forking:
        let_forks_keep(descriptor)
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _let_go() -> None:
    """Give up our descriptors in a fork, in place: who owns their numbers may close them."""
    forking.release()
    if _ours:
        # a number whose owner has closed it otherwise may be somebody else's by now
        disconnect(*(number for number, what in _ours.items() if _identity(number) == what))
        _ours.clear()


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Return what a descriptor leads to, if it is open."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return None
    return found.st_dev, found.st_ino


os.register_at_fork(
    before=forking.acquire, after_in_parent=forking.release, after_in_child=_let_go
)
