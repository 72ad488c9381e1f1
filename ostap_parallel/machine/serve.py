"""One server on one host: our workers, behind what only clients pass, tied to a lifeline.

Started in the foreground of an ssh session. Standard input is the lifeline: its first line is a
JSON object with the settings, later lines are commands, of which ``admit`` brings the key that
clients must know; its end means that the client is gone: the workers are killed, the private
directory is removed, nothing remains. Standard output brings events, one marked JSON line each:
first ``ready``, then what workers print and log. The listening socket is on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from ppft.transport import version

from ostap_parallel.machine import forked
from ostap_parallel.machine.cpus import usable_cpus
from ostap_parallel.machine.server import Server
from ostap_parallel.worker.control import set_name
from ostap_parallel.worker.processes import adopt_orphans, children

# Begins each line that is meant for the client; anything else is what a script has printed.
MARK = "\x1eostap-parallel "

# Seconds between looks for what tasks have left behind, and what has ended of it.
REAPING = 5.0


class Events:
    """Writes events to the client, one marked line each, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "w", encoding="utf-8")
        self._lock = threading.Lock()

    def send(self, event: dict[str, Any]) -> None:
        """Send one event; a client that is gone is the lifeline's business."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.write(f"{MARK}{json.dumps(event)}\n")
            self._file.flush()


def main() -> int:
    """Serve until the lifeline ends; return the exit status."""
    forked.begin()  # before anything that tasks are not to have is here, and any thread
    events = Events(os.dup(1))
    os.dup2(2, 1)  # whatever prints from here on is not an event
    set_name("ppserver")
    adopt_orphans()
    lifeline = Lifeline(0)
    settings = json.loads(lifeline.read_line(timeout=60) or "{}")
    if not settings:
        return 1  # the client left before it had said anything
    directory = settings["directory"]
    server = None
    try:
        ncpus = settings.get("ncpus") or usable_cpus()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        server = Server(
            events.send,
            ncpus,
            directory,
            on_empty=_give_up,
            tasks_per_worker=settings.get("tasks_per_worker"),
            preload=settings.get("preload", ()),
            fresh=settings.get("fresh", False),
            sessions=settings.get("sessions", {}),
        )
        server.loop.call_later(REAPING, partial(_reap, server))
        about = {
            "port": server.port,
            "ncpus": ncpus,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "ppft": str(version),
            "cpus": usable_cpus(),
        }
        events.send({"kind": "ready", **about})
        _obey(lifeline, server, events, Path(directory), settings["timeout"])
    finally:
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if server is not None:
            server.close()
        shutil.rmtree(directory, ignore_errors=True)
        _end_children()
    # Threads that wait for sockets must not keep a server alive whose client is gone.
    os._exit(0)


def _give_up() -> None:
    """End the server from a thread; the client may start another one."""
    sys.stderr.write("no worker is left, and no other can be started\n")
    os.kill(os.getpid(), signal.SIGTERM)


def _reap(server: Server) -> None:
    """Let go of orphans that have ended, now and from time to time."""
    own = server.crew.own_processes()
    for pid in children():
        if pid not in own:
            with contextlib.suppress(OSError):
                os.waitpid(pid, os.WNOHANG)
    server.loop.call_later(REAPING, partial(_reap, server))


def _end_children() -> None:
    """Kill all children; theirs become ours then, until there are none."""
    while pids := children():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class Lifeline:
    """Lines from the client, read without a thread and with a time limit."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending = b""
        self.has_ended = False  # nobody is at the other end any more

    def read_line(self, timeout: float | None) -> str | None:
        """Return the next line; ``None`` at the end, or after `timeout` seconds of silence."""
        while b"\n" not in self._pending:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                return None
            data = os.read(self._descriptor, 65536)
            if not data:
                self.has_ended = True
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode("utf-8")


def _obey(
    lifeline: Lifeline, server: Any, events: Events, directory: Path, timeout: float
) -> None:
    """Do what the client says until it goes away, or is silent for `timeout` seconds."""
    while (line := lifeline.read_line(timeout)) is not None:
        if not directory.is_dir():
            sys.stderr.write(f"the temporary directory has vanished: {directory}\n")
            return
        if not line:  # the client is there, and has nothing to say
            continue
        command = json.loads(line)
        if command["do"] == "admit":
            server.admit(bytes.fromhex(command["key"]))
        server.hand_on_output()
        # Every command is answered: "ping" is nothing but that.
        events.send({"kind": "done", "id": command["id"]})
    if not lifeline.has_ended:
        with contextlib.suppress(OSError):
            sys.stderr.write(f"nothing was heard from the client for {timeout:g} s\n")
