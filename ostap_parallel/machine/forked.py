"""A template that is a fork of this process.

In a program of ours that has just begun, another interpreter would take as long again to import
the same modules.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import NoReturn

from ostap_parallel.machine import templates
from ostap_parallel.machine.cpus import thread_limits
from ostap_parallel.worker import template
from ostap_parallel.worker.processes import holding_signals

PAUSE = 0.005  # seconds between looks at whether a process has ended


def begin() -> None:
    """Have the next template be a fork of this process, which has no other thread.

    To be called before there is anything here that tasks are not to have. Where it fails, a
    template is an interpreter of its own, as ever.
    """
    with contextlib.suppress(OSError):
        templates.give(templates.begin_by(_fork))


class Fork:
    """A fork of this process, as `subprocess.Popen` has one."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return how it has ended; ``None``: it has not."""
        return self._look(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; raises subprocess.TimeoutExpired."""
        if timeout is not None:
            end = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(template.TEMPLATE_NAME, timeout)
                time.sleep(PAUSE)
        status = self._look(0)
        assert status is not None
        return status

    def kill(self) -> None:
        """Kill it."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _look(self, how: int) -> int | None:
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, how)
            except ChildProcessError:  # somebody else has waited for it; as `subprocess` has it
                self.returncode = 0
            else:
                self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _fork(theirs: socket.socket, out: int, err: int) -> Fork:
    with holding_signals():
        pid = os.fork()
        if not pid:
            _become(theirs, out, err)
    return Fork(pid)


def _open_anew(name: str) -> None:
    """Have a standard stream know what it leads to now: it may have been a file with a place."""
    before = getattr(sys, f"__{name}__")
    number = ("stdin", "stdout", "stderr").index(name)
    stream = open(  # noqa: SIM115
        number,
        "w" if number else "r",
        encoding=getattr(before, "encoding", None),
        errors=getattr(before, "errors", None),
        closefd=False,
    )
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _become(theirs: socket.socket, out: int, err: int) -> NoReturn:
    """Be like an interpreter that was started for this."""
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        for ours, wanted in (null, 0), (out, 1), (err, 2):
            os.dup2(ours, wanted)
        for name in "stdin", "stdout", "stderr":
            _open_anew(name)
        kept = theirs.detach()
        for name in sorted(entry.name for entry in Path("/proc/self/fd").iterdir()):
            if int(name) not in (0, 1, 2, kept):
                with contextlib.suppress(OSError):
                    os.close(int(name))
        os.environ.update(thread_limits(os.environ))
        main = types.ModuleType("__main__")
        main.__dict__["__builtins__"] = builtins
        sys.modules["__main__"] = main
        template.main((kept, False))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(1)
