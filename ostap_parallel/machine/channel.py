"""A connection in a loop: nobody waits for it."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable

from ostap_parallel.logs import logger_of
from ostap_parallel.machine.loop import END, IN, OUT, Loop
from ostap_parallel.worker.processes import forking, keep_from_forks, let_forks_keep
from ostap_parallel.worker.transport import LARGE, SIZE, Remembering

logger = logger_of(__name__)

# Bytes that are read of one connection before others have their turn.
SHARE = 1 << 20


class Channel(Remembering):
    """A connection in a loop: what cannot be sent at once is sent later, messages are handed on.

    To be used with the loop's lock held.

    Parameters
    ----------
    connection
        Is owned by this from now on.
    on_message
        Called with each message.
    on_end
        Called once with the reason when the connection has ended, unless it was closed here.
    on_room
        Called when all has been sent that there was.
    """

    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        on_message: Callable[[bytes], object],
        on_end: Callable[[str], object],
        on_room: Callable[[], object] = lambda: None,
    ) -> None:
        self.scache, self.rcache = {}, {}
        self.socket = connection
        self._loop = loop
        self._on_message, self._on_end, self._on_room = on_message, on_end, on_room
        self._outgoing: deque[memoryview] = deque()
        self._small = bytearray()  # what has come of messages that are not large
        self._large: bytearray | None = None  # a large one, as far as it has come
        self._received = 0
        self.is_open = True
        self._descriptor = connection.fileno()
        connection.setblocking(False)
        keep_from_forks(self._descriptor)
        loop.watch(self._descriptor, self._handle)

    @property
    def is_congested(self) -> bool:
        """Whether there is anything that could not be sent yet."""
        return bool(self._outgoing)

    def send(self, msg: bytes | str) -> None:
        """Send one message, now or as soon as there is room."""
        parts = self._frames(msg)
        if not self.is_open:
            return
        waiting = bool(self._outgoing)
        self._outgoing.extend(map(memoryview, parts))
        if not waiting:
            self._flush()
            if self._outgoing and self.is_open:
                self._loop.change(self._descriptor, IN | OUT)

    def close(self) -> None:
        """Close the connection, without a word to `on_end`."""
        if self.is_open:
            self.is_open = False
            self._outgoing.clear()
            self._loop.forget(self._descriptor)
            with forking:
                let_forks_keep(self._descriptor)
                self.socket.close()

    def drain(self) -> None:
        """Hand on what has come by now."""
        while self.is_open and self._read():
            pass

    def _handle(self, mask: int) -> None:
        if mask & OUT and self._outgoing:
            self._flush()
            if not self._outgoing and self.is_open:
                self._loop.change(self._descriptor, IN)
                self._on_room()
        if mask & (IN | END) and self.is_open:
            self._read()

    def _flush(self) -> None:
        try:
            while self._outgoing:
                part = self._outgoing[0]
                sent = self.socket.send(part)
                if sent == len(part):
                    self._outgoing.popleft()
                else:
                    self._outgoing[0] = part[sent:]
        except BlockingIOError:
            pass
        except OSError:
            # What has come before its end is to be read yet: that tells of the end, too.
            self._outgoing.clear()

    def _read(self) -> int:
        """Read what is there, up to a share; return how much that was."""
        total = 0
        try:
            while total < SHARE:
                if self._large is not None:
                    count = self._read_large()
                else:
                    data = self.socket.recv(1 << 16)
                    count = len(data)
                    self._take(data)
                if not count:
                    self._end("the connection was closed")
                    break
                total += count
                if count < 1 << 16 or not self.is_open:
                    break
        except BlockingIOError:
            pass
        except (OSError, MemoryError, OverflowError, ValueError) as exc:
            # Of a message that does not fit into memory, the rest must not be taken for others.
            self._end(f"{type(exc).__name__}: {exc}")
        return total

    def _read_large(self) -> int:
        assert self._large is not None
        with memoryview(self._large) as view:
            count = self.socket.recv_into(view[self._received :])
        self._received += count
        if self._received == len(self._large):
            message, self._large = bytes(self._large), None
            self._hand_on(message)
        return count

    def _take(self, data: bytes) -> None:
        """Hand on the messages that are complete."""
        if self._small:
            self._small += data
            data = bytes(self._small)
            self._small.clear()
        start, end = 0, len(data)
        while end - start >= SIZE.size:
            (size,) = SIZE.unpack_from(data, start)
            first = start + SIZE.size
            if end - first < size:
                if size > LARGE:  # the rest of it need not be copied again and again
                    self._large = bytearray(size)
                    self._large[: end - first] = data[first:end]
                    self._received, start = end - first, end
                break
            start = first + size
            self._hand_on(data[first:start])
            if not self.is_open:
                return
        self._small += data[start:]

    def _hand_on(self, message: bytes) -> None:
        try:
            self._on_message(message)
        except Exception:  # what follows it is to be read all the same
            logger.exception("a message could not be dealt with")

    def _end(self, reason: str) -> None:
        if self.is_open:
            self.close()
            self._on_end(reason)
