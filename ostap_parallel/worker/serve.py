"""One server on one host: our workers, behind what only clients pass, tied to a lifeline.

Started in the foreground of an ssh session. Standard input is the lifeline: its first line is a
JSON object with the settings, later lines are commands, of which ``admit`` brings the key that
clients must know; its end means that the client is gone: the workers are killed, the private
directory is removed, nothing remains. Standard output brings events, one marked JSON line each:
first ``ready``, then what workers print and log. The listening socket is on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import ppft

from ostap_parallel.worker import engine
from ostap_parallel.worker.cpus import usable_cpus
from ostap_parallel.worker.handshake import greet_client
from ostap_parallel.worker.modules import Unpacked
from ostap_parallel.worker.nested import REFUSED
from ostap_parallel.worker.output import Sink
from ostap_parallel.worker.shared import Blob, Store
from ostap_parallel.worker.transport import Connection

# Begins each line that is meant for the client; anything else is what a script has printed.
MARK = "\x1eostap-parallel "

# Connections that may be without proof at once.
MAX_STRANGERS = 64


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


class Client(Connection):
    """A connection of a client that has proved to be one."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, None)
        self.rcache = {}


class Job(engine.Task):
    """A job of a client that waits for it."""

    def __init__(self, server: NetworkServer, client: Client) -> None:
        super().__init__(server)
        self.client = client


class NetworkServer(engine.Server):
    """A server for clients, as ppft's ``ppserver`` is, that lets in only who knows its key.

    It listens on a port of 127.0.0.1 that the system chooses. Until `admit`, clients wait. In
    `directory` are the objects that clients share with their functions, and their modules.
    """

    def __init__(self, sink: Sink, ncpus: int, directory: str | None = None) -> None:
        self.sink = sink
        self._store = Store(directory)
        self._directory = directory
        self._modules: WeakValueDictionary[str, Unpacked] = WeakValueDictionary()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        self._strangers: dict[socket.socket, None] = {}  # who has proved nothing yet
        self._strangers_lock = threading.Lock()
        # by connection: the number of its last job, and that job; of the last one to be stopped
        self._jobs: dict[int, tuple[int, Job]] = {}
        self._stopped: dict[int, int] = {}
        self._jobs_lock = threading.Lock()
        super().__init__(ncpus)

    def admit(self, key: bytes) -> None:
        """Serve clients that know `key`, from now on."""
        threading.Thread(target=self._listen, args=[key], name="listen", daemon=True).start()

    def _listen(self, key: bytes) -> None:
        while not self._exiting:
            try:
                connection, _ = self._socket.accept()
                self._enter(connection)
                threading.Thread(target=self._serve, args=[connection, key], daemon=True).start()
            except (OSError, RuntimeError):
                time.sleep(0.1)  # out of descriptors or threads: leave time to give some back

    def _enter(self, connection: socket.socket) -> None:
        """Remember a stranger; the one that has been here longest makes room for it."""
        with self._strangers_lock:
            self._strangers[connection] = None
            oldest = next(iter(self._strangers))
            if len(self._strangers) > MAX_STRANGERS:
                del self._strangers[oldest]
                with contextlib.suppress(OSError):  # its thread closes it
                    oldest.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket, key: bytes) -> None:
        with contextlib.suppress(Exception), connection:  # it left, or was refused
            try:
                greet_client(connection, key)
            finally:
                with self._strangers_lock:
                    self._strangers.pop(connection, None)
            # ppft sends a header and a body: without this each waits for the other's ACK
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Client(connection)
            purpose, _, name = client.receive().decode().partition(" ")
            if purpose == "STAT":
                client.send(str(self.get_ncpus()))
            elif purpose == "EXEC":
                self._execute(client, int(name))
            elif purpose == "STOP":
                self._stop(client.receive().decode())
            elif purpose == "STORE":
                self._keep(client)

    def _execute(self, client: Client, name: int) -> None:
        """Do a client's jobs until it leaves; by `name` it can have them stopped."""
        try:
            for number in itertools.count(1):
                job = Job(self, client)
                sfunc, sargs = client.creceive(), client.receive()
                with self._jobs_lock:
                    self._jobs[name] = number, job
                    job.is_interrupted = self._stopped.get(name, 0) >= number
                if_free = sargs.startswith(REFUSED)
                try:
                    done = self.insert(sfunc, sargs.removeprefix(REFUSED), job, if_free)
                    client.send(done(True))
                except engine.Busy:
                    client.send(REFUSED)
        finally:
            with self._jobs_lock:
                self._jobs.pop(name, None)
                self._stopped.pop(name, None)

    def _answer(self, job: Any, request: bytes) -> bytes:
        # who waits for the job sends nothing meanwhile
        job.client.send(request)
        answer: bytes = job.client.receive()
        return answer

    def _stop(self, wanted: str) -> None:
        """Interrupt jobs: each a line with a connection's name and the number of its job.

        One that has not arrived yet is not begun when it does. With a third word, the number of a
        signal, the job's worker gets that, and no more.
        """
        for name, number, *rest in (map(int, line.split()) for line in wanted.splitlines()):
            with self._jobs_lock:
                last, job = self._jobs.get(name, (0, None))
                if not rest:
                    self._stopped[name] = number
            if job is None or last != number:
                continue
            if rest:
                self.signal(job, rest[0])
            else:
                self.interrupt([job])

    def _keep(self, client: Client) -> None:
        """Tell where a client's blob is, which it sends if it is new; keep it until it leaves."""
        kind, digest, size = client.receive().decode().split()
        kept: Blob | Unpacked | None
        try:
            if kind == "modules":
                kept = self._modules.get(digest) or self._take_modules(client, digest, int(size))
            else:
                kept = self._store.find(digest) or self._take_shared(client, digest, int(size))
        except OSError as exc:
            client.send(f"refused {exc.strerror}")
            return
        client.send(f"at {kept.location}")
        client.receive()

    def _take_shared(self, client: Client, digest: str, size: int) -> Blob:
        blob = self._store.make_room(digest, size)
        client.send("send")
        self._store.fill(blob, _receive(client.socket, blob.size))
        return blob

    def _take_modules(self, client: Client, digest: str, size: int) -> Unpacked:
        client.send("send")
        data = b"".join(map(bytes, _receive(client.socket, size)))
        unpacked = self._modules[digest] = Unpacked(data, self._directory)
        return unpacked


