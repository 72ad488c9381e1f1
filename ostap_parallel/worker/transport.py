"""ppft's transports, with a bounded memory for functions, and quick with large messages."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from typing import Any

from ppft.transport import CPipeTransport, CSocketTransport, CTransport

# Functions that both ends keep; those of past runs may hold much data.
REMEMBERED = 8

# Bytes that a pipe may hold: each time it is full or empty, another process has to be woken.
PIPE_SIZE = 1 << 20

_SIZE = struct.Struct("!Q")  # precedes each message


class Remembering(CTransport):  # type: ignore[misc]
    """A transport whose two ends remember the same last few functions; ppft's remember all.

    One that receives them needs an `rcache` of its own.
    """

    scache: dict[str, bool]
    rcache: dict[str, Any]
    _hashed: tuple[bytes, str] = (b"", "")  # the last message of `csend`, and its hash
    _held: bytes = b""  # what goes with the next message

    def csend(self, msg: bytes) -> None:
        """Send a message, or only its hash if the other end remembers it, with the next one."""
        if msg is not self._hashed[0]:
            self._hashed = msg, self.hash(msg)
        key = self._hashed[1]
        message = b"H" + key.encode() if key in self.scache else b"N" + msg
        self._held = _SIZE.pack(len(message)) + message
        _remember(self.scache, key, True)

    def _frames(self, msg: bytes | str) -> tuple[bytes, ...]:
        """Return what to write for a message: one piece, but for one that is too large to copy.

        Each write wakes the other end, and lets other threads take the interpreter.
        """
        data = msg.encode() if isinstance(msg, str) else msg
        head, self._held = self._held + _SIZE.pack(len(data)), b""
        return (head + data,) if len(data) < PIPE_SIZE else (head, data)

    def creceive(self, preprocess: Any = None) -> Any:
        """Receive what `csend` sent."""
        msg = self.receive()
        kind, content = msg[:1], msg[1:]
        if kind == b"H":
            key = content.decode()
            value = self.rcache[key]
        else:
            key = self.hash(content)
            value = preprocess(content) if preprocess else content
        _remember(self.rcache, key, value)
        return value


def _remember(cache: dict[str, Any], key: str, value: Any) -> None:
    cache.pop(key, None)
    cache[key] = value
    while len(cache) > REMEMBERED:
        del cache[next(iter(cache))]


class Pipe(Remembering, CPipeTransport):  # type: ignore[misc]
    """The pipes between a server and a worker."""

    def __init__(self, r: Any, w: Any) -> None:
        super().__init__(r, w)
        self.rcache = {}
        with contextlib.suppress(OSError):  # a user may have so many pages in pipes only
            fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, PIPE_SIZE)

    def send(self, msg: bytes | str) -> None:
        """Send one message."""
        for part in self._frames(msg):
            self.w.write(part)
        self.w.flush()

    def receive(self, preprocess: Any = None) -> bytes:
        """Receive one message; raises RuntimeError at the end of the pipe."""
        (size,) = _SIZE.unpack(self._receive(_SIZE.size))
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        data: bytes = self.r.read(size)
        if len(data) < size:
            raise RuntimeError("the pipe was closed")
        return data


class Connection(Remembering, CSocketTransport):  # type: ignore[misc]
    """A connection between a client and a server."""

    socket: socket.socket

    def send(self, data: bytes | str) -> None:
        """Send one message."""
        for part in self._frames(data):
            self.socket.sendall(part)

    def receive(self, preprocess: Any = None) -> bytes:
        """Receive one message; raises RuntimeError at the end of the connection."""
        (size,) = _SIZE.unpack(self._receive(_SIZE.size))
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        data = bytearray(size)
        view, received = memoryview(data), 0
        while received < size:
            count = self.socket.recv_into(view[received:])
            if not count:
                raise RuntimeError("the connection was closed")
            received += count
        return bytes(data)
