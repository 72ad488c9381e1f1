"""The server of a host: its workers, behind what only clients pass.

It listens on a port of 127.0.0.1 only. Who connects proves to know its key before anything of it
is read. Each client has one connection, for all its jobs, see `wire`.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import IO, Any
from weakref import WeakValueDictionary

from ostap_parallel.machine import wire
from ostap_parallel.machine.channel import Channel
from ostap_parallel.machine.crew import Crew
from ostap_parallel.machine.handshake import greet_client
from ostap_parallel.machine.jobs import Job, Queue
from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.output import OutputReader, Sink
from ostap_parallel.worker.chunk import Lost, locate, pack_result
from ostap_parallel.worker.modules import Unpacked, describe
from ostap_parallel.worker.shared import Blob, Store
from ostap_parallel.worker.transport import Connection

# Connections that may be without proof at once.
MAX_STRANGERS = 64


class Server:
    """Does the jobs of clients that know its key.

    Until `admit`, clients wait. In `directory` are the objects that clients share with their
    functions, and their modules.
    """

    def __init__(
        self,
        sink: Sink,
        ncpus: int,
        directory: str | None = None,
        *,
        on_empty: Callable[[], object] = lambda: None,
        tasks_per_worker: int | None = None,
        preload: Collection[str] = (),
        fresh: bool = False,
        sessions: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.directory = directory
        self.store = Store(directory)
        self.modules: WeakValueDictionary[str, Unpacked] = WeakValueDictionary()
        self.loop = Loop("server")
        self.queue = Queue(self.loop)
        self._clients: set[_Client] = set()
        self._output = OutputReader(sink)
        self.crew = Crew(
            socket.gethostname(),
            self.queue,
            self.loop,
            self._output,
            on_empty=on_empty,
            on_change=self.tell_count,
            tasks_per_worker=tasks_per_worker,
            preload=preload,
            fresh=fresh,
            host=socket.gethostname(),
            sessions=sessions,
        )
        self.queue.machines.append(self.crew)
        self._strangers: dict[socket.socket, None] = {}  # who has proved nothing yet
        self._strangers_lock = threading.Lock()
        self._is_closed = False
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._socket.getsockname()[1]
        try:
            self.crew.resize(ncpus)
        except BaseException:
            self.close()
            raise

    def admit(self, key: bytes) -> None:
        """Serve clients that know `key`, from now on."""
        threading.Thread(target=self._listen, args=[key], name="listen", daemon=True).start()

    def _listen(self, key: bytes) -> None:
        while not self._is_closed:
            try:
                connection, _ = self._socket.accept()
                self._enter(connection)
                threading.Thread(target=self._greet, args=[connection, key], daemon=True).start()
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

    def _greet(self, connection: socket.socket, key: bytes) -> None:
        with contextlib.suppress(Exception), contextlib.ExitStack() as closing:
            closing.callback(connection.close)  # it left, or was refused
            try:
                greet_client(connection, key)
            finally:
                with self._strangers_lock:
                    self._strangers.pop(connection, None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Connection(connection)
            purpose = client.receive()
            if purpose == b"STAT":
                client.send(str(self.crew.count()))
            elif purpose == b"LINK":
                with self.loop.lock:
                    closing.pop_all()
                    self._clients.add(_Client(self, connection))

    def tell_count(self) -> None:
        """Tell all clients how many workers there are."""
        for client in self._clients:
            client.tell_count()

    def leave(self, client: _Client) -> None:
        """Forget a client."""
        self._clients.discard(client)

    def hand_on_output(self) -> None:
        """Tell what workers have printed so far."""
        self._output.hand_on()

    def close(self) -> None:
        """End all workers."""
        self._is_closed = True
        with self.loop.lock:
            self.queue.is_closed = True
            self.crew.close()
        self._output.close()
        self._socket.close()
        self.loop.stop()


class _Incoming:
    """What a client sends in pieces."""

    def __init__(self, kind: str, size: int, count: int, blob: Blob | None) -> None:
        self.kind, self.left, self.count = kind, size, count
        self.blob = blob
        self._pieces: list[bytes] = []
        self._file: IO[bytes] | None = blob.open() if blob is not None else None

    def take(self, piece: bytes) -> bool:
        """Take a piece; return whether it was the last."""
        self.left -= len(piece)
        if self._file is None:
            self._pieces.append(piece)
        else:
            self._file.write(piece)
        if self.left > 0:
            return False
        self.close()
        return True

    def content(self) -> bytes:
        return b"".join(self._pieces)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class _Client:
    """A client that has proved to be one, and its jobs."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server = server
        self._function = b""
        self._jobs: dict[int, Job] = {}
        self._asking: set[int] = set()  # jobs that wait for an answer
        self._incoming: dict[str, _Incoming] = {}
        self._kept: dict[str, Blob | Unpacked] = {}
        self._counts: dict[str, int] = {}
        self._channel = Channel(server.loop, connection, self._take, self._leave)
        self.tell_count()

    def tell_count(self) -> None:
        """Tell the number of workers."""
        self._channel.send(wire.pack(wire.WORKERS, self._server.crew.count()))

    def _take(self, message: bytes) -> None:
        kind = message[:1]
        if kind in wire.FUNCTION:
            self._function = self._channel.recall(message)
        elif kind == wire.JOB:
            self._begin(message)
        elif kind == wire.STOP:
            self._stop(*wire.unpack_stop(message))
        elif kind == wire.WHERE:
            self._tell_place(wire.unpack(message)[0])
        elif kind == wire.ANSWER:
            number, answer = wire.unpack(message)
            self._asking.discard(number)
            job = self._jobs.get(number)
            if job is not None and job.machine is not None:
                job.machine.answer(job, answer)
        elif kind == wire.OFFER:
            self._hear_offer(json.loads(message[1:]))
        elif kind == wire.PIECE:
            self._take_piece(*wire.unpack_digest(message))
        elif kind == wire.FORGET:
            digest, _ = wire.unpack_digest(message)
            self._kept.pop(digest, None)
            self._counts.pop(digest, None)

    def _begin(self, message: bytes) -> None:
        head, chunk = wire.unpack_job(message)
        number = head.number
        if head.if_free and not self._server.crew.has_room():
            self._channel.send(wire.pack(wire.BUSY, number))
            return
        try:
            chunk = self._locate(head, chunk)
        except KeyError as exc:
            lost = Lost("", 0, f"what it refers to is not here: {exc}")
            self._channel.send(wire.pack(wire.RESULT, number, pack_result(lost)))
            return
        job = Job(self._function, chunk, lambda result: self._end(number, result), ask=self._ask)
        job.client = number
        self._jobs[number] = job
        self._server.queue.add(job)

    def _locate(self, head: wire.JobHead, chunk: bytes) -> bytes:
        """Return a chunk with the places of what it refers to."""
        if not head.blobs and not head.modules:
            return chunk
        locations = [str(self._kept[digest].location) for digest in head.blobs]
        places = b""
        if head.modules:
            root, count = self._kept[head.modules].location, self._counts[head.modules]
            places = describe(head.modules, first=[f"{root}/{n}" for n in range(count)])
        return locate(chunk, locations, places)

    def _end(self, number: int, result: bytes) -> None:
        self._jobs.pop(number, None)
        self._asking.discard(number)
        self._channel.send(wire.pack(wire.RESULT, number, result))

    def _ask(self, job: Job, request: bytes) -> None:
        self._asking.add(job.client)
        self._channel.send(wire.pack(wire.QUESTION, job.client, request))

    def _tell_place(self, number: int) -> None:
        job = self._jobs.get(number)
        if job is not None and job.machine is not None:
            send = self._channel.send
            job.machine.place(job, lambda doing: send(wire.pack_place(number, doing)))

    def _stop(self, number: int, signal: int) -> None:
        job = self._jobs.get(number)
        if job is None:  # it has just ended
            return
        if not signal:
            self._server.queue.interrupt([job])
        elif job.machine is not None:
            job.machine.signal(job, signal)

    def _hear_offer(self, offer: dict[str, str | int]) -> None:
        digest, kind, size = str(offer["digest"]), str(offer["kind"]), int(offer["size"])
        server = self._server
        known: Blob | Unpacked | None
        known = server.modules.get(digest) if kind == "modules" else server.store.find(digest)
        self._counts[digest] = int(offer.get("count", 0))
        if known is not None:
            self._keep(digest, known)
            return
        try:
            blob = None if kind == "modules" else server.store.make_room(digest, size)
            self._incoming[digest] = _Incoming(kind, size, self._counts[digest], blob)
        except OSError as exc:
            self._refuse(digest, exc)
            return
        self._channel.send(wire.pack_digest(wire.WANTED, digest))

    def _take_piece(self, digest: str, piece: bytes) -> None:
        incoming = self._incoming.get(digest)
        if incoming is None:  # it was refused
            return
        try:
            if not incoming.take(piece):
                return
            del self._incoming[digest]
            if incoming.blob is not None:
                self._server.store.publish(incoming.blob)
                self._keep(digest, incoming.blob)
            else:
                unpacked = Unpacked(incoming.content(), self._server.directory)
                self._server.modules[digest] = unpacked
                self._keep(digest, unpacked)
        except OSError as exc:
            self._incoming.pop(digest, None)
            self._refuse(digest, exc)

    def _keep(self, digest: str, kept: Blob | Unpacked) -> None:
        self._kept[digest] = kept
        self._channel.send(wire.pack_digest(wire.PRESENT, digest))

    def _refuse(self, digest: str, error: OSError) -> None:
        reason = (error.strerror or str(error)).encode()
        self._channel.send(wire.pack_digest(wire.REFUSED, digest, reason))

    def _leave(self, reason: str) -> None:
        """Give up the jobs of a client that has gone."""
        self._server.leave(self)
        for incoming in self._incoming.values():
            incoming.close()
        jobs = list(self._jobs.values())
        self._server.queue.interrupt(jobs)
        for job in jobs:
            if job.client in self._asking and job.machine is not None:
                job.machine.answer(job, pickle.dumps(("interrupted",)))
        self._kept.clear()