def _receive(connection: socket.socket, size: int) -> Iterator[memoryview]:
    """Yield so many bytes, piece by piece, all in the same memory."""
    buffer = memoryview(bytearray(1 << 20))
    while size:
        count = connection.recv_into(buffer, min(size, len(buffer)))
        if not count:
            raise ConnectionError("the connection was closed")
        size -= count
        yield buffer[:count]


def main() -> int:
    """Serve until the lifeline ends; return the exit status."""
    events = Events(os.dup(1))
    os.dup2(2, 1)  # whatever prints from here on is not an event
    _adopt_orphans()
    lifeline = Lifeline(0)
    settings = json.loads(lifeline.read_line(timeout=60) or "{}")
    if not settings:
        return 1  # the client left before it had said anything
    directory = settings["directory"]
    server = None
    try:
        ncpus = settings.get("ncpus") or usable_cpus()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        server = NetworkServer(events.send, ncpus, directory)
        server.on_empty = _give_up
        server.tasks_per_worker = settings.get("tasks_per_worker")
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
        _obey(lifeline, server, events, Path(directory), settings["timeout"])
    finally:
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if server is not None:
            server.destroy()
        shutil.rmtree(directory, ignore_errors=True)
        _end_children()
    # Threads that wait for sockets must not keep a server alive whose client is gone.
    os._exit(0)


def _give_up() -> None:
    """End the server from a thread; the client may start another one."""
    sys.stderr.write("no worker is left, and no other can be started\n")
    os.kill(os.getpid(), signal.SIGTERM)


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
        # Every command is answered: "ping" is nothing but that.
        events.send({"kind": "done", "id": command["id"]})
