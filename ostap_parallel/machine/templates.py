"""The process that starts workers, as its owner has it; and one that waits for its next owner."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

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

    process: subprocess.Popen[bytes]
    control: socket.socket
    printed: tuple[int, int]
    sessions: dict[str, Any]
    told: dict[str, object] = field(default_factory=dict)

    def end(self) -> None:
        """End it, and all workers with it."""
        close_kept(self.control.detach())
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        self.process.kill()
        self.process.wait()


def start(preload: Collection[str], sessions: Mapping[str, Any], fresh: bool) -> Template:
    """Start a template; raises OSError."""
    with forking, contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
        mine, yours = socket.socketpair()
        mine.settimeout(PATIENCE)
        ours.callback(mine.close)
        theirs.callback(yours.close)
        (out_r, out_w), (err_r, err_w) = open_pipe(ours, theirs), open_pipe(ours, theirs)
        words = control.command(module_path(), "template", (yours.fileno(), fresh))
        process = start_apart(
            [sys.executable, *interpreter_options(), *words],
            stdin=subprocess.DEVNULL,
            stdout=out_w,
            stderr=err_w,
            env={**os.environ, **thread_limits(os.environ)},
            pass_fds=[yours.fileno()],
        )
        control.send(mine, {"preload": list(preload), "sessions": dict(sessions)})
        ours.pop_all()
        keep_from_forks(mine.fileno())
    return Template(process, mine, (out_r, err_r), dict(sessions))


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
        _is_over, others = True, list(_waiting)
        _waiting.clear()
    for other in others:
        _discard(other)


def _forget() -> None:
    """Leave to the parent, in a fork, what waits there."""
    global _lock
    _lock = threading.Lock()
    _of_parent.extend(_waiting)  # to forget them would be to complain of them
    _waiting.clear()


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
