"""What workers print and log, read by one thread of their server."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ostap_parallel.logs import logger_of

logger = logger_of(__name__)

# A line longer than this is passed on in pieces: a task may print anything.
MAX_LINE = 64 * 1024

# Of what a worker prints while it runs one chunk, bytes beyond this are dropped, for each of
# standard output, standard error and log: an endless loop must not fill a disk, or a night.
MAX_OUTPUT = 16 * 1024 * 1024

# Receives what workers say: {"kind": "stdout" | "stderr", "text": str, "pid": int}, one line a
# call, or {"kind": "log", "record": dict, "pid": int}. On standard error "item": int is the index
# of the item, where its chunk has no other one.
Sink = Callable[[dict[str, Any]], None]


@dataclass
class _Source:
    """A descriptor that is read: what of a line is there, and bytes since the last chunk."""

    kind: str
    pid: int
    item: Callable[[], int]
    pending: bytearray = field(default_factory=bytearray)
    size: int = 0

    def take(self, data: bytes) -> None:
        self.pending += data[: max(0, MAX_OUTPUT - self.size)]
        self.size += len(data)

    def end_chunk(self) -> int:
        """End the last line; return how many bytes were dropped."""
        if self.pending:
            self.pending += b"\n"
        dropped, self.size = max(0, self.size - MAX_OUTPUT), 0
        return dropped


class OutputReader:
    """Reads the output of all workers of a server, in one thread, and hands it to a sink.

    Others may read, too, with locks of their own; the sink, which may be anybody's, is called by
    `hand_on` only, one call at a time.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._noticed = False  # that it raises
        self._selector = selectors.DefaultSelector()
        self._lock = threading.RLock()
        self._sources: dict[int, _Source] = {}
        self._events: deque[dict[str, Any]] = deque()  # that the sink has not had yet
        self._handing = threading.RLock()
        self._wake_r, self._wake_w = os.pipe()
        self._selector.register(self._wake_r, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="worker-output", daemon=True)
        self._thread.start()

    def add(
        self, descriptor: int, kind: str, pid: int, item: Callable[[], int] = lambda: -1
    ) -> None:
        """Own and read a descriptor; `item` returns the index of the item that has it, or -1."""
        os.set_blocking(descriptor, False)
        with self._lock:
            self._sources[descriptor] = _Source(kind, pid, item)
            self._selector.register(descriptor, selectors.EVENT_READ)
        os.write(self._wake_w, b".")

    def remove(self, descriptor: int) -> None:
        """Stop reading a descriptor and close it."""
        with self._lock:
            if self._sources.pop(descriptor, None):
                with contextlib.suppress(KeyError):
                    self._selector.unregister(descriptor)
                os.close(descriptor)

    def read(self, descriptor: int) -> None:
        """Take what is there now, but for a last line that has no end yet."""
        with self._lock:
            source = self._sources.get(descriptor)
            if source is None:
                return
            for _ in range(256):  # bounded: a task that prints for ever must not keep us here
                try:
                    data = os.read(descriptor, 65536)
                except BlockingIOError:
                    break
                if not data:
                    with contextlib.suppress(KeyError):
                        self._selector.unregister(descriptor)
                    break
                source.take(data)
                self._pass_on(source)
        self._call_soon()

    def end_chunk(self, descriptors: Iterable[int]) -> None:
        """Take last lines that have no end; the next chunk may print as much as any."""
        with self._lock:
            found = map(self._sources.get, descriptors)
            if not (ended := [source for source in found if source is not None and source.size]):
                return
            for source in ended:
                dropped = source.end_chunk()
                self._pass_on(source)
                if dropped:
                    text = f"[{source.kind} of worker {source.pid}: {dropped} bytes more than the "
                    text += f"{MAX_OUTPUT} that a chunk may print were dropped]"
                    self._send({"kind": "stderr", "text": text, "pid": source.pid})
        self._call_soon()

    def hand_on(self) -> None:
        """Give the sink all that was taken so far."""
        while self._events:
            with self._handing:
                try:
                    event = self._events.popleft()
                except IndexError:  # another thread has given it
                    return
                try:
                    self._sink(event)
                except Exception:  # the user's handler, or an output that cannot show it
                    notice, self._noticed = not self._noticed, True
                    if notice:
                        text = "what worker %d printed or logged cannot be shown, in part at least"
                        logger.warning(text, event["pid"], exc_info=True)

    def is_inside(self) -> bool:
        """Return whether this is the thread that reads."""
        return threading.current_thread() is self._thread

    def _call_soon(self) -> None:
        """Have the thread call the sink, if this is another one."""
        if self._events and not self.is_inside():
            with contextlib.suppress(OSError):
                os.write(self._wake_w, b".")

    def close(self) -> None:
        """End the thread; the descriptors have been removed before."""
        self.hand_on()
        os.write(self._wake_w, b"q")
        if not self.is_inside():
            self._thread.join()
        os.close(self._wake_w)

    def _pass_on(self, source: _Source) -> None:
        *lines, rest = source.pending.split(b"\n")
        # a record of the log is of use as a whole only
        limit = MAX_OUTPUT if source.kind == "log" else MAX_LINE
        while len(rest) > limit:
            lines.append(rest[:limit])
            rest = rest[limit:]
        source.pending = rest
        for line in lines:
            if source.kind == "log":
                event = {"kind": "log", "record": line, "pid": source.pid}
            else:
                text = line.decode("utf-8", "backslashreplace")
                event = {"kind": source.kind, "text": text, "pid": source.pid}
                if source.kind == "stderr" and (index := source.item()) >= 0:
                    event["item"] = index
            self._send(event)

    def _send(self, event: dict[str, Any]) -> None:
        if event["kind"] == "log":
            try:
                event["record"] = json.loads(event["record"])
            except ValueError:  # what was dropped is told of at the end of the chunk
                return
        self._events.append(event)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fd != self._wake_r:
                    self.read(key.fd)
                elif b"q" in os.read(self._wake_r, 4096):
                    self._selector.close()
                    os.close(self._wake_r)
                    return
            self.hand_on()
