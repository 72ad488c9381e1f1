"""One server on one host: ppft's own ``ppserver`` with our workers, tied to a lifeline.

Started in the foreground of an ssh session. Standard input is the lifeline: its first line is a
JSON object with the secret and the settings, later lines are commands, and its end means that
the client is gone: the workers are killed, the private directory is removed, nothing remains.
Standard output brings events, one marked JSON line each: first ``ready`` (the handshake), then
what workers print and log. The listening socket is on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ppft

from ostap_parallel.worker import engine
from ostap_parallel.worker.cpus import usable_cpus

# Begins each line that is meant for the client; anything else is what a script has printed.
MARK = "\x1eostap-parallel "


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


def network_server() -> Any:
    """Return the server class of ppft's ``ppserver`` script, built on our server.

    The script is a module of the bundle. It looks its base class up in ppft, in this process
    that serves nothing else.
    """
    ppft.Server = engine.Server
    base = importlib.import_module("ppserver")._NetworkServer

    class NetworkServer(base):  # type: ignore[misc, valid-type]
        """ppserver on a port of 127.0.0.1 that the system chooses, without accept time-outs."""

        def __init__(self, sink: engine.Sink, ncpus: int, secret: str) -> None:
            self.sink = sink
            self.ssocket = socket.create_server(("127.0.0.1", 0), backlog=128)
            port = self.ssocket.getsockname()[1]
            super().__init__(ncpus, "127.0.0.1", None, port, secret, socket_timeout=None)

        def listen(self) -> None:
            while not self._exiting:
                try:
                    client, _ = self.ssocket.accept()
                except OSError:
                    time.sleep(0.1)  # out of descriptors: leave some time to give some back
                    continue
                # ppft sends a header and a body: without this each waits for the other's ACK
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve_client, args=[client], daemon=True).start()

        def _serve_client(self, client: socket.socket) -> None:
            with contextlib.suppress(Exception), client:  # a client that left, or was refused
                self.crun(client)

    return NetworkServer


def main() -> int:
    """Serve until the lifeline ends; return the exit status."""
    events = Events(os.dup(1))
    os.dup2(2, 1)  # whatever prints from here on is not an event
    _adopt_orphans()
    lifeline = Lifeline(0)
    settings = json.loads(lifeline.read_line(timeout=60) or "{}")
    if "secret" not in settings:
        return 1  # the client left before it had said anything
    directory = settings["directory"]
    server = None
    try:
        ncpus = settings.get("ncpus") or usable_cpus()
        server = network_server()(events.send, ncpus, settings["secret"])
        threading.Thread(target=server.listen, name="listen", daemon=True).start()
        about = {
            "port": server.port,
            "ncpus": ncpus,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "python": platform.python_version(),
            "executable": sys.executable,
            "ppft": ppft.__version__,
            "cpus": usable_cpus(),
        }
        events.send({"kind": "ready", **about})
        _obey(lifeline, server, events, settings.get("timeout"))
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if server is not None:
            server.destroy()
        shutil.rmtree(directory, ignore_errors=True)
        _end_children()
    # Threads that wait for sockets must not keep a server alive whose client is gone.
    os._exit(0)


def _adopt_orphans() -> None:
    """Become the parent of what tasks leave behind, whatever session it has gone to."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def _end_children() -> None:
    """Kill all children; theirs become ours then, until there are none."""
    tasks = Path("/proc/self/task")
    while pids := [
        int(pid) for file in tasks.glob("*/children") for pid in file.read_text().split()
    ]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


class Lifeline:
    """Lines from the client, read without a thread and with a time limit."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending = b""

    def read_line(self, timeout: float | None) -> str | None:
        """Return the next line; ``None`` at the end, or after `timeout` seconds of silence."""
        while b"\n" not in self._pending:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                return None
            data = os.read(self._descriptor, 65536)
            if not data:
                return None
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode("utf-8")


def _obey(lifeline: Lifeline, server: Any, events: Events, timeout: float | None) -> None:
    """Do what the client says until it goes away, or is silent for `timeout` seconds."""
    while (line := lifeline.read_line(timeout)) is not None:
        command = json.loads(line)
        if command["do"] == "interrupt":
            server.interrupt()
        # Every command is answered: "ping" is nothing but that.
        events.send({"kind": "done", "id": command["id"]})
