"""The connection to the server of a host: its workers, as the caller's queue sees them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ostap_parallel.errors import HostError
from ostap_parallel.machine import handshake, wire
from ostap_parallel.machine.channel import Channel
from ostap_parallel.machine.endpoint import Endpoint
from ostap_parallel.machine.jobs import Job, Machine, Queue
from ostap_parallel.machine.loop import Loop
from ostap_parallel.machine.usage import Doing
from ostap_parallel.supply.source import STEP
from ostap_parallel.worker.chunk import INTERRUPTED, Lost, pack_result
from ostap_parallel.worker.shared import Blob
from ostap_parallel.worker.transport import Connection

# Seconds: a host whose round trip takes longer is sent the next short job while it does the last.
FAR = 0.005


def connect(label: str, endpoint: Endpoint) -> tuple[socket.socket, int, float]:
    """Connect to a server; return the connection, the number of workers, and the round trip.

    Raises HostError if no server of ours answers.
    """
    host, port = endpoint.address
    with contextlib.ExitStack() as closing:
        try:
            peer = socket.create_connection((host, port), timeout=handshake.TIMEOUT)
            closing.callback(peer.close)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            handshake.greet_server(peer, endpoint.key)
        except handshake.GreetingError as exc:
            raise HostError(label, "server", str(exc)) from exc
        except OSError as exc:
            reason = f"no server answers on port {port}: {exc}; is it up, and does sshd "
            reason += "there permit TCP forwarding?"
            raise HostError(label, "server", reason) from exc
        try:
            peer.settimeout(handshake.TIMEOUT)
            channel = Connection(peer)
            begin = time.monotonic()
            channel.send("LINK")
            count, _ = wire.unpack(channel.receive())
            round_trip = time.monotonic() - begin
        except (OSError, RuntimeError, ValueError) as exc:
            raise HostError(label, "server", f"the connection broke: {exc}") from exc
        closing.pop_all()
        return peer, count, round_trip


class _Delivery:
    """A blob on its way to a host, or there."""

    def __init__(self, blob: Blob) -> None:
        self.is_present = False
        self.pieces: Iterator[bytes] | None = None  # while they are sent
        self.blob = weakref.ref(blob)
        self.held: dict[int, Job] = {}  # jobs that need it


class Link(Machine):
    """The workers of a host.

    Parameters
    ----------
    limit
        So many workers at most; ``None``: all.
    is_shared
        The server may have other clients, whose jobs its workers do, too.
    on_lost, on_useless
        Called, from a thread, when the connection has broken, or when the host cannot take what
        its jobs need.
    explanation
        Returns what finds out, then, why that is so; ``None``: there is no more to know.

    Attributes
    ----------
    longest
        Seconds that the longest job has taken.
    since, worked
        When it was connected to, and when a job has ended last, by `time.monotonic`.
    """

    def __init__(
        self,
        label: str,
        queue: Queue,
        loop: Loop,
        connected: tuple[socket.socket, int, float],
        *,
        limit: int | None,
        is_shared: bool,
        on_lost: Callable[[HostError], object],
        on_useless: Callable[[HostError], object],
        explanation: Callable[[], Callable[[], str] | None],
    ) -> None:
        super().__init__(label)
        connection, self._workers, self.round_trip = connected
        self._limit = limit
        self._queue, self._loop, self._is_shared = queue, loop, is_shared
        self._on_lost, self._on_useless, self._explanation = on_lost, on_useless, explanation
        self.longest = 0.0
        self.since = self.worked = time.monotonic()
        self._deliveries: dict[str, _Delivery] = {}
        self._asked: dict[int, Callable[[Doing], object]] = {}  # by the number of the job
        self.channel = Channel(loop, connection, self._take, self._end, self._send_pieces)

    def count(self) -> int:
        """Return the number of workers that are used."""
        return self._workers if self._limit is None else min(self._workers, self._limit)

    def has_spare_room(self, job: Job) -> bool:
        """Return whether a job may wait at a far host.

        It may where all is short; behind a long one it would wait though others were idle.
        """
        if self.round_trip <= FAR or not job.is_short or self.limit is not None:
            return False
        is_short = all(one.is_short for one in self.running.values())
        return is_short and len(self.running) < 2 * self.count()

    def begin(self, job: Job) -> None:
        """Send a job, or what it needs before."""
        for needed in (*job.blobs, job.modules):
            if needed is not None and not self._offer(needed).is_present:
                self._deliveries[needed.digest].held[job.number] = job
                return
        head = wire.JobHead(
            job.number,
            job.if_free and self._is_shared,  # see `nesting` for the reason
            job.is_short,
            [blob.digest for blob in job.blobs],
            job.modules.digest if job.modules else "",
        )
        self.channel.csend(job.call)
        self.channel.send(wire.pack_job(head, job.chunk))

    def answer(self, job: Job, message: bytes) -> None:
        """Answer what a job has asked."""
        self.channel.send(wire.pack(wire.ANSWER, job.number, message))

    def signal(self, job: Job, number: int) -> None:
        """Send a signal to the worker that runs a job."""
        self.channel.send(wire.pack_stop(job.number, number))

    def place(self, job: Job, tell: Callable[[Doing], object]) -> None:
        """Ask what the worker of a job does; a later question replaces this."""
        self._asked[job.number] = tell
        self.channel.send(wire.pack(wire.WHERE, job.number))

    def interrupt(self, jobs: Collection[Job], grace: float) -> None:
        """Interrupt jobs; one that waits for what it needs to be sent is given up at once."""
        for job in jobs:
            held = [one for one in self._deliveries.values() if one.held.pop(job.number, None)]
            if held:
                lost = Lost("", 0, INTERRUPTED)
                self._queue.end(self, job, pack_result(lost))
            else:
                self.channel.send(wire.pack_stop(job.number))

    def close(self, reason: str, early: float = 0.0) -> None:
        """Close the connection; the jobs that the host had end as `Lost`.

        Those that had begun before `early` may be to blame.
        """
        self.channel.close()
        self._deliveries.clear()
        for job in list(self.running.values()):
            self._queue.end(self, job, pack_result(Lost("", 0, reason, job.begun < early)))

    def _take(self, message: bytes) -> None:
        kind = message[:1]
        if kind in (wire.RESULT, wire.QUESTION, wire.BUSY):
            number, content = wire.unpack(message)
            job = self.running.get(number)
            if job is None:
                return
            if kind == wire.RESULT:
                self._asked.pop(number, None)
                self.worked = time.monotonic()
                self.longest = max(self.longest, self.worked - job.begun)
                self._queue.end(self, job, content)
            elif kind == wire.BUSY:
                self._queue.end(self, job, wire.BUSY)
            elif job.ask is not None:
                job.ask(job, content)
        elif kind == wire.PLACE:
            number, doing = wire.unpack_place(message)
            if tell := self._asked.pop(number, None):
                tell(doing)
        elif kind == wire.WORKERS:
            self._workers, _ = wire.unpack(message)
            self._queue.dispatch()
        else:
            self._hear_of_delivery(kind, *wire.unpack_digest(message))

    def _offer(self, blob: Blob) -> _Delivery:
        """Return what is known of a blob on the host; offer it if that is nothing."""
        delivery = self._deliveries.get(blob.digest)
        if delivery is None:
            delivery = _Delivery(blob)
            self._deliveries[blob.digest] = delivery
            this, loop, digest = weakref.ref(self), self._loop, blob.digest

            def forget() -> None:
                if link := this():
                    link.forget(digest)

            # from wherever the garbage collector runs
            weakref.finalize(blob, lambda: loop.call_soon(forget)).atexit = False
            offer: dict[str, Any] = {"kind": blob.kind, "digest": digest, "size": blob.size}
            offer["count"] = getattr(blob, "count", 0)
            self.channel.send(wire.OFFER + json.dumps(offer).encode())
        return delivery

    def forget(self, digest: str) -> None:
        """Have the host forget a blob that no job refers to any more."""
        delivery = self._deliveries.get(digest)
        if delivery is None or delivery.blob() is not None:  # the same has come again
            return
        del self._deliveries[digest]
        self.channel.send(wire.pack_digest(wire.FORGET, digest))
        for job in list(delivery.held.values()):  # which need another blob of that content
            self.begin(job)

    def _hear_of_delivery(self, kind: bytes, digest: str, content: bytes) -> None:
        delivery = self._deliveries.get(digest)
        if delivery is None:
            return
        if kind == wire.WANTED:
            blob = delivery.blob()
            if blob is not None:  # else it is about to be forgotten
                delivery.pieces = blob.pieces(wire.PIECE_SIZE)
                self._send_pieces()
        elif kind == wire.PRESENT:
            delivery.is_present, held, delivery.held = True, delivery.held, {}
            for job in held.values():
                self.begin(job)
        elif kind == wire.REFUSED:
            reason = f"{content.decode(errors='replace')}; make room there or set tmpdir"
            self._fail(HostError(self.label, STEP, reason), self._on_useless)

    def _send_pieces(self) -> None:
        """Send of what is wanted as much as the connection takes."""
        for digest, delivery in self._deliveries.items():
            while delivery.pieces is not None and not self.channel.is_congested:
                piece = next(delivery.pieces, None)
                if piece is None:
                    delivery.pieces = None
                else:
                    self.channel.send(wire.pack_digest(wire.PIECE, digest, piece))

    def _end(self, reason: str) -> None:
        text = f"the connection to {self.label} was lost: {reason}"
        self._fail(HostError(self.label, "run", text), self._on_lost)

    def _fail(self, error: HostError, tell: Callable[[HostError], object]) -> None:
        """Use the connection no more, and tell of that."""
        if self in self._queue.machines:
            self._queue.machines.remove(self)
            self.channel.close()
            explain = self._explanation()
            if explain is None:
                self._give_up_jobs(error.reason)

            def part() -> None:
                if explain is not None:
                    reason = explain() or error.reason
                    with self._loop.lock:
                        self._give_up_jobs(reason)
                tell(error)

            threading.Thread(target=part, name="lost", daemon=True).start()

    def _give_up_jobs(self, reason: str) -> None:
        self.close(reason)
        self._queue.dispatch()
