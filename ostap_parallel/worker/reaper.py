"""Starting a command, and ending it with all that it has started, whatever became of that."""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostap_parallel.worker.files import write_all
from ostap_parallel.worker.node import VARIABLE

# Holds the interpreter of the workers, for node scripts.
PYTHON = "OSTAP_PARALLEL_PYTHON"

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER

# What Python ignores and programs do not.
_DEFAULT_SIGNALS = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass(frozen=True)
class Started:
    """A command that has begun: its process, and the descriptors of its outputs."""

    pid: int
    outputs: tuple[int, ...]


class Reaper:
    """Makes this process the parent of all that its commands leave behind; one runs at a time.

    Attributes
    ----------
    woken
        A descriptor that can be read when a child has ended.
    status, ended_at
        Of the command once it has ended: its exit status, negative: a signal; and when.
    usage
        What it and what it has started has used.
    """

    def __init__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
        self.woken, self._wake = os.pipe()
        for descriptor in (self.woken, self._wake):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A variable without a name is none that a program could ask for; it may not be passed on.
        self._environ = {name: value for name, value in os.environb.items() if name}
        self._pid = 0
        self._is_done = True
        self.status: int | None = None
        self.ended_at: float | None = None
        self.usage: dict[str, Any] = {}

    def start(
        self,
        argv: Sequence[str],
        stdin: bytes,
        environment: Mapping[str, str],
        directory: str,
        arguments: bytes | None = None,
    ) -> Started:
        """Start a command; raises OSError if that is impossible.

        With `arguments` it is a node script, and its messages are a third output.
        """
        self.status, self.ended_at, self._is_done = None, None, False
        self.usage = {"memory": 0, "user": 0.0, "system": 0.0, "read": 0, "written": 0}
        added = dict(environment)
        where = os.path.expanduser(os.path.expandvars(directory)) if directory else None  # noqa: PTH111
        is_plain = not (stdin or where or "PATH" in added) and arguments is None
        with contextlib.ExitStack() as theirs, contextlib.ExitStack() as ours:
            pipes = [os.pipe() for _ in range(2 if arguments is None else 3)]
            for reader, writer in pipes:
                theirs.callback(os.close, writer)
                ours.callback(os.close, reader)
            outputs = pipes[0][1], pipes[1][1]
            try:
                if is_plain:
                    self._pid = self._spawn(argv, added, outputs)
                else:
                    passed: tuple[int, ...] = ()
                    source = _file(stdin, theirs) if stdin else subprocess.DEVNULL
                    if arguments is not None:
                        passed = (_file(arguments, theirs), pipes[2][1])
                        others = added.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
                        added |= _for_node(passed, others)
                    self._pid = self._open(argv, added, (source, *outputs), where, passed)
            except BaseException:
                self._is_done = True
                raise
            ours.pop_all()
        return Started(self._pid, tuple(reader for reader, _ in pipes))

    def _spawn(
        self, argv: Sequence[str], added: Mapping[str, str], outputs: tuple[int, int]
    ) -> int:
        """Start a program without more ado: this takes half the time of the other way."""
        encoded = {os.fsencode(name): os.fsencode(value) for name, value in added.items()}
        try:
            return os.posix_spawnp(
                argv[0],
                tuple(argv),
                self._environ | encoded,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, outputs[0], 1),
                    (os.POSIX_SPAWN_DUP2, outputs[1], 2),
                ],
                setsid=True,
                setsigdef=_DEFAULT_SIGNALS,
            )
        except NotImplementedError:  # Python was built with a C library before glibc 2.26
            return self._open(argv, added, (subprocess.DEVNULL, *outputs), None, ())

    def _open(
        self,
        argv: Sequence[str],
        added: Mapping[str, str],
        standard: tuple[int, int, int],
        where: str | None,
        passed: tuple[int, ...],
    ) -> int:
        stdin, stdout, stderr = standard
        process = subprocess.Popen(
            argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=where,
            env={**os.environ, **added} if added else None,
            start_new_session=True,
            pass_fds=passed,
        )
        process.returncode = 0  # `reap` waits for it
        return process.pid

    def reap(self) -> None:
        """Take notice of all that has ended."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.woken, 4096)
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                self._is_done = True
                return
            if found is None:
                return
            self._count_bytes(found.si_pid)
            pid, status, used = os.wait4(found.si_pid, 0)
            usage = self.usage
            usage["memory"] = max(usage["memory"], used.ru_maxrss * 1024)
            usage["user"] += used.ru_utime
            usage["system"] += used.ru_stime
            if pid == self._pid:
                self.status, self.ended_at = os.waitstatus_to_exitcode(status), time.monotonic()

    def _count_bytes(self, pid: int) -> None:
        """Add what a process has read and written that has ended, and is remembered still."""
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{pid}/io", "rb", buffering=0) as file:  # noqa: PTH123 - it is quick
                lines = file.read().split()
            self.usage["read"] += int(lines[1])
            self.usage["written"] += int(lines[3])

    def is_done(self) -> bool:
        """Return whether nothing of it is left."""
        return self._is_done

    def terminate(self) -> None:
        """Ask all of it to end; what is stopped goes on for that."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill all of it."""
        self._signal(signal.SIGKILL)

    def end_all(self, grace: float) -> None:
        """End what is left and wait for that; after `grace` seconds kill it."""
        if self._is_done:
            return
        self.terminate()
        deadline = time.monotonic() + grace
        while not self._wait(max(0.0, deadline - time.monotonic())):
            self.kill()  # again and again: it may just have forked
            deadline = time.monotonic() + 0.05

    def _wait(self, seconds: float) -> bool:
        """Wait until nothing is left; return whether that is so."""
        deadline = time.monotonic() + seconds
        self.reap()
        while not self._is_done and (left := deadline - time.monotonic()) > 0:
            select.select([self.woken], [], [], left)
            self.reap()
        return self._is_done

    def _signal(self, number: int) -> None:
        # those that are there now: not what one starts to tidy up, as it is told to end
        for pid in list(_descendants(os.getpid())):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _file(data: bytes, owner: contextlib.ExitStack) -> int:
    """Return the descriptor of a file without a name that holds some bytes."""
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    owner.enter_context(file)
    write_all(file, data)
    file.seek(0)
    return file.fileno()


def _for_node(passed: tuple[int, ...], others: str | None) -> dict[str, str]:
    """Return what the environment of a node script has: how it finds this package, and us."""
    path = [str(Path(__file__).parents[2]), others]
    return {
        VARIABLE: " ".join(map(str, passed)),
        PYTHON: sys.executable,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes below one."""
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for text in file.read_text().split():
                yield int(text)
                yield from _descendants(int(text))
