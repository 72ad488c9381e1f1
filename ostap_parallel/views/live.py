"""Runs of this user that are going on, told of through sockets.

A run that takes longer than a moment is told of by its process: it has a socket, and who connects
as the same user gets what there is to tell, as JSON, and no more. One thread of the process waits
for that, and keeps nothing alive.

The sockets have names that are no files, see unix(7): they go with the process, however it ends.
Who may connect is told by the system from the process at the other end, and both ends look.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ostap_parallel.lending.borrower import uid_of, wake

# Seconds after which a run is told of: shorter ones are not worth a socket.
DELAY = 1.0

# Seconds that one side waits for the other.
PATIENCE = 3.0
ASKED_AT_ONCE = 8

_PREFIX = "ostap-parallel-run-"  # of sockets' names; the user's number and the process's follow
_LISTED = Path("/proc/net/unix")

Look = Callable[[], dict[str, Any]]


class Teller:
    """Tells of the runs of this process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._looks: list[Look] = []
        self._opened = contextlib.ExitStack()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def telling(self, look: Look) -> Iterator[None]:
        """Tell of a run during the block: what `look` returns whenever somebody asks."""
        with self._changed:
            self._looks.append(look)
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._serve, name="live", daemon=True)
                with contextlib.suppress(RuntimeError):  # at the exit of the interpreter
                    self._thread.start()
        try:
            yield
        finally:
            with self._changed:
                self._looks.remove(look)
                self._changed.notify_all()
                if not self._looks:
                    self.close()

    def close(self) -> None:
        """Remove what others could connect to."""
        self._opened.close()

    def leave(self) -> None:
        """Leave in a fork what is open, and who waits for it, to the other process."""
        self._changed = threading.Condition()
        self.close()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._looks)
                if self._changed.wait_for(lambda: not self._looks, DELAY):
                    continue
                try:
                    server = self._open()
                except OSError:  # a disk that is full, say: then nobody can look
                    self._changed.wait_for(lambda: not self._looks)
                    continue
            with contextlib.suppress(OSError):  # closed by `telling`
                while True:
                    connection, _ = server.accept()
                    with contextlib.suppress(OSError), connection:
                        connection.settimeout(PATIENCE)
                        if uid_of(connection) == os.getuid():
                            connection.sendall(json.dumps(self._tell()).encode())

    def _open(self) -> socket.socket:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX))
            server.settimeout(None)  # whatever the script has as usual
            # nobody else can have taken a name that cannot be guessed
            name = f"{_PREFIX}{os.getuid()}-{os.getpid()}-{secrets.token_hex(8)}"
            server.bind(f"\0{name}")
            server.listen()
            stack.callback(_wake, server, os.getpid())
            self._opened = stack.pop_all()
        return server

    def _tell(self) -> list[dict[str, Any]]:
        told = []
        for look in list(self._looks):
            with contextlib.suppress(Exception):  # of a run that is just ending
                told.append({"process": os.getpid(), **look()})
        return told


teller = Teller()
atexit.register(teller.close)


def _forget() -> None:
    """In a fork: the thread and the runs are those of the other process."""
    global teller
    teller.leave()
    teller = Teller()


os.register_at_fork(after_in_child=_forget)


def telling(look: Look) -> contextlib.AbstractContextManager[None]:
    """Tell of a run during a block; see `Teller.telling`."""
    return teller.telling(look)


def _wake(server: socket.socket, pid: int) -> None:
    if os.getpid() == pid:  # in a fork it would end that of the other process
        wake(server)


def runs() -> list[dict[str, Any]]:
    """Return what the runs of this user on this machine tell, the oldest first."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:  # one that does not answer holds up no other
        # a connection that is open is listed with the name, too
        found = [run for told in pool.map(_ask, sorted(set(_names()))) for run in told]
    return sorted(found, key=lambda run: run.get("started", 0.0))


def _names() -> Iterator[str]:
    """Yield the names of sockets that tell of runs of this user's."""
    with contextlib.suppress(OSError):
        for line in _LISTED.read_text(errors="replace").splitlines():
            name = line.rpartition(" ")[2]
            if name.startswith(f"@{_PREFIX}{os.getuid()}-"):
                yield name.removeprefix("@")


def _ask(name: str) -> list[dict[str, Any]]:
    """Return what a process tells; nothing if it is just ending, was killed, or is stopped."""
    told: Any = []
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(f"\0{name}")
        if uid_of(client) == os.getuid():
            with client.makefile("rb") as file:
                told = json.load(file)
    return [run for run in told if isinstance(run, dict)]
