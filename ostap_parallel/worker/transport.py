"""ppft's transports, with a bounded memory for functions, and quick with large messages."""

from __future__ import annotations

import io
import socket
import struct
from typing import Any

from ppft.transport import CSocketTransport, CTransport

# Functions that both ends keep; those of past runs may hold much data.
REMEMBERED = 8

# Bytes that a socket may hold: each time it is full or empty, another process has to be woken.
BUFFER_SIZE = 1 << 20

# Bytes from which on a message is received in place.
LARGE = 1 << 17

# Bytes that are asked for at once. For twice as many the C library maps pages, and gives them
# back, each time: that takes longer than all else about a small message.
PIECE = 1 << 16

SIZE = struct.Struct("!Q")  # precedes each message


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
        self._held += SIZE.pack(len(message)) + message
        _remember(self.scache, key, True)

    def _frames(self, msg: bytes | str) -> tuple[bytes, ...]:
        """Return what to write for a message: one piece, but for one that is too large to copy.

        Each write wakes the other end, and lets other threads take the interpreter.
        """
        data = msg.encode() if isinstance(msg, str) else msg
        head, self._held = self._held + SIZE.pack(len(data)), b""
        return (head + data,) if len(data) < BUFFER_SIZE else (head, data)

    def creceive(self, preprocess: Any = None) -> Any:
        """Receive what `csend` sent."""
        return self.recall(self.receive(), preprocess)

    def recall(self, msg: bytes, preprocess: Any = None) -> Any:
        """Return the function that a message of `csend` stands for."""
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


class Connection(Remembering, CSocketTransport):  # type: ignore[misc]
    """A connection whose messages are sent and received one after another, waiting for each."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection, None)
        self.rcache = {}

    def send(self, data: bytes | str) -> None:
        """Send one message."""
        for part in self._frames(data):
            self.socket.sendall(part)

    def receive(self, preprocess: Any = None) -> bytes:
        """Receive one message; raises RuntimeError at the end of the connection."""
        (size,) = SIZE.unpack(self._receive(SIZE.size))
        return self._receive(size)

    def _receive(self, size: int) -> bytes:
        return self._complete(b"", size)

    def _complete(self, begun: bytes, size: int) -> bytes:
        """Return so many bytes that begin like this; what is large is copied nowhere."""
        if not size:
            return b""
        file, received = io.BytesIO(begun), len(begun)
        file.seek(size - 1)
        file.write(b"\0")
        with file.getbuffer() as view:
            while received < size:
                count = self.socket.recv_into(view[received:])
                if not count:
                    raise RuntimeError("the connection was closed")
                received += count
        return file.getvalue()


class Buffered(Connection):
    """A connection that only its owner ever reads from: fewer calls of the system."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__(connection)
        self._buffer = b""

    def _receive(self, size: int) -> bytes:
        data = self._buffer
        if len(data) < size:
            if size > LARGE:
                self._buffer = b""
                return self._complete(data, size)
            pieces, missing = [data], size - len(data)
            while missing > 0:
                piece = self.socket.recv(PIECE)
                if not piece:
                    raise RuntimeError("the connection was closed")
                pieces.append(piece)
                missing -= len(piece)
            data = b"".join(pieces)
        self._buffer = data[size:]
        return data[:size]
