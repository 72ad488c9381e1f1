"""Many streams over a pair of descriptors: what both ends of a relay are made of.

The far end gets this as text, and whatever Python there is runs it: it makes do with Python 3.6
and the standard library, without what newer ones know.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable

# Begins what the far end says; what was there before is of start-up files.
GREETING = b"\x1eostap-parallel relay 1\n"

# Begins a line on our standard error that names a signal that the far end has got.
SIGNALLED = "\x1eostap-parallel signal "

# Our exit status where the program has failed, and not what it leads to.
FAILED = 254

# Bytes of a stream that may be on their way, so that none of them takes the room of others.
WINDOW = 1 << 20
PART = 1 << 16

# Seconds that what runs on the far end has to end by itself when the near one has gone; and for
# which output is waited for once a command has ended.
GRACE = 5.0
REST = 1.0

_HEAD = struct.Struct(">cII")  # the kind, the stream, and how many bytes follow
EXEC, CONNECT, LISTEN, LISTENING = b"E", b"T", b"L", b"B"
DATA, ERRORS, END, ACK, STATUS, KILL = b"D", b"R", b"F", b"A", b"S", b"K"
PING, SIGNAL = b"P", b"N"


class Stream:
    """One stream: what is read here goes there, and what comes from there is written here.

    Attributes
    ----------
    sources
        Descriptors to read from, with the kind that their bytes go by.
    sinks
        Descriptors to write to, with what waits to be written, by the same kinds.
    credit
        Bytes that may still be sent.
    on_end
        Called with the status when the other end has told it, and all has been written.
    """

    def __init__(self, number: int, on_end: Callable[[int], None] | None = None) -> None:
        self.number = number
        self.sources: dict[int, bytes] = {}
        self.sinks: dict[bytes, int] = {}
        self.waiting: dict[bytes, bytearray] = {}
        self.ending: set[bytes] = set()  # sinks that are closed when all is written
        self.credit = WINDOW
        self.owed = 0  # bytes taken that the other end has not been told of
        self.on_end = on_end
        self.status: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.socket: socket.socket | None = None
        self.has_ended = False
        self.read_at = 0.0

    def read_from(self, descriptor: int, kind: bytes) -> None:
        """Send what can be read."""
        self.sources[descriptor] = kind

    def write_to(self, descriptor: int, kind: bytes) -> None:
        """Write what comes."""
        os.set_blocking(descriptor, False)
        self.sinks[kind], self.waiting[kind] = descriptor, bytearray()

    def is_flushed(self) -> bool:
        """Return whether all that came has been written."""
        return not any(self.waiting.values())


class Mux:
    """Streams over a pair of descriptors, one end of it. Runs in one thread."""

    def __init__(self, reader: int, writer: int, first: int) -> None:
        self.streams: dict[int, Stream] = {}
        self.watched: dict[int, Callable[[], None]] = {}  # further descriptors to read from
        self.is_open = True
        self.heard = time.monotonic()
        self._reader, self._writer = reader, writer
        self._next = first  # the two ends number theirs oddly and evenly
        self._in, self._out = bytearray(), bytearray()
        os.set_blocking(writer, False)
        self._handlers: dict[bytes, Callable[[int, bytes], None]] = {
            DATA: self._take_data,
            ERRORS: lambda number, data: self._take(number, ERRORS, data),
            END: self._take_end,
            ACK: self._take_ack,
            STATUS: self._take_status,
            KILL: lambda number, data: self.forget(number),
            CONNECT: self._take_connect,
            PING: lambda number, data: None,
        }

    def on(self, kind: bytes, handler: Callable[[int, bytes], None]) -> None:
        """Have a handler called for messages of a kind."""
        self._handlers[kind] = handler

    def open(self, on_end: Callable[[int], None] | None = None) -> Stream:
        """Return a new stream."""
        self._next += 2
        stream = self.streams[self._next] = Stream(self._next, on_end)
        return stream

    def open_socket(self, connection: socket.socket, port: int) -> None:
        """Have a connection lead to a port of loopback at the other end."""
        self._join(self.open(), connection)
        self.send(CONNECT, self._next, str(port).encode())

    def send(self, kind: bytes, number: int, data: bytes = b"") -> None:
        """Send a message."""
        self._out += _HEAD.pack(kind, number, len(data)) + data

    def step(self, timeout: float) -> None:
        """Wait until something can be done, and do it."""
        poll = select.poll()
        wanted: dict[int, int] = {}
        readers: dict[int, tuple[Stream, bytes]] = {}
        writers: dict[int, tuple[Stream, bytes]] = {}
        if self.is_open:
            wanted[self._reader] = select.POLLIN
        if self._out and self.is_open:
            wanted[self._writer] = wanted.get(self._writer, 0) | select.POLLOUT
        for descriptor in self.watched:
            wanted[descriptor] = select.POLLIN
        for stream in self.streams.values():
            for descriptor, kind in stream.sources.items():
                if stream.credit > 0:
                    wanted[descriptor] = wanted.get(descriptor, 0) | select.POLLIN
                    readers[descriptor] = stream, kind
            for kind, descriptor in stream.sinks.items():
                if stream.waiting[kind]:
                    wanted[descriptor] = wanted.get(descriptor, 0) | select.POLLOUT
                    writers[descriptor] = stream, kind
        watched = dict(self.watched)
        for descriptor, events in wanted.items():
            poll.register(descriptor, events)
        for descriptor, events in poll.poll(timeout * 1000):
            broken = events & (select.POLLERR | select.POLLNVAL)
            if descriptor == self._writer and (events & select.POLLOUT or broken):
                self._flush()
            if descriptor in writers and (events & select.POLLOUT or broken):
                self._write(*writers[descriptor])
            if events & (select.POLLIN | select.POLLHUP) or broken:
                if descriptor == self._reader:
                    self._read()
                elif descriptor in watched:
                    if self.watched.get(descriptor) is watched[descriptor]:  # else it is another's
                        watched[descriptor]()
                elif descriptor in readers:
                    self._pass_on(descriptor, *readers[descriptor])
        for stream in list(self.streams.values()):
            self._finish(stream)

    def feed(self, data: bytes) -> None:
        """Take what has been read from the other end."""
        self._in += data
        self.heard = time.monotonic()
        while len(self._in) >= _HEAD.size:
            kind, number, size = _HEAD.unpack_from(self._in)
            if len(self._in) < _HEAD.size + size:
                break
            payload = bytes(self._in[_HEAD.size : _HEAD.size + size])
            del self._in[: _HEAD.size + size]
            self._handlers[kind](number, payload)

    def _read(self) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(self._reader, 4 * PART)
        if data:
            self.feed(data)
        else:
            self.is_open = False

    def _flush(self) -> None:
        try:
            with memoryview(self._out) as view:
                count = os.write(self._writer, view[: 4 * PART])
            del self._out[:count]
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False

    def _pass_on(self, descriptor: int, stream: Stream, kind: bytes) -> None:
        if self.streams.get(stream.number) is not stream:  # its descriptor may be another's
            return
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(descriptor, min(PART, stream.credit))
        if data:
            stream.credit -= len(data)
            stream.read_at = time.monotonic()
            self.send(kind, stream.number, data)
            return
        if stream.sources.pop(descriptor, None) == DATA:
            self.send(END, stream.number)
        if stream.socket is None:
            os.close(descriptor)

    def _take_data(self, number: int, data: bytes) -> None:
        self._take(number, DATA, data)

    def _take(self, number: int, kind: bytes, data: bytes) -> None:
        stream = self.streams.get(number)
        if stream is not None and kind in stream.sinks:
            stream.waiting[kind] += data
            self._write(stream, kind)
        else:  # nobody wants it any more, but the other end may want to go on
            self._acknowledge(number, len(data))

    def _acknowledge(self, number: int, count: int) -> None:
        self.send(ACK, number, str(count).encode())

    def _write(self, stream: Stream, kind: bytes) -> None:
        if self.streams.get(stream.number) is not stream:
            return
        waiting = stream.waiting[kind]
        count = 0
        try:
            with memoryview(waiting) as view:
                count = os.write(stream.sinks[kind], view[:PART])
        except BlockingIOError:
            return
        except OSError:  # who should read it has gone
            count = len(waiting)
            stream.ending.add(kind)
        del waiting[:count]
        stream.owed += count
        if stream.owed >= WINDOW // 4:  # each small message may be held back by TCP for a while
            self._acknowledge(stream.number, stream.owed)
            stream.owed = 0

    def _take_end(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].ending.add(DATA)

    def _take_ack(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].credit += int(data)

    def _take_status(self, number: int, data: bytes) -> None:
        if number in self.streams:
            self.streams[number].status = int(data)

    def _take_connect(self, number: int, data: bytes) -> None:
        try:
            connection = socket.create_connection(("127.0.0.1", int(data)), timeout=GRACE)
        except OSError:
            self.send(KILL, number)
            return
        stream = self.streams[number] = Stream(number)
        self._join(stream, connection)

    def _join(self, stream: Stream, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.socket = connection
        stream.read_from(connection.fileno(), DATA)
        stream.write_to(connection.fileno(), DATA)

    def _finish(self, stream: Stream) -> None:
        """Close what has ended."""
        for kind in list(stream.ending):
            if kind in stream.sinks and not stream.waiting[kind]:
                descriptor = stream.sinks.pop(kind)
                if stream.socket is None:
                    os.close(descriptor)
                else:
                    with contextlib.suppress(OSError):
                        stream.socket.shutdown(socket.SHUT_WR)
        if stream.socket is not None:
            has_ended = not stream.sources and not stream.sinks
        else:
            has_ended = stream.status is not None and stream.is_flushed()
        if has_ended:
            self.forget(stream.number)

    def forget(self, number: int) -> None:
        """Close all of a stream."""
        stream = self.streams.pop(number, None)
        if stream is None:
            return
        if stream.socket is not None:
            stream.socket.close()
        else:
            for descriptor in {*stream.sources, *stream.sinks.values()}:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        if stream.process is not None and stream.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(stream.process.pid, signal.SIGTERM)
        if stream.on_end is not None:
            stream.on_end(FAILED if stream.status is None else stream.status)


def listen(port: int) -> socket.socket:
    """Return a listener on a port of loopback, or on any if that is taken."""
    listener = socket.socket()
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        listener.bind(("127.0.0.1", 0))
    listener.listen(128)
    return listener
