"""The template of a machine's workers: it has imported what they need, and forks them.

A fork takes a millisecond and shares memory; a new interpreter takes a hundred times as long. The
process stays single-threaded, so that forks are safe. Where a module that it was to import has
started a thread, or where forks are not wanted, it starts new interpreters instead.

It is the parent of all workers: it tells its owner how each has ended. It ends, and its workers
with it and with what the modules have started, when its owner closes the connection.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from ostap_parallel import libraries
from ostap_parallel.worker import generators, process
from ostap_parallel.worker.control import command, receive, send, set_name
from ostap_parallel.worker.processes import adopt_orphans, children, kill_tree, release_signals

# Name that the system shows for this process.
TEMPLATE_NAME = "pptemplate"


class _Template:
    """The process: its control connection, and its children."""

    def __init__(self, control: socket.socket, fresh: bool) -> None:
        self._control = control
        self._fresh = fresh
        self._children: set[int] = set()
        self._started = set(children())  # by the modules
        self._generators = generators.find()
        self._told: dict[str, Any] = {}
        self._patience: float | None = None  # milliseconds, without an owner
        self._woken_r, self._woken_w = os.pipe()
        for descriptor in (self._woken_r, self._woken_w):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(self._woken_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Fork workers as the owner asks for them, until it goes."""
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(self._woken_r, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll(self._patience)}
            if not ready:  # nobody has come
                return
            if self._woken_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._woken_r, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._obey():
                return

    def _obey(self) -> bool:
        """Do what the next message says; return whether there was one."""
        descriptors: list[int] = []
        try:
            wanted = receive(self._control, descriptors)
            if wanted is None:
                return False
            self._patience = 1000 * wanted["park"] if "park" in wanted else None
            if "park" in wanted:
                return True
            if "prepare" in wanted:
                threaded, failed = _prepare(wanted["prepare"], self._control)
                gc.freeze()
                self._fresh = self._fresh or bool(threaded)
                send(self._control, ("ready", threaded, failed))
                return True
            self._told.update(wanted)  # what is the same for all is told when it changes
            wanted = self._told
            try:
                pid = os.fork()
            except OSError as exc:
                send(self._control, ("failed", wanted["number"], f"no process: {exc.strerror}"))
                return True
            if not pid:
                self._become_worker(wanted, descriptors)
            self._children.add(pid)
            send(self._control, ("started", wanted["number"], pid))
        except OSError:  # the owner has gone
            return False
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _reap(self) -> None:
        """Tell of all that have ended; what their orphans leave is not told."""
        with contextlib.suppress(ChildProcessError, OSError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                pid, status = ended
                self._started.discard(pid)
                if pid in self._children:
                    self._children.discard(pid)
                    send(self._control, ("ended", pid, os.waitstatus_to_exitcode(status)))

    def end(self) -> NoReturn:
        """End all workers, what the modules have started, and this process."""
        for pid in self._children:
            for kill in os.killpg, os.kill:  # it may not be the head of its group yet
                with contextlib.suppress(OSError):
                    kill(pid, signal.SIGKILL)
        for pid in self._children:
            with contextlib.suppress(OSError):
                os.waitpid(pid, 0)
        for pid in self._started:
            kill_tree(pid)
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)  # what is left of them, and this
        os._exit(0)

    def _become_worker(self, wanted: dict[str, Any], descriptors: list[int]) -> NoReturn:
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            release_signals()
            for descriptor in (self._control.detach(), self._woken_r, self._woken_w):
                os.close(descriptor)
            *passed, out, err = descriptors
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
            _adopt(wanted)
            name = wanted["host"], wanted["number"]
            arguments: Any = tuple(passed), wanted["tasks"], name
            if self._fresh:
                for descriptor in passed:
                    os.set_inheritable(descriptor, True)
                words = command(sys.path, "process", arguments)
                os.execv(sys.executable, [sys.executable, *wanted["options"], *words])
            generators.differ(self._generators)
            process.main(arguments)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                sys.stderr.flush()
            os._exit(1)


def _adopt(wanted: dict[str, Any]) -> None:
    """Take over what the owner is like now."""
    with contextlib.suppress(OSError):  # it was removed, or may not be entered
        os.chdir(wanted["directory"])
    sys.path[:] = wanted["path"]
    if dict(os.environ) != wanted["environment"]:
        os.environ.clear()
        os.environ.update(wanted["environment"])


def _count_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def _preload(names: list[str], control: socket.socket) -> tuple[list[str], list[tuple[str, str]]]:
    """Import modules; return those that have started a thread, and those that failed, and why.

    The owner is told of each before: it may be the last that this process does.
    """
    threaded, failed = [], []
    for name in names:
        before = _count_threads()
        send(control, ("importing", name))
        try:
            importlib.import_module(name)
        except BaseException as exc:
            failed.append((name, f"{type(exc).__name__}: {exc}"))
        if _count_threads() > before:
            threaded.append(name)
    return threaded, failed


def _prepare(
    sessions: dict[str, Any], control: socket.socket
) -> tuple[list[str], list[tuple[str, str]]]:
    """Have libraries here as the caller has them; return the same as `_preload`."""
    threaded, failed = [], []
    for name, session in sessions.items():
        before = _count_threads()
        send(control, ("importing", name))
        with contextlib.suppress(Exception):  # whoever needs it here will be told
            failed += libraries.support_for(name).prepare(session)
        if _count_threads() > before:
            threaded.append(name)
    return threaded, failed


def main(arguments: tuple[int, bool]) -> None:
    """Serve the owner at the other end of a socket, of which the descriptor is given.

    `arguments` are that descriptor, and whether workers are to be new interpreters. The first
    message has the modules to import, and what the caller has of libraries, see
    `libraries.sessions`.
    """
    descriptor, fresh = arguments
    sys.argv = ["ostap_parallel-template"]
    set_name(TEMPLATE_NAME)
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    if (wanted := receive(control, [])) is None:
        return
    adopt_orphans()  # for now, to know all that the modules start
    libraries.watch(generators.take_in)
    threaded, failed = _preload(wanted["preload"], control)
    more_threaded, more_failed = _prepare(wanted["sessions"], control)
    threaded, failed = threaded + more_threaded, failed + more_failed
    adopt_orphans(False)
    if wanted["preload"] or wanted["sessions"]:
        gc.collect()  # of what this has imported by itself there is too little for what it takes
    template = _Template(control, fresh or bool(threaded))
    gc.freeze()  # so that no collection touches, and copies, what workers share
    try:
        send(control, ("ready", threaded, failed))
        template.serve()
    finally:
        template.end()
