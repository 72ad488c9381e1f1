"""The process that starts workers, as its owner has it; and one that waits for its next owner."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ostap_parallel import libraries
from ostap_parallel.machine.cpus import thread_limits
from ostap_parallel.machine.local import open_pipe
from ostap_parallel.worker import control
from ostap_parallel.worker.processes import (
    close_kept,
    forking,
    interpreter_options,
    keep_from_forks,
    start_apart,
)

# Seconds that the template, once it has imported what it is to, may take to read what it is told,
# and to fork.
PATIENCE = 10.0

# Seconds that a template without an owner waits for the next one.
IDLE = 60.0


class Process(Protocol):
    """What is asked of the process of a template, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int:
        """Its number."""

    @property
    def returncode(self) -> int | Any:
        """How it has ended, once `wait` or `poll` have said so."""

    def poll(self) -> int | None:
        """Return how it has ended; ``None``: it has not."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; raises subprocess.TimeoutExpired."""

    def kill(self) -> None:
        """Kill it."""


@dataclass
class Template:
    """A template.

    Attributes
    ----------
    control
        The connection to it.
    printed
        The descriptors of its standard output and error.
    sessions
        What it was to have of libraries.
    told
        What it was told last of what holds for all workers.
    """

    process: Process
    control: socket.socket
    printed: tuple[int, int]
    sessions: dict[str, Any] = field(default_factory=dict)
    told: dict[str, object] = field(default_factory=dict)

    def end(self) -> None:
        """End it, and all workers with it."""
        close_kept(self.control.detach())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        self.process.kill()
        self.process.wait()


# Makes a process of what are its control connection, standard output and error.
Begin = Callable[[socket.socket, int, int], Process]


def start(preload: Collection[str], sessions: Mapping[str, Any], fresh: bool) -> Template:
    """Start a template, or use one that was begun already; raises OSError."""
    template = _take_begun(fresh)
    if template is None:
        with forking:
            template = begin_by(partial(_begin, fresh))
    control.send(template.control, {"preload": list(preload), "sessions": dict(sessions)})
    template.sessions = dict(sessions)
    return template


def begin_by(begin: Begin) -> Template:
    """Return a template that waits to be told what to import; raises OSError."""
    with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        mine, yours = socket.socketpair()
        mine.settimeout(PATIENCE)
        ours.callback(mine.close)
        theirs.callback(yours.close)
        (out_r, out_w), (err_r, err_w) = open_pipe(ours, theirs), open_pipe(ours, theirs)
        process = begin(yours, out_w, err_w)
        ours.pop_all()
        keep_from_forks(mine.fileno())
    return Template(process, mine, (out_r, err_r))


def _begin(fresh: bool, theirs: socket.socket, out: int, err: int) -> Process:
    words = control.command(module_path(), "template", (theirs.fileno(), fresh))
    return start_apart(
        [sys.executable, *interpreter_options(), *words],
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        env={**os.environ, **thread_limits(os.environ)},
        pass_fds=[theirs.fileno()],
    )


_begun: list[Template] = []  # that have no owner yet, see `forked`


def _take_begun(fresh: bool) -> Template | None:
    with _lock:
        template = _begun.pop() if _begun else None
    if template is None or (template.process.poll() is None and not fresh):
        return template
    _discard(template)
    return None


def give(template: Template) -> None:
    """Have the next owner use a template that `begin_by` has returned."""
    with _lock:
        _begun.append(template)


_waiting: list[Template] = []
_of_parent: list[Template] = []
_is_over = False  # the program ends
_lock = threading.Lock()


def park(template: Template) -> None:
    """Keep a template, whose workers are to end, for the next owner; it ends after some time."""
    printed = os.dup(template.printed[0]), os.dup(template.printed[1])
    template.printed = printed  # its owner closes the others
    with contextlib.suppress(OSError):
        control.send(template.control, {"park": IDLE})
    with _lock:
        others, _waiting[:] = list(_waiting), [template]
        if _is_over:
            others, _waiting[:] = [*others, template], []
    for other in others:
        _discard(other)


def take(sessions: Mapping[str, Any]) -> tuple[Template, bool] | None:
    """Return a template that waits, if there is one, and whether it is ready.

    Else it has just been told what else it is to have, and says when it is ready.
    """
    with _lock:
        found = _waiting.pop() if _waiting else None
    if found is None:
        return None
    try:
        if found.process.poll() is None:
            if found.sessions == sessions:
                return found, True
            control.send(found.control, {"prepare": dict(sessions)})
            found.sessions = dict(sessions)
            return found, False
    except OSError:  # it has just ended
        pass
    _discard(found)
    return None


def _discard(template: Template) -> None:
    template.end()
    for descriptor in template.printed:
        os.close(descriptor)


def _end() -> None:
    global _is_over
    with _lock:
        _is_over, others = True, [*_waiting, *_begun]
        _waiting.clear()
        _begun.clear()
    for other in others:
        _discard(other)


def _forget() -> None:
    """Leave to the parent, in a fork, what waits there."""
    global _lock
    _lock = threading.Lock()
    for others in _waiting, _begun:
        _of_parent.extend(others)  # to forget them would be to complain of them
        others.clear()


atexit.register(_end)
os.register_at_fork(after_in_child=_forget)


def module_path() -> list[str]:
    """Return where modules are looked for; what is no path at all is left out."""
    entries = [entry for entry in sys.path if isinstance(entry, str | bytes | os.PathLike)]
    return [os.fsdecode(entry) or directory() for entry in entries]


def directory() -> str:
    """Return the working directory."""
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it was removed
        return "/"


# Modules of ours that the tasks of users derive from: each worker would import them by itself.
_OF_TASKS = "ostap_parallel.ostap", "ostap_parallel.pipeline"


def modules_of(preload: Collection[str]) -> list[str]:
    """Return the modules that a template imports: those, and what this process has of ours."""
    modules = [name for name in preload if not libraries.owner_of(name)]
    return modules + [name for name in _OF_TASKS if name in sys.modules and name not in modules]


def may_wait(preload: Collection[str], sessions: Mapping[str, Any]) -> bool:
    """Return whether a template is worth keeping: libraries take long to start.

    What else is preloaded may have changed when the next manager comes.
    """
    return bool(sessions) and all(map(libraries.is_known, preload))
